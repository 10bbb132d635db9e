"""Random features of every kind an objective reads, and the share of them that one worker holds."""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from models.outputs import MaskedImage, MaskedText, PairBatch, PairOutputs, TeacherOutputs
from models.recipe import MethodRecipe
from tests.pair_fixture import TOWERS, draw, make_batch, unit

JOINT, VISION, GRID = 8, 8, 3
NUM_PATCHES = GRID * GRID

Held = TypeVar("Held", PairOutputs, TeacherOutputs, MaskedText, MaskedImage)


def batch_for(recipe: MethodRecipe, *, seed: int = 0) -> PairBatch:
    return make_batch(num_views=recipe.features.num_views, num_texts=recipe.features.num_texts, seed=seed)


def outputs_for(recipe: MethodRecipe, batch: PairBatch, *, seed: int = 0) -> PairOutputs:
    """What towers could say about a batch."""
    num_views, num_pairs = batch.view_boxes.shape[:2]
    num_texts, length = len(batch.is_text), batch.token_ids.shape[2]
    seeds = iter(range(100 * seed, 100 * seed + 100))
    texts = unit(num_texts, num_pairs, JOINT, seed=next(seeds))
    total = (texts * batch.is_text[:, :, None]).sum(0)
    is_target = batch.is_real_token[0] & (torch.arange(length) % 3 == 1)
    kept = torch.arange(0, NUM_PATCHES, 3).expand(num_pairs, -1)
    return PairOutputs(
        image_embeds=unit(num_views, num_pairs, JOINT, seed=next(seeds)),
        text_embeds=texts,
        report_embeds=texts[0] if recipe.features.report == "first" else F.normalize(total, dim=1),
        is_text=batch.is_text,
        image_tokens=draw(num_views, num_pairs, NUM_PATCHES, JOINT, seed=next(seeds)),
        text_tokens=draw(num_pairs, length, JOINT, seed=next(seeds)),
        is_real_token=batch.is_real_token[0],
        image_features=draw(num_views, num_pairs, VISION, seed=next(seeds)),
        patch_features=draw(num_views, num_pairs, NUM_PATCHES, VISION, seed=next(seeds)),
        patch_weights=draw(num_views, num_pairs, NUM_PATCHES, seed=next(seeds)).softmax(2),
        text_weights=draw(num_pairs, num_texts, seed=next(seeds)).softmax(1),
        masked_text=MaskedText(
            draw(num_pairs, length, TOWERS.text_width, seed=next(seeds)), batch.token_ids[0], is_target
        ),
        masked_image=MaskedImage(draw(num_pairs, kept.shape[1], VISION, seed=next(seeds)), kept),
    )


def teacher_for(batch: PairBatch, *, seed: int = 0) -> TeacherOutputs:
    """What a teacher could say about a batch."""
    num_pairs, seeds = len(batch.images), iter(range(100 * seed + 50, 100 * seed + 60))
    return TeacherOutputs(
        token_scores=draw(1, num_pairs, NUM_PATCHES, seed=next(seeds)),
        features=draw(num_pairs, VISION, seed=next(seeds)),
        patches=draw(num_pairs, NUM_PATCHES, VISION, seed=next(seeds)),
        image_embeds=unit(num_pairs, JOINT, seed=next(seeds)),
        text_embeds=unit(num_pairs, JOINT, seed=next(seeds)),
    )


# Fields whose first axis counts views or texts; pairs are the second.
_SECOND_AXIS = {
    PairOutputs: {
        "image_embeds",
        "text_embeds",
        "is_text",
        "image_tokens",
        "image_features",
        "patch_features",
        "patch_weights",
    },
    TeacherOutputs: {"token_scores"},
    MaskedText: set(),
    MaskedImage: set(),
}
# Fields whose second axis counts the tokens of text 0.
_TOKENS = {"text_tokens", "is_real_token", "states", "token_ids", "is_target"}


def share_of(held: Held, rows: slice, num_tokens: int) -> Held:
    """One worker's pairs, their texts cut to the worker's longest."""

    def part(name: str, value: Any) -> Any:
        if is_dataclass(value):
            return share_of(value, rows, num_tokens)  # type: ignore[type-var]  # a part that is held
        if value is None:
            return None
        cut = value[:, rows] if name in _SECOND_AXIS[type(held)] else value[rows]
        return cut[:, :num_tokens] if name in _TOKENS else cut

    return replace(held, **{f.name: part(f.name, getattr(held, f.name)) for f in fields(held)})


def leaves_of(outputs: PairOutputs) -> tuple[PairOutputs, list[Tensor]]:
    """The same features, of which every floating one collects a gradient, and those."""
    leaves: list[Tensor] = []

    def leaf(value: Any) -> Any:
        if is_dataclass(value):
            parts = {f.name: leaf(getattr(value, f.name)) for f in fields(value)}
            return replace(value, **parts)  # type: ignore[type-var]  # an instance
        if isinstance(value, Tensor) and value.is_floating_point():
            leaves.append(value.clone().requires_grad_())
            return leaves[-1]
        return value

    found = leaf(outputs)
    assert isinstance(found, PairOutputs)
    return found, leaves
