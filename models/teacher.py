"""The EMA teacher of a training run: it scores patches, gives heads their targets and fills queues."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.crops import crop_images, shrink_images
from models.ema import make_teacher, update_teacher_
from models.outputs import PairBatch, TeacherOutputs, at_least_float32
from models.pair_model import PairModel
from models.recipe import MethodRecipe
from models.schedules import ema_decay
from models.token_scores import class_attention_scores, map_scores_to_view
from models.token_selection import (
    keep_attentive,
    keep_least_attentive,
    keep_mixed,
    keep_random,
    keep_random_blocks,
)
from models.towers import VisionTower
from models.training_slots import TokenSelection

# The paper's blocks are 2x2 patches of a 14x14 grid; on a 4x4 grid that would leave 4 blocks to choose from.
_SMALLEST_GRID_WITH_BLOCKS = 14


class TokenScorer(nn.Module):
    """The part of a teacher that scores patches and gives BYOL its targets; another process may hold it."""

    def __init__(self, vision: VisionTower, projector: nn.Module | None, recipe: MethodRecipe) -> None:
        super().__init__()
        self.vision, self.projector, self.recipe = vision, projector, recipe

    @torch.no_grad()
    def forward(self, batch: PairBatch) -> tuple[Tensor, Tensor]:
        """Score the teacher's crop once and carry the scores over to every view.

        Returns:
            Scores [V, B, patches of the grid], and the feature of the crop [B, H], projected by BYOL's head
            if there is one.
        """
        tokens = self.vision(
            self.shrunk(crop_images(batch.images, batch.teacher_boxes)), with_class_attention=True
        )
        scores = class_attention_scores(tokens.class_attention)
        per_view = [
            map_scores_to_view(scores, batch.teacher_boxes, boxes, out_side=self.vision.grid)
            for boxes in batch.view_boxes
        ]
        feature = tokens.pooled if self.projector is None else self.projector(tokens.pooled)
        # Autocast leaves half precision here; heads take norms and scores of these.
        return torch.stack(per_view), at_least_float32(feature)

    @torch.no_grad()
    def whole_images(self, pixels: Tensor) -> Tensor:
        """Scores of whole images, grey levels [B, 3, S, S], on this scorer's own grid, [B, patches]."""
        tokens = self.vision(self.shrunk(pixels), with_class_attention=True)
        return class_attention_scores(tokens.class_attention)

    def shrunk(self, images: Tensor) -> Tensor:
        """Images at the size this teacher scores."""
        patch_size = int(self.vision.vision.config.patch_size)
        return shrink_images(images, self.recipe.teacher.image_scale, patch_size=patch_size)


class EmaTeacher(nn.Module):
    """A slow float32 copy of the vision tower, or of the whole encoder, and of BYOL's projector."""

    def __init__(self, model: PairModel) -> None:
        super().__init__()
        self.recipe: MethodRecipe = model.recipe
        whole = self.recipe.needs_joint_teacher
        self.encoder = make_teacher(model.encoder) if whole else None
        self.own_vision = None if whole else make_teacher(model.encoder.vision)
        projector = model.objective.heads.byol_projector
        self.projector = None if projector is None else make_teacher(projector)

    @property
    def vision(self) -> VisionTower:
        found = self.own_vision if self.encoder is None else self.encoder.vision
        assert found is not None
        return found

    def follow(self, model: PairModel, *, step: int, total_steps: int) -> None:
        """Move towards the online weights, with the decay of `step`."""
        decay = ema_decay(step, total_steps, self.recipe.teacher.decay)
        if self.encoder is not None:
            update_teacher_(self.encoder, model.encoder, decay)
        else:
            update_teacher_(self.vision, model.encoder.vision, decay)
        projector = model.objective.heads.byol_projector
        if self.projector is not None and projector is not None:
            update_teacher_(self.projector, projector, decay)

    @torch.no_grad()
    def forward(self, batch: PairBatch) -> TeacherOutputs:
        """Score the teacher's crop, and everything the recipe's heads and memories ask of the teacher."""
        scores, features = self.scorer()(batch)
        patches = images = texts = None
        if self.recipe.heads.masked_distillation.weight:
            patches = self.vision(crop_images(batch.images, batch.view_boxes[0])).patches
        if self.encoder is not None:
            crops = crop_images(batch.images, batch.teacher_boxes)
            images = self.encoder.embed_images(crops)[0]
            texts = self.encoder.embed_texts(batch.token_ids[0], batch.is_real_token[0])[0]
            texts = self.encoder.embed_reports(texts[None], batch.is_text[:1])[0]
        return TeacherOutputs(
            token_scores=scores,
            features=features,
            patches=None if patches is None else at_least_float32(patches),
            image_embeds=images,
            text_embeds=texts,
        )

    def scorer(self) -> TokenScorer:
        """The part that scores, sharing this teacher's weights."""
        return TokenScorer(self.vision, self.projector, self.recipe)

    def shrunk(self, images: Tensor) -> Tensor:
        """Images at the size this teacher scores."""
        return self.scorer().shrunk(images)


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
    if selection.kind == "tokens":
        return keep_random(noise, keep_ratio=ratio)
    if selection.kind == "random" or scores is None:
        return keep_random_blocks(noise, keep_ratio=ratio, block=block)
    if selection.kind == "attentive":
        return keep_attentive(scores, keep_ratio=ratio, block=block)
    if selection.kind == "high":
        return keep_least_attentive(scores, keep_ratio=ratio, block=block)
    return keep_mixed(scores, noise, keep_ratio=ratio, best_share=selection.mixed_share, block=block)
