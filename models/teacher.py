"""The EMA teacher of a training run: it scores patches and gives BYOL its targets."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.crops import crop_images
from models.ema import make_teacher, update_teacher_
from models.outputs import PairBatch, TeacherOutputs
from models.recipe import TokenSelection
from models.schedules import ema_decay
from models.token_scores import class_attention_scores, map_scores_to_view
from models.token_selection import (
    keep_attentive,
    keep_least_attentive,
    keep_mixed,
    keep_random_blocks,
)
from models.towers import VisionTower

# The paper's blocks are 2x2 patches of a 14x14 grid; on a 4x4 grid that would leave 4 blocks to choose from.
_SMALLEST_GRID_WITH_BLOCKS = 14


class EmaTeacher(nn.Module):
    """A slow float32 copy of the vision tower and, with BYOL, of its projector."""

    def __init__(self, vision: VisionTower, projector: nn.Module | None, *, decay: float) -> None:
        super().__init__()
        self.vision = make_teacher(vision)
        self.projector = None if projector is None else make_teacher(projector)
        self.decay = decay

    def follow(
        self, vision: VisionTower, projector: nn.Module | None, *, step: int, total_steps: int
    ) -> None:
        """Move towards the online weights, with the decay of `step`."""
        decay = ema_decay(step, total_steps, self.decay)
        update_teacher_(self.vision, vision, decay)
        if self.projector is not None and projector is not None:
            update_teacher_(self.projector, projector, decay)

    @torch.no_grad()
    def forward(self, batch: PairBatch) -> TeacherOutputs:
        """Score the teacher's crop once and carry the scores over to every view."""
        crops = crop_images(batch.images, batch.teacher_boxes)
        tokens = self.vision(crops, with_class_attention=True)
        scores = class_attention_scores(tokens.class_attention)
        per_view = [map_scores_to_view(scores, batch.teacher_boxes, boxes) for boxes in batch.view_boxes]
        target = tokens.pooled if self.projector is None else self.projector(tokens.pooled)
        return TeacherOutputs(torch.stack(per_view), target)


def block_size(selection: TokenSelection, grid: int) -> int:
    """Patches per side of a block on a grid of `grid` x `grid` patches."""
    if selection.block_size is not None:
        return selection.block_size
    return 2 if grid >= _SMALLEST_GRID_WITH_BLOCKS and grid % 2 == 0 else 1


def select_tokens(
    selection: TokenSelection, *, scores: Tensor | None, noise: Tensor, grid: int
) -> Tensor | None:
    """Patches to keep, ascending indices [B, K]; None keeps all.

    Args:
        scores: [B, patches]; None falls back to random selection (the teacher is not trusted yet).
        noise: uniform [B, patches], drawn from row keys so that it is the same on any worker.
    """
    if selection.kind == "none":
        return None
    ratio, block = selection.keep_ratio, block_size(selection, grid)
    if selection.kind == "random" or scores is None:
        return keep_random_blocks(noise, keep_ratio=ratio, block=block)
    if selection.kind == "attentive":
        return keep_attentive(scores, keep_ratio=ratio, block=block)
    if selection.kind == "high":
        return keep_least_attentive(scores, keep_ratio=ratio, block=block)
    return keep_mixed(scores, noise, keep_ratio=ratio, best_share=selection.mixed_share, block=block)
