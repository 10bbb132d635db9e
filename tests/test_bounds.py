"""Sigmoid pairs and variational bounds: loops, stored values, limits, masks, large scores, refusals."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from models.bounds import softplus
from models.estimators import (
    EXP_ESTIMATORS,
    NWJ,
    TUBA,
    DonskerVaradhan,
    InfoNCE,
    Interpolated,
    JensenShannon,
    SigmoidPairs,
    donsker_varadhan_bound,
    estimate,
    info_nce_bound,
    interpolated_bound,
    js_bound,
    js_fgan_bound,
    mine_bound,
    nwj_bound,
    smallest_safe_temperature,
    smile_bound,
    tuba_bound,
)
from models.outputs import at_least_float32
from models.pair_table import PairTable
from tests.golden_files import assert_golden, leaf, tensors
from tests.oracles.bounds import (
    loop_binary_nce,
    loop_interpolated,
    loop_mine_gradient,
    loop_nwj,
    loop_sigmoid,
    loop_smile,
    loop_tuba,
)
from tests.oracles.contrastive import LoopTable

NEW = [SigmoidPairs(), NWJ(), TUBA(), Interpolated(), Interpolated(alpha_logit=3.0)]
BASELINE = torch.tensor([0.3, -0.8, 1.4], dtype=torch.float64)


def draw(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def masked_table(scores: Tensor, *, masked: bool = True, seed: int = 9) -> PairTable:
    """Three of five rows of a global table; optionally a third of the candidates taken out."""
    positive = torch.tensor([1, 2, 4])
    is_valid = torch.rand(3, 5, generator=torch.Generator().manual_seed(seed)) > 1 / 3
    is_valid = is_valid.scatter(1, positive[:, None], True) if masked else None
    return PairTable(scores, positive, is_valid=is_valid, log_baseline=BASELINE)


def loop_of(table: PairTable) -> LoopTable:
    return LoopTable(table.scores, table.positive.tolist(), table.is_valid)


@pytest.mark.parametrize("weights", [None, [0.5, 2.0, 0.25]])
@pytest.mark.parametrize("masked", [False, True])
def test_estimators_equal_the_loops(masked, weights):
    table = masked_table(2 * draw(3, 5), masked=masked)
    if weights is not None:
        table = replace(table, row_weights=torch.tensor(weights, dtype=torch.float64))
    loop, a = loop_of(table), BASELINE.tolist()
    for estimator, expected in (
        (SigmoidPairs(), loop_sigmoid(loop, weights)),
        (NWJ(), -loop_nwj(loop, weights)),
        (TUBA(), -loop_tuba(loop, a, weights)),
        *(
            (
                Interpolated(alpha_logit=logit),
                -loop_interpolated(loop, a, alpha=1 / (1 + math.exp(-logit)), weights=weights),
            )
            for logit in (-2.0, 0.5, 6.0)
        ),
    ):
        assert estimate(estimator, table).item() == pytest.approx(expected, rel=1e-12), estimator
        other = replace(table, positive=table.positive.roll(1))
        assert abs(estimate(estimator, other).item() - expected) > 1e-3


def test_without_a_baseline_the_interpolation_takes_one():
    table = masked_table(draw(3, 5))
    without = estimate(Interpolated(), replace(table, log_baseline=None))
    expected = -loop_interpolated(loop_of(table), [1.0] * 3, alpha=1 / (1 + math.exp(2.0)))
    assert without.item() == pytest.approx(expected, rel=1e-12)
    assert abs(without - estimate(Interpolated(), table)) > 1e-3


def test_shifted_sigmoid_pairs_are_the_binary_loss_of_a_memory_bank():
    num_data, normaliser, K = 40, 7.5, 6
    raw = draw(4, 1 + K)
    shifted = raw - math.log(normaliser * K / num_data)
    found = estimate(SigmoidPairs(), PairTable(shifted, torch.zeros(4, dtype=torch.int64)))
    expected = loop_binary_nce(raw.tolist(), normaliser=normaliser, num_data=num_data)
    assert found.item() == pytest.approx(expected, rel=1e-12)
    unshifted = estimate(SigmoidPairs(), PairTable(raw, torch.zeros(4, dtype=torch.int64)))
    assert abs(unshifted.item() - expected) > 0.1


def released_bounds(log_baseline: Tensor) -> dict:
    """Ours for every bound of the published notebook, by stored key."""
    bounds = {
        "nwj": nwj_bound,
        "infonce": info_nce_bound,
        "js": js_bound,
        "js_fgan": js_fgan_bound,
        "dv": donsker_varadhan_bound,
        "smile5": lambda scores: smile_bound(scores, clip=5.0),
        "smile1": lambda scores: smile_bound(scores, clip=1.0),
        "tuba": lambda scores: tuba_bound(scores, log_baseline),
        "mine_buf1": lambda scores: mine_bound(scores)[0],
    }
    for logit in ("-20", "-2", "+0", "+2", "+20"):
        bounds[f"interp_{logit}"] = lambda scores, logit=float(logit): interpolated_bound(
            scores, log_baseline, alpha_logit=logit
        )
    return bounds


def test_every_released_bound_is_reproduced():
    golden = tensors("vbmi_official_bounds")
    bounds = released_bounds(golden["log_baseline"])
    assert {*bounds, *(f"{key}_grad" for key in bounds), "scores", "log_baseline"} == set(golden)
    for key, bound in bounds.items():
        scores = leaf(golden["scores"])
        found = bound(scores)
        assert_golden(found, golden[key])
        found.backward()
        assert_golden(scores.grad, golden[f"{key}_grad"])
        assert abs(bound(golden["scores"].flip(0)) - golden[key]) > 0.1, key


@pytest.mark.parametrize("estimator", NEW, ids=str)
def test_gradients_pass_gradcheck(estimator):
    def total(scores, log_baseline):
        return estimate(estimator, replace(masked_table(scores), log_baseline=log_baseline))

    takes_baseline = estimator.kind in ("tuba", "interp")
    baseline = BASELINE.clone().requires_grad_(takes_baseline)
    assert torch.autograd.gradcheck(total, [leaf(draw(3, 5)), baseline])


@pytest.mark.parametrize(
    ("estimator", "expected"),
    [
        (SigmoidPairs(), 7 * math.log(2)),
        (NWJ(), math.exp(-1)),
        (TUBA(), 0.0),
        (Interpolated(alpha_logit=0.0), 0.0),
    ],
    ids=str,
)
def test_equal_scores_have_the_closed_value(estimator, expected):
    table = PairTable.square(torch.zeros(7, 7, dtype=torch.float64))
    table = replace(table, log_baseline=torch.zeros(7, dtype=torch.float64))
    assert estimate(estimator, table).item() == pytest.approx(expected, abs=1e-14)


@pytest.mark.parametrize("estimator", NEW, ids=str)
def test_the_order_of_pairs_is_irrelevant(estimator):
    scores, log_baseline = draw(8, 8), draw(8, seed=1)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    table = replace(PairTable.square(scores), log_baseline=log_baseline)
    shuffled = replace(PairTable.square(scores[order][:, order]), log_baseline=log_baseline[order])
    mispaired = replace(PairTable.square(scores[order]), log_baseline=log_baseline[order])
    torch.testing.assert_close(estimate(estimator, shuffled), estimate(estimator, table))
    assert not torch.isclose(estimate(estimator, mispaired), estimate(estimator, table))


@pytest.mark.parametrize("estimator", NEW, ids=str)
def test_excluded_candidates_have_no_say(estimator):
    values, gradients = [], []
    is_valid = masked_table(draw(3, 5)).is_valid
    for filler in (0.0, 50.0):
        scores = leaf(draw(3, 5).masked_fill(~is_valid, filler))
        found = estimate(estimator, masked_table(scores))
        found.backward()
        assert (scores.grad[~is_valid] == 0).all()
        assert (scores.grad[is_valid] != 0).all()
        values.append(found.detach())
        gradients.append(scores.grad)
    assert torch.equal(values[0], values[1])
    assert torch.equal(gradients[0], gradients[1])
    assert not torch.isclose(estimate(estimator, masked_table(scores, masked=False)), values[0])


@pytest.mark.parametrize("estimator", NEW, ids=str)
def test_a_row_without_negatives_stays_a_number(estimator):
    is_valid = torch.ones(3, 3, dtype=torch.bool)
    is_valid[0] = torch.tensor([True, False, False])
    scores = leaf(draw(3, 3))
    table = replace(PairTable.square(scores), is_valid=is_valid, log_baseline=BASELINE)
    found = estimate(estimator, table)
    found.backward()
    assert found.isfinite()
    assert scores.grad.isfinite().all()
    assert (scores.grad[0, 1:] == 0).all()
    # the interpolation has no column to leave out in it; the others still have its own pair
    assert (scores.grad[0, 0] == 0) == (estimator.kind == "interp")
    loop, a = loop_of(table), BASELINE.tolist()
    expected = {
        "sigmoid": lambda: loop_sigmoid(loop),
        "nwj": lambda: -loop_nwj(loop),
        "tuba": lambda: -loop_tuba(loop, a),
        "interp": lambda: -loop_interpolated(loop, a, alpha=1 / (1 + math.exp(-estimator.alpha_logit))),
    }
    assert found.item() == pytest.approx(expected[estimator.kind](), rel=1e-12)


@pytest.mark.parametrize("masked", [False, True])
def test_the_interpolation_begins_at_tuba(masked):
    scores, end = leaf(draw(3, 5)), leaf(draw(3, 5))
    found = estimate(Interpolated(alpha_logit=-20.0), masked_table(scores, masked=masked))
    expected = estimate(TUBA(), masked_table(end, masked=masked))
    found.backward()
    expected.backward()
    # alpha is 2e-9
    torch.testing.assert_close(found, expected, atol=1e-7, rtol=0)
    torch.testing.assert_close(scores.grad, end.grad, atol=1e-7, rtol=0)
    nwj = estimate(NWJ(), masked_table(scores, masked=masked))
    no_baseline = replace(masked_table(scores, masked=masked), log_baseline=None)
    torch.testing.assert_close(estimate(Interpolated(alpha_logit=-20.0), no_baseline), nwj, atol=1e-7, rtol=0)
    assert abs(found - nwj) > 1e-2


def test_the_interpolation_ends_where_info_nce_is_bounded():
    """At +20 no baseline matters, and as InfoNCE it cannot exceed log K however good the critic."""
    perfect = 200.0 * torch.eye(6, dtype=torch.float64)
    end = interpolated_bound(perfect, torch.full((6,), 5.0, dtype=torch.float64), alpha_logit=40.0)
    assert end.item() == pytest.approx(info_nce_bound(perfect).item(), abs=0.2)
    assert end.item() <= math.log(6)
    assert interpolated_bound(perfect, alpha_logit=-20.0) > math.log(6)
    baseline = leaf(draw(6, seed=1))
    interpolated_bound(draw(6, 6), baseline, alpha_logit=20.0).backward()
    assert baseline.grad.abs().max() < 1e-7


def test_one_log_sum_over_all_negatives_has_the_gradient_of_donsker_varadhan():
    ours, released = leaf(draw(5, 5)), leaf(draw(5, 5))
    estimate(DonskerVaradhan(), PairTable.square(ours)).backward()
    off_diagonal = released[~torch.eye(5, dtype=torch.bool)]
    (off_diagonal.logsumexp(0) - released.diagonal().mean()).backward()
    torch.testing.assert_close(ours.grad, released.grad, atol=1e-15, rtol=0)
    by_row = leaf(draw(5, 5))
    estimate(InfoNCE(), PairTable.square(by_row)).backward()
    assert (by_row.grad - ours.grad).abs().max() > 1e-2


def test_smile_clips_negatives_and_learns_by_jensen_shannon():
    scores = 3 * draw(5, 5)
    loop = LoopTable(scores, list(range(5)))
    assert smile_bound(scores, clip=0.7).item() == pytest.approx(loop_smile(loop, clip=0.7), rel=1e-12)
    torch.testing.assert_close(smile_bound(scores, clip=None), donsker_varadhan_bound(scores))
    assert abs(smile_bound(scores, clip=0.7) - donsker_varadhan_bound(scores)) > 0.1


def test_mine_divides_by_the_moving_average():
    scores, loop = leaf(draw(5, 5)), LoopTable(draw(5, 5), list(range(5)))
    first, log_average = mine_bound(scores, decay=0.6)
    gradient, average = loop_mine_gradient(loop, average=1.0, decay=0.6)
    assert not log_average.requires_grad
    assert log_average.exp().item() == pytest.approx(average, rel=1e-13)
    first.backward()
    torch.testing.assert_close(scores.grad, torch.tensor(gradient, dtype=torch.float64))
    again = leaf(draw(5, 5))
    second, _ = mine_bound(again, log_average, decay=0.6)
    second.backward()
    expected, _ = loop_mine_gradient(loop, average=average, decay=0.6)
    torch.testing.assert_close(again.grad, torch.tensor(expected, dtype=torch.float64))
    assert (again.grad - scores.grad).abs().max() > 1e-3
    torch.testing.assert_close(first, second)


def test_without_memory_mine_is_donsker_varadhan():
    mine, plain = leaf(draw(5, 5)), leaf(draw(5, 5))
    bound, log_average = mine_bound(mine, log_average=3.0, decay=0.0)
    bound.backward()
    donsker_varadhan_bound(plain).backward()
    torch.testing.assert_close(mine.grad, plain.grad)
    assert log_average.isfinite()


def test_mine_stays_finite_at_an_inverse_temperature_of_100_in_float32():
    scores = (100 * draw(4, 4).tanh()).float().requires_grad_()
    bound, log_average = mine_bound(scores)
    bound.backward()
    assert bound.isfinite()
    assert log_average.isfinite()
    assert scores.grad.isfinite().all()


@pytest.mark.parametrize("score", [-200.0, -1.0, 0.0, 1.0, 21.0, 200.0])
def test_softplus_is_exact_everywhere(score):
    x = leaf(torch.tensor(score))
    found = softplus(x)
    found.backward()
    assert found.item() == pytest.approx(max(score, 0) + math.log1p(math.exp(-abs(score))), rel=1e-15)
    assert x.grad.item() == pytest.approx(1 / (1 + math.exp(-score)), rel=1e-15)


@pytest.mark.parametrize(
    "estimator",
    [SigmoidPairs(), JensenShannon(), DonskerVaradhan(), Interpolated(), Interpolated(alpha_logit=-60.0)],
    ids=str,
)
def test_estimators_without_a_safe_temperature_are_finite_in_float32_at_100(estimator):
    assert smallest_safe_temperature(estimator.kind) == 0
    scores = torch.full((6, 6), 100.0).fill_diagonal_(-100.0).requires_grad_()
    found = estimate(estimator, PairTable.square(scores))
    found.backward()
    assert found.isfinite()
    assert scores.grad.isfinite().all()


@pytest.mark.parametrize("estimator", [NWJ(), TUBA()], ids=str)
def test_exponential_estimators_hold_down_to_their_safe_temperature(estimator):
    assert estimator.kind in EXP_ESTIMATORS
    cosines = torch.ones(6, 6).fill_diagonal_(-1.0)

    def at(temperature):
        scores = (cosines / temperature).requires_grad_()
        table = replace(PairTable.square(scores), log_baseline=torch.ones(6))
        found = estimate(estimator, table)
        found.backward()
        return found, scores.grad / temperature

    value, gradient = at(smallest_safe_temperature(estimator.kind))
    assert value.item() == pytest.approx(math.exp(79.0) + 80.0, rel=1e-5)
    assert gradient.isfinite().all()
    beyond, _ = at(0.01)
    assert beyond.isinf()


def test_a_finite_mean_survives_a_sum_that_would_overflow():
    scores = torch.full((6, 6), 89.0).requires_grad_()
    found = estimate(NWJ(), PairTable.square(scores))
    found.backward()
    assert found.item() == pytest.approx(math.exp(88.0), rel=1e-5)
    assert scores.grad.isfinite().all()
    # negative control: the plain sum of the same terms
    assert torch.full((30,), 88.0).exp().sum().isinf()


def test_a_baseline_takes_large_scores_back_before_they_are_exponentiated():
    table = replace(PairTable.square(torch.full((4, 4), 150.0)), log_baseline=torch.full((4,), 149.0))
    assert estimate(TUBA(), table).item() == pytest.approx(math.e - 2.0, rel=1e-6)
    assert torch.tensor(150.0).exp().isinf()


@pytest.mark.parametrize("estimator", NEW, ids=str)
def test_half_precision_scores_are_raised_by_the_caller(estimator):
    half = draw(3, 5).bfloat16()
    baseline = BASELINE.float()
    found = estimate(estimator, replace(masked_table(at_least_float32(half)), log_baseline=baseline))
    exact = estimate(estimator, masked_table(half.double()))
    assert found.dtype == torch.float32
    # float32 keeps seven digits; bfloat16 would keep three
    assert found.item() == pytest.approx(exact.item(), rel=1e-5)
    kept = estimate(estimator, replace(masked_table(half), log_baseline=BASELINE.bfloat16()))
    assert abs(kept.item() - exact.item()) > 1e-4


SQUARE = torch.zeros(3, 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: estimate(TUBA(), PairTable.square(SQUARE)), "'tuba' needs a log-baseline per query"),
        *(
            (lambda e=e: estimate(e, PairTable.square(torch.zeros(1, 1))), "at least 2 candidates, got 1")
            for e in NEW
        ),
        (lambda: Interpolated(alpha_logit=61.0), "alpha_logit must be between -60 and 60, got 61.0"),
        (lambda: Interpolated(alpha_logit=math.nan), "alpha_logit must be between -60 and 60, got nan"),
        (lambda: smile_bound(SQUARE, clip=0.0), "clip must be > 0, got 0.0"),
        (lambda: mine_bound(SQUARE, decay=1.0), r"decay must be in \[0, 1\), got 1.0"),
        (lambda: nwj_bound(torch.zeros(2, 3)), r"a square table is needed, got shape \(2, 3\)"),
        (lambda: info_nce_bound(torch.zeros(2, 3)), r"a square table is needed, got shape \(2, 3\)"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()
