"""Bootstrap intervals over rows and seeds, and the paired test."""

from __future__ import annotations

import numpy as np
import pytest

from pipelines.evaluation import statistics
from pipelines.evaluation.seeds import ONE_SEED, bootstrap_seeds, paired_bootstrap, two_sided_p
from pipelines.evaluation.statistics import (
    Bootstrap,
    bootstrap_means,
    group_index,
    mean_replicates,
    percentile_interval,
    resample_counts,
)
from tests.oracles.evaluation import loop_percentile

FEW = Bootstrap(resamples=200)


def hits(num_rows: int = 300, share: float = 0.7, seed: int = 0, num_seeds: int = 1) -> np.ndarray:
    return (np.random.default_rng(seed).random((num_seeds, num_rows)) < share).astype(float)


def test_interval_equals_the_loop_over_the_resampled_rows():
    values = np.random.default_rng(1).normal(size=(2, 12))
    counts = np.concatenate(list(resample_counts(12, FEW)), axis=1)
    assert counts.sum(0).tolist() == [12.0] * 200
    for row, found in zip(values, bootstrap_means(values, FEW), strict=True):
        means = []
        for resample in range(200):
            drawn = [v for v, n in zip(row, counts[:, resample], strict=True) for _ in range(int(n))]
            means.append(sum(drawn) / len(drawn))
        assert found.point == pytest.approx(row.mean())
        assert found.low == pytest.approx(loop_percentile(means, 0.025), abs=1e-12)
        assert found.high == pytest.approx(loop_percentile(means, 0.975), abs=1e-12)
        assert found.low != pytest.approx(loop_percentile(means, 0.05), abs=1e-6)


def test_same_seed_same_interval_other_seed_another():
    values = hits()
    again = bootstrap_means(values, Bootstrap(seed=3))[0]
    assert bootstrap_means(values, Bootstrap(seed=3))[0] == again
    assert bootstrap_means(values, Bootstrap(seed=4))[0].low != again.low


def test_blocks_of_resamples_do_not_change_the_draws(monkeypatch):
    expected = np.concatenate(list(resample_counts(20, FEW)), axis=1)
    monkeypatch.setattr(statistics, "_BLOCK_ELEMENTS", 20 * 7)
    blocks = list(resample_counts(20, FEW))
    assert len(blocks) == 29
    assert np.array_equal(np.concatenate(blocks, axis=1), expected)


def test_interval_contains_the_point_and_widens_with_confidence():
    widths = []
    for confidence in (0.5, 0.8, 0.95, 0.99):
        found = bootstrap_means(hits(), Bootstrap(confidence=confidence))[0]
        assert found.low <= found.point <= found.high
        widths.append(found.high - found.low)
    assert widths == sorted(widths)
    assert widths[0] < widths[-1]


def test_more_rows_narrow_the_interval():
    few, many = (bootstrap_means(hits(n), Bootstrap())[0] for n in (50, 2000))
    assert many.high - many.low < 0.25 * (few.high - few.low)


def test_rows_are_covered_about_as_often_as_promised():
    covered = 0
    for trial in range(300):
        found = bootstrap_means(hits(120, 0.7, seed=trial), FEW)[0]
        covered += found.low <= 0.7 <= found.high
    assert 0.90 <= covered / 300 <= 0.98


def clustered(seed: int) -> tuple[np.ndarray, list[str]]:
    """50 patients with 4 rows each that are nearly copies."""
    patients = np.random.default_rng(seed).random(50) < 0.6
    return np.repeat(patients, 4).astype(float)[None], [f"p{i // 4}" for i in range(200)]


