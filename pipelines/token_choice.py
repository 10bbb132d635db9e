"""Which patches each view of a batch keeps in a step, wherever they were scored. No Ray.

V views, B pairs, P patches of the grid, K kept patches.
"""

from __future__ import annotations

import torch
from torch import Tensor

from models.outputs import PairBatch, TeacherOutputs
from models.teacher import select_tokens
from models.token_scores import map_scores_to_view
from pipelines.scoring import ScoringPolicy
from pipelines.step_meter import StepMeter


def choose_tokens(
    policy: ScoringPolicy,
    batch: PairBatch,
    teacher: TeacherOutputs | None,
    *,
    step: int,
    grid: int,
    meter: StepMeter,
) -> Tensor | None:
    """Patches to keep, ascending indices [V, B, K]; None keeps all.

    Args:
        batch: its own scores, if it has any, come before the teacher's.
        meter: told the ages of scores that came from outside.
    """
    phase = policy.phase(step)
    if phase == "whole":
        return None
    if phase == "random":
        return select_views(policy, batch, None, grid=grid)
    if batch.scored is not None:
        return _fresh_or_random(policy, batch, step=step, grid=grid, meter=meter)
    if policy.scoring.mode == "offline":
        return select_views(policy, batch, whole_image_scores(batch, grid=grid), grid=grid)
    assert teacher is not None
    return select_views(policy, batch, teacher.token_scores, grid=grid)


def select_views(policy: ScoringPolicy, batch: PairBatch, scores: Tensor | None, *, grid: int) -> Tensor:
    """The recipe's selection in every view, [V, B, K].

    Args:
        scores: [V, B, P]; None draws at random, as many as by score.
    """
    kept = [
        select_tokens(
            policy.recipe.selection, scores=None if scores is None else scores[view], noise=noise, grid=grid
        )
        for view, noise in enumerate(batch.selection_noise)
    ]
    return torch.stack([found for found in kept if found is not None])


def whole_image_scores(batch: PairBatch, *, grid: int) -> Tensor:
    """Scores that lie beside the data, carried over to every view, [V, B, P]."""
    assert batch.whole_scores is not None
    side = batch.images.shape[1]
    whole = batch.teacher_boxes.new_tensor([0, 0, side, side]).expand(len(batch.images), 4)
    return torch.stack(
        [map_scores_to_view(batch.whole_scores, whole, boxes, out_side=grid) for boxes in batch.view_boxes]
    )


def _fresh_or_random(
    policy: ScoringPolicy, batch: PairBatch, *, step: int, grid: int, meter: StepMeter
) -> Tensor:
    scored = batch.scored
    assert scored is not None
    assert scored.kept is not None
    is_too_old = policy.is_too_old(step, scored.ema_version)
    meter.add_ages(step - scored.ema_version, is_too_old)
    kept = scored.kept.long()
    if not bool(is_too_old.any()):
        return kept
    drawn = select_views(policy, batch, None, grid=grid)
    return torch.where(is_too_old.to(kept.device)[None, :, None], drawn, kept)
