"""LoVT's attention parts: cross-attention in both directions and attention pooling."""

import pytest
import torch
from torch import Tensor

from models.attention_pool import AttentionPool, masked_mean
from models.cross_attention import SymmetricCrossAttention, symmetric_attention
from tests.golden_files import assert_golden, leaf, tensors
from tests.oracles.lovt import loop_attention_pool, loop_cross_attention

WIDTH = 6
OUTPUTS = ("regions_at_sentences", "sentences_at_regions", "over_regions", "over_sentences")


def draw(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def seeded(module: torch.nn.Module, *, seed=0) -> torch.nn.Module:
    """The module in float64 with every parameter, biases too, drawn from a seed."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.double().parameters():
        parameter.data = 0.5 * torch.randn(parameter.shape, dtype=torch.float64, generator=generator)
    return module


def bags(*, seed=0) -> tuple[Tensor, Tensor, Tensor]:
    """Regions, sentences and mask of three pairs: no pad, two, one."""
    is_sentence = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 1, 1]], dtype=torch.bool)
    return draw(3, 9, WIDTH, seed=seed), draw(3, 4, WIDTH, seed=seed + 100), is_sentence


def golden_module(stored: dict[str, Tensor], norm: str) -> SymmetricCrossAttention:
    module = SymmetricCrossAttention(4, norm=norm).double()
    for name, letter in (("key", "k"), ("value", "v"), ("output", "o")):
        projection = getattr(module, name)
        projection.weight.data, projection.bias.data = stored[f"W{letter}"], stored[f"b{letter}"]
    return module


def probe(attended) -> Tensor:
    """The stored gradients' scalar."""
    at_sentences = attended.regions_at_sentences
    ramp = torch.arange(at_sentences.shape[2])
    return 0.01 * (attended.sentences_at_regions**2).sum() + 0.1 * (at_sentences * ramp).sum()


def test_the_release_is_reproduced_with_its_batch_norm():
    golden = tensors("lovt_official_crossattention")
    regions, sentences = leaf(golden["ha"]), leaf(golden["hb"])
    found = golden_module(golden, "batch")(regions, sentences, golden["mask_b"])
    assert_golden(found.sentences_at_regions, golden["attended_b2a"])
    assert_golden(found.regions_at_sentences, golden["attended_a2b"])  # pads too, where the release is not 0
    assert_golden(found.over_sentences, golden["probs_b2a"])
    assert_golden(found.over_regions, golden["probs_a2b"])
    probe(found).backward()
    assert_golden(regions.grad, golden["probe_grad_ha"])
    assert_golden(sentences.grad, golden["probe_grad_hb"])


def test_layer_norm_changes_the_outputs_of_the_release_and_not_its_attention():
    golden = tensors("lovt_official_crossattention")
    found = golden_module(golden, "layer")(golden["ha"], golden["hb"], golden["mask_b"])
    assert_golden(found.over_sentences, golden["probs_b2a"])
    assert not torch.allclose(found.sentences_at_regions, golden["attended_b2a"], atol=1e-2)


def test_layer_norm_equals_the_loop_over_the_real_sentences():
    regions, sentences, is_sentence = bags()
    module = seeded(SymmetricCrossAttention(WIDTH))
    found = module(regions, sentences, is_sentence)
    parameters = dict(module.named_parameters())
    for b, real in enumerate(is_sentence):
        loops = loop_cross_attention(regions[b].tolist(), sentences[b][real].tolist(), parameters)
        expected = [torch.tensor(values, dtype=torch.float64) for values in loops]
        torch.testing.assert_close(found.regions_at_sentences[b][real], expected[0])
        torch.testing.assert_close(found.sentences_at_regions[b], expected[1])
        torch.testing.assert_close(found.over_regions[b][real], expected[2])
        torch.testing.assert_close(found.over_sentences[b][:, real], expected[3])
    other = seeded(SymmetricCrossAttention(WIDTH), seed=1)(regions, sentences, is_sentence)
    assert not torch.allclose(other.sentences_at_regions, found.sentences_at_regions, atol=0.1)


@pytest.mark.parametrize("content", [0.0, 1e6, torch.nan, torch.inf])
def test_pads_enter_nothing_and_get_no_gradient(content):
    regions, sentences, is_sentence = bags()
    module = seeded(SymmetricCrossAttention(WIDTH))
    expected = module(regions, sentences, is_sentence)
    regions = leaf(regions)
    padded = leaf(sentences.masked_fill(~is_sentence[:, :, None], content))
    found = module(regions, padded, is_sentence)
    for name in OUTPUTS:
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=0, atol=0)
    assert (found.regions_at_sentences[~is_sentence] == 0).all()
    assert (found.over_regions[~is_sentence] == 0).all()
    assert (found.over_sentences.transpose(1, 2)[~is_sentence] == 0).all()
    probe(found).backward()
    assert (padded.grad[~is_sentence] == 0).all()
    assert padded.grad[is_sentence].abs().min() > 0
    assert regions.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in module.parameters())


