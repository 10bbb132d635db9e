"""The towers against transformers' own forward; token dropping, sizes, class rows, padding, refusals."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPModel

from models.crops import shrink_images
from models.token_scores import class_attention_scores, map_scores_to_view
from models.token_selection import keep_attentive, spread_block_scores
from models.towers import TextTower, TowerSettings, VisionTower, build_clip, transformer_block

SIDE, GRID, VOCAB_SIZE = 32, 4, 64
TOWERS = TowerSettings(
    image_size=SIDE,
    patch_size=SIDE // GRID,
    vision_width=32,
    vision_layers=2,
    vision_heads=2,
    text_width=32,
    text_layers=2,
    text_heads=2,
    embed_dim=16,
    max_tokens=16,
)
# transformers takes the largest id for the end token when the config says 2, its legacy branch
PAD, START, END = 0, 1, 7
SPECIAL = {"pad_id": PAD, "start_id": START, "end_id": END}
LENGTHS = torch.tensor([11, 9, 8, 5, 3])


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make_texts() -> tuple[Tensor, Tensor]:
    """Random ids between start and end tokens, [B, T], and which are real."""
    is_real = torch.arange(int(LENGTHS.max())) < LENGTHS[:, None]
    ids = torch.randint(END + 1, VOCAB_SIZE, is_real.shape, generator=generator(0))
    ids[:, 0] = START
    ids[torch.arange(len(ids)), LENGTHS - 1] = END
    return ids.masked_fill(~is_real, PAD), is_real


IDS, IS_REAL = make_texts()


def build(seed: int = 0, settings: TowerSettings = TOWERS) -> CLIPModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        clip = build_clip(settings, vocab_size=VOCAB_SIZE, **SPECIAL).double()
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
    expected = clip.text_model(input_ids=IDS, attention_mask=IS_REAL.long())
    pooled, tokens = tower(IDS, IS_REAL)
    torch.testing.assert_close(pooled, expected.pooler_output)
    real = IS_REAL
    torch.testing.assert_close(tokens[real], expected.last_hidden_state[real])
    assert not torch.allclose(tower(IDS.flip(0), IS_REAL)[0], expected.pooler_output)


def test_joint_space_equals_transformers():
    clip = build()
    vision, text = towers(clip)
    ids, is_real = IDS[:3], IS_REAL[:3]
    expected = clip(input_ids=ids, pixel_values=normalised(vision, images()), attention_mask=is_real.long())
    image = F.normalize(clip.visual_projection(vision(images()).pooled), dim=1)
    caption = F.normalize(clip.text_projection(text(ids, is_real)[0]), dim=1)
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
    ids, is_real = IDS, IS_REAL
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


def shown_to(tower: TextTower, ids: Tensor, is_real: Tensor, attention: str) -> tuple[Tensor, Tensor]:
    """Which positions' states move, [B, T, T]: entry (b, i, j) says whether i sees j; and all states."""
    embeds = tower.text.embeddings.token_embedding(ids).detach()
    _, states = tower(None, is_real, attention=attention, inputs_embeds=embeds)
    columns = []
    for position in range(ids.shape[1]):
        moved = embeds.clone()
        moved[:, position] = -moved[:, position]
        _, changed = tower(None, is_real, attention=attention, inputs_embeds=moved)
        columns.append((changed - states).abs().amax(2) > 1e-9)
    return torch.stack(columns, 2), states


def test_full_attention_sees_every_real_token_and_no_padding():
    _, tower = towers(build())
    sees, _ = shown_to(tower, IDS, IS_REAL, "full")
    own = torch.eye(IDS.shape[1], dtype=torch.bool)
    assert torch.equal(sees, IS_REAL[:, None, :] | own)
    causal, _ = shown_to(tower, IDS, IS_REAL, "causal")
    assert torch.equal(causal, own.cumsum(0).bool().expand(len(IDS), -1, -1))


