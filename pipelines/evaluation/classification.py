"""Single-label zero-shot classification: top-1, top-5 and recall per class."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.evaluation.statistics import Floats

# With five classes or fewer every answer is among the top five.
MIN_CLASSES_FOR_TOP5 = 6


@dataclass(frozen=True, kw_only=True)
class Classification:
    """Hits per row and recall per class; a class without rows has recall None."""

    is_top1: NDArray[np.bool_]  # [N]
    is_top5: NDArray[np.bool_] | None  # [N]
    class_recall: list[float | None]
    class_rows: list[int]
    mean_per_class_recall: float
    # Mean over rows = mean_per_class_recall; see `recall_row_values`.
    recall_values: Floats  # [N]


def target_ranks(scores_NC: Floats, target_N: NDArray[np.int64]) -> NDArray[np.int64]:
    """How many classes stand before the right one, [N]; 0 is a top-1 hit.

    Equal scores stand in class order, as in an argmax, so the result is the same on every machine.

    Raises:
        ValueError: scores that are not finite, or targets outside the classes.
    """
    num_classes = scores_NC.shape[1]
    if not np.isfinite(scores_NC).all():
        raise ValueError(
            f"{int((~np.isfinite(scores_NC)).any(1).sum())} rows have scores that are not finite"
        )
    if target_N.size and (target_N.min() < 0 or target_N.max() >= num_classes):
        raise ValueError(f"targets must be in 0..{num_classes - 1}, got {target_N.min()}..{target_N.max()}")
    own_N1 = np.take_along_axis(scores_NC, target_N[:, None], axis=1)
    is_earlier_NC = np.arange(num_classes)[None, :] < target_N[:, None]
    is_before_NC = (scores_NC > own_N1) | ((scores_NC == own_N1) & is_earlier_NC)
    ranks: NDArray[np.int64] = is_before_NC.sum(1)
    return ranks


def classify(scores_NC: Floats, target_N: NDArray[np.int64]) -> Classification:
    """Top-1, top-5 and recall per class.

    Args:
        scores_NC: one score per row and class.
        target_N: the right class of each row.

    Returns:
        `is_top5` is None with fewer than six classes; the mean per-class recall is over classes with rows.

    Raises:
        ValueError: no rows, scores that are not finite, or targets outside the classes.
    """
    if len(target_N) == 0:
        raise ValueError("classification needs at least one row")
    ranks = target_ranks(scores_NC, target_N)
    num_classes = scores_NC.shape[1]
    is_hit = ranks == 0
    rows_C = np.bincount(target_N, minlength=num_classes)
    hits_C = np.bincount(target_N, weights=is_hit, minlength=num_classes)
    recall_C = [float(h / n) if n else None for h, n in zip(hits_C, rows_C, strict=True)]
    defined = [recall for recall in recall_C if recall is not None]
    return Classification(
        is_top1=is_hit,
        is_top5=ranks < 5 if num_classes >= MIN_CLASSES_FOR_TOP5 else None,
        class_recall=recall_C,
        class_rows=[int(n) for n in rows_C],
        mean_per_class_recall=float(np.mean(defined)),
        recall_values=recall_row_values(is_hit, target_N),
    )


def recall_row_values(is_hit_N: NDArray[np.bool_], target_N: NDArray[np.int64]) -> Floats:
    """Per-row values whose mean is the mean per-class recall and whose spread is its sampling spread.

    The first-order (jackknife) expansion: a row moves its own class's recall by (hit - recall) / n of the
    class. It lets intervals and paired tests treat the metric as a mean over rows.
    """
    rows_C = np.bincount(target_N)
    recall_C = np.bincount(target_N, weights=is_hit_N) / np.maximum(rows_C, 1)
    num_present = int((rows_C > 0).sum())
    mean = recall_C.sum() / num_present
    weight_N = len(target_N) / (num_present * rows_C[target_N])
    values: Floats = mean + weight_N * (is_hit_N - recall_C[target_N])
    return values


def describe_classes(found: Classification, class_names: list[str]) -> list[dict[str, Any]]:
    """One entry per class for the results store."""
    rows = []
    for name, n, recall in zip(class_names, found.class_rows, found.class_recall, strict=True):
        entry: dict[str, Any] = {"name": name, "n": n, "recall": recall}
        if recall is None:
            entry["reason"] = "no row of this class"
        rows.append(entry)
    return rows
