"""GLoRIA's word scores: loop, chunks, pads, order, length, refusals; memory of pools that attend."""

import math

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from models.attended_pooling import attention_pool, gloria_attention, gloria_scores, non_local_pool
from models.sentence_pooling import pool_sentences
from tests.bag_fixture import draw, gradient
from tests.golden_files import leaf
from tests.oracles import pooling as oracle

B, P, N, T, D = 3, 6, 5, 4, 4
REGIONS = draw(B, P, D, seed=1)
WORDS = draw(N, T, D, seed=7)
IS_WORD = torch.arange(T) < torch.tensor([[4], [2], [1], [3], [4]])
SHARPNESS = {"region_sharpness": 3.0, "word_sharpness": 2.0}


@pytest.mark.parametrize("chunk", [None, 1, 2, 9])
@pytest.mark.parametrize("aggregation", ["sum", "mean"])
def test_gloria_equals_the_loop_in_any_chunks(aggregation, chunk):
    pooled = gloria_scores(
        REGIONS, WORDS, IS_WORD, aggregation=aggregation, texts_per_chunk=chunk, **SHARPNESS
    )
    expected = oracle.loop_gloria(REGIONS, WORDS, IS_WORD, sharpness=(3.0, 2.0), aggregation=aggregation)
    torch.testing.assert_close(pooled, torch.tensor(expected, dtype=torch.float64))
    assert not torch.allclose(gloria_scores(REGIONS, WORDS, IS_WORD, aggregation=aggregation), pooled)


def test_gloria_gradients_are_the_same_in_chunks_and_pass_gradcheck():
    def in_chunks(regions: Tensor, words: Tensor) -> Tensor:
        return gloria_scores(regions, words, IS_WORD, texts_per_chunk=2)

    inputs = (leaf(REGIONS), leaf(WORDS))
    assert torch.autograd.gradcheck(in_chunks, inputs)
    whole = gradient(lambda words: gloria_scores(REGIONS, words, IS_WORD), WORDS)
    torch.testing.assert_close(gradient(lambda words: in_chunks(REGIONS, words), WORDS), whole)


@pytest.mark.parametrize("junk", [0.0, 50.0, math.nan, math.inf])
@pytest.mark.parametrize("chunk", [None, 2])
def test_pads_of_words_change_no_value_and_get_no_gradient(junk, chunk):
    def pool(words: Tensor) -> Tensor:
        return gloria_scores(REGIONS, words, IS_WORD, texts_per_chunk=chunk)

    with_junk = WORDS.masked_fill(~IS_WORD[:, :, None], junk)
    assert torch.equal(pool(with_junk), pool(WORDS))
    found = gradient(pool, with_junk)
    assert found.isfinite().all()
    assert (found[~IS_WORD] == 0).all()
    assert gradient(lambda r: gloria_scores(r, with_junk, IS_WORD), REGIONS).isfinite().all()
    if math.isfinite(junk):
        assert not torch.allclose(gloria_scores(REGIONS, with_junk, torch.ones_like(IS_WORD)), pool(WORDS))


def test_gloria_ignores_the_order_of_regions_and_words():
    expected = gloria_scores(REGIONS, WORDS, IS_WORD)
    order, regions = torch.tensor([2, 0, 3, 1]), REGIONS[:, [3, 5, 0, 1, 4, 2]]
    torch.testing.assert_close(gloria_scores(regions, WORDS[:, order], IS_WORD[:, order]), expected)
    assert not torch.allclose(gloria_scores(regions, WORDS[:, order], IS_WORD), expected)


def test_gloria_attention_equals_the_loop():
    found = gloria_attention(REGIONS, WORDS, IS_WORD, region_sharpness=3.0)
    torch.testing.assert_close(found.sum(3), torch.ones(B, N, T, dtype=torch.float64))
    for b, bag in enumerate(REGIONS.tolist()):
        for n, words in enumerate(oracle.without_pads(WORDS, IS_WORD)):
            expected = oracle.loop_gloria_attention(bag, words, region_sharpness=3.0)
            torch.testing.assert_close(found[b, n, : len(words)], torch.tensor(expected, dtype=torch.float64))
    assert not torch.allclose(found, gloria_attention(REGIONS, WORDS, IS_WORD))


def test_gloria_depends_on_how_often_a_text_says_its_words_and_attention_does_not():
    words, is_word = WORDS.repeat(1, 3, 1), IS_WORD.repeat(1, 3)
    once = gloria_scores(REGIONS, WORDS, IS_WORD, aggregation="mean")
    thrice = gloria_scores(REGIONS, words, is_word, aggregation="mean")
    assert (once - thrice).abs().max() > 0.05
    attended = attention_pool(REGIONS, WORDS.flatten(0, 1), temperature=0.3).unflatten(1, (N, T))
    torch.testing.assert_close(
        pool_sentences(attended.repeat(1, 1, 3), is_word, kind="lse"),
        pool_sentences(attended, IS_WORD, kind="lse"),
    )


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else [result]:
            if isinstance(value, Tensor):
                self.numel = max(self.numel, value.numel())
        return result


@pytest.mark.parametrize(
    ("pool", "limit"),
    [
        (lambda r, t: attention_pool(r, t, temperature=0.3), 3 * 6 * 20),
        (lambda r, t: non_local_pool(r, t, torch.eye(64)), 64 * 64),
        (
            lambda r, t: gloria_scores(r, t[:, None], torch.ones(20, 1, dtype=torch.bool)),
            3 * 6 * 20,
        ),
    ],
    ids=["attention", "non_local", "gloria"],
)
def test_attended_vectors_are_never_made(pool, limit):
    """A vector per image and text would be 3 * 20 * 64 numbers, more than any input."""
    regions, texts = draw(3, 6, 64).float(), draw(20, 64, seed=1).float()
    expected = pool(regions, texts)
    with LargestTensor() as largest:
        torch.testing.assert_close(pool(regions, texts), expected)
    inputs = max(regions.numel(), texts.numel())
    assert largest.numel <= max(limit, inputs)
    with LargestTensor() as made:
        torch.einsum("bpn,bpd->bnd", draw(3, 6, 20).float(), regions)
    assert made.numel >= 3 * 20 * 64


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"region_sharpness": 0.0}, "region_sharpness must be > 0, got 0.0"),
        ({"word_sharpness": -5.0}, "word_sharpness must be > 0, got -5.0"),
        ({"aggregation": "max"}, "aggregation must be sum or mean, got max"),
        ({"texts_per_chunk": 0}, "texts_per_chunk must be >= 1, got 0"),
    ],
)
def test_refusals(changes, message):
    with pytest.raises(ValueError, match=message):
        gloria_scores(REGIONS, WORDS, IS_WORD, **changes)


@pytest.mark.parametrize("function", [gloria_scores, gloria_attention])
def test_a_mask_of_another_shape_is_refused(function):
    with pytest.raises(ValueError, match=r"is_word must be \[N, T\] = \(5, 4\), got \(4, 4\)"):
        function(REGIONS, WORDS, IS_WORD[1:])
