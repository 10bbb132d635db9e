"""Intervals and paired tests: percentile bootstrap over rows, Student t over training seeds.

Every draw comes from a generator seeded by the caller, so two metrics, or two methods, asked with the
same seed on the same rows see the same resamples; the paired tests rest on that.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating[Any]]

# Counts held at once: 2**23 float32 are 32 MB, whatever the number of rows.
_BLOCK_ELEMENTS = 2**23
_FEW_GROUPS = 10


@dataclass(frozen=True, kw_only=True)
class Bootstrap:
    """How intervals are made.

    Raises:
        ValueError: a confidence outside (0, 1), or too few resamples to reach the tails.
    """

    resamples: int = 1000
    confidence: float = 0.95
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.confidence < 1:
            raise ValueError(f"confidence must be between 0 and 1, got {self.confidence}")
        needed = int(np.ceil(2 / (1 - self.confidence) - 1e-9))
        if self.resamples < needed:
            raise ValueError(
                f"a {self.confidence:.0%} interval needs at least {needed} resamples, got {self.resamples}"
            )


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A point estimate with its interval; `low` and `high` are None when there is none.

    `note` says why there is no interval, or what the interval leaves out.
    """

    point: float
    low: float | None
    high: float | None
    level: float
    resamples: int
    seed: int
    note: str | None = None

    def to_json(self) -> dict[str, Any]:
        """The form in which results are stored."""
        found: dict[str, Any] = {
            "low": self.low,
            "high": self.high,
            "level": self.level,
            "method": "bootstrap",
            "resamples": self.resamples,
            "seed": self.seed,
        }
        return found if self.note is None else {**found, "note": self.note}


@dataclass(frozen=True, kw_only=True)
class PairedTest:
    """Mean of a minus mean of b on the same rows and seeds; `p_value` is two-sided."""

    difference: float
    low: float | None
    high: float | None
    p_value: float | None
    level: float
    num_rows: int
    num_seeds: int
    note: str | None = None


def group_index(group_ids: Sequence[str | None] | None, num_rows: int) -> NDArray[np.int64] | None:
    """Rows to group numbers, or None when every row is its own group.

    A row without a group id is a group of its own.

    Raises:
        ValueError: the number of ids differs from the number of rows.
    """
    if group_ids is None or all(group is None for group in group_ids):
        return None
    if len(group_ids) != num_rows:
        raise ValueError(f"{num_rows} rows need {num_rows} group ids, got {len(group_ids)}")
    numbers: dict[tuple[bool, str | int], int] = {}
    keys = [(True, i) if group is None else (False, group) for i, group in enumerate(group_ids)]
    index = np.array([numbers.setdefault(key, len(numbers)) for key in keys], dtype=np.int64)
    return None if len(numbers) == num_rows else index


