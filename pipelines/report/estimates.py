"""From the results of one method's seeds to one number with its interval, and a paired test of two."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.evaluation.seeds import bootstrap_seeds, paired_bootstrap, seeds_interval
from pipelines.evaluation.statistics import Bootstrap, Interval
from pipelines.results import Json, Store

_FROM_ROWS = "bootstrap over rows, Student t over seeds"
_FROM_CI = "each seed's own interval taken as normal, Student t over seeds"
_UNIT_RANGE = (0.0, 1.0)


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Mean over seeds with its interval; `reason` says why a value is None, `how` what the interval is."""

    value: float | None
    low: float | None = None
    high: float | None = None
    level: float | None = None
    how: str | None = None
    reason: str | None = None


@dataclass(frozen=True, kw_only=True)
class RowMatrix:
    """Per-row values of one metric, [S, N]: `values[s, n]` is row `row_ids[n]` under seed `seeds[s]`."""

    seeds: list[int]
    row_ids: list[str]
    group_ids: list[str | None] | None
    values: NDArray[np.float64]


def estimate_metric(
    results: Sequence[Json], metric: str, *, bootstrap: Bootstrap, rows: RowMatrix | None = None
) -> Estimate:
    """One metric over the seeds of one method.

    Args:
        results: one result per seed, all of the same data, task and keep rule.
        rows: per-row values of all these seeds where the metric has them.
    """
    values = [result["metrics"].get(metric) for result in results]
    undefined = [result for result, value in zip(results, values, strict=True) if value is None]
    if undefined or not values:
        return Estimate(value=None, reason=_reason(undefined, metric, num_seeds=len(values)))
    points_S = np.array(values, dtype=np.float64)
    bounds = _UNIT_RANGE if ((points_S >= 0) & (points_S <= 1)).all() else None
    if rows is not None:
        found = bootstrap_seeds(rows.values, bootstrap, group_ids=rows.group_ids, bounds=bounds)
        how = _FROM_ROWS
    else:
        replicates_SR = _replicates_from_ci(results, metric, points_S, bootstrap)
        if replicates_SR is None:
            return Estimate(value=float(points_S.mean()), how="the results carry no interval for this metric")
        found, how = seeds_interval(points_S, replicates_SR, bootstrap, bounds=bounds), _FROM_CI
    return _from_interval(float(points_S.mean()), found, how)


def row_matrix(store: Store, results: Sequence[Json], metric: str) -> RowMatrix | None:
    """Per-row values of a metric under every seed, on the rows all seeds have.

    None when a seed has none, or when they do not average to the metric (which then is no mean of rows).
    """
    columns: list[dict[str, float]] = []
    groups: dict[str, str | None] = {}
    for result in results:
        table = store.row_values(result)
        rows = [] if table is None else [row for row in table.to_pylist() if row["metric"] == metric]
        if not rows:
            return None
        columns.append({row["row_id"]: row["value"] for row in rows})
        groups |= {row["row_id"]: row.get("group_id") for row in rows}
    common = set(columns[0]).intersection(*columns[1:]) if columns else set()
    row_ids = sorted(common)
    values = np.array([[column[row_id] for row_id in row_ids] for column in columns])
    reported = [result["metrics"].get(metric) for result in results]
    if not row_ids or None in reported or not np.allclose(values.mean(1), reported, rtol=0, atol=1e-6):
        return None
    return RowMatrix(
        seeds=[result["clipfleet"]["seed"] for result in results],
        row_ids=row_ids,
        group_ids=[groups[row_id] for row_id in row_ids] if any(groups.values()) else None,
        values=values,
    )


def paired_p(a: RowMatrix | None, b: RowMatrix | None, bootstrap: Bootstrap) -> tuple[float | None, str]:
    """Two-sided p-value of "a and b are equal" on the seeds and rows both have, and what it rests on."""
    if a is None or b is None:
        return None, "the metric is no mean of stored per-row values"
    seeds = sorted(set(a.seeds) & set(b.seeds))
    row_ids = sorted(set(a.row_ids) & set(b.row_ids))
    if not seeds or not row_ids:
        return None, "no common seeds" if row_ids else "no common rows"
    groups = None
    if a.group_ids is not None:
        by_row = dict(zip(a.row_ids, a.group_ids, strict=True))
        groups = [by_row[row_id] for row_id in row_ids]
    test = paired_bootstrap(_part(a, seeds, row_ids), _part(b, seeds, row_ids), bootstrap, group_ids=groups)
    note = (
        f"paired bootstrap, {test.num_seeds} seeds, {test.num_rows} rows, not adjusted for many comparisons"
    )
    return test.p_value, note if test.note is None else f"{note}; {test.note}"


def _part(matrix: RowMatrix, seeds: Sequence[int], row_ids: Sequence[str]) -> NDArray[np.float64]:
    row_of = {row_id: index for index, row_id in enumerate(matrix.row_ids)}
    rows = [matrix.seeds.index(seed) for seed in seeds]
    return matrix.values[np.ix_(rows, [row_of[row_id] for row_id in row_ids])]


def _replicates_from_ci(
    results: Sequence[Json], metric: str, points_S: NDArray[np.float64], bootstrap: Bootstrap
) -> NDArray[np.float64] | None:
    """Row resamples as each seed's interval implies them; one draw for all seeds, whose rows are the same."""
    errors = []
    for result in results:
        ci: dict[str, Any] = (result["clipfleet"].get("ci") or {}).get(metric) or {}
        if ci.get("low") is None or ci.get("high") is None:
            return None
        width = 2 * NormalDist().inv_cdf(0.5 + ci.get("level", bootstrap.confidence) / 2)
        errors.append((ci["high"] - ci["low"]) / width)
    draws_R = np.random.default_rng(bootstrap.seed).standard_normal(bootstrap.resamples)
    return points_S[:, None] + np.array(errors)[:, None] * draws_R


def _from_interval(value: float, found: Interval, how: str) -> Estimate:
    notes = how if found.note is None else f"{how}; {found.note}"
    return Estimate(value=value, low=found.low, high=found.high, level=found.level, how=notes)


def _reason(undefined: Sequence[Json], metric: str, *, num_seeds: int) -> str:
    if not num_seeds:
        return "no finished final run"
    reasons = [(result["clipfleet"].get("undefined") or {}) for result in undefined]
    texts = dict.fromkeys(
        r.get(metric) or "; ".join(dict.fromkeys(r.values())) or "not reported" for r in reasons
    )
    share = "" if len(undefined) == num_seeds else f"undefined for {len(undefined)} of {num_seeds} seeds: "
    return share + "; ".join(texts)
