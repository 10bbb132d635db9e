"""Local-global losses: Deep InfoMax's released values and gradients, loops, workers, limits, refusals."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.divergences import (
    MEASURES,
    as_queries,
    divergence_rows,
    f_divergence,
    local_global_scores,
    local_info_nce,
    local_info_nce_rows,
    negative_terms,
    one_negative_jsd,
    one_negative_jsd_rows,
    positive_terms,
    reduce_divergence,
)
from models.gather import SingleProcess
from tests.golden_files import assert_golden, leaf, tensors
from tests.oracles.divergences import loop_f_divergence, loop_local_info_nce


def draw(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def released() -> tuple[dict[str, Tensor], Tensor, Tensor]:
    golden = tensors("localmi_dim_official")
    return golden, leaf(golden["l"]), leaf(golden["m"])


@pytest.mark.parametrize("measure", MEASURES)
def test_divergences_equal_deep_infomax(measure):
    golden, locals_, globals_ = released()
    found = f_divergence(locals_, globals_, measure=measure)
    key = f"fd_{measure.upper()}"
    assert_golden(found, golden[key])
    found.backward()
    assert_golden(locals_.grad, golden[f"{key}_gradl"])
    assert_golden(globals_.grad, golden[f"{key}_gradm"])
    mispaired = f_divergence(locals_, globals_.roll(1, 0), measure=measure)
    assert abs(mispaired - golden[key]) > 1e-2


def test_info_nce_equals_deep_infomax_with_its_masking_score():
    golden, locals_, globals_ = released()
    found = local_info_nce(locals_, globals_, own_image_score=-10.0)
    assert_golden(found, golden["nce"])
    found.backward()
    assert_golden(locals_.grad, golden["nce_gradl"])
    assert_golden(globals_.grad, golden["nce_gradm"])
    assert abs(local_info_nce(locals_, globals_, own_image_score=-9.0) - golden["nce"]) > 1e-6


def test_info_nce_without_own_locals_equals_the_exact_value():
    golden, locals_, globals_ = released()
    assert_golden(local_info_nce(locals_, globals_), golden["nce_exact_mask"])
    assert abs(golden["nce"] - golden["nce_exact_mask"]) > 1e-6


@pytest.mark.parametrize("measure", MEASURES)
def test_divergences_equal_the_loop(measure):
    locals_, globals_ = draw(4, 3, 2), draw(4, 3, 2, seed=1)
    valid = torch.ones(4, 4, dtype=torch.bool)
    valid[0, 1] = valid[1, 0] = False
    scores = local_global_scores(locals_, globals_)
    rows = divergence_rows(scores, torch.arange(4), measure=measure, is_valid_BN=valid)
    expected = loop_f_divergence(locals_, globals_, measure=measure, valid=valid.tolist())
    assert reduce_divergence(rows).item() == pytest.approx(expected, abs=1e-11)
    everything = f_divergence(locals_, globals_, measure=measure).item()
    assert everything == pytest.approx(loop_f_divergence(locals_, globals_, measure=measure), abs=1e-11)
    assert abs(everything - expected) > 1e-3


@pytest.mark.parametrize("own_image_score", [None, -1.0])
def test_info_nce_equals_the_loop(own_image_score):
    locals_, globals_ = draw(4, 3, 2), draw(4, 3, 2, seed=1)
    valid = torch.ones(4, 4, dtype=torch.bool)
    valid[0, 1] = valid[1, 0] = False
    rows = local_info_nce_rows(
        local_global_scores(locals_, globals_),
        torch.arange(4),
        gather=SingleProcess(),
        is_valid_BN=valid,
        own_image_score=own_image_score,
    )
    masked = loop_local_info_nce(locals_, globals_, own_image_score=own_image_score, valid=valid.tolist())
    assert rows.mean().item() == pytest.approx(masked, abs=1e-11)
    everything = local_info_nce(locals_, globals_, own_image_score=own_image_score).item()
    expected = loop_local_info_nce(locals_, globals_, own_image_score=own_image_score)
    assert everything == pytest.approx(expected, abs=1e-11)
    assert abs(masked - expected) > 1e-3


@pytest.mark.parametrize(
    "loss",
    [*(partial(f_divergence, measure=measure) for measure in MEASURES), local_info_nce],
    ids=[*MEASURES, "nce"],
)
def test_pairs_locals_and_globals_may_be_permuted(loss):
    locals_, globals_ = draw(4, 3, 5), draw(4, 3, 2, seed=1)
    order, inner = torch.tensor([2, 0, 3, 1]), torch.tensor([4, 1, 0, 3, 2])
    value = loss(locals_, globals_)
    torch.testing.assert_close(loss(locals_[order][:, :, inner], globals_[order].flip(2)), value)
    assert abs(loss(locals_[order], globals_) - value) > 1e-4


class WholeBatch:
    """Stands for one worker of several: hands out rows that were prepared for all of them."""

    def __init__(self, whole: Tensor, *, rank: int, world: int) -> None:
        self.whole, self.rank, self.world = whole, rank, world

    def __call__(self, local: Tensor) -> Tensor:
        torch.testing.assert_close(local, self.whole[self.rank * len(local) :][: len(local)])
        return self.whole


def parts(locals_: Tensor, globals_: Tensor, world: int) -> list[tuple[Tensor, Tensor]]:
    """Each worker's scores and own columns."""
    size = len(locals_) // world
    own = torch.arange(len(locals_)).split(size)
    return [
        (local_global_scores(mine, globals_), columns)
        for mine, columns in zip(locals_.split(size), own, strict=True)
    ]


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("measure", MEASURES)
def test_divergence_rows_of_workers_make_the_global_loss(measure, world):
    locals_, globals_ = leaf(draw(4, 3, 5)), leaf(draw(4, 3, 2, seed=1))
    rows = [divergence_rows(*part, measure=measure) for part in parts(locals_, globals_, world)]
    found = torch.autograd.grad(reduce_divergence(torch.cat(rows)), [locals_, globals_])
    expected = torch.autograd.grad(f_divergence(locals_, globals_, measure=measure), [locals_, globals_])
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("world", [2, 4])
def test_info_nce_rows_of_workers_make_the_global_loss(world):
    locals_, globals_ = leaf(draw(4, 3, 5)), leaf(draw(4, 3, 2, seed=1))
    shards = parts(locals_, globals_, world)
    lowest = torch.finfo(torch.float64).min
    whole = torch.cat(
        [
            scores.logsumexp(2).masked_fill((torch.arange(4) == own[:, None])[:, :, None], lowest)
            for scores, own in shards
        ]
    )
    rows = [
        local_info_nce_rows(*shard, gather=WholeBatch(whole, rank=rank, world=world))
        for rank, shard in enumerate(shards)
    ]
    loss, expected = torch.cat(rows).mean(), local_info_nce(locals_, globals_)
    torch.testing.assert_close(loss, expected)
    found = torch.autograd.grad(loss, [locals_, globals_])
    torch.testing.assert_close(found, torch.autograd.grad(expected, [locals_, globals_]))
    per_worker = [local_info_nce(locals_[:2], globals_[:2]), local_info_nce(locals_[2:], globals_[2:])]
    assert abs(torch.stack(per_worker).mean() - expected) > 0.01


