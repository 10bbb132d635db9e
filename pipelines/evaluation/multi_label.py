"""Multi-label AUROC: ties count one half, a label without both classes is undefined, never zero."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.evaluation.statistics import (
    Bootstrap,
    Floats,
    Interval,
    group_index,
    no_interval,
    percentile_interval,
    resample_counts,
    row_problem,
)

Bools = NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class LabelAuroc:
    """One label; `auroc` is None with a reason when it has no positives or no negatives."""

    name: str
    num_positive: int
    auroc: float | None
    reason: str | None


@dataclass(frozen=True, kw_only=True)
class MultiLabel:
    """AUROC per label and their mean over the defined ones."""

    labels: list[LabelAuroc]
    auroc_macro: float | None
    num_defined: int
    # Mean over rows = auroc_macro; None when no label is defined. See `auroc_row_values`.
    row_values: Floats | None  # [N]

    @property
    def reason(self) -> str | None:
        """Why the macro mean leaves labels out; None when it leaves none out."""
        if self.num_defined == len(self.labels):
            return None
        return f"{self.num_defined} of {len(self.labels)} labels have both positives and negatives"


def _placements(scores_N: Floats, is_positive_N: Bools) -> tuple[Floats, Floats]:
    """Share of negatives below each positive, and of positives above each negative; ties one half."""
    positive, negative = scores_N[is_positive_N], scores_N[~is_positive_N]
    sorted_neg, sorted_pos = np.sort(negative), np.sort(positive)
    below = np.searchsorted(sorted_neg, positive, "left") + np.searchsorted(sorted_neg, positive, "right")
    not_above = np.searchsorted(sorted_pos, negative, "left") + np.searchsorted(sorted_pos, negative, "right")
    return below / (2 * len(negative)), 1 - not_above / (2 * len(positive))


def auroc(scores_N: Floats, is_positive_N: Bools) -> float | None:
    """Area under the ROC curve of one label; None without positives or without negatives."""
    if is_positive_N.all() or not is_positive_N.any():
        return None
    return float(_placements(scores_N, is_positive_N)[0].mean())


def weighted_auroc(scores_N: Floats, is_positive_N: Bools, counts_NR: Floats) -> Floats:
    """AUROC of R resamples given as row counts, [R]; NaN where a resample lacks a class.

    One sort serves all resamples: in score order, a positive beats the negatives counted before its group
    of equal scores and half of those inside it.
    """
    order = np.argsort(scores_N, kind="stable")
    sorted_scores = scores_N[order]
    at = np.flatnonzero(is_positive_N[order])
    counts_NR = counts_NR[order]
    positives_PR = counts_NR[at]
    negatives_NR = counts_NR
    negatives_NR[at] = 0
    below_NR = np.zeros((len(order) + 1, counts_NR.shape[1]), dtype=counts_NR.dtype)
    np.cumsum(negatives_NR, axis=0, out=below_NR[1:])
    first = np.searchsorted(sorted_scores, sorted_scores[at], "left")
    last = np.searchsorted(sorted_scores, sorted_scores[at], "right")
    beaten_PR = (below_NR[first] + below_NR[last]) / 2
    pairs_R = positives_PR.sum(0, dtype=np.float64) * below_NR[-1]
    wins_R = np.einsum("pr,pr->r", positives_PR, beaten_PR, dtype=np.float64)
    found: Floats = np.divide(wins_R, pairs_R, out=np.full(len(pairs_R), np.nan), where=pairs_R > 0)
    return found


def score_labels(
    scores_NL: Floats, is_positive_NL: Bools, names: Sequence[str], *, is_known_NL: Bools | None = None
) -> MultiLabel:
    """AUROC of every label and their macro mean.

    Args:
        scores_NL: higher means present.
        is_positive_NL: truth.
        names: L label names.
        is_known_NL: where not, the row does not count for the label; None: the truth is known everywhere.

    Raises:
        ValueError: shapes that disagree, no rows, or scores that are not finite.
    """
    if scores_NL.shape != is_positive_NL.shape or scores_NL.shape[1] != len(names) or not len(scores_NL):
        raise ValueError(
            f"scores {list(scores_NL.shape)}, truth {list(is_positive_NL.shape)} "
            f"and {len(names)} names disagree"
        )
    if not np.isfinite(scores_NL).all():
        raise ValueError(
            f"{int((~np.isfinite(scores_NL)).any(1).sum())} rows have scores that are not finite"
        )
    labels = []
    for column, name in enumerate(names):
        known = _known(column, scores_NL, is_known_NL)
        truth = is_positive_NL[known, column]
        value = auroc(scores_NL[known, column], truth)
        missing = "positives" if not truth.any() else "negatives"
        labels.append(
            LabelAuroc(
                name=name,
                num_positive=int(truth.sum()),
                auroc=value,
                reason=f"no {missing} among {len(truth)} rows" if value is None else None,
            )
        )
    defined = [i for i, label in enumerate(labels) if label.auroc is not None]
    values = None
    if defined:
        known_NL = None if is_known_NL is None else is_known_NL[:, defined]
        values = auroc_row_values(scores_NL[:, defined], is_positive_NL[:, defined], is_known_NL=known_NL)
    return MultiLabel(
        labels=labels,
        auroc_macro=float(np.mean([labels[i].auroc for i in defined])) if defined else None,
        num_defined=len(defined),
        row_values=values,
    )


def _known(column: int, scores_NL: Floats, is_known_NL: Bools | None) -> Bools:
    """The rows that count for a label, [N]."""
    return np.ones(len(scores_NL), np.bool_) if is_known_NL is None else is_known_NL[:, column]


def auroc_row_values(scores_NL: Floats, is_positive_NL: Bools, *, is_known_NL: Bools | None = None) -> Floats:
    """Per-row values whose mean is the macro AUROC and whose spread is its sampling spread, [N].

    A positive row contributes how many negatives it beats and a negative row by how many positives it is
    beaten, relative to the AUROC (the placements of DeLong et al. 1988, each divided by the share of its
    class). With them the macro AUROC of two methods can be compared like any mean over rows. A row that does
    not count for a label has its AUROC there.
    """
    num_rows, num_labels = scores_NL.shape
    values: Floats = np.zeros(num_rows)
    for column in range(num_labels):
        known = _known(column, scores_NL, is_known_NL)
        of_positive, of_negative = _placements(scores_NL[known, column], is_positive_NL[known, column])
        area = of_positive.mean()
        values += area
        for at, found in (
            (known & is_positive_NL[:, column], of_positive),
            (known & ~is_positive_NL[:, column], of_negative),
        ):
            values[at] += (found - area) / at.mean()
    return np.asarray(values / num_labels)


def auroc_intervals(
    scores_NL: Floats,
    is_positive_NL: Bools,
    found: MultiLabel,
    bootstrap: Bootstrap,
    *,
    group_ids: Sequence[str | None] | None = None,
    is_known_NL: Bools | None = None,
) -> tuple[dict[str, Interval], Interval | None]:
    """Bootstrap intervals: per defined label by name, and of the macro mean (None when undefined).

    A resample that lacks a class for a label is skipped for that label, and its macro mean is over the
    labels it does define. A label whose positives (or negatives) all come from one row or group gets no
    interval: resampling would only repeat that one.
    """
    defined = [i for i, label in enumerate(found.labels) if label.auroc is not None]
    if not defined or found.auroc_macro is None:
        return {}, None
    possible, note = row_problem(len(scores_NL), group_ids)
    if not possible:
        nothing = no_interval(found.auroc_macro, str(note), bootstrap)
        return {found.labels[i].name: nothing for i in defined}, nothing
    replicates_LR = auroc_replicates(
        scores_NL[:, defined],
        is_positive_NL[:, defined],
        bootstrap,
        group_ids=group_ids,
        is_known_NL=None if is_known_NL is None else is_known_NL[:, defined],
    )
    groups = group_index(group_ids, len(scores_NL))
    per_label = {}
    for row, i in zip(replicates_LR, defined, strict=True):
        label, known = found.labels[i], _known(i, scores_NL, is_known_NL)
        point = float(label.auroc or 0.0)
        lonely = _lonely_class(is_positive_NL[:, i], known, groups)
        per_label[label.name] = (
            no_interval(point, lonely, bootstrap)
            if lonely
            else percentile_interval(point, row, bootstrap, note=note)
        )
    notes = "; ".join(text for text in (found.reason, note) if text)
    macro = percentile_interval(
        found.auroc_macro, macro_replicates(replicates_LR), bootstrap, note=notes or None
    )
    return per_label, macro


def auroc_replicates(
    scores_NL: Floats,
    is_positive_NL: Bools,
    bootstrap: Bootstrap,
    *,
    group_ids: Sequence[str | None] | None = None,
    is_known_NL: Bools | None = None,
) -> Floats:
    """AUROC of each label in each resample, [L, R]; NaN where undefined."""
    blocks = []
    known_LN = [_known(i, scores_NL, is_known_NL) for i in range(scores_NL.shape[1])]
    for counts_NR in resample_counts(len(scores_NL), bootstrap, group_ids=group_ids):
        found = [
            weighted_auroc(scores_NL[known, i], is_positive_NL[known, i], counts_NR[known])
            for i, known in enumerate(known_LN)
        ]
        blocks.append(np.stack(found))
    return np.concatenate(blocks, axis=1)


def macro_replicates(replicates_LR: Floats) -> Floats:
    """Mean over the labels each resample defines, [R]; NaN where it defines none."""
    is_defined = np.isfinite(replicates_LR)
    counts = is_defined.sum(0)
    totals = np.where(is_defined, replicates_LR, 0.0).sum(0)
    found: Floats = np.divide(totals, counts, out=np.full(len(counts), np.nan), where=counts > 0)
    return found


def _lonely_class(is_positive_N: Bools, is_known_N: Bools, groups: NDArray[np.int64] | None) -> str | None:
    for truth, kind in (
        (is_positive_N & is_known_N, "positives"),
        (~is_positive_N & is_known_N, "negatives"),
    ):
        num_units = int(truth.sum()) if groups is None else len(np.unique(groups[truth]))
        if num_units < 2:
            return f"all {kind} come from one {'row' if groups is None else 'group'}"
    return None


def describe_labels(found: MultiLabel, intervals: dict[str, Interval]) -> list[dict[str, Any]]:
    """One entry per label for the results store."""
    rows = []
    for label in found.labels:
        interval = intervals.get(label.name)
        entry: dict[str, Any] = {
            "name": label.name,
            "n_pos": label.num_positive,
            "auroc": label.auroc,
            "low": interval.low if interval else None,
            "high": interval.high if interval else None,
        }
        reason = label.reason or (interval.note if interval else None)
        rows.append(entry if reason is None else {**entry, "reason": reason})
    return rows
