"""Class-token scores and their mapping from the teacher's crop to a view."""

import pytest
import torch

from models.token_scores import (
    class_attention_scores,
    class_query_attention,
    grid_side,
    map_scores_to_view,
    map_scores_to_view_exact,
)
from models.token_selection import is_kept, keep_attentive
from tests.golden_files import assert_golden, tensors
from tests.oracles.aclip import loop_class_rows, loop_mapped, loop_scores


def draw(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def random_boxes(count, *, seed=0):
    """Views inside their source crop, in pixels."""
    generator = torch.Generator().manual_seed(seed)
    share = torch.rand(count, 6, generator=generator)
    source = torch.stack([5 + 20 * share[:, 0], 5 + 20 * share[:, 1], *(300 + 100 * share[:, 2:4].T)], 1)
    source = source.round().long()
    size = (source[:, 2:] * (0.6 + 0.3 * share[:, 4:6])).long()
    corner = source[:, :2] + ((source[:, 2:] - size) * share[:, :2]).long()
    return source, torch.cat([corner, size], 1)


def test_scores_equal_the_aclip_release():
    golden = tensors("aclip_e2e_tiny")
    rows = list(golden["ema_attn_cls_rows"])
    assert_golden(class_attention_scores(rows), golden["score_ema"])
    assert not torch.allclose(class_attention_scores(rows[:1]), golden["score_ema"])


def test_scores_equal_the_loop():
    rows = [draw(2, 3, 10, seed=s).softmax(2) for s in range(2)]
    expected = torch.tensor(loop_scores(rows), dtype=torch.float64)
    torch.testing.assert_close(class_attention_scores(rows), expected)


def test_class_query_attention_equals_the_loop_and_the_whole_map():
    query, key = draw(2, 3, 10, 4, seed=1), draw(2, 3, 10, 4, seed=2)
    rows = class_query_attention(query[:, :, 0], key)
    torch.testing.assert_close(rows, torch.tensor(loop_class_rows(query[:, :, 0], key), dtype=torch.float64))
    whole = (query @ key.transpose(2, 3) / 2).softmax(3)
    torch.testing.assert_close(rows, whole[:, :, 0])
    assert not torch.allclose(rows, whole[:, :, 1])


def test_half_precision_inputs_are_ranked_in_float32_even_under_autocast():
    query, key = draw(1, 2, 4).bfloat16(), draw(1, 2, 10, 4).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rows = class_query_attention(query, key)
    assert rows.dtype == torch.float32
    torch.testing.assert_close(rows, class_query_attention(query.float(), key.float()))


def test_scores_and_the_class_column_sum_to_one():
    rows = [draw(2, 3, 17, seed=s).softmax(2) for s in range(3)]
    own = torch.stack(rows)[..., 0].mean(dim=(0, 2))
    torch.testing.assert_close(class_attention_scores(rows).sum(1) + own, torch.ones(2, dtype=torch.float64))


def test_exact_mapping_equals_the_aclip_release():
    golden = tensors("aclip_crop_map_in")
    mapped = map_scores_to_view_exact(golden["score_ema"], golden["ema_box"], golden["view_box"])
    assert_golden(mapped, golden["score_view"])
    kept = keep_attentive(mapped, keep_ratio=0.5)
    assert torch.equal(kept, golden["kept"])
    assert torch.equal(~is_kept(kept, 196), golden["mask_removed"])
    swapped = map_scores_to_view_exact(golden["score_ema"], golden["view_box"], golden["ema_box"])
    assert not torch.allclose(swapped, golden["score_view"])


def test_exact_mapping_equals_the_release_where_a_view_leaves_the_crop():
    golden = tensors("aclip_e2e_tiny")
    view_boxes = golden["pos"]  # view 1, view 2, teacher
    for number in (0, 1):
        mapped = map_scores_to_view_exact(golden["score_ema"], view_boxes[:, 2], view_boxes[:, number])
        assert_golden(mapped, golden[f"score_view{number + 1}"])


def test_exact_mapping_fills_what_the_crop_does_not_cover_with_zero():
    scores = torch.ones(1, 16, dtype=torch.float64)
    source, view = torch.tensor([[0, 0, 8, 8]]), torch.tensor([[-4, 4, 8, 8]])
    expected = torch.zeros(4, 4, dtype=torch.float64)
    expected[2:, :2] = 1
    assert torch.equal(map_scores_to_view_exact(scores, source, view).view(4, 4), expected)
    assert torch.equal(map_scores_to_view(scores, source, view).view(4, 4), expected)
    outside = torch.tensor([[100, 100, 8, 8]])
    assert map_scores_to_view_exact(scores, source, outside).abs().sum() == 0
    assert map_scores_to_view(scores, source, outside).abs().sum() == 0


def test_fast_mapping_equals_the_loop():
    scores = draw(4, 36).abs()
    source, view = random_boxes(4)
    view = view.double() - torch.tensor([40.0, 0.0, 0.0, 0.0], dtype=torch.float64)  # some leave the crop
    expected = [loop_mapped(s, a, b) for s, a, b in zip(scores, source.tolist(), view.tolist(), strict=True)]
    mapped = map_scores_to_view(scores, source, view)
    torch.testing.assert_close(mapped, torch.tensor(expected, dtype=torch.float64))
    assert (mapped == 0).any()


def test_a_coarse_map_on_a_finer_grid_equals_the_loop():
    """Half-cell steps of a 12x12 grid are four interleaved 6x6 grids, each shifted by a quarter cell."""
    scores = draw(4, 36).abs()
    source, view = random_boxes(4)
    view = view.double() - torch.tensor([40.0, 0.0, 0.0, 0.0], dtype=torch.float64)  # some leave the crop
    expected = torch.empty(4, 12, 12, dtype=torch.float64)
    for row in (0, 1):
        for column in (0, 1):
            cell = view[:, 2:] / 6
            shift = (torch.tensor([row, column], dtype=torch.float64) / 2 - 0.25) * cell
            shifted = torch.cat([view[:, :2] + shift, view[:, 2:]], 1)
            for b in range(4):
                mapped = loop_mapped(scores[b], source[b].tolist(), shifted[b].tolist())
                expected[b, row::2, column::2] = torch.tensor(mapped, dtype=torch.float64).view(6, 6)
    found = map_scores_to_view(scores, source, view, out_side=12)
    torch.testing.assert_close(found, expected.flatten(1))
    assert (found == 0).any()
    assert not torch.allclose(found, map_scores_to_view(scores, source, view.flip(0), out_side=12))


def test_fast_mapping_reads_nothing_back_from_a_device():
    """Reading a value of a tensor without values raises."""
    boxes = torch.zeros(2, 4, device="meta")
    with pytest.raises(RuntimeError, match="meta"):
        map_scores_to_view_exact(torch.zeros(2, 49, device="meta"), boxes, boxes)
    found = map_scores_to_view(torch.zeros(2, 49, device="meta"), boxes, boxes, out_side=14)
    assert found.shape == (2, 196)


@pytest.mark.parametrize(("side", "out_side"), [(7, 14), (7, 7), (4, 6), (14, 7)])
def test_equal_boxes_resize_the_map(side, out_side):
    scores = draw(2, side * side).abs()
    boxes = torch.tensor([[3.0, 5.0, 224.0, 200.0]]).expand(2, -1)
    found = map_scores_to_view(scores, boxes, boxes, out_side=out_side)
    resized = torch.nn.functional.interpolate(
        scores.view(2, 1, side, side), size=(out_side, out_side), mode="bilinear", align_corners=False
    )
    torch.testing.assert_close(found, resized.flatten(1))
    if side == out_side:
        assert torch.equal(found, map_scores_to_view(scores, boxes, boxes))
        torch.testing.assert_close(found, scores)


@pytest.mark.parametrize("mapping", [map_scores_to_view, map_scores_to_view_exact])
def test_equal_boxes_keep_the_map(mapping):
    scores = draw(2, 49).abs()
    # odd pixels per cell: then a cell's centre is a pixel's centre and the second resize reads one pixel
    boxes = torch.tensor([[3, 5, 217, 217]]).expand(2, -1)
    moved = boxes + torch.tensor([0, 31, 0, 0])
    torch.testing.assert_close(mapping(scores, boxes, boxes), scores)
    assert not torch.allclose(mapping(scores, boxes, moved), scores)


def test_fast_mapping_keeps_nearly_the_same_tokens_as_the_exact_one():
    """Smooth maps on 14x14, 24 views: intersection over union of the kept sets."""
    coarse = draw(24, 1, 5, 5, seed=3)
    scores = torch.nn.functional.interpolate(coarse, size=(14, 14), mode="bilinear").flatten(1).abs()
    source, view = random_boxes(24, seed=4)
    masks = [
        is_kept(keep_attentive(mapping(scores, source, view), keep_ratio=0.5), 196)
        for mapping in (map_scores_to_view, map_scores_to_view_exact)
    ]
    overlap = (masks[0] & masks[1]).sum() / (masks[0] | masks[1]).sum()
    assert overlap > 0.97
    unmapped = is_kept(keep_attentive(scores, keep_ratio=0.5), 196)
    assert (unmapped & masks[1]).sum() / (unmapped | masks[1]).sum() < 0.9


BOX = torch.tensor([[0, 0, 8, 8]])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: class_attention_scores([]), "at least one layer, got none"),
        (lambda: class_attention_scores([torch.ones(2, 5)]), r"layer 0: expected .* got \(2, 5\)"),
        (lambda: class_query_attention(torch.ones(1, 2, 4), torch.ones(1, 2, 4)), "got 3 and 3 axes"),
        (lambda: class_query_attention(torch.ones(1, 2, 4), torch.ones(1, 2, 9, 3)), "B, H and D must agree"),
        (lambda: grid_side(15), "square grid, got 15"),
        (lambda: map_scores_to_view(torch.ones(1, 15), BOX, BOX), "square grid, got 15"),
        (lambda: map_scores_to_view(torch.ones(2, 16), BOX, BOX), r"source boxes must be \[2, 4\]"),
        (lambda: map_scores_to_view(torch.ones(1, 16), BOX, BOX, out_side=0), "out_side must be >= 1, got 0"),
        (lambda: map_scores_to_view_exact(torch.ones(1, 16), BOX, BOX * 0), "view boxes must have height"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()