def test_full_attention_equals_transformers_layers_with_a_padding_mask():
    clip = build()
    _, tower = towers(clip)
    pooled, states = tower(IDS, IS_REAL, attention="full")
    text = clip.text_model
    hidden = text.embeddings(input_ids=IDS)
    bias = torch.zeros(len(IDS), 1, 1, IDS.shape[1], dtype=torch.float64)
    bias = bias.masked_fill(~IS_REAL[:, None, None, :], -torch.inf)
    for layer in text.encoder.layers:
        hidden = layer(hidden, bias.expand(-1, -1, IDS.shape[1], -1))
    expected = text.final_layer_norm(hidden)
    torch.testing.assert_close(states, expected)
    torch.testing.assert_close(pooled, expected[torch.arange(len(IDS)), LENGTHS - 1])
    assert not torch.allclose(tower(IDS, IS_REAL)[0], pooled)


@pytest.mark.parametrize("attention", ["causal", "full"])
def test_padding_moves_no_real_position_and_gets_no_gradient(attention):
    _, tower = towers(build())
    longer = F.pad(IS_REAL, (0, 4))
    embeds = tower.text.embeddings.token_embedding(F.pad(IDS, (0, 4), value=9)).detach().requires_grad_()
    pooled, states = tower(None, longer, attention=attention, inputs_embeds=embeds)
    expected, real = tower(IDS, IS_REAL, attention=attention)
    torch.testing.assert_close(pooled, expected)
    torch.testing.assert_close(states[longer], real[IS_REAL])
    states[longer].square().sum().backward()
    assert embeds.grad is not None
    assert torch.equal(embeds.grad[~longer], torch.zeros_like(embeds.grad[~longer]))
    assert embeds.grad[longer].abs().amax(1).min() > 0


def test_embeddings_stand_for_the_ids_they_come_from():
    _, tower = towers(build())
    embeds = tower.text.embeddings.token_embedding(IDS)
    assert torch.equal(tower(None, IS_REAL, inputs_embeds=embeds)[0], tower(IDS, IS_REAL)[0])
    assert not torch.allclose(tower(None, IS_REAL, inputs_embeds=embeds.flip(1))[0], tower(IDS, IS_REAL)[0])


