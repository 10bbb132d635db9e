"""Intervals and paired tests over training seeds and test rows together: what a leaderboard shows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pipelines.evaluation.statistics import (
    Bootstrap,
    Floats,
    Interval,
    PairedTest,
    checked_values,
    count_units,
    edge_interval,
    mean_replicates,
    no_interval,
    percentile_interval,
    row_problem,
)

ONE_SEED = "one seed: the interval covers the test rows, not the spread between trainings"


def combine_seeds(points_S: Floats, replicates_SR: Floats, bootstrap: Bootstrap) -> Floats:
    """Replicates of the mean over seeds: rows resampled, seeds drawn from Student's t with S - 1 degrees.

    Drawing S seeds from S with replacement, as a two-level bootstrap would, covers the true mean in
    84 % of experiments instead of 95 % at S = 3 (and 82 % at S = 2) when seeds differ more than rows
    do; this covers 96 % and 98 %. The price is that two seeds give a very wide interval, which is what
    two seeds are worth.

    Args:
        points_S: the metric of each seed on all rows.
        replicates_SR: the metric of each seed in each row resample; the same resample for every seed.
    """
    rows_R: Floats = replicates_SR.mean(0)
    num_seeds = len(points_S)
    if num_seeds < 2:
        return rows_R
    # A stream of its own, so that adding a seed does not change which rows are drawn.
    generator = np.random.default_rng([bootstrap.seed, 1])
    error = float(np.std(points_S, ddof=1)) / np.sqrt(num_seeds)
    seeds_R: Floats = error * generator.standard_t(num_seeds - 1, size=len(rows_R))
    return rows_R + seeds_R


def seeds_interval(
    points_S: Floats,
    replicates_SR: Floats,
    bootstrap: Bootstrap,
    *,
    bounds: tuple[float, float] | None = None,
    note: str | None = None,
) -> Interval:
    """Interval of any metric over seeds and rows, from its values per seed and row resample.

    Args:
        bounds: range of the metric; the interval is cut there.
    """
    replicates = combine_seeds(points_S, replicates_SR, bootstrap)
    if bounds is not None:
        replicates = np.clip(replicates, *bounds)
    notes = [text for text in (note, ONE_SEED if len(points_S) < 2 else None) if text]
    return percentile_interval(float(np.mean(points_S)), replicates, bootstrap, note="; ".join(notes) or None)


def bootstrap_seeds(
    values_SN: Floats,
    bootstrap: Bootstrap,
    *,
    group_ids: Sequence[str | None] | None = None,
    bounds: tuple[float, float] | None = None,
) -> Interval:
    """Interval of the mean over S seeds and N rows, [S, N] per-row values of the same rows.

    With one seed it covers the rows only and says so; with fewer than two rows there is none. Values
    that all lie at one end of `bounds` get the exact binomial bound.

    Raises:
        ValueError: not two axes, empty, or values that are not finite.
    """
    values = checked_values(values_SN)
    possible, note = row_problem(values.shape[1], group_ids)
    if not possible:
        return no_interval(float(values.mean()), str(note), bootstrap)
    num_units = count_units(values.shape[1], group_ids)
    if edge := edge_interval(values, num_units, bounds, bootstrap):
        return edge
    replicates = mean_replicates(values, bootstrap, group_ids=group_ids)
    return seeds_interval(values.mean(1), replicates, bootstrap, bounds=bounds, note=note)


def paired_bootstrap(
    a_SN: Floats, b_SN: Floats, bootstrap: Bootstrap, *, group_ids: Sequence[str | None] | None = None
) -> PairedTest:
    """Is method a better than method b on the same seeds and rows?

    The p-value inverts the interval: twice the smaller share of resampled differences on the other side
    of zero (ties count on both), never below 2 / (resamples + 1), at most 1.

    Args:
        a_SN, b_SN: per-row values, [S, N]; column j is the same row in both, row s the same seed.

    Raises:
        ValueError: shapes that differ, empty, or values that are not finite.
    """
    a, b = checked_values(a_SN), checked_values(b_SN)
    if a.shape != b.shape:
        raise ValueError(
            "a paired test needs the same seeds and rows from both methods, "
            f"got {list(a.shape)} and {list(b.shape)} (seeds, rows)"
        )
    differences = a - b
    found = bootstrap_seeds(differences, bootstrap, group_ids=group_ids)
    p_value = None
    if found.low is not None:
        replicates = combine_seeds(
            differences.mean(1), mean_replicates(differences, bootstrap, group_ids=group_ids), bootstrap
        )
        p_value = two_sided_p(replicates)
    return PairedTest(
        difference=found.point,
        low=found.low,
        high=found.high,
        p_value=p_value,
        level=bootstrap.confidence,
        num_rows=a.shape[1],
        num_seeds=a.shape[0],
        note=found.note,
    )


def two_sided_p(replicates_R: Floats) -> float:
    """Two-sided p-value of "the difference is zero" from its resampled values."""
    below, above = int((replicates_R <= 0).sum()), int((replicates_R >= 0).sum())
    return min(1.0, 2 * (min(below, above) + 1) / (len(replicates_R) + 1))
