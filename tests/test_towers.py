"""The towers against transformers' own forward; token dropping, class rows, padding, loading, refusals."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers import CLIPModel

from models.towers import TextTower, TowerSettings, VisionTower, build_clip, transformer_block
from tests.pair_fixture import GRID, SIDE, TEXT, TOWERS, generator, make_batch

# transformers takes the largest id for the end token when the config says 2, its legacy branch
END = 7
SPECIAL = {"pad_id": 0, "start_id": 1, "end_id": END}
BATCH = make_batch()
IDS = BATCH.token_ids.masked_fill(BATCH.token_ids == END, 8).masked_fill(BATCH.token_ids == 2, END)


def build(seed: int = 0, settings: TowerSettings = TOWERS) -> CLIPModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        clip = build_clip(settings, vocab_size=TEXT.vocab_size, **SPECIAL).double()
        # positions start near zero: make them matter
        for embedding in (clip.vision_model.embeddings, clip.text_model.embeddings):
            torch.nn.init.normal_(embedding.position_embedding.weight, std=0.5)
    return clip.eval()


def images(num: int = 3) -> Tensor:
    return 255 * torch.rand(num, 3, SIDE, SIDE, dtype=torch.float64, generator=generator(3))


def normalised(tower: VisionTower, pixels: Tensor) -> Tensor:
    return (pixels / 255 - tower.pixel_mean) / tower.pixel_std


def towers(clip: CLIPModel) -> tuple[VisionTower, TextTower]:
    return VisionTower(clip.vision_model).double(), TextTower(clip.text_model)


def test_vision_equals_transformers():
    clip = build()
    tower, _ = towers(clip)
    expected = clip.vision_model(pixel_values=normalised(tower, images()))
    found = tower(images())
    torch.testing.assert_close(found.pooled, expected.pooler_output)
    patches = clip.vision_model.post_layernorm(expected.last_hidden_state[:, 1:])
    torch.testing.assert_close(found.patches, patches)
    assert found.class_attention == ()
    assert not torch.allclose(tower(images().flip(1)).pooled, expected.pooler_output)


def test_text_equals_transformers():
    clip = build()
    _, tower = towers(clip)
    expected = clip.text_model(input_ids=IDS, attention_mask=BATCH.is_real_token.long())
    pooled, tokens = tower(IDS, BATCH.is_real_token)
    torch.testing.assert_close(pooled, expected.pooler_output)
    real = BATCH.is_real_token
    torch.testing.assert_close(tokens[real], expected.last_hidden_state[real])
    assert not torch.allclose(tower(IDS.flip(0), BATCH.is_real_token)[0], expected.pooler_output)


def test_joint_space_equals_transformers():
    clip = build()
    vision, text = towers(clip)
    ids, is_real = IDS[:3], BATCH.is_real_token[:3]
    expected = clip(input_ids=ids, pixel_values=normalised(vision, images()), attention_mask=is_real.long())
    image = torch.nn.functional.normalize(clip.visual_projection(vision(images()).pooled), dim=1)
    caption = torch.nn.functional.normalize(clip.text_projection(text(ids, is_real)[0]), dim=1)
    torch.testing.assert_close(image, expected.image_embeds)
    torch.testing.assert_close(caption, expected.text_embeds)


def manual_kept(clip: CLIPModel, pixels: Tensor, kept: list[int]) -> Tensor:
    """Class token of one image that is shown some patches, through transformers' own layers."""
    vision = clip.vision_model
    tokens = vision.embeddings(pixels)  # positions added
    tokens = tokens[:, [0, *(1 + patch for patch in kept)]]
    states = vision.encoder(inputs_embeds=vision.pre_layrnorm(tokens)).last_hidden_state
    return vision.post_layernorm(states[:, 0])


def test_dropped_patches_leave_the_others_at_their_positions():
    clip = build()
    tower, _ = towers(clip)
    kept = torch.tensor([[0, 5, 6, 15], [1, 2, 3, 4], [7, 8, 9, 14]])
    found = tower(images(), kept=kept)
    assert found.patches.shape == (3, 4, TOWERS.vision_width)
    pixels = normalised(tower, images())
    for number, patches in enumerate(kept.tolist()):
        expected = manual_kept(clip, pixels[number : number + 1], patches)
        torch.testing.assert_close(found.pooled[number : number + 1], expected)
    # the control: the same pixels at the first positions
    moved = pixels.clone()
    side = TOWERS.patch_size
    for slot, patch in enumerate(kept[0].tolist()):
        row, column = divmod(patch, GRID)
        piece = pixels[0, :, row * side : (row + 1) * side, column * side : (column + 1) * side]
        moved[0, :, :side, slot * side : (slot + 1) * side] = piece
    elsewhere = manual_kept(clip, moved[:1], [0, 1, 2, 3])
    assert not torch.allclose(found.pooled[:1], elsewhere, atol=1e-3)


