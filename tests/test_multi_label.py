"""AUROC and its bootstrap against loops and stored values."""

from __future__ import annotations

import numpy as np
import pytest

from pipelines.evaluation.multi_label import (
    auroc,
    auroc_intervals,
    auroc_replicates,
    auroc_row_values,
    describe_labels,
    macro_replicates,
    score_labels,
    weighted_auroc,
)
from pipelines.evaluation.statistics import Bootstrap, bootstrap_means, resample_counts
from tests.golden_files import load
from tests.oracles.evaluation import loop_auroc, loop_chexzero_interval


def problem(num_rows: int = 80, num_labels: int = 4, seed: int = 0, *, decimals: int = 1):
    generator = np.random.default_rng(seed)
    truth = generator.random((num_rows, num_labels)) < 0.3
    scores = generator.normal(size=truth.shape) + truth
    return scores.round(decimals), truth


def names(truth: np.ndarray) -> list[str]:
    return [f"label {i}" for i in range(truth.shape[1])]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_auroc_equals_the_loop_with_ties_counted_one_half(seed):
    scores, truth = problem(seed=seed)
    for column in range(truth.shape[1]):
        found = auroc(scores[:, column], truth[:, column])
        pairs = scores[:, column].tolist(), truth[:, column].tolist()
        assert found == pytest.approx(loop_auroc(*pairs), abs=1e-12)
        assert found != pytest.approx(loop_auroc(*pairs, tie=1.0), abs=1e-4)
        assert found != pytest.approx(loop_auroc(*pairs, tie=0.0), abs=1e-4)


def test_stored_auroc_with_ties():
    case = load("derived_zeroshot_scores")
    found = [auroc(case["score_rounded"][:, i], case["labels"][:, i] == 1) for i in range(3)]
    assert found == pytest.approx(case["auroc_ties"].tolist(), abs=1e-12)
    assert found != pytest.approx(case["auroc"].tolist(), abs=1e-3)


def golden_counts(case: dict, shift: int = 0) -> np.ndarray:
    indices = (case["boot_indices"].astype(int) + shift) % 60
    return np.stack([np.bincount(row, minlength=60) for row in indices], axis=1).astype(np.float32)


def test_stored_bootstrap_replicates_and_interval():
    """CheXzero's released bootstrap on its own resamples; its percentile index is one lower than ours."""
    case = load("chexzero_bootstrap")
    for label in range(2):
        scores, truth = case["y_score"][:, label], case["y_true"][:, label] == 1
        assert auroc(scores, truth) == pytest.approx(case["auroc"][label], abs=1e-12)
        found = weighted_auroc(scores, truth, golden_counts(case))
        np.testing.assert_allclose(found, case["boot_auroc"][:, label], rtol=0, atol=1e-12)
        low, high = loop_chexzero_interval(found.tolist())
        assert [round(x, 4) for x in (found.mean(), low, high)] == case["ci"][:, label].tolist()
        # Negative control: resamples of other rows do not match.
        other = weighted_auroc(scores, truth, golden_counts(case, shift=1))
        assert not np.allclose(other, case["boot_auroc"][:, label], atol=1e-3)


def test_replicates_equal_the_loop_on_the_resampled_rows():
    scores, truth = problem(num_rows=25, num_labels=2)
    bootstrap = Bootstrap(resamples=40, seed=5)
    found = auroc_replicates(scores, truth, bootstrap)
    counts = np.concatenate(list(resample_counts(25, bootstrap)), axis=1).astype(int)
    for resample in range(40):
        rows = np.repeat(np.arange(25), counts[:, resample])
        for label in range(2):
            expected = loop_auroc(scores[rows, label].tolist(), truth[rows, label].tolist())
            assert found[label, resample] == pytest.approx(expected, abs=1e-12)


def test_auroc_ignores_monotone_maps_and_row_order():
    scores, truth = problem()
    order = np.random.default_rng(1).permutation(len(scores))
    expected = score_labels(scores, truth, names(truth))
    found = score_labels(np.exp(2 * scores[order]) + 5, truth[order], names(truth))
    assert found.auroc_macro == pytest.approx(expected.auroc_macro, abs=1e-12)
    mirrored = score_labels(-scores, truth, names(truth))
    assert mirrored.auroc_macro == pytest.approx(1 - expected.auroc_macro, abs=1e-12)


