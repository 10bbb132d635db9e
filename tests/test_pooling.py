"""Region pools: loops, order, pads, workers, limits, extreme logits, refusals."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.attended_pooling import attention_pool, global_mean_pool, non_local_pool
from models.region_pooling import (
    best_region,
    neutral_noisy_or_bias,
    noisy_or,
    pool_lse,
    pool_max,
    pool_mean,
    select_regions,
)
from tests.bag_fixture import draw, gradient, weights
from tests.golden_files import leaf
from tests.oracles import pooling as oracle

B, P, N, D = 3, 6, 5, 4
SCORES, REGIONS, TEXTS = draw(B, P, N), draw(B, P, D, seed=1), draw(N, D, seed=2)
PROJECTION = draw(D, D, seed=3)
IS_REGION = torch.arange(P) < torch.tensor([[6], [4], [1]])
OTHER_MASK = IS_REGION.flip(1)
OWN = torch.tensor([1, 4, 2])

# Scores [B, P, N], mask -> [B, N].
SCORE_POOLS = {
    "max": lambda s, m: pool_max(s, is_region=m),
    "mean": lambda s, m: pool_mean(s, is_region=m),
    "lse": lambda s, m: pool_lse(s, 3.0, is_region=m),
    "noisy_or": lambda s, m: noisy_or(s, is_region=m),
    "select": lambda s, m: select_regions(s, OWN, rule="select", is_region=m),
    "pmi": lambda s, m: select_regions(s, OWN, rule="pmi", is_region=m),
}
SCORE_LOOPS = {
    "max": lambda s, m: oracle.loop_scores(s, m, max),
    "mean": lambda s, m: oracle.loop_scores(s, m, lambda bag: sum(bag) / len(bag)),
    "lse": lambda s, m: oracle.loop_scores(s, m, lambda bag: oracle.log_mean_exp(bag, 3.0)),
    "noisy_or": lambda s, m: oracle.loop_scores(s, m, oracle.log_odds_of_any),
    "select": lambda s, m: oracle.loop_select(s, m, positive=OWN.tolist(), rule="select"),
    "pmi": lambda s, m: oracle.loop_select(s, m, positive=OWN.tolist(), rule="pmi"),
}
# Regions [B, P, D], mask, texts [N, D] -> [B, N].
VECTOR_POOLS = {
    "global": lambda r, m, t: global_mean_pool(r, t, is_region=m),
    "attention": lambda r, m, t: attention_pool(r, t, temperature=0.3, is_region=m),
    "non_local": lambda r, m, t: non_local_pool(r, t, PROJECTION, is_region=m),
}
VECTOR_LOOPS = {
    "global": lambda r, m, t: oracle.loop_global_mean(r, t, m),
    "attention": lambda r, m, t: oracle.loop_attention(r, t, m, temperature=0.3),
    "non_local": lambda r, m, t: oracle.loop_non_local(r, t, m, projection=PROJECTION),
}
# Everything as a function of one bag [B, P, N or D] and its mask.
POOLS = SCORE_POOLS | {
    name: (lambda r, m, pool=pool: pool(r, m, TEXTS)) for name, pool in VECTOR_POOLS.items()
}
LOOPS = SCORE_LOOPS | {
    name: (lambda r, m, loop=loop: loop(r, m, TEXTS)) for name, loop in VECTOR_LOOPS.items()
}
each_pool = pytest.mark.parametrize("name", POOLS)


def bags(name: str) -> Tensor:
    return SCORES if name in SCORE_POOLS else REGIONS


def table(rows: oracle.Rows) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


@each_pool
@pytest.mark.parametrize("mask", [None, IS_REGION], ids=["full", "padded"])
def test_pools_equal_their_loops(name, mask):
    found = POOLS[name](bags(name), mask)
    torch.testing.assert_close(found, table(LOOPS[name](bags(name), mask)))
    assert not torch.allclose(found, POOLS[name](bags(name).roll(1, 0), mask))


@each_pool
def test_gradients_pass_gradcheck(name):
    assert torch.autograd.gradcheck(lambda bag: POOLS[name](bag, IS_REGION), leaf(bags(name)))


@pytest.mark.parametrize("name", VECTOR_POOLS)
def test_gradients_in_the_texts_pass_gradcheck(name):
    assert torch.autograd.gradcheck(lambda t: VECTOR_POOLS[name](REGIONS, IS_REGION, t), leaf(TEXTS))


@each_pool
def test_the_order_of_regions_is_irrelevant(name):
    order = torch.tensor([3, 5, 0, 1, 4, 2])
    pool = POOLS[name]
    torch.testing.assert_close(pool(bags(name)[:, order], None), pool(bags(name), None))
    moved = gradient(lambda bag: pool(bag, None), bags(name)[:, order])
    stayed = gradient(lambda bag: pool(bag, None), bags(name))
    torch.testing.assert_close(moved, stayed[:, order])
    assert not torch.allclose(pool(bags(name)[:, 1:], None), pool(bags(name), None))


@each_pool
@pytest.mark.parametrize("junk", [0.0, 50.0, math.nan, math.inf, -math.inf])
def test_pads_change_no_value_and_get_no_gradient(name, junk):
    pool, bag = POOLS[name], bags(name)
    with_junk = bag.masked_fill(~IS_REGION[:, :, None], junk)
    assert torch.equal(pool(with_junk, IS_REGION), pool(bag, IS_REGION))
    found = gradient(lambda x: pool(x, IS_REGION), with_junk)
    assert found.isfinite().all()
    assert (found[~IS_REGION] == 0).all()
    assert (found[IS_REGION] != 0).any()
    assert not torch.allclose(pool(bag, OTHER_MASK), pool(bag, IS_REGION))


@each_pool
def test_images_are_pooled_alone(name):
    """So each worker pools its own: the rows of two workers are the rows of one."""
    if name in ("select", "pmi"):
        whole = select_regions(SCORES, OWN, rule=name)
        parts = [select_regions(SCORES[s], OWN[s], rule=name) for s in (slice(0, 1), slice(1, 3))]
        assert not torch.allclose(select_regions(SCORES, OWN.roll(1), rule=name), whole)
    else:
        whole = POOLS[name](bags(name), None)
        parts = [POOLS[name](bags(name)[s], None) for s in (slice(0, 1), slice(1, 3))]
    torch.testing.assert_close(torch.cat(parts), whole)


@each_pool
def test_a_single_region_is_its_own_pool(name):
    one = bags(name)[:, :1]
    expected = (
        one[:, 0] if name in SCORE_POOLS else F.normalize(one[:, 0], dim=1) @ F.normalize(TEXTS, dim=1).T
    )
    torch.testing.assert_close(POOLS[name](one, None), expected)


@each_pool
def test_half_precision_is_pooled_in_float32(name):
    half = bags(name).bfloat16()
    found = POOLS[name](half, None) if name in SCORE_POOLS else half_vectors(name, half)
    assert found.dtype == torch.float32
    expected = POOLS[name](half.double(), None) if name in SCORE_POOLS else half_vectors(name, half.double())
    torch.testing.assert_close(found.double(), expected, rtol=2e-5, atol=2e-5)


def half_vectors(name: str, regions: Tensor) -> Tensor:
    texts = TEXTS.bfloat16().to(regions.dtype)
    if name == "non_local":
        projection = PROJECTION.float().to(torch.promote_types(regions.dtype, torch.float32))
        return non_local_pool(regions, texts, projection)
    return VECTOR_POOLS[name](regions, None, texts)


def test_equal_best_regions_share_the_gradient():
    tied = torch.tensor([[[2.0], [2.0], [1.0]]], dtype=torch.float64)
    found = gradient(lambda bag: pool_max(bag), tied).flatten()
    assert found[0] == found[1] != 0
    assert found[2] == 0


def test_limits_of_log_mean_exp_are_the_mean_and_the_maximum():
    # Log P / sharpness loses the digits of float64 that 1 / sharpness gains: 1e-6 leaves ten.
    torch.testing.assert_close(pool_lse(SCORES, 1e-6), pool_mean(SCORES), atol=1e-5, rtol=0)
    torch.testing.assert_close(pool_lse(SCORES, 1e5), pool_max(SCORES), atol=1e-4, rtol=0)
    between = pool_lse(SCORES, 3.0)
    assert (pool_mean(SCORES) < between).all()
    assert (between < pool_max(SCORES)).all()


@pytest.mark.parametrize("num_copies", [2, 7])
def test_log_mean_exp_does_not_grow_with_the_grid(num_copies):
    torch.testing.assert_close(pool_lse(SCORES.repeat(1, num_copies, 1), 3.0), pool_lse(SCORES, 3.0))
    assert (noisy_or(SCORES.repeat(1, num_copies, 1)) > noisy_or(SCORES)).all()


def test_limits_of_attention_are_the_best_and_the_mean_region():
    cosines = torch.einsum("bpd,nd->bpn", F.normalize(REGIONS, dim=2), F.normalize(TEXTS, dim=1))
    torch.testing.assert_close(attention_pool(REGIONS, TEXTS, temperature=1e-4), pool_max(cosines))
    flat = attention_pool(REGIONS, TEXTS, temperature=1e9)
    torch.testing.assert_close(flat, global_mean_pool(REGIONS, TEXTS))
    assert not torch.allclose(attention_pool(REGIONS, TEXTS, temperature=1.0), flat)


def test_non_local_attention_without_projection_is_the_mean_region():
    flat = non_local_pool(REGIONS, TEXTS, torch.zeros_like(PROJECTION))
    torch.testing.assert_close(flat, global_mean_pool(REGIONS, TEXTS))


def test_regions_that_cancel_keep_their_cosine_within_one():
    """Float32 lengths out of a Gram matrix have no correct digit here."""
    some = draw(40, 6, 64, seed=5).float()
    cancelling = torch.cat([some, -some.sum(1, keepdim=True)], 1)
    texts = draw(30, 64, seed=6).float()
    assert (attention_pool(cancelling, texts, temperature=1e9).abs() <= 1 + 1e-6).all()
    assert attention_pool(torch.zeros(1, 3, 64), texts, temperature=1.0).eq(0).all()


# Noisy-or


@pytest.mark.parametrize("num_regions", [1, 16, 49, 2000])
def test_noisy_or_of_undecided_regions_has_the_closed_value(num_regions):
    logits = torch.zeros(1, num_regions, 1, dtype=torch.float64)
    expected = num_regions * math.log(2) + math.log1p(-(2.0**-num_regions))
    assert noisy_or(logits).item() == pytest.approx(expected, abs=1e-12)
    slope = gradient(noisy_or, logits) / weights(1, 1)
    torch.testing.assert_close(slope, torch.full_like(slope, 0.5 / (1 - 2.0**-num_regions)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("logit", [-2000.0, -110.0, -60.0, -40.1, -39.9, -16.0])
def test_noisy_or_of_impossible_regions_is_the_sum_of_their_odds(logit, dtype):
    logits = (logit + torch.arange(7.0, dtype=dtype) / 10)[None, :, None]
    # softplus(z) is exp(z) to a relative 1e-7 at -16 and better below.
    torch.testing.assert_close(noisy_or(logits), logits.logsumexp(1), atol=1e-6, rtol=1e-6)
    variable = logits.clone().requires_grad_()
    noisy_or(variable).sum().backward()
    torch.testing.assert_close(variable.grad, logits.softmax(1), atol=1e-5, rtol=0)


@pytest.mark.parametrize("logit", [25.0, 1000.0, 1e6])
def test_noisy_or_of_certain_regions_is_their_sum(logit):
    logits = torch.full((1, 196, 1), logit)
    torch.testing.assert_close(noisy_or(logits), logits.sum(1))
    torch.testing.assert_close(gradient(noisy_or, logits) / weights(1, 1), torch.ones(1, 196, 1).double())


def test_noisy_or_has_no_seam_between_its_forms():
    """Sums from 1e-6 to 10, across the change at 1e-2."""
    sums = torch.logspace(-6, 1, 300, dtype=torch.float64)
    logits = torch.expm1(sums / 3).log()[None, None].expand(1, 3, -1)
    torch.testing.assert_close(noisy_or(logits)[0], torch.expm1(sums).log(), rtol=1e-13, atol=1e-13)
    variable = leaf(logits)
    noisy_or(variable).sum().backward()
    slope = torch.sigmoid(logits) / -torch.expm1(-sums)
    torch.testing.assert_close(variable.grad, slope, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(("num_regions", "bias"), [(16, -3.12), (49, -4.25), (196, -5.64), (1, 0.0)])
def test_the_neutral_bias_leaves_a_bag_undecided(num_regions, bias):
    found = neutral_noisy_or_bias(num_regions)
    assert found == pytest.approx(bias, abs=5e-3)
    logits = torch.full((1, num_regions, 1), found, dtype=torch.float64)
    assert noisy_or(logits).item() == pytest.approx(0.0, abs=1e-12)
    assert noisy_or(logits + 0.1).item() > 0.05


# Chosen regions


@pytest.mark.parametrize("mask", [None, IS_REGION])
def test_the_best_region_is_the_one_whose_score_is_the_maximum(mask):
    best = best_region(SCORES, is_region=mask)
    assert (best.shape, best.dtype) == ((B, N), torch.int64)
    torch.testing.assert_close(SCORES.gather(1, best[:, None])[:, 0], pool_max(SCORES, is_region=mask))
    assert (best < (P if mask is None else mask.sum(1, keepdim=True))).all()


def test_a_region_that_fits_every_text_is_chosen_by_score_and_not_by_pmi():
    scores = torch.zeros(1, 2, 4)
    scores[0, 0] = 3.0
    scores[0, 1, 2] = 2.0
    own = torch.tensor([2])
    assert torch.equal(select_regions(scores, own, rule="select"), scores[:, 0])
    assert torch.equal(select_regions(scores, own, rule="pmi"), scores[:, 1])
    assert torch.equal(
        select_regions(scores, own, rule="pmi", is_region=torch.tensor([[True, False]])), scores[:, 0]
    )


@pytest.mark.parametrize("rule", ["select", "pmi"])
def test_only_the_chosen_region_gets_a_gradient(rule):
    found = gradient(lambda bag: select_regions(bag, OWN, rule=rule), SCORES)
    assert ((found != 0).any(2).sum(1) == 1).all()
    assert ((gradient(pool_max, SCORES) != 0).any(2).sum(1) > 1).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pool_lse(SCORES, 0.0), "sharpness must be > 0, got 0.0"),
        (lambda: pool_lse(SCORES, math.nan), "sharpness must be > 0, got nan"),
        (lambda: attention_pool(REGIONS, TEXTS, temperature=-1.0), "temperature must be > 0, got -1.0"),
        (lambda: neutral_noisy_or_bias(0), "num_regions must be >= 1, got 0"),
        (lambda: select_regions(SCORES, OWN, rule="best"), "rule must be select or pmi, got best"),
        (
            lambda: best_region(SCORES, is_region=IS_REGION[:2]),
            r"is_region must be \[B, P\] = \(3, 6\), got \(2, 6\)",
        ),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@each_pool
def test_a_mask_of_another_shape_is_refused(name):
    with pytest.raises(ValueError, match=r"is_region must be \[B, P\] = \(3, 6\), got \(2, 6\)"):
        POOLS[name](bags(name), IS_REGION[:2])