@pytest.mark.parametrize("side", [16, 48])
def test_another_image_size_equals_transformers_with_resized_positions(side):
    clip = build()
    tower, _ = towers(clip)
    pixels = F.interpolate(images(), size=(side, side), mode="bilinear")
    expected = clip.vision_model(pixel_values=normalised(tower, pixels), interpolate_pos_encoding=True)
    found = tower(pixels, with_class_attention=True)
    torch.testing.assert_close(found.pooled, expected.pooler_output)
    assert found.patches.shape == (3, (side // TOWERS.patch_size) ** 2, TOWERS.vision_width)
    assert found.class_attention[0].shape[2] == 1 + found.patches.shape[1]
    with torch.no_grad():
        positions = clip.vision_model.embeddings.position_embedding.weight
        positions[1:] = positions[1:].flip(0)
    assert not torch.allclose(tower(pixels).pooled, found.pooled)


def test_positions_are_resized_bicubically_and_left_alone_at_full_size():
    tower, _ = towers(build())
    positions = tower.vision.embeddings.position_embedding.weight[1:]
    assert torch.equal(tower._patch_positions(images()), positions)
    side = SIDE // 2
    found = tower._patch_positions(images()[:, :, :side, :side])
    # half a grid: every new centre lies between four old ones, with the weights of a cubic of -0.75
    near, far = 0.59375, -0.09375
    rows = torch.zeros(2, GRID, dtype=torch.float64)
    rows[0, [0, 1, 2]] = torch.tensor([near + far, near, far], dtype=torch.float64)
    rows[1, [1, 2, 3]] = torch.tensor([far, near, near + far], dtype=torch.float64)
    expected = torch.einsum("ap,bq,pqh->abh", rows, rows, positions.view(GRID, GRID, -1)).flatten(0, 1)
    torch.testing.assert_close(found, expected)
    found.sum().backward()
    assert tower.vision.embeddings.position_embedding.weight.grad is not None


def test_a_half_size_image_drops_patches_of_its_own_grid():
    tower, _ = towers(build())
    pixels = shrink_images(images(), 0.5, patch_size=TOWERS.patch_size)
    everything = torch.arange(4).repeat(3, 1)
    torch.testing.assert_close(tower(pixels, kept=everything).pooled, tower(pixels).pooled)
    assert tower(pixels, kept=everything[:, :2]).patches.shape[1] == 2
    assert not torch.allclose(tower(pixels, kept=everything[:, :2]).pooled, tower(pixels).pooled)


def test_a_half_size_teacher_scores_the_blocks_of_the_full_grid():
    tower, _ = towers(build())
    boxes = torch.tensor([[0.0, 0.0, SIDE, SIDE]]).repeat(3, 1)
    pixels = shrink_images(images(), 0.5, patch_size=TOWERS.patch_size)
    scores = class_attention_scores(tower(pixels, with_class_attention=True).class_attention)
    spread = spread_block_scores(map_scores_to_view(scores, boxes, boxes), num_patches=GRID * GRID)
    kept = keep_attentive(spread, keep_ratio=0.5)
    assert kept.shape == (3, 12)  # 3 of 4 blocks
    dropped = [set(range(GRID * GRID)) - set(row) for row in kept.tolist()]
    worst = scores.argmin(1)
    for patches, block in zip(dropped, worst.tolist(), strict=True):
        assert {patch // GRID // 2 * 2 + patch % GRID // 2 for patch in patches} == {block}
    finer = map_scores_to_view(scores, boxes, boxes, out_side=GRID)
    assert tower(images(), kept=keep_attentive(finer, keep_ratio=0.5)).patches.shape[1] == 12


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
    loaded = build_clip(settings, vocab_size=VOCAB_SIZE, **SPECIAL)
    state = loaded.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in saved.state_dict().items())
    fresh = build_clip(TOWERS, vocab_size=VOCAB_SIZE, **SPECIAL).state_dict()
    key = "visual_projection.weight"
    assert not torch.equal(fresh[key], state[key])


def test_pretrained_models_that_do_not_fit_the_data_are_refused(tmp_path):
    build().float().save_pretrained(tmp_path / "clip")
    settings = replace(TOWERS, pretrained=str(tmp_path / "clip"))
    with pytest.raises(
        ValueError, match=r"takes 32 px images, the data is prepared at 64 px; set data.image"
    ):
        build_clip(replace(settings, image_size=64), vocab_size=VOCAB_SIZE, **SPECIAL)
    with pytest.raises(ValueError, match=r"has 64 tokens, the data's tokenizer 65; set data.tokenizer="):
        build_clip(settings, vocab_size=65, **SPECIAL)
    with pytest.raises(
        ValueError, match=r"takes 16 text positions, texts may have 20; set data.max_tokens=16"
    ):
        build_clip(replace(settings, max_tokens=20), vocab_size=VOCAB_SIZE, **SPECIAL)


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


EMBEDS = torch.zeros(*IDS.shape, TOWERS.text_width, dtype=torch.float64)
TOO_LONG = torch.zeros(1, 17, dtype=torch.int64)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda text: text(None, IS_REAL), "takes either token_ids or inputs_embeds"),
        (lambda text: text(IDS, IS_REAL, inputs_embeds=EMBEDS), "takes either token_ids or inputs_embeds"),
        (lambda text: text(IDS, IS_REAL, attention="both"), "must be 'causal' or 'full', got 'both'"),
        (lambda text: text(IDS, IS_REAL[:2]), r"shape \(2, 11\), texts are \(5, 11\)"),
        (lambda text: text(TOO_LONG, TOO_LONG == 0), "texts have 17 tokens, the tower 16 positions"),
    ],
)
def test_texts_that_do_not_fit_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(towers(build())[1])


def test_image_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="multiples of the patch size 8, got 20 x 20"):
        towers(build())[0](images()[:, :, :20, :20])
