"""The contract between data, towers and methods.

Shape letters: B pairs of one worker, V views of an image, M texts of a pair, P patches seen, T tokens,
S image side, D joint width, H width of the vision tower, W width of the text tower.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor


def at_least_float32(tensor: Tensor) -> Tensor:
    """Half precision raised to float32; every other type stays, float64 above all."""
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


# Width of the hashed bag of labels in `PairBatch.tags`.
NUM_TAGS = 128


@dataclass(frozen=True)
class ScoredTokens:
    """What a scorer outside the trainer says about a batch; it may hold an older teacher than the trainer.

    Attributes:
        ema_version: step at whose start the trainer's teacher had these weights, int64 [B]; always on the
            CPU, where it is looked at. -1 where nothing was scored.
        kept: patches the method's rule keeps in each view, ascending, int16 [V, B, K]; None in steps that
            do not ask for it.
        features: as `TeacherOutputs.features`, [B, H]; None unless a head predicts them.
        seconds: that scoring the batch took.
    """

    ema_version: Tensor
    kept: Tensor | None = None
    features: Tensor | None = None
    seconds: float = 0.0

    def to(self, device: torch.device) -> ScoredTokens:
        kept, features = (
            None if value is None else value.to(device, non_blocking=True)
            for value in (self.kept, self.features)
        )
        return replace(self, kept=kept, features=features)


@dataclass(frozen=True)
class PairBatch:
    """One worker's share of a global batch; everything random in it was drawn from row keys.

    Attributes:
        images: prepared images, uint8 [B, S, S, 3].
        view_boxes: crops of the views, pixels, float32 [V, B, 4] as (top, left, height, width).
        teacher_boxes: crop the EMA teacher scores, covering every view, float32 [B, 4].
        token_ids: padded to the longest text of the batch, int64 [M, B, T].
        is_real_token: False at padding, bool [M, B, T].
        is_text: False where a pair has fewer than M texts, bool [M, B]; text 0 is always there. A missing
            text holds its start and end token, so that it can be encoded.
        selection_noise: uniform noise for random token selection, float32 [V, B, patches of the grid].
        row_keys, group_keys, text_keys: 63-bit hashes of row id, group and text 0, int64 [B].
        draw_keys: hash of (seed, epoch, row); the source of every draw inside the model, int64 [B].
        row_index: position of the row in the training split, int64 [B].
        tags: hashed bag of the row's labels, 0 or 1, float32 [B, NUM_TAGS].
        scored: None unless patches are scored outside the trainer.
        whole_scores: scores of the whole image's patches that lie beside the data, float32 [B, patches of
            the scorer's grid]; None unless scored ahead.
    """

    images: Tensor
    view_boxes: Tensor
    teacher_boxes: Tensor
    token_ids: Tensor
    is_real_token: Tensor
    is_text: Tensor
    selection_noise: Tensor
    row_keys: Tensor
    group_keys: Tensor
    text_keys: Tensor
    draw_keys: Tensor
    row_index: Tensor
    tags: Tensor
    scored: ScoredTokens | None = None
    whole_scores: Tensor | None = None

    def to(self, device: torch.device) -> PairBatch:
        tensors = {f.name: v for f in fields(self) if isinstance(v := getattr(self, f.name), Tensor)}
        moved = {name: value.to(device, non_blocking=True) for name, value in tensors.items()}
        scored = None if self.scored is None else self.scored.to(device)
        return replace(self, **moved, scored=scored)


@dataclass(frozen=True)
class MaskedText:
    """What the text tower says about text 0 with some tokens masked.

    Attributes:
        states: of every position, [B, T, W].
        token_ids: before masking, [B, T].
        is_target: True at positions to be predicted, [B, T].
    """

    states: Tensor
    token_ids: Tensor
    is_target: Tensor


@dataclass(frozen=True)
class MaskedImage:
    """What the vision tower says about view 0 with most patches removed.

    Attributes:
        patches: those it saw, before the joint projection, [B, P, H].
        kept: their indices in the grid, [B, P].
    """

    patches: Tensor
    kept: Tensor


@dataclass(frozen=True)
class PairOutputs:
    """What the towers say about a batch.

    Attributes:
        image_embeds: unit, [V, B, D].
        text_embeds: unit, one per text, [M, B, D].
        report_embeds: unit, one per pair, [B, D]: text 0, or all texts pooled.
        is_text: False where a pair has fewer texts, [M, B].
        image_tokens: patches seen by the tower, in the joint space, not normalised, [V, B, P, D].
        text_tokens: every position of text 0 in the joint space, not normalised, [B, T, D].
        is_real_token: False at padding of text 0, [B, T].
        image_features: pooled vision feature before the joint projection, [V, B, H].
        patch_features: patches seen before the joint projection, [V, B, P, H].
        patch_weights: what the attention pool gives each patch, [V, B, P]; None without that pool.
        text_weights: what the attention pool gives each text, [B, M]; None without that pool.
        masked_text: None unless a head predicts masked tokens.
        masked_image: None unless a head predicts removed patches.
    """

    image_embeds: Tensor
    text_embeds: Tensor
    report_embeds: Tensor
    is_text: Tensor
    image_tokens: Tensor
    text_tokens: Tensor
    is_real_token: Tensor
    image_features: Tensor
    patch_features: Tensor
    patch_weights: Tensor | None = None
    text_weights: Tensor | None = None
    masked_text: MaskedText | None = None
    masked_image: MaskedImage | None = None

    def float(self) -> PairOutputs:
        """The same in float32 (float64 stays), for tables and losses under bf16 autocast."""
        text, image = self.masked_text, self.masked_image
        return replace(
            self,
            **{
                f.name: at_least_float32(value)
                for f in fields(self)
                if isinstance(value := getattr(self, f.name), Tensor)
            },
            masked_text=text and replace(text, states=at_least_float32(text.states)),
            masked_image=image and replace(image, patches=at_least_float32(image.patches)),
        )


@dataclass(frozen=True)
class TeacherOutputs:
    """What the EMA teacher says about its crop and about text 0.

    Attributes:
        token_scores: class-token attention over the patch grid of each view, [V, B, patches]; None when
            patches were scored outside the trainer.
        features: pooled vision feature of the teacher's crop, projected by BYOL's head if there is one,
            [B, H].
        patches: patch tokens of view 0 whole, [B, patches, H]; None unless a head predicts them.
        image_embeds, text_embeds: unit, in the joint space, [B, D]; None unless the teacher holds both
            towers.
    """

    token_scores: Tensor | None
    features: Tensor
    patches: Tensor | None = None
    image_embeds: Tensor | None = None
    text_embeds: Tensor | None = None
