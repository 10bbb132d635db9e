"""The contract between data, towers and methods.

Shape letters: B pairs of one worker, V views, P patches seen, T tokens, S image side, D joint width,
H width of the vision tower.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor


def at_least_float32(tensor: Tensor) -> Tensor:
    """Half precision raised to float32; every other type stays, float64 above all."""
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


@dataclass(frozen=True)
class PairBatch:
    """One worker's share of a global batch; everything random in it was drawn from row keys.

    Attributes:
        images: prepared images, uint8 [B, S, S, 3].
        view_boxes: crops of the views, pixels, float32 [V, B, 4] as (top, left, height, width).
        teacher_boxes: crop the EMA teacher scores, covering every view, float32 [B, 4].
        token_ids: padded to the longest text of the batch, int64 [B, T].
        is_real_token: False at padding, bool [B, T].
        selection_noise: uniform noise for random token selection, float32 [V, B, patches of the grid].
        row_keys, group_keys, text_keys: 63-bit hashes of row id, group and text, int64 [B].
    """

    images: Tensor
    view_boxes: Tensor
    teacher_boxes: Tensor
    token_ids: Tensor
    is_real_token: Tensor
    selection_noise: Tensor
    row_keys: Tensor
    group_keys: Tensor
    text_keys: Tensor

    def to(self, device: torch.device) -> PairBatch:
        moved = {f.name: getattr(self, f.name).to(device, non_blocking=True) for f in fields(self)}
        return replace(self, **moved)


@dataclass(frozen=True)
class PairOutputs:
    """What the towers say about a batch.

    Attributes:
        image_embeds: unit, [V, B, D].
        text_embeds: unit, [B, D].
        image_tokens: patches seen by the tower, in the joint space, not normalised, [V, B, P, D].
        text_tokens: every position in the joint space, not normalised, [B, T, D].
        is_real_token: False at padding, [B, T].
        image_features: pooled vision feature before the joint projection, [V, B, H].
    """

    image_embeds: Tensor
    text_embeds: Tensor
    image_tokens: Tensor
    text_tokens: Tensor
    is_real_token: Tensor
    image_features: Tensor

    def float(self) -> PairOutputs:
        """The same in float32 (float64 stays), for tables and losses under bf16 autocast."""
        return replace(self, **{f.name: at_least_float32(getattr(self, f.name)) for f in fields(self)})


@dataclass(frozen=True)
class TeacherOutputs:
    """What the EMA teacher says about its crop.

    Attributes:
        token_scores: class-token attention over the patch grid of each view, [V, B, patches].
        features: pooled vision feature of the teacher's crop, [B, H].
    """

    token_scores: Tensor
    features: Tensor
