"""Parts of a pair table that every estimator honours: weights of rows, extra columns."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from models.estimators import (
    NWJ,
    TUBA,
    DonskerVaradhan,
    InfoLOOB,
    InfoNCE,
    Interpolated,
    JensenShannon,
    RelationKL,
    SigmoidPairs,
    SoftKL,
    estimate,
)
from models.pair_table import PairTable
from models.targets import soft_targets
from tests.golden_files import leaf
from tests.oracles.bounds import loop_weighted_dv, loop_weighted_jsd
from tests.oracles.contrastive import LoopTable, loop_ce, loop_loob

ESTIMATORS = [
    InfoNCE(),
    InfoNCE(slack=0.7),
    InfoLOOB(),
    JensenShannon(),
    SigmoidPairs(),
    DonskerVaradhan(),
    NWJ(),
    TUBA(),
    Interpolated(),
    SoftKL(),
    SoftKL(direction="symmetric"),
    RelationKL(),
    RelationKL(direction="symmetric"),
]
POSITIVE = torch.tensor([1, 2, 4, 0])
WEIGHTS = torch.tensor([2.0, 0.0, 1.0, 3.0], dtype=torch.float64)

every_estimator = pytest.mark.parametrize("estimator", ESTIMATORS, ids=str)


def draw(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def mask(*shape, seed=9) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) > 1 / 3


def is_soft(estimator) -> bool:
    return estimator.kind in ("kl", "relation_kl")


def make_table(estimator, scores: Tensor, *, weights: Tensor | None = WEIGHTS) -> PairTable:
    """Four of five rows of a global table with a mask, a baseline and, where wanted, soft targets."""
    is_valid = mask(4, 5).scatter(1, POSITIVE[:, None], True)
    soft = soft_targets(draw(4, 5, seed=1), POSITIVE, temperature=1.0, mixing=0.6, is_valid=is_valid)
    return PairTable(
        scores,
        POSITIVE,
        log_targets=soft if is_soft(estimator) else None,
        is_valid=is_valid,
        row_weights=weights,
        log_baseline=draw(4, seed=2),
    )


def of_rows(table: PairTable, rows: Tensor, *, row_weights: Tensor | None = None) -> PairTable:
    """The table of some rows, possibly several times the same."""

    def taken(part: Tensor | None) -> Tensor | None:
        return None if part is None else part[rows]

    return PairTable(
        table.scores[rows],
        table.positive[rows],
        log_targets=taken(table.log_targets),
        is_valid=taken(table.is_valid),
        row_weights=row_weights,
        log_baseline=taken(table.log_baseline),
    )


@every_estimator
def test_a_whole_weight_is_that_many_equal_rows(estimator):
    scores, same = leaf(draw(4, 5)), leaf(draw(4, 5))
    weighted = estimate(estimator, make_table(estimator, scores))
    repeated = torch.tensor([0, 0, 2, 3, 3, 3])
    expected = estimate(estimator, of_rows(make_table(estimator, same), repeated))
    torch.testing.assert_close(weighted, expected)
    weighted.backward()
    expected.backward()
    torch.testing.assert_close(scores.grad, same.grad)
    unweighted = estimate(estimator, make_table(estimator, draw(4, 5), weights=None))
    assert abs(weighted - unweighted) > 1e-3


def test_weighted_estimators_equal_the_loops():
    weights = torch.tensor([0.3, 1.7, 0.9, 0.1], dtype=torch.float64)
    table = make_table(InfoNCE(), draw(4, 5), weights=weights)
    loop = LoopTable(table.scores, POSITIVE.tolist(), table.is_valid)

    def mean(rows):
        return sum(w * v for w, v in zip(weights.tolist(), rows, strict=True)) / weights.sum().item()

    for estimator, expected in (
        (InfoNCE(), mean(loop_ce(loop))),
        (InfoNCE(slack=0.7), mean([max(row - 0.7, 0.0) for row in loop_ce(loop)])),
        (InfoLOOB(), mean(loop_loob(loop))),
        (JensenShannon(), loop_weighted_jsd(loop, weights.tolist())),
        (DonskerVaradhan(), loop_weighted_dv(loop, weights.tolist())),
    ):
        assert estimate(estimator, table).item() == pytest.approx(expected, rel=1e-13)
        other = replace(table, row_weights=weights.flip(0))
        assert abs(estimate(estimator, other).item() - expected) > 1e-3


@every_estimator
def test_weights_of_one_change_nothing_and_their_scale_is_irrelevant(estimator):
    table = make_table(estimator, draw(4, 5))
    ones = replace(table, row_weights=torch.ones(4, dtype=torch.float64))
    torch.testing.assert_close(
        estimate(estimator, ones), estimate(estimator, replace(table, row_weights=None))
    )
    torch.testing.assert_close(
        estimate(estimator, replace(table, row_weights=0.37 * WEIGHTS)), estimate(estimator, table)
    )


@every_estimator
@pytest.mark.parametrize("filler", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_a_row_of_weight_zero_has_no_say_whatever_it_holds(estimator, filler):
    filled = draw(4, 5)
    filled[1] = filler
    scores, log_baseline = leaf(filled), leaf(draw(4, seed=2).index_fill(0, torch.tensor([1]), filler))
    table = replace(make_table(estimator, scores), log_baseline=log_baseline)
    found = estimate(estimator, table)
    found.backward()
    left = torch.tensor([0, 2, 3])
    alone = leaf(draw(4, 5))
    expected = estimate(estimator, of_rows(make_table(estimator, alone), left, row_weights=WEIGHTS[left]))
    expected.backward()
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(scores.grad, alone.grad)
    assert (scores.grad[1] == 0).all()
    assert log_baseline.grad is None or log_baseline.grad[1] == 0
    # negative control: with a weight the same row is seen
    seen = estimate(estimator, replace(table, row_weights=WEIGHTS + 1))
    assert not torch.isclose(seen, expected)


@every_estimator
def test_gathered_rows_that_are_not_finite_are_stopped_by_their_weight(estimator):
    """A worker may hold a whole table of idle rows; what it sends must not matter."""
    table = make_table(estimator, draw(4, 5))
    rows = leaf(estimator.rows(table).index_fill(0, torch.tensor([1]), float("inf")))
    found = estimator.reduce(rows, WEIGHTS)
    found.backward()
    torch.testing.assert_close(found, estimate(estimator, table))
    assert rows.grad.isfinite().all()
    assert (rows.grad[1] == 0).all()


@every_estimator
@pytest.mark.parametrize("filler", [0.0, float("nan")])
def test_a_table_in_which_no_row_counts_is_zero(estimator, filler):
    scores = leaf(torch.full((4, 5), filler))
    found = estimate(estimator, make_table(estimator, scores, weights=torch.zeros(4, dtype=torch.float64)))
    found.backward()
    assert found.item() == 0
    assert (scores.grad == 0).all()


@every_estimator
@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_slices_of_rows_reduce_to_the_whole_table(estimator, weights):
    """Three unequal slices, as if of three workers: value and gradient are those of one."""
    scores, whole = leaf(draw(4, 5)), leaf(draw(4, 5))
    table = make_table(estimator, scores, weights=weights)
    slices = [torch.tensor(rows) for rows in ([0], [1], [2, 3])]
    parts = [of_rows(table, rows, row_weights=None if weights is None else weights[rows]) for rows in slices]
    found = estimator.reduce(torch.cat([estimator.rows(part) for part in parts]), weights)
    expected = estimate(estimator, make_table(estimator, whole, weights=weights))
    found.backward()
    expected.backward()
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(scores.grad, whole.grad)


@pytest.mark.parametrize(
    "estimator", [e for e in ESTIMATORS if e.kind in ("jsd", "dv", "nwj", "tuba", "interp")], ids=str
)
def test_a_mean_of_workers_losses_is_another_objective(estimator):
    table = make_table(estimator, 2 * draw(4, 5), weights=None)
    parts = [of_rows(table, torch.tensor(rows)) for rows in ([0, 1], [2, 3])]
    mean = torch.stack([estimate(estimator, part) for part in parts]).mean()
    assert abs(mean - estimate(estimator, table)) > 1e-4


# a divergence from targets of 0 is infinite in the symmetric direction
@pytest.mark.parametrize("estimator", [e for e in ESTIMATORS if "symmetric" not in str(e)], ids=str)
@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_extra_columns_are_further_negatives(estimator, weights):
    """A table split into columns and extra columns is the table; soft targets give the extra ones nothing."""
    scores, whole = leaf(draw(4, 8)), leaf(draw(4, 8))
    extra_mask = mask(4, 3, seed=4)
    table = make_table(estimator, scores[:, :5], weights=weights)
    found = estimate(estimator, table.with_columns(scores[:, 5:], extra_mask))
    target = table.log_targets
    if target is not None:
        target = torch.cat([target, torch.full((4, 3), -torch.inf, dtype=torch.float64)], 1)
    is_valid = torch.cat([table.is_valid, extra_mask], 1)
    expected = estimate(estimator, replace(table, scores=whole, log_targets=target, is_valid=is_valid))
    torch.testing.assert_close(found, expected)
    found.backward()
    expected.backward()
    torch.testing.assert_close(scores.grad, whole.grad)
    assert (scores.grad[:, 5:][~extra_mask] == 0).all()
    assert (scores.grad[:, 5:] != 0).any()
    assert not torch.isclose(found, estimate(estimator, table))


def test_masks_of_columns_are_joined():
    scores, extra = draw(3, 3), draw(3, 2, seed=1)
    own_mask, extra_mask = mask(3, 3), mask(3, 2, seed=3)
    plain = PairTable.square(scores)
    masked = replace(plain, is_valid=own_mask)
    all_own, all_extra = torch.ones(3, 3, dtype=torch.bool), torch.ones(3, 2, dtype=torch.bool)
    assert plain.with_columns(extra).is_valid is None
    assert torch.equal(plain.with_columns(extra, extra_mask).is_valid, torch.cat([all_own, extra_mask], 1))
    assert torch.equal(masked.with_columns(extra).is_valid, torch.cat([own_mask, all_extra], 1))
    wide = masked.with_columns(extra, extra_mask)
    assert torch.equal(wide.is_valid, torch.cat([own_mask, extra_mask], 1))
    assert torch.equal(wide.positive_scores, plain.positive_scores)
    assert wide.log_targets is None


def test_other_parts_survive_extra_columns():
    weighted = replace(PairTable.square(draw(3, 3)), row_weights=draw(3).abs(), log_baseline=draw(3, seed=1))
    wide = weighted.with_columns(draw(3, 2, seed=2))
    assert wide.row_weights is weighted.row_weights
    assert wide.log_baseline is weighted.log_baseline
    assert wide.scores.shape == (3, 5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda t: t.with_columns(torch.zeros(2, 4)),
            r"extra columns must have shape \[3, E\], got \[2, 4\]",
        ),
        (lambda t: t.with_columns(torch.zeros(3)), r"extra columns must have shape \[3, E\], got \[3\]"),
        (
            lambda t: t.with_columns(torch.zeros(3, 2), torch.ones(3, 1, dtype=torch.bool)),
            r"is_valid of extra columns must have shape \[3, 2\], got \[3, 1\]",
        ),
        (lambda t: InfoNCE(slack=-0.1), "slack must be >= 0, got -0.1"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call(PairTable.square(torch.zeros(3, 3)))