def test_more_padding_changes_nothing():
    regions, sentences, is_sentence = bags()
    module = seeded(SymmetricCrossAttention(WIDTH))
    short = module(regions, sentences, is_sentence)
    longer = module(
        regions,
        torch.cat([sentences, draw(3, 2, WIDTH, seed=7)], 1),
        torch.cat([is_sentence, torch.zeros(3, 2, dtype=torch.bool)], 1),
    )
    torch.testing.assert_close(longer.sentences_at_regions, short.sentences_at_regions)
    torch.testing.assert_close(longer.regions_at_sentences[:, :4], short.regions_at_sentences)
    taken = module(regions, sentences, torch.ones_like(is_sentence))
    assert not torch.allclose(taken.sentences_at_regions, short.sentences_at_regions, atol=1e-2)


def test_order_of_regions_and_sentences_is_carried_along():
    regions, sentences, is_sentence = bags()
    module = seeded(SymmetricCrossAttention(WIDTH))
    found = module(regions, sentences, is_sentence)
    generator = torch.Generator().manual_seed(3)
    of_regions, of_sentences = torch.randperm(9, generator=generator), torch.tensor([2, 0, 3, 1])
    moved = module(regions[:, of_regions], sentences[:, of_sentences], is_sentence[:, of_sentences])
    torch.testing.assert_close(moved.sentences_at_regions, found.sentences_at_regions[:, of_regions])
    torch.testing.assert_close(moved.regions_at_sentences, found.regions_at_sentences[:, of_sentences])
    torch.testing.assert_close(moved.over_regions, found.over_regions[:, of_sentences][:, :, of_regions])
    torch.testing.assert_close(moved.over_sentences, found.over_sentences[:, of_regions][:, :, of_sentences])


def test_each_pair_has_the_outputs_it_has_alone():
    """LayerNorm: another split over workers changes nothing; the release's BatchNorm depends on it."""
    regions, sentences, is_sentence = bags()
    for norm, is_same in (("layer", True), ("batch", False)):
        module = seeded(SymmetricCrossAttention(WIDTH, norm=norm))
        whole = module(regions, sentences, is_sentence).sentences_at_regions[:1]
        alone = module(regions[:1], sentences[:1], is_sentence[:1]).sentences_at_regions
        assert torch.allclose(whole, alone, rtol=0, atol=1e-12) == is_same


def test_a_pair_without_sentences_attends_to_nothing():
    scores = draw(2, 3, 2).requires_grad_()
    is_sentence = torch.tensor([[True, True], [False, False]])
    over_sentences, over_regions = symmetric_attention(scores, is_sentence)
    torch.testing.assert_close(over_sentences.sum(2)[0], torch.ones(3, dtype=torch.float64))
    assert (over_sentences[1] == 0).all()
    assert (over_regions[1] == 0).all()
    (over_sentences[..., 0].sum() + over_regions[..., 0].sum()).backward()
    assert scores.grad.isfinite().all()
    assert (scores.grad[1] == 0).all()


def test_equal_scores_average():
    over_sentences, over_regions = symmetric_attention(torch.zeros(1, 4, 3), torch.ones(1, 3).bool())
    torch.testing.assert_close(over_sentences, torch.full((1, 4, 3), 1 / 3))
    torch.testing.assert_close(over_regions, torch.full((1, 3, 4), 1 / 4))


def test_cross_attention_gradcheck():
    regions, sentences, is_sentence = bags()
    module = seeded(SymmetricCrossAttention(WIDTH))

    def outputs(regions, sentences):
        found = module(regions, sentences, is_sentence[1:2])
        return found.regions_at_sentences, found.sentences_at_regions

    assert torch.autograd.gradcheck(outputs, (leaf(regions[1:2, :3]), leaf(sentences[1:2])))


def test_both_parts_compute_in_float32_under_autocast():
    regions, sentences, is_sentence = (t.float() if t.is_floating_point() else t for t in bags())
    cross, pool = seeded(SymmetricCrossAttention(WIDTH)).float(), seeded(AttentionPool(WIDTH, 2)).float()
    expected = [*vars(cross(regions, sentences, is_sentence)).values(), *pool(sentences, is_sentence)]
    with torch.autocast("cpu", torch.bfloat16):
        found = [*vars(cross(regions, sentences, is_sentence)).values(), *pool(sentences, is_sentence)]
        halves = cross(regions.bfloat16(), sentences.bfloat16(), is_sentence)
    for value, wanted in zip(found, expected, strict=True):
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, wanted, rtol=0, atol=0)
    assert halves.sentences_at_regions.dtype == torch.float32
    assert not torch.equal(halves.sentences_at_regions, found[1])


def test_norm_and_projections_are_in_the_state():
    names = set(SymmetricCrossAttention(4).state_dict())
    parts = ("key", "value", "output", "norm")
    assert names == {f"{part}.{kind}" for part in parts for kind in ("weight", "bias")}
    assert "norm.running_mean" in SymmetricCrossAttention(4, norm="batch").state_dict()