def test_a_weight_of_zero_drops_a_row():
    rows = divergence_rows(
        local_global_scores(draw(4, 3, 5), draw(4, 3, 2, seed=1)), torch.arange(4), measure="jsd"
    )
    weights = torch.tensor([1.0, 1.0, 0.0, 1.0], dtype=torch.float64)
    torch.testing.assert_close(reduce_divergence(rows, weights), reduce_divergence(rows[[0, 1, 3]]))
    assert abs(reduce_divergence(rows, weights) - reduce_divergence(rows)) > 1e-3


def test_jsd_is_the_pair_tables_estimator_on_queries():
    """Rows of the table are (pair, local, global), its columns pairs: sums and counts as they are."""
    locals_, globals_ = draw(4, 3, 5), draw(4, 3, 2, seed=1)
    scores, positive = as_queries(local_global_scores(locals_, globals_), torch.arange(4))
    is_own = torch.arange(4) == positive[:, None]
    table = F.softplus(-scores[is_own]).mean()
    table = table + F.softplus(scores[~is_own]).mean()
    torch.testing.assert_close(table - 2 * math.log(2), f_divergence(locals_, globals_, measure="jsd"))


def test_equal_scores_have_closed_values():
    zeros = torch.zeros(4, 3, 5, dtype=torch.float64), torch.zeros(4, 3, 2, dtype=torch.float64)
    assert f_divergence(*zeros, measure="jsd").item() == pytest.approx(0.0)
    assert f_divergence(*zeros, measure="gan").item() == pytest.approx(2 * math.log(2))
    assert local_info_nce(*zeros).item() == pytest.approx(math.log(1 + 3 * 5))
    assert one_negative_jsd(torch.zeros(3), torch.zeros(3)).item() == pytest.approx(2 * math.log(2))


