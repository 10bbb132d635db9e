"""Estimators on pair tables: loops, limits, masks, refusals."""

import math

import pytest
import torch
from torch import Tensor

from models.estimators import (
    DonskerVaradhan,
    InfoLOOB,
    InfoNCE,
    JensenShannon,
    RelationKL,
    SoftKL,
    donsker_varadhan,
    info_loob,
    info_nce,
    jensen_shannon,
    symmetric,
)
from models.pair_table import PairTable
from models.targets import soft_targets
from tests.golden_files import leaf
from tests.oracles.contrastive import (
    LoopTable,
    loop_ce,
    loop_dv,
    loop_jsd,
    loop_kl,
    loop_loob,
    loop_relation_kl,
    loop_soft_ce,
)

HARD = [InfoNCE(), InfoLOOB(), JensenShannon(), DonskerVaradhan()]
SOFT = [InfoNCE(), SoftKL(), SoftKL(direction="symmetric"), RelationKL(), RelationKL(direction="symmetric")]
SQUARE = [info_nce, info_loob, jensen_shannon, donsker_varadhan]


def draw(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def loss(estimator, table: PairTable) -> Tensor:
    return estimator.reduce(estimator.rows(table))


def masked_table(scores: Tensor, *, seed: int = 9) -> PairTable:
    """Three of five rows of a global table, a third of the candidates taken out, own pair always in."""
    positive = torch.tensor([1, 2, 4])
    is_valid = torch.rand(3, 5, generator=torch.Generator().manual_seed(seed)) > 1 / 3
    return PairTable(scores, positive, is_valid=is_valid.scatter(1, positive[:, None], True))


@pytest.mark.parametrize("masked", [False, True])
def test_estimators_equal_the_loops(masked):
    scores = 3 * draw(3, 5)
    table = masked_table(scores)
    if not masked:
        table = PairTable(scores, table.positive)
    loop = LoopTable(scores, table.positive.tolist(), table.is_valid)
    for estimator, expected in (
        (InfoNCE(), sum(loop_ce(loop)) / 3),
        (InfoLOOB(), sum(loop_loob(loop)) / 3),
        (JensenShannon(), loop_jsd(loop)),
        (DonskerVaradhan(), loop_dv(loop)),
    ):
        assert loss(estimator, table).item() == pytest.approx(expected, rel=1e-13)
        other = PairTable(scores, table.positive.roll(1), is_valid=table.is_valid)
        assert abs(loss(estimator, other).item() - expected) > 1e-3


@pytest.mark.parametrize("masked", [False, True])
def test_soft_estimators_equal_the_loops(masked):
    scores = 3 * draw(3, 5)
    table = masked_table(scores)
    is_valid = table.is_valid if masked else None
    log_targets = soft_targets(
        draw(3, 5, seed=1), table.positive, temperature=1.0, mixing=0.6, is_valid=is_valid
    )
    table = PairTable(scores, table.positive, log_targets=log_targets, is_valid=is_valid)
    loop, targets = LoopTable(scores, table.positive.tolist(), is_valid), log_targets.exp()
    for estimator, rows in (
        (InfoNCE(), loop_soft_ce(loop, targets)),
        (SoftKL(), loop_kl(loop, targets)),
        (SoftKL(direction="symmetric"), loop_kl(loop, targets, symmetric=True)),
        (RelationKL(), loop_relation_kl(loop, targets)),
        (RelationKL(direction="symmetric"), loop_relation_kl(loop, targets, symmetric=True)),
    ):
        torch.testing.assert_close(estimator.rows(table)[:, 0], torch.tensor(rows, dtype=torch.float64))
    hard = PairTable(scores, table.positive, is_valid=is_valid)
    assert abs(loss(InfoNCE(), hard) - loss(InfoNCE(), table)) > 1e-2


@pytest.mark.parametrize("objective", SQUARE)
def test_the_order_of_pairs_is_irrelevant(objective):
    logits, order = draw(8, 8), torch.randperm(8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(objective(logits[order][:, order]), objective(logits))
    assert not torch.isclose(objective(logits[order]), objective(logits))


@pytest.mark.parametrize(
    ("objective", "expected"),
    [
        (info_nce, math.log(7)),
        (info_loob, math.log(6)),
        (jensen_shannon, 2 * math.log(2)),
        (donsker_varadhan, 0.0),
    ],
)
def test_equal_scores_have_the_closed_value(objective, expected):
    assert objective(torch.zeros(7, 7, dtype=torch.float64)).item() == pytest.approx(expected, abs=1e-14)


def test_temperature_limits_of_info_nce():
    matched = torch.eye(5, dtype=torch.float64)
    assert info_nce(matched / 1e-3).item() == pytest.approx(0.0, abs=1e-12)
    assert info_nce(matched / 1e9).item() == pytest.approx(math.log(5))
    assert info_nce(matched.roll(1, 0) / 1e-3).item() == pytest.approx(1000.0)
    # without its positive in the denominator the loss has no floor: it falls as 1 / temperature
    assert info_loob(matched / 1e-3).item() == pytest.approx(math.log(4) - 1000.0)


@pytest.mark.parametrize("estimator", HARD, ids=lambda e: e.kind)
def test_gradients_pass_gradcheck(estimator):
    def total(scores):
        return loss(estimator, masked_table(scores))

    assert torch.autograd.gradcheck(total, [leaf(draw(3, 5))])


@pytest.mark.parametrize("estimator", SOFT, ids=str)
def test_soft_gradients_pass_gradcheck(estimator):
    positive = torch.arange(4)
    log_targets = soft_targets(draw(4, 4, seed=1), positive, temperature=1.0, mixing=0.6)

    def total(scores):
        return loss(estimator, PairTable(scores, positive, log_targets=log_targets))

    assert torch.autograd.gradcheck(total, [leaf(draw(4, 4))])


@pytest.mark.parametrize("inverse_temperature", [30.0, 100.0])
def test_leaving_the_positive_out_stays_exact_when_it_dominates(inverse_temperature):
    cosines = draw(6, 6, seed=2).tanh() * 0.5
    cosines.fill_diagonal_(1.0)
    logits = (inverse_temperature * cosines).float()
    expected = torch.tensor(loop_loob(LoopTable(logits, list(range(6)))), dtype=torch.float64)
    found = InfoLOOB().rows(PairTable.square(logits))[:, 0]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-6)
    # negative control: taking the positive out of the whole sum by subtraction loses it
    own, everything = logits.diagonal(), logits.logsumexp(1)
    subtracted = everything + torch.log1p(-torch.exp(own - everything).clamp(max=1 - 1e-7)) - own
    assert (subtracted.double() - expected).abs().max() > 1


@pytest.mark.parametrize("score", [-200.0, 200.0])
def test_jensen_shannon_is_finite_at_large_scores_in_float32(score):
    scores = torch.full((3, 3), score).requires_grad_()
    found = jensen_shannon(scores)
    found.backward()
    assert found.item() == pytest.approx(200.0)
    assert scores.grad.isfinite().all()
    assert torch.sigmoid(torch.tensor(-200.0)).log().isinf()


@pytest.mark.parametrize("estimator", HARD, ids=lambda e: e.kind)
def test_excluded_candidates_have_no_say(estimator):
    values, gradients = [], []
    is_valid = masked_table(draw(3, 5)).is_valid
    for filler in (0.0, 50.0):
        scores = leaf(draw(3, 5).masked_fill(~is_valid, filler))
        found = loss(estimator, masked_table(scores))
        found.backward()
        assert (scores.grad[~is_valid] == 0).all()
        assert (scores.grad[is_valid] != 0).all()
        values.append(found.detach())
        gradients.append(scores.grad)
    assert torch.equal(values[0], values[1])
    assert torch.equal(gradients[0], gradients[1])
    assert not torch.isclose(loss(estimator, PairTable(scores, masked_table(scores).positive)), values[0])


@pytest.mark.parametrize("estimator", HARD, ids=lambda e: e.kind)
def test_slices_of_rows_reduce_to_the_whole_table(estimator):
    table = PairTable.square(draw(6, 6))
    slices = [PairTable(table.scores[rows], table.positive[rows]) for rows in (slice(0, 2), slice(2, 6))]
    gathered = torch.cat([estimator.rows(part) for part in slices])
    torch.testing.assert_close(estimator.reduce(gathered), loss(estimator, table))


def test_a_mean_of_workers_losses_is_another_donsker_varadhan():
    table = PairTable.square(2 * draw(6, 6))
    parts = [PairTable(table.scores[rows], table.positive[rows]) for rows in (slice(0, 3), slice(3, 6))]
    mean = torch.stack([loss(DonskerVaradhan(), part) for part in parts]).mean()
    assert abs(mean - loss(DonskerVaradhan(), table)) > 1e-3


@pytest.mark.parametrize("estimator", [*HARD[1:], *SOFT[3:]], ids=str)
def test_a_row_without_negatives_leaves_the_mean(estimator):
    """All candidates of the first row are excluded; what is left must stay a number, gradients included."""
    is_valid = torch.ones(3, 3, dtype=torch.bool)
    is_valid[0] = torch.tensor([True, False, False])
    positive = torch.arange(3)
    log_targets = None
    if estimator in SOFT:
        log_targets = soft_targets(
            draw(3, 3, seed=1), positive, temperature=1.0, mixing=0.6, is_valid=is_valid
        )
    scores = leaf(draw(3, 3))
    table = PairTable(scores, positive, log_targets=log_targets, is_valid=is_valid)
    found = loss(estimator, table)
    found.backward()
    assert found.isfinite()
    assert scores.grad.isfinite().all()
    assert (scores.grad[0, 1:] == 0).all()
    if estimator.kind in ("loob", "relation_kl"):
        left = None if log_targets is None else log_targets[1:]
        alone = PairTable(scores[1:], positive[1:], log_targets=left, is_valid=is_valid[1:])
        torch.testing.assert_close(found, loss(estimator, alone))
        assert (scores.grad[0] == 0).all()


def test_pooled_negatives_of_a_row_without_any_equal_the_loops():
    is_valid = torch.ones(3, 3, dtype=torch.bool)
    is_valid[0] = torch.tensor([True, False, False])
    for estimator, loop in ((JensenShannon(), loop_jsd), (DonskerVaradhan(), loop_dv)):
        scores = draw(3, 3)
        found = loss(estimator, PairTable(scores, torch.arange(3), is_valid=is_valid))
        assert found.item() == pytest.approx(loop(LoopTable(scores, [0, 1, 2], is_valid)))


ONE = torch.zeros(1, 1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        *(((lambda f=f: f(ONE)), "at least 2 candidates, got 1; raise the global batch") for f in SQUARE),
        (lambda: info_nce(torch.zeros(2, 3)), r"a square table is needed, got shape \(2, 3\)"),
        (lambda: info_nce(torch.zeros(3)), r"a square table is needed, got shape \(3,\)"),
        (lambda: symmetric(SoftKL(), torch.zeros(2, 2)), "'kl' needs soft targets; set targets.kind=soft"),
        (lambda: symmetric(RelationKL(), torch.zeros(2, 2)), "'relation_kl' needs soft targets"),
        (lambda: symmetric(SoftKL(), ONE), "needs at least 2 candidates, got 1"),
        (lambda: symmetric(RelationKL(), ONE), "needs at least 2 candidates, got 1"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()