def test_undefined_labels_are_null_and_left_out_of_the_mean():
    scores, truth = problem()
    truth[:, 1], truth[:, 2] = False, True
    found = score_labels(scores, truth, names(truth))
    assert [label.auroc is None for label in found.labels] == [False, True, True, False]
    assert found.labels[1].reason == "no positives among 80 rows"
    assert found.labels[2].reason == "no negatives among 80 rows"
    assert found.auroc_macro == pytest.approx((found.labels[0].auroc + found.labels[3].auroc) / 2)
    assert found.reason == "2 of 4 labels have both positives and negatives"
    per_label, macro = auroc_intervals(scores, truth, found, Bootstrap(resamples=100))
    assert sorted(per_label) == ["label 0", "label 3"]
    assert macro.note == found.reason
    stored = describe_labels(found, per_label)
    assert stored[1] == {
        "name": "label 1",
        "n_pos": 0,
        "auroc": None,
        "low": None,
        "high": None,
        "reason": "no positives among 80 rows",
    }


def test_no_defined_label_gives_no_macro():
    scores, truth = problem()
    found = score_labels(scores, np.zeros_like(truth), names(truth))
    assert found.auroc_macro is None
    assert found.row_values is None
    assert auroc_intervals(scores, np.zeros_like(truth), found, Bootstrap(resamples=100)) == ({}, None)


def test_row_values_average_to_the_macro_auroc_and_follow_its_derivative():
    scores, truth = problem(num_rows=40, num_labels=3)
    values = auroc_row_values(scores, truth)
    macro = score_labels(scores, truth, names(truth)).auroc_macro
    assert values.mean() == pytest.approx(macro, abs=1e-12)
    step = 1e-6
    for row in range(40):
        weights = np.ones((40, 1))
        weights[row] += step
        moved = np.mean([weighted_auroc(scores[:, i], truth[:, i], weights)[0] for i in range(3)])
        assert (moved - macro) / step == pytest.approx((values[row] - macro) / 40, abs=1e-6)


def test_row_values_give_the_interval_of_the_real_bootstrap():
    scores, truth = problem(num_rows=400, num_labels=5)
    found = score_labels(scores, truth, names(truth))
    bootstrap = Bootstrap(resamples=1000)
    _, real = auroc_intervals(scores, truth, found, bootstrap)
    linear = bootstrap_means(found.row_values[None], bootstrap)[0]
    assert (linear.low, linear.high) == pytest.approx((real.low, real.high), abs=0.003)


def test_a_label_of_one_patient_gets_no_interval():
    scores, truth = problem(num_rows=40, num_labels=2)
    truth[:, 0] = np.arange(40) < 4
    groups = [str(i // 4) for i in range(40)]
    found = score_labels(scores, truth, names(truth))
    per_label, _ = auroc_intervals(scores, truth, found, Bootstrap(resamples=200), group_ids=groups)
    assert per_label["label 0"].low is None
    assert per_label["label 0"].note == "all positives come from one group"
    assert per_label["label 1"].low is not None
    alone, _ = auroc_intervals(scores, truth, found, Bootstrap(resamples=200))
    assert alone["label 0"].low is not None


def test_one_group_gives_no_interval_at_all():
    scores, truth = problem(num_rows=20)
    found = score_labels(scores, truth, names(truth))
    _, macro = auroc_intervals(scores, truth, found, Bootstrap(resamples=100), group_ids=["p"] * 20)
    assert macro.low is None
    assert macro.note == "resampling needs at least 2 groups, found 1"


def test_a_resample_without_a_class_is_skipped():
    scores, truth = np.array([0.1, 0.2, 0.3]), np.array([True, False, False])
    counts = np.array([[0, 1], [2, 1], [1, 1]], dtype=np.float32)
    found = weighted_auroc(scores, truth, counts)
    assert np.isnan(found[0])
    assert found[1] == 0.0
    assert macro_replicates(np.array([[np.nan, 0.5], [0.25, 1.0]])).tolist() == [0.25, 0.75]


def test_bad_tables_are_refused():
    scores, truth = problem()
    with pytest.raises(ValueError, match=r"scores \[80, 4\], truth \[80, 4\] and 1 names disagree"):
        score_labels(scores, truth, ["a"])
    scores[3, 1] = np.inf
    with pytest.raises(ValueError, match="1 rows have scores that are not finite"):
        score_labels(scores, truth, names(truth))