@pytest.mark.parametrize(("measure", "bound"), [("gan", 0.0), ("jsd", -2 * math.log(2)), ("h2", -2.0)])
def test_bounded_measures_stay_above_their_bound(measure, bound):
    found = negative_terms(torch.tensor(-500.0), measure) - positive_terms(torch.tensor(500.0), measure)
    assert found.item() == pytest.approx(bound, abs=1e-6)


def test_the_released_chi_squared_falls_with_any_large_score():
    """A larger score of a false pair should cost; here it pays."""
    assert negative_terms(torch.tensor(30.0), "x2") < negative_terms(torch.tensor(0.0), "x2") - 100
    others = [measure for measure in MEASURES if measure != "x2"]
    assert all(negative_terms(torch.tensor(30.0), k) > negative_terms(torch.tensor(0.0), k) for k in others)


@pytest.mark.parametrize("measure", ["gan", "jsd", "w1"])
def test_large_scores_stay_finite_in_float32(measure):
    locals_ = (100 * draw(3, 2, 4)).float().requires_grad_()
    f_divergence(locals_, draw(3, 2, 1, seed=1).float(), measure=measure).backward()
    assert locals_.grad.isfinite().all()


def test_excluded_pairs_get_no_gradient_however_large():
    """exp of the excluded score is infinite: it must not reach the gradient as inf * 0."""
    scores = torch.zeros(2, 2, 1, 1)
    scores[0, 1] = 1000.0
    scores.requires_grad_()
    valid = torch.tensor([[True, False], [True, True]])
    reduce_divergence(divergence_rows(scores, torch.arange(2), measure="kl", is_valid_BN=valid)).backward()
    assert scores.grad[0, 1].abs().max() == 0
    assert scores.grad.isfinite().all()


def test_a_global_without_candidates_has_no_loss_and_no_gradient():
    scores = leaf(draw(2, 2, 3, 1))
    nothing = torch.zeros(2, 2, dtype=torch.bool)
    rows = local_info_nce_rows(scores, torch.arange(2), gather=SingleProcess(), is_valid_BN=nothing)
    rows.sum().backward()
    assert rows.abs().max() == 0
    assert scores.grad.abs().max() == 0


def test_half_precision_features_are_compared_in_float32():
    locals_, globals_ = draw(3, 2, 4).bfloat16(), draw(3, 2, 1, seed=1).bfloat16()
    assert f_divergence(locals_, globals_).dtype == torch.float32
    torch.testing.assert_close(
        f_divergence(locals_, globals_), f_divergence(locals_.float(), globals_.float())
    )
    assert one_negative_jsd(locals_[0, 0], locals_[0, 1]).dtype == torch.float32


def test_losses_pass_gradcheck():
    inputs = leaf(draw(3, 2, 3)), leaf(draw(3, 2, 1, seed=1))
    assert torch.autograd.gradcheck(local_info_nce, inputs)
    for measure in MEASURES:
        assert torch.autograd.gradcheck(partial(f_divergence, measure=measure), inputs)


def test_one_negative_jsd_equals_the_probabilities():
    positive, negative = draw(6), draw(6, seed=1)
    expected = -positive.sigmoid().log() - (1 - negative.sigmoid()).log()
    torch.testing.assert_close(one_negative_jsd_rows(positive, negative), expected)
    torch.testing.assert_close(one_negative_jsd(positive, negative), expected.mean())
    assert abs(one_negative_jsd(negative, positive) - expected.mean()) > 0.01


def test_one_negative_jsd_is_finite_at_scores_of_any_size():
    scores = torch.tensor([-1e4, 1e4], requires_grad=True)
    loss = one_negative_jsd(scores, -scores)
    loss.backward()
    assert loss.item() == pytest.approx(1e4)
    assert scores.grad.isfinite().all()


X = torch.ones(2, 3, 4)
ONE = torch.ones(1, 3, 4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: f_divergence(X, X, measure="tv"), "one of gan, jsd, x2, kl, rkl, h2, w1, got 'tv'"),
        (lambda: negative_terms(X, "tv"), "one of gan, jsd, x2, kl, rkl, h2, w1, got 'tv'"),
        (lambda: f_divergence(X, X[:, :2]), r"of one width U are needed, got \[2, 3, 4\] and \[2, 2, 4\]"),
        (lambda: local_info_nce(X, X[0]), r"of one width U are needed, got \[2, 3, 4\] and \[3, 4\]"),
        (lambda: f_divergence(ONE, ONE), "global batch of at least 2 pairs, got 1"),
        (lambda: local_info_nce(ONE, ONE), "global batch of at least 2 pairs, got 1"),
        (lambda: one_negative_jsd(X, X[:1]), r"one negative score, got shapes \[2, 3, 4\] and \[1, 3, 4\]"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()
