"""Relaxed positive pairs: stored values, loops, which pairs lose their gradient, refusals."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.estimators import InfoNCE, estimate, relax, slacken, symmetric
from models.pair_table import PairTable
from tests.golden_files import assert_golden, leaf, tensors
from tests.oracles.bounds import loop_relax
from tests.oracles.contrastive import LoopTable, loop_ce

KINDS = ["cap", "leaky", "cap_all"]
POSITIVE = torch.tensor([1, 2, 0])


def draw(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def relaxed_loss(cosines: Tensor, kind: str, golden: dict[str, Tensor]) -> Tensor:
    tau, own = golden["tau"], torch.arange(len(cosines))
    if kind == "none":
        return symmetric(InfoNCE(), cosines / tau)
    if kind == "hinge":
        both = [InfoNCE().rows(PairTable.square(table / tau))[:, 0] for table in (cosines, cosines.T)]
        return slacken(0.5 * (both[0] + both[1]), golden["delta"].item()).mean()
    table = relax(cosines, own, kind=kind, limit=golden["lam"].item(), slope=golden["slope"].item())
    return symmetric(InfoNCE(), table / tau)


@pytest.mark.parametrize("kind", ["none", *KINDS, "hinge"])
def test_relaxed_losses_equal_the_derived_values(kind):
    golden = tensors("relax_derived")
    key = kind.replace("_", "")
    images, texts = leaf(golden["E"]), leaf(golden["G"])
    cosines = F.normalize(images, dim=1) @ F.normalize(texts, dim=1).T
    assert_golden(cosines, golden["cos"])
    found = relaxed_loss(cosines, kind, golden)
    assert_golden(found, golden[f"{key}_loss"])
    found.backward()
    assert_golden(images.grad, golden[f"{key}_gradE"])
    assert_golden(texts.grad, golden[f"{key}_gradG"])
    mispaired = relaxed_loss(cosines.detach().roll(1, 0), kind, golden)
    assert abs(mispaired - golden[f"{key}_loss"]) > 1e-2


def test_slack_of_a_pair_is_not_slack_of_its_queries():
    """In the stored case one direction of two pairs exceeds the slack, and the mean of both does not."""
    golden = tensors("relax_derived")
    logits, slack = golden["cos"] / golden["tau"], golden["delta"].item()
    expected = 0.0
    for table in (logits, logits.T):
        rows = loop_ce(LoopTable(table, list(range(6))))
        expected += sum(max(row - slack, 0.0) for row in rows) / 12
    found = symmetric(InfoNCE(slack=slack), logits)
    assert found.item() == pytest.approx(expected, rel=1e-12)
    assert found - golden["hinge_loss"] > 0.01


@pytest.mark.parametrize("kind", KINDS)
def test_relaxation_equals_the_loop(kind):
    cosines = draw(3, 5).tanh()
    found = relax(cosines, POSITIVE, kind=kind, limit=0.1, slope=0.3)
    expected = loop_relax(cosines.tolist(), POSITIVE.tolist(), kind=kind, limit=0.1, slope=0.3)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), atol=1e-15, rtol=0)
    assert not torch.equal(found, relax(cosines, POSITIVE.roll(1), kind=kind, limit=-0.5, slope=0.3))


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_pass_gradcheck(kind):
    def total(cosines):
        table = relax(cosines, POSITIVE, kind=kind, limit=0.1, slope=0.3)
        return estimate(InfoNCE(), PairTable(5 * table, POSITIVE))

    assert torch.autograd.gradcheck(total, [leaf(draw(3, 5).tanh())])


@pytest.mark.parametrize("above", [0.0, 0.1])
def test_a_positive_at_or_above_the_limit_gets_no_gradient(above):
    scores = draw(3, 5).tanh().scatter(1, POSITIVE[:, None], 0.8 + above)
    cosines, plain = leaf(scores), leaf(scores)
    table = relax(cosines, POSITIVE, kind="cap", limit=0.8)
    own = PairTable(table, POSITIVE).is_positive
    estimate(InfoNCE(), PairTable(table / 0.07, POSITIVE)).backward()
    estimate(InfoNCE(), PairTable(plain / 0.07, POSITIVE)).backward()
    assert (cosines.grad[own] == 0).all()
    assert (cosines.grad[~own] > 0).all()
    assert (plain.grad[own] < 0).all()
    # a limit in the numerator alone would push the pair apart
    half = leaf(scores)
    (F.cross_entropy(half / 0.07, POSITIVE) + (half - half.detach())[own].sum() / 0.07 / 3).backward()
    assert (half.grad[own] > 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_below_the_limit_nothing_changes(kind):
    cosines = leaf(0.5 * draw(3, 5).tanh())
    table = relax(cosines, POSITIVE, kind=kind, limit=0.9)
    assert torch.equal(table, cosines)
    table.sum().backward()
    assert (cosines.grad == 1).all()


def test_a_leak_of_zero_is_the_cap_and_of_one_is_nothing():
    cosines = draw(3, 5).tanh()
    cap = relax(cosines, POSITIVE, kind="cap", limit=0.1)
    torch.testing.assert_close(relax(cosines, POSITIVE, kind="leaky", limit=0.1, slope=0.0), cap)
    torch.testing.assert_close(relax(cosines, POSITIVE, kind="leaky", limit=0.1, slope=1.0), cosines)
    assert not torch.equal(cap, cosines)


def test_a_query_within_its_slack_has_no_gradient():
    scores = leaf(draw(3, 5).scatter(1, POSITIVE[:, None], torch.tensor([[9.0], [0.0], [9.0]]).double()))
    table = PairTable(scores, POSITIVE)
    rows = InfoNCE(slack=0.2).rows(table)[:, 0]
    torch.testing.assert_close(rows, (InfoNCE().rows(table)[:, 0] - 0.2).clamp(min=0))
    assert torch.equal(rows > 0, torch.tensor([False, True, False]))
    rows.sum().backward()
    assert torch.equal((scores.grad != 0).all(1), torch.tensor([False, True, False]))
    assert torch.equal((scores.grad == 0).all(1), torch.tensor([True, False, True]))


TABLE = torch.zeros(3, 5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: relax(TABLE, POSITIVE, kind="hinge"), "must be cap, leaky or cap_all, got hinge"),
        (lambda: relax(TABLE, POSITIVE, kind="cap", limit=-1.0), r"must be in \(-1, 1\], got -1.0"),
        (lambda: relax(TABLE, POSITIVE, kind="leaky", slope=1.5), r"slope must be in \[0, 1\], got 1.5"),
        (lambda: slacken(TABLE[0], -0.1), "slack must be >= 0, got -0.1"),
        (lambda: relax(TABLE, POSITIVE[:2], kind="cap"), r"must have shape \[3\], got \[2\]"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()
