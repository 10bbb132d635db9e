"""Sentence pools: loop, order, pads, repetition, limits, refusals."""

import math

import pytest
import torch
from torch import Tensor

from models.sentence_pooling import pool_sentences
from tests.bag_fixture import draw, gradient
from tests.golden_files import leaf
from tests.oracles import pooling as oracle

B, N, M = 3, 5, 4
SCORES = draw(B, N, M, seed=8)
IS_SENTENCE = torch.arange(M) < torch.tensor([[4], [2], [1], [3], [4]])
LOOPS = {
    "mean": lambda values: sum(values) / len(values),
    "sum": sum,
    "max": max,
    "lse": lambda values: oracle.log_mean_exp(values, 2.0),
}
each_kind = pytest.mark.parametrize("kind", LOOPS)


@each_kind
def test_sentence_pools_equal_the_loop(kind):
    found = pool_sentences(SCORES, IS_SENTENCE, kind=kind, sharpness=2.0)
    expected = oracle.loop_sentences(SCORES, IS_SENTENCE, LOOPS[kind])
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))
    others = [pool_sentences(SCORES, IS_SENTENCE, kind=k, sharpness=2.0) for k in LOOPS if k != kind]
    assert not any(torch.allclose(found, other) for other in others)


@each_kind
@pytest.mark.parametrize("junk", [0.0, 50.0, math.nan, math.inf, -math.inf])
def test_pads_of_sentences_change_no_value_and_get_no_gradient(kind, junk):
    def pool(scores: Tensor) -> Tensor:
        return pool_sentences(scores, IS_SENTENCE, kind=kind)

    with_junk = SCORES.masked_fill(~IS_SENTENCE, junk)
    assert torch.equal(pool(with_junk), pool(SCORES))
    found = gradient(pool, with_junk)
    assert found.isfinite().all()
    assert (found[:, ~IS_SENTENCE] == 0).all()
    assert (found != 0).any()


@each_kind
def test_the_order_of_sentences_is_irrelevant(kind):
    order = torch.tensor([2, 0, 3, 1])
    expected = pool_sentences(SCORES, IS_SENTENCE, kind=kind)
    torch.testing.assert_close(pool_sentences(SCORES[..., order], IS_SENTENCE[:, order], kind=kind), expected)
    assert not torch.allclose(pool_sentences(SCORES[..., order], IS_SENTENCE, kind=kind), expected)


@each_kind
def test_saying_everything_twice_changes_the_sum_alone(kind):
    twice = pool_sentences(SCORES.repeat(1, 1, 2), IS_SENTENCE.repeat(1, 2), kind=kind)
    once = pool_sentences(SCORES, IS_SENTENCE, kind=kind)
    torch.testing.assert_close(twice, 2 * once if kind == "sum" else once)


@each_kind
def test_sentence_gradients_pass_gradcheck(kind):
    assert torch.autograd.gradcheck(
        lambda scores: pool_sentences(scores, IS_SENTENCE, kind=kind), leaf(SCORES)
    )


def test_limits_of_sentence_log_mean_exp():
    def pool(kind: str, sharpness: float = 1.0) -> Tensor:
        return pool_sentences(SCORES, IS_SENTENCE, kind=kind, sharpness=sharpness)

    torch.testing.assert_close(pool("lse", 1e-6), pool("mean"), atol=1e-5, rtol=0)
    torch.testing.assert_close(pool("lse", 1e5), pool("max"), atol=1e-4, rtol=0)
    assert not torch.allclose(pool("lse"), pool("mean"))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pool_sentences(SCORES, IS_SENTENCE, kind="min"), "kind must be mean, .* got min"),
        (
            lambda: pool_sentences(SCORES, IS_SENTENCE, kind="lse", sharpness=0.0),
            "sharpness must be > 0, got 0.0",
        ),
        (
            lambda: pool_sentences(SCORES, IS_SENTENCE[1:], kind="mean"),
            r"is_sentence must be \[N, M\] = \(5, 4\), got \(4, 4\)",
        ),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()
