"""Patch scores from the EMA teacher's class-token attention."""

import math
from collections.abc import Sequence

import torch
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