def test_groups_are_resampled_whole():
    counts = np.concatenate(list(resample_counts(200, FEW, group_ids=clustered(0)[1])), axis=1)
    by_patient = counts.reshape(50, 4, -1)
    assert (by_patient == by_patient[:, :1]).all()
    assert (by_patient[:, 0].sum(0) == 50).all()
    covered = {"groups": 0, "rows": 0}
    for trial in range(150):
        values, groups = clustered(trial)
        for name, ids in (("groups", groups), ("rows", None)):
            found = bootstrap_means(values, FEW, group_ids=ids)[0]
            covered[name] += found.low <= 0.6 <= found.high
    assert covered["groups"] >= 0.89 * 150
    # Negative control: rows of one patient taken for independent promise too much.
    assert covered["rows"] < 0.8 * 150


def test_rows_without_a_group_stand_alone():
    assert group_index([None, "a", None, "a"], 4).tolist() == [0, 1, 2, 1]
    assert group_index([None, None], 2) is None
    assert group_index(["a", "b"], 2) is None
    with pytest.raises(ValueError, match="3 rows need 3 group ids, got 1"):
        group_index(["a"], 3)


def test_no_interval_without_two_rows_or_groups():
    found = bootstrap_means(np.ones((1, 1)), FEW)[0]
    assert (found.point, found.low, found.high) == (1.0, None, None)
    assert found.note == "resampling needs at least 2 rows, found 1"
    one_group = bootstrap_means(hits(6), FEW, group_ids=["p"] * 6)[0]
    assert one_group.low is None
    assert one_group.note == "resampling needs at least 2 groups, found 1"
    few_groups = bootstrap_means(hits(6), FEW, group_ids=["p", "q"] * 3)[0]
    assert few_groups.note == "only 2 groups were resampled; the interval is rough"


def test_values_at_one_end_get_the_exact_binomial_bound():
    inside = {"bounds": (0.0, 1.0)}
    none, every = bootstrap_means(np.stack([np.zeros(6), np.ones(6)]), FEW, **inside)
    assert none.low == 0.0
    # 0 of 6 has probability (1 - p)^6, which is 2.5 % at the bound.
    assert (1 - none.high) ** 6 == pytest.approx(0.025)
    assert (every.low, every.high) == (pytest.approx(1 - none.high), 1.0)
    assert every.note == "all 6 values are 1; the other bound is the exact binomial one"
    assert bootstrap_seeds(np.ones((3, 6)), FEW, **inside).low == pytest.approx(every.low)
    by_group = bootstrap_means(np.ones((1, 6)), FEW, group_ids=["p", "q"] * 3, **inside)[0]
    assert by_group.low < every.low
    # Negative control: the plain percentile interval has no width.
    assert bootstrap_means(np.ones((1, 6)), FEW)[0].low == 1.0


def test_undefined_resamples_are_skipped_and_counted():
    found = percentile_interval(0.5, np.array([0.4, np.nan, 0.6]), FEW)
    assert (found.resamples, found.low > 0.4, found.high < 0.6) == (2, True, True)
    nothing = percentile_interval(0.5, np.array([np.nan]), FEW)
    assert (nothing.low, nothing.note) == (None, "the metric is undefined in every resample")


def test_stored_form():
    found = bootstrap_means(hits(), Bootstrap(seed=7))[0]
    assert found.to_json() == {
        "low": found.low,
        "high": found.high,
        "level": 0.95,
        "method": "bootstrap",
        "resamples": 1000,
        "seed": 7,
    }
    assert bootstrap_means(np.ones((1, 1)), FEW)[0].to_json()["note"].startswith("resampling needs")


def seeded(trial: int, num_seeds: int, spread: float) -> np.ndarray:
    """Per-row hits of trainings whose true accuracies scatter around 0.7."""
    generator = np.random.default_rng([trial, num_seeds])
    accuracy = 0.7 + generator.normal(0, spread, size=num_seeds)
    return (generator.random((num_seeds, 300)) < accuracy[:, None]).astype(float)