def resample_counts(
    num_rows: int, bootstrap: Bootstrap, *, group_ids: Sequence[str | None] | None = None
) -> Iterator[NDArray[np.float32]]:
    """How often each row occurs in each resample, in blocks [num_rows, r] that add up to all resamples.

    With group ids whole groups are drawn, as many as there are (rows of one patient are not independent).
    """
    groups = group_index(group_ids, num_rows)
    num_units = num_rows if groups is None else int(groups.max()) + 1
    generator = np.random.default_rng(bootstrap.seed)
    block = max(1, _BLOCK_ELEMENTS // max(num_rows, num_units))
    for start in range(0, bootstrap.resamples, block):
        size = min(block, bootstrap.resamples - start)
        drawn = generator.integers(0, num_units, size=(size, num_units))
        drawn += np.arange(size)[:, None] * num_units
        counts = np.bincount(drawn.ravel(), minlength=size * num_units).reshape(size, num_units)
        by_unit = np.ascontiguousarray(counts.T, dtype=np.float32)
        yield by_unit if groups is None else by_unit[groups]


def percentile_interval(
    point: float, replicates: Floats, bootstrap: Bootstrap, *, note: str | None = None
) -> Interval:
    """Percentile interval of the finite replicates; resamples where the metric is undefined are skipped."""
    finite = replicates[np.isfinite(replicates)]
    low = high = None
    if finite.size == 0:
        note = "the metric is undefined in every resample"
    else:
        tail = (1 - bootstrap.confidence) / 2
        low, high = (float(x) for x in np.quantile(finite, [tail, 1 - tail]))
    return Interval(
        point=point,
        low=low,
        high=high,
        level=bootstrap.confidence,
        resamples=int(finite.size),
        seed=bootstrap.seed,
        note=note,
    )


def no_interval(point: float, reason: str, bootstrap: Bootstrap) -> Interval:
    """A point estimate that cannot have an interval, and why."""
    return Interval(
        point=point,
        low=None,
        high=None,
        level=bootstrap.confidence,
        resamples=0,
        seed=bootstrap.seed,
        note=reason,
    )


def edge_interval(
    values: Floats, num_units: int, bounds: tuple[float, float] | None, bootstrap: Bootstrap
) -> Interval | None:
    """Interval of values that all lie at one end of their range; None when they do not.

    Every resample repeats that end, so the percentile interval has no width however few the rows. The
    exact binomial bound for n of n (Clopper and Pearson 1934) says what n rows can show.
    """
    end = float(values.flat[0])
    if bounds is None or end not in bounds or (values != end).any():
        return None
    missed = (bounds[1] - bounds[0]) * (1 - ((1 - bootstrap.confidence) / 2) ** (1 / num_units))
    return Interval(
        point=end,
        low=end if end == bounds[0] else end - missed,
        high=end if end == bounds[1] else end + missed,
        level=bootstrap.confidence,
        resamples=0,
        seed=bootstrap.seed,
        note=f"all {num_units} values are {end:g}; the other bound is the exact binomial one",
    )


def count_units(num_rows: int, group_ids: Sequence[str | None] | None) -> int:
    """How many rows, or groups of rows, are resampled."""
    groups = group_index(group_ids, num_rows)
    return num_rows if groups is None else int(groups.max()) + 1


def row_problem(num_rows: int, group_ids: Sequence[str | None] | None) -> tuple[bool, str | None]:
    """Whether rows can be resampled, and what to say about it."""
    num_units = count_units(num_rows, group_ids)
    is_grouped = num_units < num_rows
    if num_units < 2:
        unit = "group" if is_grouped else "row"
        return False, f"resampling needs at least 2 {unit}s, found {num_units}"
    if is_grouped and num_units < _FEW_GROUPS:
        return True, f"only {num_units} groups were resampled; the interval is rough"
    return True, None


def mean_replicates(
    values_MN: Floats, bootstrap: Bootstrap, *, group_ids: Sequence[str | None] | None = None
) -> Floats:
    """Mean over rows of each of M metrics in each resample, [M, R]."""
    values = np.asarray(values_MN, dtype=np.float64)
    blocks = [
        (values @ counts) / counts.sum(0)
        for counts in resample_counts(values.shape[1], bootstrap, group_ids=group_ids)
    ]
    return np.concatenate(blocks, axis=1)


def bootstrap_means(
    values_MN: Floats,
    bootstrap: Bootstrap,
    *,
    group_ids: Sequence[str | None] | None = None,
    bounds: tuple[float, float] | None = None,
) -> list[Interval]:
    """Percentile intervals of the row means of M metrics on the same N rows.

    Args:
        values_MN: per-row values, finite, [M, N].
        group_ids: N ids; whole groups are resampled.
        bounds: range of the values; values that all lie at one end get the exact binomial bound.

    Returns:
        M intervals; empty ones with a note when there are fewer than two rows or groups.

    Raises:
        ValueError: not two axes, no rows, or values that are not finite.
    """
    values = checked_values(values_MN)
    points = [float(x) for x in values.mean(1)]
    possible, note = row_problem(values.shape[1], group_ids)
    if not possible:
        return [no_interval(point, str(note), bootstrap) for point in points]
    replicates = mean_replicates(values, bootstrap, group_ids=group_ids)
    num_units = count_units(values.shape[1], group_ids)
    return [
        edge_interval(own, num_units, bounds, bootstrap)
        or percentile_interval(point, row, bootstrap, note=note)
        for point, own, row in zip(points, values, replicates, strict=True)
    ]


def checked_values(values: Floats) -> NDArray[np.float64]:
    found = np.asarray(values, dtype=np.float64)
    if found.ndim != 2 or found.size == 0:
        raise ValueError(f"values must be a non-empty table of two axes, got shape {list(found.shape)}")
    if not np.isfinite(found).all():
        raise ValueError(f"{int((~np.isfinite(found)).sum())} of {found.size} per-row values are not finite")
    return found
