"""Top-1, top-5 and per-class recall against loops."""

from __future__ import annotations

import numpy as np
import pytest

from pipelines.evaluation.classification import (
    classify,
    describe_classes,
    recall_row_values,
    target_ranks,
)
from tests.oracles.evaluation import loop_accuracy, loop_mean_per_class_recall


def problem(num_rows: int = 60, num_classes: int = 8, seed: int = 0, *, decimals: int = 1):
    """Scores with ties (rounded) and unbalanced classes; the last class has no row."""
    generator = np.random.default_rng(seed)
    target = generator.integers(0, num_classes - 1, size=num_rows) * generator.integers(0, 2, size=num_rows)
    scores = generator.normal(size=(num_rows, num_classes))
    scores[np.arange(num_rows), target] += 0.7
    return scores.round(decimals), target


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_hits_equal_the_loops(seed):
    scores, target = problem(seed=seed)
    found = classify(scores, target)
    assert found.is_top1.mean() == pytest.approx(loop_accuracy(scores.tolist(), target.tolist(), 1))
    assert found.is_top5.mean() == pytest.approx(loop_accuracy(scores.tolist(), target.tolist(), 5))
    expected = loop_mean_per_class_recall(scores.tolist(), target.tolist())
    assert found.mean_per_class_recall == pytest.approx(expected, abs=1e-12)
    # Negative control: unbalanced classes tell the two means apart.
    assert abs(found.is_top1.mean() - expected) > 0.01


def test_ties_go_to_the_earlier_class():
    scores = np.zeros((3, 4))
    assert target_ranks(scores, np.array([0, 1, 3])).tolist() == [0, 1, 3]
    assert classify(scores, np.array([0, 1, 3])).is_top1.tolist() == [True, False, False]


def test_recall_of_every_class_with_its_rows():
    scores = np.eye(3)[[0, 0, 1, 1]]
    found = classify(scores, np.array([0, 1, 1, 1]))
    assert describe_classes(found, ["a", "b", "c"]) == [
        {"name": "a", "n": 1, "recall": 1.0},
        {"name": "b", "n": 3, "recall": pytest.approx(2 / 3)},
        {"name": "c", "n": 0, "recall": None, "reason": "no row of this class"},
    ]
    assert found.mean_per_class_recall == pytest.approx((1 + 2 / 3) / 2)


def test_top5_needs_six_classes():
    scores, target = problem(num_classes=5)
    assert classify(scores, target).is_top5 is None
    scores, target = problem(num_classes=6)
    assert classify(scores, target).is_top5 is not None


def test_row_order_and_monotone_maps_are_irrelevant():
    scores, target = problem()
    order = np.random.default_rng(3).permutation(len(target))
    found, moved = classify(scores, target), classify(np.exp(scores[order] * 3), target[order])
    assert moved.is_top1.tolist() == found.is_top1[order].tolist()
    assert moved.class_recall == pytest.approx(found.class_recall)


def test_a_shuffled_target_is_at_chance():
    generator = np.random.default_rng(0)
    target = np.repeat(np.arange(10), 100)
    scores = np.eye(10)[target] + generator.normal(size=(1000, 10)) * 0.1
    assert classify(scores, target).is_top1.mean() == 1.0
    assert classify(scores, generator.permutation(target)).is_top1.mean() == pytest.approx(0.1, abs=0.03)


def test_row_values_average_to_the_recall_and_follow_its_derivative():
    scores, target = problem()
    is_hit = classify(scores, target).is_top1
    values = recall_row_values(is_hit, target)
    assert values.mean() == pytest.approx(classify(scores, target).mean_per_class_recall)
    # Doubling row 0 moves the metric by (value - mean) / N to first order.
    num_rows, step = len(target), 1e-6
    weights = np.ones(num_rows)
    weights[0] += step
    recalls = [np.average(is_hit[target == c], weights=weights[target == c]) for c in np.unique(target)]
    slope = (np.mean(recalls) - values.mean()) / step
    assert slope == pytest.approx((values[0] - values.mean()) / num_rows, rel=1e-4)


@pytest.mark.parametrize(
    ("scores", "target", "message"),
    [
        (np.zeros((0, 3)), np.zeros(0, dtype=int), "at least one row"),
        (np.full((2, 3), np.nan), np.array([0, 1]), "2 rows have scores that are not finite"),
        (np.zeros((2, 3)), np.array([0, 3]), r"targets must be in 0\.\.2, got 0\.\.3"),
    ],
)
def test_bad_input_is_refused(scores, target, message):
    with pytest.raises(ValueError, match=message):
        classify(scores, target)