def test_attention_pool_equals_the_loop_over_the_real_tokens():
    _, tokens, is_real = bags()
    module = seeded(AttentionPool(WIDTH, 2))
    pooled, weights = module(tokens, is_real)
    for b, real in enumerate(is_real):
        expected, shares = loop_attention_pool(tokens[b][real].tolist(), dict(module.named_parameters()), 2)
        torch.testing.assert_close(pooled[b], torch.tensor(expected, dtype=torch.float64))
        torch.testing.assert_close(weights[b][real], torch.tensor(shares, dtype=torch.float64))
    other, _ = seeded(AttentionPool(WIDTH, 3))(tokens, is_real)
    assert not torch.allclose(other, pooled, atol=1e-3)


@pytest.mark.parametrize("content", [0.0, 1e6, torch.nan, torch.inf])
def test_pooled_pads_have_no_weight_and_no_gradient(content):
    _, tokens, is_real = bags()
    module = seeded(AttentionPool(WIDTH, 2))
    expected, expected_weights = module(tokens, is_real)
    padded = leaf(tokens.masked_fill(~is_real[:, :, None], content))
    pooled, weights = module(padded, is_real)
    torch.testing.assert_close(pooled, expected, rtol=0, atol=0)
    torch.testing.assert_close(weights, expected_weights, rtol=0, atol=0)
    assert (weights[~is_real] == 0).all()
    torch.testing.assert_close(weights.sum(1), torch.ones(3, dtype=torch.float64))
    (pooled.sum() + weights[:, 0].sum()).backward()
    assert (padded.grad[~is_real] == 0).all()
    assert padded.grad[is_real].abs().min() > 0


def test_pooling_ignores_the_order_and_carries_the_weights_along():
    _, tokens, is_real = bags()
    module = seeded(AttentionPool(WIDTH, 2))
    pooled, weights = module(tokens, is_real)
    order = torch.tensor([2, 0, 3, 1])
    again, moved = module(tokens[:, order], is_real[:, order])
    torch.testing.assert_close(again, pooled)
    torch.testing.assert_close(moved, weights[:, order])
    assert not torch.allclose(moved, weights)


def test_pooling_without_a_mask_takes_every_token():
    tokens = draw(2, 5, WIDTH)
    module = seeded(AttentionPool(WIDTH, 2))
    torch.testing.assert_close(module(tokens), module(tokens, torch.ones(2, 5, dtype=torch.bool)))
    torch.testing.assert_close(module(tokens[:, :1])[1], torch.ones(2, 1, dtype=torch.float64))


def test_evaluation_without_gradients_pools_alike():
    """torch takes another path through its attention there."""
    _, tokens, is_real = bags()
    module = seeded(AttentionPool(WIDTH, 2))
    expected = module(tokens, is_real)
    with torch.no_grad():
        torch.testing.assert_close(module.eval()(tokens, is_real), expected)


def test_a_bag_without_tokens_is_pooled_to_a_constant():
    module = seeded(AttentionPool(WIDTH, 2))
    tokens, is_real = leaf(draw(2, 3, WIDTH)), torch.tensor([[True, True, False], [False] * 3])
    pooled, weights = module(tokens, is_real)
    assert (weights[1] == 0).all()
    pooled.sum().backward()
    assert pooled.isfinite().all()
    assert (tokens.grad[1] == 0).all()
    assert all(p.grad.isfinite().all() for p in module.parameters())


def test_masked_mean_divides_by_the_real_tokens():
    """The release divides by the padded length."""
    is_real = torch.tensor([[True, False], [False, False]])
    tokens = torch.tensor([[[1.0], [torch.nan]], [[torch.nan], [2.0]]])
    torch.testing.assert_close(masked_mean(tokens, is_real), torch.tensor([[1.0], [0.0]]))


REGIONS, SENTENCES, IS_SENTENCE = bags()
CROSS = SymmetricCrossAttention(WIDTH).double()
POOL = AttentionPool(WIDTH, 2).double()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: SymmetricCrossAttention(0), "width must be >= 1, got 0"),
        (lambda: SymmetricCrossAttention(4, norm="group"), "norm must be 'layer' or 'batch', got 'group'"),
        (lambda: CROSS(REGIONS[:2], SENTENCES, IS_SENTENCE), r"got \[2, 9, 6\] and \[3, 4, 6\]"),
        (lambda: CROSS(REGIONS, SENTENCES[..., :2], IS_SENTENCE), r"got \[3, 9, 6\] and \[3, 4, 2\]"),
        (lambda: CROSS(REGIONS, SENTENCES, IS_SENTENCE[:, :3]), r"must have shape \[3, 4\], got \[3, 3\]"),
        (lambda: AttentionPool(6, 4), "num_heads must be >= 1 and divide the width 6, got 4"),
        (lambda: AttentionPool(6, 0), "num_heads must be >= 1 and divide the width 6, got 0"),
        (lambda: POOL(SENTENCES, IS_SENTENCE[:2]), r"got \[3, 4, 6\] and \[2, 4\]"),
        (lambda: POOL(SENTENCES[0]), r"need tokens \[B, K, D\] and is_real \[B, K\], got \[4, 6\]"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()
