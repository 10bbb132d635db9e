"""Patch scores from the EMA teacher's class-token attention, and their transfer to training views."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

# B images, H heads, N tokens (class token first), P patches = N - 1, D width of a head


def class_query_attention(query_BHD: Tensor, key_BHND: Tensor) -> Tensor:
    """The class token's attention row alone: softmax(q_0 k^T / sqrt(D)).

    Args:
        query_BHD: query of the class token in each head, [B, H, D].
        key_BHND: keys of all tokens, [B, H, 1 + P, D], class token first.

    Returns:
        [B, H, 1 + P], rows sum to 1; float32 for half-precision input, because neighbouring scores
        differ by less than a half-precision step.

    Raises:
        ValueError: batch, heads or width of the two disagree.

    Source: A-CLIP, arXiv 2212.08653. The release computes whole attention maps and keeps this row; the
        row alone is exact and needs no [N, N] map.
    """
    if query_BHD.dim() != 3 or key_BHND.dim() != 4:
        raise ValueError(
            f"expected query [B, H, D] and key [B, H, N, D], got {query_BHD.dim()} and {key_BHND.dim()} axes"
        )
    if query_BHD.shape != key_BHND[:, :, 0].shape:
        raise ValueError(
            f"query {tuple(query_BHD.shape)} does not fit key {tuple(key_BHND.shape)}: B, H and D must agree"
        )
    with torch.autocast(device_type=query_BHD.device.type, enabled=False):
        query, key = _at_least_float32(query_BHD), _at_least_float32(key_BHND)
        logits_BHN = torch.einsum("bhd,bhnd->bhn", query, key) / math.sqrt(query.shape[-1])
        return logits_BHN.softmax(dim=-1)


def _at_least_float32(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def class_attention_scores(class_rows: Sequence[Tensor]) -> Tensor:
    """Score of each patch: class-token attention averaged over all layers and heads.

    Args:
        class_rows: one [B, H, 1 + P] attention row tensor per layer, class token first.

    Returns:
        scores [B, P]; they sum to 1 minus the mean attention of the class token to itself, because the
        class column is dropped without renormalising.

    Raises:
        ValueError: no layer, or a layer without heads or patches.

    Source: A-CLIP, arXiv 2212.08653, one map per image from one EMA crop. Text never enters.
    """
    if not class_rows:
        raise ValueError("class_attention_scores needs the attention rows of at least one layer, got none")
    for layer, rows in enumerate(class_rows):
        if rows.dim() != 3 or rows.shape[1] < 1 or rows.shape[2] < 2:
            raise ValueError(f"layer {layer}: expected attention rows [B, H, 1 + P], got {tuple(rows.shape)}")
    per_layer_LBN = torch.stack([_at_least_float32(rows).mean(dim=1) for rows in class_rows])
    return per_layer_LBN.mean(dim=0)[:, 1:]


def grid_side(num_patches: int) -> int:
    """Side of the square patch grid.

    Raises:
        ValueError: the number of patches is not a square.
    """
    side = math.isqrt(num_patches)
    if side * side != num_patches or side == 0:
        raise ValueError(f"patches must form a square grid, got {num_patches}")
    return side


def _check_boxes(scores_BP: Tensor, source_box_B4: Tensor, view_box_B4: Tensor) -> None:
    for name, boxes in (("source", source_box_B4), ("view", view_box_B4)):
        if boxes.shape != (scores_BP.shape[0], 4):
            raise ValueError(
                f"{name} boxes must be [{scores_BP.shape[0]}, 4] (top, left, height, width), "
                f"got {tuple(boxes.shape)}"
            )
        # Looking is free on the CPU; on an accelerator every view would wait for the device.
        if boxes.device.type == "cpu" and bool((boxes[:, 2:] <= 0).any()):
            raise ValueError(f"{name} boxes must have height and width > 0")


def map_scores_to_view_exact(scores_BP: Tensor, source_box_B4: Tensor, view_box_B4: Tensor) -> Tensor:
    """Scores of one crop carried over to another crop of the same image, as released.

    The map is resized to the source crop in pixels, the view is cut out of it with zeros where the source
    crop does not reach, and the cut is resized back to the grid; both resizes bilinear, no antialiasing.

    Args:
        scores_BP: scores on the source (EMA) crop, [B, P], row-major square grid.
        source_box_B4: (top, left, height, width) of the source crop in pixels of the unresized image;
            rounded to whole pixels.
        view_box_B4: the same for the view.

    Returns:
        scores on the view, [B, P].

    Raises:
        ValueError: patches that form no square, or boxes of a wrong shape or size.

    Source: A-CLIP, arXiv 2212.08653. For parity tests: a Python loop over images, hundreds of times slower
        than `map_scores_to_view`.
    """
    _check_boxes(scores_BP, source_box_B4, view_box_B4)
    side = grid_side(scores_BP.shape[1])
    rows = []
    boxes = zip(_whole_pixels(source_box_B4), _whole_pixels(view_box_B4), strict=True)
    for scores, (source, view) in zip(scores_BP, boxes, strict=True):
        map_11GG = scores.reshape(1, 1, side, side)
        pixels = F.interpolate(map_11GG, size=source[2:], mode="bilinear", align_corners=False)[0, 0]
        cut = _zero_filled_crop(pixels, top=view[0] - source[0], left=view[1] - source[1], size=view[2:])
        back = F.interpolate(cut[None, None], size=(side, side), mode="bilinear", align_corners=False)
        rows.append(back.reshape(-1))
    return torch.stack(rows)


def _whole_pixels(boxes_B4: Tensor) -> list[list[int]]:
    whole = boxes_B4.round().long()
    return torch.cat([whole[:, :2], whole[:, 2:].clamp(min=1)], dim=1).tolist()


def _zero_filled_crop(pixels: Tensor, *, top: int, left: int, size: list[int]) -> Tensor:
    height, width = size
    canvas = pixels.new_zeros(height, width)
    inside = pixels[max(top, 0) : max(top + height, 0), max(left, 0) : max(left + width, 0)]
    row, column = max(-top, 0), max(-left, 0)
    canvas[row : row + inside.shape[0], column : column + inside.shape[1]] = inside
    return canvas


def map_scores_to_view(
    scores_BP: Tensor, source_box_B4: Tensor, view_box_B4: Tensor, *, out_side: int | None = None
) -> Tensor:
    """Scores of one crop sampled at the patch centres of another crop of the same image.

    Args:
        scores_BP: scores on the source (EMA) crop, [B, P], row-major square grid.
        source_box_B4: (top, left, height, width) of the source crop in pixels of the unresized image.
        view_box_B4: the same for the view.
        out_side: patches per side of the view's grid G; None means that of the scores. A half-resolution
            teacher's 7x7 scores land on a 14x14 grid with 14.

    Returns:
        scores on the view, [B, G * G]; 0 for patches whose centre the source crop does not cover. The
        source grid's outer half cells repeat the border score.

    Raises:
        ValueError: patches that form no square, out_side < 1, or boxes of a wrong shape or (where they are
            on the CPU) of no size.

    Source: own vectorised form of A-CLIP's mapping (arXiv 2212.08653). It interpolates once where the
        release does twice, so the kept sets differ a little from `map_scores_to_view_exact`.
    """
    _check_boxes(scores_BP, source_box_B4, view_box_B4)
    source_side = grid_side(scores_BP.shape[1])
    side = source_side if out_side is None else out_side
    if side < 1:
        raise ValueError(f"out_side must be >= 1, got {out_side}")
    dtype = scores_BP.dtype
    centres_G = (torch.arange(side, device=scores_BP.device, dtype=dtype) + 0.5) / side
    source, view = source_box_B4.to(scores_BP.device, dtype), view_box_B4.to(scores_BP.device, dtype)
    y_BG = (view[:, :1] - source[:, :1] + centres_G * view[:, 2:3]) / source[:, 2:3]
    x_BG = (view[:, 1:2] - source[:, 1:2] + centres_G * view[:, 3:4]) / source[:, 3:4]
    points_BGG2 = torch.stack(
        [x_BG[:, None, :].expand(-1, side, -1), y_BG[:, :, None].expand(-1, -1, side)], dim=-1
    )
    sampled = F.grid_sample(
        scores_BP.reshape(-1, 1, source_side, source_side),
        points_BGG2 * 2 - 1,
        mode="bilinear",
        padding_mode="border",
        align_corners=False,
    )
    is_covered = ((points_BGG2 >= 0) & (points_BGG2 <= 1)).all(dim=-1)
    return (sampled[:, 0] * is_covered).reshape(scores_BP.shape[0], -1)