@pytest.mark.parametrize("num_seeds", [2, 3, 5])
def test_seeds_and_rows_are_covered_together(num_seeds):
    covered, rows_only = 0, 0
    for trial in range(200):
        values = seeded(trial, num_seeds, 0.08)
        found = bootstrap_seeds(values, FEW)
        covered += found.low <= 0.7 <= found.high
        low, high = np.quantile(mean_replicates(values, FEW).mean(0), [0.025, 0.975])
        rows_only += low <= 0.7 <= high
    assert covered / 200 >= 0.92
    # Negative control: an interval over rows alone ignores what another training would give.
    assert rows_only / 200 < 0.6


def test_one_seed_says_what_it_leaves_out():
    found = bootstrap_seeds(hits(), FEW)
    assert found.note == ONE_SEED
    plain = bootstrap_means(hits(), FEW)[0]
    assert (found.low, found.high) == (plain.low, plain.high)
    assert bootstrap_seeds(hits(num_seeds=3), FEW).note is None
    assert bootstrap_seeds(np.ones((3, 1)), FEW).low is None


def test_bounds_cut_the_interval():
    values = np.stack([np.ones(50), np.zeros(50)])
    assert bootstrap_seeds(values, FEW).high > 1
    cut = bootstrap_seeds(values, FEW, bounds=(0, 1))
    assert (cut.low, cut.high) == (0, 1)


def test_pairing_finds_what_two_intervals_hide():
    rows = hits(400, 0.6, seed=1)
    better = rows.copy()
    better[0, np.flatnonzero(rows[0] == 0)[:12]] = 1
    found = paired_bootstrap(better, rows, Bootstrap())
    assert found.difference == pytest.approx(12 / 400)
    assert found.low > 0
    assert found.p_value < 0.01
    # Negative control: the same values without the pairing prove nothing.
    order = np.random.default_rng(0).permutation(400)
    assert paired_bootstrap(better[:, order], rows, Bootstrap()).p_value > 0.1


def test_paired_test_is_antisymmetric_and_calm_without_a_difference():
    a, b = hits(num_seeds=3, seed=1), hits(num_seeds=3, seed=2)
    many = Bootstrap(resamples=4000)
    forward, backward = paired_bootstrap(a, b, many), paired_bootstrap(b, a, many)
    assert forward.difference == pytest.approx(-backward.difference)
    assert forward.p_value == pytest.approx(backward.p_value, abs=0.08)
    same = paired_bootstrap(a, a, FEW)
    assert (same.difference, same.p_value) == (0.0, 1.0)


def test_paired_test_seldom_cries_wolf():
    alarms = 0
    for trial in range(200):
        a, b = seeded(trial, 3, 0.05), seeded(trial + 1000, 3, 0.05)
        alarms += paired_bootstrap(a, b, FEW).p_value < 0.05
    assert alarms / 200 <= 0.08


def test_p_value_has_a_floor():
    assert two_sided_p(np.ones(99)) == pytest.approx(2 / 100)
    assert two_sided_p(np.zeros(99)) == 1.0
    assert two_sided_p(np.array([-1.0, 1.0, 1.0])) == 1.0


def test_no_p_value_without_rows_to_resample():
    found = paired_bootstrap(np.ones((2, 1)), np.zeros((2, 1)), FEW)
    assert found.p_value is None
    assert found.note == "resampling needs at least 2 rows, found 1"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Bootstrap(resamples=39), "a 95% interval needs at least 40 resamples, got 39"),
        (lambda: Bootstrap(confidence=1.0), r"confidence must be between 0 and 1, got 1\.0"),
        (lambda: bootstrap_means(np.zeros((1, 0)), FEW), "non-empty table of two axes"),
        (lambda: bootstrap_means(np.zeros(3), FEW), r"got shape \[3\]"),
        (lambda: bootstrap_seeds(np.array([[np.nan, 1.0]]), FEW), "1 of 2 per-row values are not finite"),
        (lambda: paired_bootstrap(np.ones((1, 3)), np.ones((2, 3)), FEW), r"got \[1, 3\] and \[2, 3\]"),
    ],
)
def test_bad_input_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
