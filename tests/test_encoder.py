"""From pixels and tokens to features: pools, projections, reports, masked passes."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.crops import crop_images
from models.encoder import Encoder, encode_pairs
from models.keyed_noise import Draw, keyed_uniform
from models.methods.biovil import BIOVIL
from models.methods.catalogue import METHODS
from models.methods.clip import CLIP
from models.methods.maskclip import MASKCLIP
from models.outputs import MaskedImage, MaskedText, PairBatch, PairOutputs
from models.recipe import MethodRecipe
from models.text_heads import mask_tokens
from models.training_slots import Features
from tests.oracles.critics import loop_mi_block
from tests.pair_fixture import GRID, TEXT, TOWERS, build_model, make_batch, padded, rows_of

SENTENCES = Features(text="sentence", num_texts=3)


def encoder_with(features: Features = Features(), *, seed: int = 0) -> Encoder:
    return build_model(replace(CLIP, features=features), seed=seed).encoder


def outputs_with(features: Features = Features(), batch: PairBatch | None = None) -> PairOutputs:
    return encoder_with(features)(batch or make_batch(num_texts=features.num_texts), None)


def images_of(batch: PairBatch, view: int = 0) -> Tensor:
    return crop_images(batch.images, batch.view_boxes[view])


@pytest.mark.parametrize("name", METHODS)
def test_features_have_the_shapes_they_state(name):
    recipe = METHODS[name]
    model = build_model(recipe)
    V, M, B = recipe.features.num_views, recipe.features.num_texts, 8
    batch = make_batch(num_views=V, num_texts=M)
    T, P, H, D = batch.token_ids.shape[2], GRID * GRID, TOWERS.vision_width, model.encoder.width
    found = encode_pairs(model.encoder, recipe, batch, None)
    assert found.image_embeds.shape == (V, B, D)
    assert found.text_embeds.shape == (M, B, D)
    assert found.report_embeds.shape == (B, D)
    assert found.image_tokens.shape == (V, B, P, D)
    assert found.text_tokens.shape == (B, T, D)
    assert found.image_features.shape == (V, B, H)
    assert found.patch_features.shape == (V, B, P, H)
    assert torch.equal(found.is_text, batch.is_text)
    assert torch.equal(found.is_real_token, batch.is_real_token[0])
    for embeds in (found.image_embeds, found.text_embeds, found.report_embeds):
        torch.testing.assert_close(embeds.norm(dim=-1), torch.ones(embeds.shape[:-1]).double())
    assert (found.patch_weights is not None) == (recipe.features.image == "attention")
    assert (found.text_weights is not None) == (recipe.features.report == "attention")
    assert (found.masked_text is not None) == (recipe.heads.masked_tokens.weight > 0)
    assert (found.masked_image is not None) == (recipe.heads.masked_distillation.weight > 0)


def test_the_class_token_is_projected():
    encoder, batch = encoder_with(), make_batch()
    tokens = encoder.vision(images_of(batch))
    found = encoder(batch, None)
    expected = F.normalize(encoder.visual_projection(tokens.pooled), dim=1)
    torch.testing.assert_close(found.image_embeds[0], expected)
    torch.testing.assert_close(found.image_features[0], tokens.pooled)
    torch.testing.assert_close(found.patch_features[0], tokens.patches)
    torch.testing.assert_close(found.image_tokens[0], encoder.visual_projection(tokens.patches))


def test_the_mean_patch_is_the_mean_after_the_projection():
    found = outputs_with(Features(image="patch_mean", projection="mlp"))
    expected = F.normalize(found.image_tokens[0].mean(1), dim=1)
    torch.testing.assert_close(found.image_embeds[0], expected)
    torch.testing.assert_close(found.image_features[0], found.patch_features[0].mean(1))
    encoder = encoder_with(Features(image="patch_mean", projection="mlp"))
    before = F.normalize(encoder.visual_projection(found.image_features[0]), dim=1)
    assert (before - expected).abs().max() > 1e-3  # the projection is not linear


def test_an_attention_pool_says_what_it_looked_at():
    features = Features(image="attention", text="sentence", num_texts=3, report="attention")
    encoder, batch = encoder_with(features), make_batch(num_texts=3)
    found = encoder(batch, None)
    pooled, weights = encoder.patch_pool(found.patch_features[0])
    torch.testing.assert_close(found.image_features[0], pooled)
    torch.testing.assert_close(found.patch_weights[0], weights)
    torch.testing.assert_close(weights.sum(1), torch.ones(8).double())
    torch.testing.assert_close(found.image_embeds[0], F.normalize(encoder.visual_projection(pooled), dim=1))
    report, texts = encoder.report_pool(found.text_embeds.transpose(0, 1), batch.is_text.T)
    torch.testing.assert_close(found.report_embeds, F.normalize(report, dim=1))
    torch.testing.assert_close(found.text_weights, texts)
    assert (found.text_weights[~batch.is_text.T] == 0).all()


@pytest.mark.parametrize("report", ["first", "mean", "attention"])
def test_missing_texts_have_no_say_in_a_report(report):
    features = replace(SENTENCES, report=report)
    batch = make_batch(num_texts=3)
    junk = batch.token_ids.clone()
    junk[:, :, 0] = torch.where(batch.is_text, junk[:, :, 0], 7)
    assert not batch.is_text.all()
    one, other = outputs_with(features, batch), outputs_with(features, replace(batch, token_ids=junk))
    assert not torch.allclose(one.text_embeds, other.text_embeds)
    torch.testing.assert_close(other.report_embeds, one.report_embeds)


def test_reports_are_the_first_text_or_the_mean_of_those_there():
    batch = make_batch(num_texts=3)
    first = outputs_with(SENTENCES, batch)
    assert torch.equal(first.report_embeds, first.text_embeds[0])
    mean = outputs_with(replace(SENTENCES, report="mean"), batch)
    for pair in range(8):
        there = [text for text in range(3) if batch.is_text[text, pair]]
        expected = F.normalize(torch.stack([mean.text_embeds[text, pair] for text in there]).mean(0), dim=0)
        torch.testing.assert_close(mean.report_embeds[pair], expected)
    assert (mean.report_embeds - first.report_embeds).abs().max() > 0.01


def test_texts_are_encoded_alone_whatever_their_number():
    batch = make_batch(num_texts=3)
    encoder = encoder_with(SENTENCES)
    found = encoder(batch, None)
    for number in range(3):
        embeds, words = encoder.embed_texts(batch.token_ids[number], batch.is_real_token[number])
        torch.testing.assert_close(found.text_embeds[number], embeds)
        if number == 0:
            torch.testing.assert_close(found.text_tokens, words)
    one = encoder(make_batch(), None)
    torch.testing.assert_close(one.text_embeds[0], found.text_embeds[0])
    assert (found.text_embeds[1] - found.text_embeds[0]).abs().max() > 0.01


def test_full_attention_reads_both_ways_and_no_padding():
    batch = make_batch()
    for attention, reads_ahead in (("causal", False), ("full", True)):
        features = Features(text_attention=attention)
        whole = outputs_with(features, batch)
        longer = outputs_with(features, padded(batch, 3, 9))
        length = batch.token_ids.shape[2]
        real = batch.is_real_token[0]
        torch.testing.assert_close(longer.text_embeds, whole.text_embeds)
        torch.testing.assert_close(longer.text_tokens[:, :length][real], whole.text_tokens[real])
        changed = batch.token_ids.clone()
        changed[0, 0, 5] = (changed[0, 0, 5] - 3 + 1) % (TEXT.vocab_size - 3) + 3
        other = outputs_with(features, replace(batch, token_ids=changed))
        assert (not torch.allclose(other.text_tokens[0, :5], whole.text_tokens[0, :5])) == reads_ahead
        assert not torch.allclose(other.text_embeds[0, 0], whole.text_embeds[0, 0])


def test_projections_end_in_one_space():
    linear, mlp, block = (encoder_with(Features(projection=kind)) for kind in ("linear", "mlp", "mi_block"))
    assert linear.width == mlp.width == TOWERS.embed_dim
    assert block.width == max(TOWERS.vision_width, TOWERS.text_width)
    rows = torch.randn(3, TOWERS.vision_width, generator=torch.Generator().manual_seed(0)).double()
    expected = torch.tensor(loop_mi_block(rows, block.visual_projection.state_dict())).double()
    torch.testing.assert_close(block.visual_projection(rows), expected)
    hidden = mlp.visual_projection
    assert not torch.allclose(hidden(2 * rows), 2 * hidden(rows))
    torch.testing.assert_close(linear.visual_projection(2 * rows), 2 * linear.visual_projection(rows))


def test_views_and_kept_patches_are_encoded_view_by_view():
    features = Features(num_views=2)
    encoder, batch = encoder_with(features), make_batch(num_views=2)
    kept = torch.stack([torch.tensor([0, 3, 7]), torch.tensor([1, 2, 15])])[:, None].expand(2, 8, 3)
    found = encoder(batch, kept)
    for view in range(2):
        alone = replace(batch, view_boxes=batch.view_boxes[view : view + 1])
        torch.testing.assert_close(
            found.image_embeds[view], encoder(alone, kept[view : view + 1]).image_embeds[0]
        )
    assert found.image_tokens.shape[2] == 3
    everything = encoder(batch, None)
    assert (everything.image_embeds - found.image_embeds).abs().max() > 1e-3


def masked(recipe: MethodRecipe, batch: PairBatch) -> PairOutputs:
    return encode_pairs(build_model(recipe).encoder, recipe, batch, None)


def test_masked_words_are_those_of_the_rows_keys():
    batch = make_batch()
    recipe = replace(
        BIOVIL, heads=replace(BIOVIL.heads, masked_tokens=replace(BIOVIL.heads.masked_tokens, share=0.5))
    )
    found = masked(recipe, batch).masked_text
    noise = keyed_uniform(batch.draw_keys, Draw.MASKED_TOKENS, 3 * TOWERS.max_tokens).view(8, -1, 3)
    corrupted, is_target = mask_tokens(
        batch.token_ids[0],
        batch.is_real_token[0],
        noise[:, : batch.token_ids.shape[2]],
        mask_id=TEXT.pad_id,
        vocab_size=TEXT.vocab_size,
        share=0.5,
    )
    assert torch.equal(found.is_target, is_target)
    assert torch.equal(found.token_ids, batch.token_ids[0])
    assert is_target.any()
    _, states = build_model(recipe).encoder.text(corrupted, batch.is_real_token[0], attention="full")
    torch.testing.assert_close(found.states, states)
    share = rows_of(batch, slice(4, 8))  # shorter texts, the same draws
    length = share.token_ids.shape[2]
    assert torch.equal(masked(recipe, share).masked_text.is_target, is_target[4:, :length])
    other = masked(recipe, replace(batch, draw_keys=batch.draw_keys + 1)).masked_text
    assert not torch.equal(other.is_target, is_target)


def test_removed_patches_are_those_of_the_rows_keys():
    batch = make_batch()
    found = masked(MASKCLIP, batch).masked_image
    num_kept = found.kept.shape[1]
    noise = keyed_uniform(batch.draw_keys, Draw.MASKED_PATCHES, GRID * GRID)
    expected = noise.argsort(1)[:, :num_kept].sort(1).values
    assert num_kept == GRID * GRID * MASKCLIP.heads.masked_distillation.keep_ratio
    assert torch.equal(found.kept.sort(1).values, expected)
    tokens = build_model(MASKCLIP).encoder.vision(images_of(batch), kept=found.kept)
    torch.testing.assert_close(found.patches, tokens.patches)
    share = masked(MASKCLIP, rows_of(batch, slice(4, 8))).masked_image
    assert torch.equal(share.kept, found.kept[4:])


def test_masked_passes_change_no_feature():
    batch = make_batch()
    plain = build_model(replace(MASKCLIP, heads=CLIP.heads)).encoder
    both = encode_pairs(build_model(MASKCLIP).encoder, MASKCLIP, batch, None)
    torch.testing.assert_close(both.image_embeds, plain(batch, None).image_embeds)
    torch.testing.assert_close(both.text_embeds, plain(batch, None).text_embeds)


def floating(held: object) -> list[Tensor]:
    """Every floating tensor in a dataclass, in those it holds too."""
    found: list[Tensor] = []
    for value in vars(held).values():
        if isinstance(value, MaskedText | MaskedImage):
            found += floating(value)
        elif isinstance(value, Tensor) and value.is_floating_point():
            found.append(value)
    return found


@pytest.mark.parametrize("name", ["lovt", "maskclip", "mil_lse"])
def test_everything_that_is_read_is_raised_to_float32(name):
    recipe = METHODS[name]
    model, batch = build_model(recipe).float(), make_batch(num_texts=recipe.features.num_texts)
    with torch.autocast("cpu", torch.bfloat16):
        found = encode_pairs(model.encoder, recipe, batch, None)
    # patches and words in the joint space; layer norms and embeddings leave in float32
    assert sum(value.dtype == torch.bfloat16 for value in floating(found)) == 2
    assert all(value.dtype == torch.float32 for value in floating(found.float()))