def test_keeping_every_patch_changes_nothing():
    tower, _ = towers(build())
    everything = torch.arange(GRID * GRID).repeat(3, 1)
    torch.testing.assert_close(tower(images(), kept=everything).pooled, tower(images()).pooled)


def test_class_row_equals_the_row_of_the_whole_attention_map():
    clip = build()
    clip.set_attn_implementation("eager")
    tower, _ = towers(clip)
    maps = clip.vision_model(pixel_values=normalised(tower, images()), output_attentions=True).attentions
    found = tower(images(), with_class_attention=True)
    assert len(found.class_attention) == TOWERS.vision_layers
    for row, whole in zip(found.class_attention, maps, strict=True):
        assert row.shape == (3, TOWERS.vision_heads, 1 + GRID * GRID)
        torch.testing.assert_close(row, whole[:, :, 0])
        assert not torch.allclose(row, whole[:, :, 1])
    torch.testing.assert_close(found.pooled, tower(images()).pooled)


def test_padding_changes_nothing_before_it():
    _, tower = towers(build())
    ids, is_real = IDS, BATCH.is_real_token
    pooled, tokens = tower(ids, is_real)
    other = ids.masked_fill(~is_real, 9)
    longer = torch.cat([other, torch.full((len(ids), 4), 9)], 1)
    more = torch.cat([is_real, torch.zeros(len(ids), 4, dtype=torch.bool)], 1)
    for padded, mask in ((other, is_real), (longer, more)):
        again, states = tower(padded, mask)
        torch.testing.assert_close(again, pooled)
        torch.testing.assert_close(states[:, : ids.shape[1]][is_real], tokens[is_real])
    changed = ids.clone()
    changed[:, 1] = 9
    assert not torch.allclose(tower(changed, is_real)[0], pooled)


def test_a_causal_block_looks_back_only():
    layer = build().text_model.encoder.layers[0]
    tokens = torch.randn(2, 5, TOWERS.text_width, dtype=torch.float64, generator=generator(0))
    changed = tokens.clone()
    changed[:, 3] *= -1  # the norm before attention would not see a constant
    before, after = (transformer_block(layer, x, is_causal=True)[0] for x in (tokens, changed))
    torch.testing.assert_close(after[:, :3], before[:, :3])
    assert (after[:, 3:] - before[:, 3:]).abs().amax(2).min() > 1e-6
    free = transformer_block(layer, changed)[0]
    assert (free[:, :3] - before[:, :3]).abs().amax() > 1e-6


def test_a_saved_model_is_loaded_with_its_weights(tmp_path):
    saved = build(seed=5).float()
    saved.save_pretrained(tmp_path / "clip-small")
    settings = replace(TOWERS, pretrained=str(tmp_path / "clip-small"))
    assert settings.name == "clip-small"
    loaded = build_clip(settings, vocab_size=TEXT.vocab_size, **SPECIAL)
    state = loaded.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in saved.state_dict().items())
    fresh = build_clip(TOWERS, vocab_size=TEXT.vocab_size, **SPECIAL).state_dict()
    key = "visual_projection.weight"
    assert not torch.equal(fresh[key], state[key])


def test_pretrained_models_that_do_not_fit_the_data_are_refused(tmp_path):
    build().float().save_pretrained(tmp_path / "clip")
    settings = replace(TOWERS, pretrained=str(tmp_path / "clip"))
    with pytest.raises(
        ValueError, match=r"takes 32 px images, the data is prepared at 64 px; set data.image"
    ):
        build_clip(replace(settings, image_size=64), vocab_size=TEXT.vocab_size, **SPECIAL)
    with pytest.raises(ValueError, match=r"has 64 tokens, the data's tokenizer 65; set data.tokenizer="):
        build_clip(settings, vocab_size=65, **SPECIAL)
    with pytest.raises(
        ValueError, match=r"takes 16 text positions, texts may have 20; set data.max_tokens=16"
    ):
        build_clip(replace(settings, max_tokens=20), vocab_size=TEXT.vocab_size, **SPECIAL)


def test_names_tell_towers_apart():
    assert TOWERS.name == "vit-p8-w32-l2-px32"
    assert replace(TOWERS, vision_layers=3).name != TOWERS.name


@pytest.mark.parametrize(
    ("slots", "message"),
    [
        ({"patch_size": 5}, "patch_size must divide image_size, got 5 and 32"),
        ({"vision_heads": 3}, "vision_heads must divide vision_width, got 3 and 32"),
        ({"text_heads": 5}, "text_heads must divide text_width, got 5 and 32"),
    ],
)
def test_refusals(slots, message):
    with pytest.raises(ValueError, match=message):
        replace(TOWERS, **slots)
