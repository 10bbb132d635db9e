"""Few-shot classification without a model: which training rows are shown, and the result of the scores."""

# S shots, N rows of a split, C classes

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.evaluation.classification import classify, describe_classes
from pipelines.evaluation.statistics import Bootstrap, Floats, Interval, bootstrap_means
from pipelines.evaluation.task_result import FEW_SHOT, with_main_metric
from pipelines.evaluation.zero_shot_tasks import ClassificationTask
from pipelines.keyed_random import text_key

_MAX_LISTED = 8


@dataclass(frozen=True, kw_only=True)
class Shots:
    """Training rows to fit on, in an order of their own.

    Attributes:
        at: where they stand in the training split, int64 [S].
        labels: class of each, int64 [S].
        num_per_class: how many each class got, int64 [C]; fewer than asked when it has no more.
        asked: wanted per class.
    """

    at: NDArray[np.int64]
    labels: NDArray[np.int64]
    num_per_class: NDArray[np.int64]
    asked: int


@dataclass(frozen=True, kw_only=True)
class FewShotScores:
    """Scores of the same rows and classes, [N, C], by how the class embeddings were made."""

    fitted: Floats
    # Fitted without the counterfactual term.
    no_counterfactual: Floats
    zero_shot: Floats


def choose_shots(
    row_ids: Sequence[str],
    row_classes: Sequence[str | None],
    *,
    classes: Sequence[str],
    num_shots: int,
    seed: int,
) -> Shots:
    """The `num_shots` rows of each class whose hash of (seed, row id) is lowest, ordered by it.

    Neither the order of the rows nor those of other classes matter, and more shots contain the fewer.

    Args:
        row_ids: of the training split.
        row_classes: class of each row, None where it has none or several.

    Raises:
        ValueError: fewer than two classes, or a class without a row.
    """
    if len(classes) < 2:
        raise ValueError(
            f"evaluation.shots={num_shots} needs rows of at least 2 classes, this data has {len(classes)}: "
            "data.columns.class_name names the column that holds a row's class; set evaluation.shots=0"
        )
    number = {name: i for i, name in enumerate(classes)}
    by_class: list[list[tuple[int, int]]] = [[] for _ in classes]
    for row, (row_id, name) in enumerate(zip(row_ids, row_classes, strict=True)):
        if name is not None:
            by_class[number[name]].append((text_key(f"shot {seed} {row_id}"), row))
    if absent := [name for name, found in zip(classes, by_class, strict=True) if not found]:
        raise ValueError(
            f"evaluation.shots={num_shots} needs a training row of every class, {len(absent)} of "
            f"{len(classes)} have none: {_listed(absent)}; set evaluation.shots=0"
        )
    taken = [sorted(found)[:num_shots] for found in by_class]
    ordered = sorted((key, row, label) for label, found in enumerate(taken) for key, row in found)
    return Shots(
        at=np.array([row for _, row, _ in ordered], dtype=np.int64),
        labels=np.array([label for *_, label in ordered], dtype=np.int64),
        num_per_class=np.array([len(found) for found in taken], dtype=np.int64),
        asked=num_shots,
    )


def short_classes(shots: Shots, classes: Sequence[str]) -> str | None:
    """Which classes got fewer shots than asked; None when all got theirs."""
    short = [f"{name} {n}" for name, n in zip(classes, shots.num_per_class, strict=True) if n < shots.asked]
    if not short:
        return None
    return (
        f"evaluation.shots={shots.asked}, but {len(short)} classes have fewer training rows: {_listed(short)}"
    )


def few_shot_fields(
    task: ClassificationTask, scores: FewShotScores, shots: Shots, bootstrap: Bootstrap | None
) -> dict[str, Any]:
    """Fields of a `TaskResult` but task, source, prompts_sha and seconds.

    Args:
        task: rows, classes and targets of one source.
        scores: of the task's rows.
    """
    found = classify(scores.fitted, task.target)
    values: dict[str, Floats] = {
        "acc1": found.is_top1.astype(np.float64),
        "mean_per_class_recall": found.recall_values,
        "acc1_no_counterfactual": _hits(scores.no_counterfactual, task),
        "acc1_zero_shot": _hits(scores.zero_shot, task),
    }
    intervals: dict[str, Interval] = {}
    if bootstrap is not None:
        intervals = dict(
            zip(
                values,
                bootstrap_means(
                    np.stack(list(values.values())),
                    bootstrap,
                    group_ids=task.rows.group_ids,
                    bounds=(0.0, 1.0),
                ),
                strict=True,
            )
        )
    metrics: dict[str, float | None] = {
        **{name: float(rows.mean()) for name, rows in values.items()},
        "mean_per_class_recall": found.mean_per_class_recall,
        "num_shots": float(shots.asked),
        "num_short_classes": float((shots.num_per_class < shots.asked).sum()),
        "chance": 1 / len(task.class_names),
    }
    labels = describe_classes(found, task.class_names)
    return {
        "n": len(task.rows.row_ids),
        "row_ids": task.rows.row_ids,
        "group_ids": task.rows.group_ids,
        "row_values": values,
        **with_main_metric(FEW_SHOT, metrics, intervals, {}),
        "labels": [
            {**label, "num_shots": int(n)} for label, n in zip(labels, shots.num_per_class, strict=True)
        ],
    }


def _hits(scores_NC: Floats, task: ClassificationTask) -> Floats:
    return classify(scores_NC, task.target).is_top1.astype(np.float64)


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MAX_LISTED} more" if len(names) > _MAX_LISTED else ""
    return ", ".join(names[:_MAX_LISTED]) + more
