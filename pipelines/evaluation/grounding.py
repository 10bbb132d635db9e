"""Pointing game: does the best patch for a label's prompt lie inside a box of that label?"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.evaluation.statistics import Floats

Boxes = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, kw_only=True)
class PointingTargets:
    """M questions "where is this label in this image?" and the patches that answer them."""

    image: NDArray[np.int64]  # [M]
    label: NDArray[np.int64]  # [M]
    # The patch's centre lies inside a box of the asked label.
    is_inside: NDArray[np.bool_]  # [M, P]
    # ... inside a box of any label.
    is_on_object: NDArray[np.bool_]  # [M, P]


@dataclass(frozen=True, kw_only=True)
class Pointing:
    """Hits per question, and what a patch drawn at random would score."""

    is_hit: NDArray[np.bool_]  # [M]
    is_on_object: NDArray[np.bool_]  # [M]
    chance: float
    chance_on_object: float
    # Share of questions with a patch centre inside their boxes: the most that can be reached.
    reachable: float


def patch_centres(grid: int) -> Floats:
    """Centres (x, y) of grid x grid patches, row-major, relative to the image, [P, 2]."""
    steps = (np.arange(grid) + 0.5) / grid
    y, x = np.meshgrid(steps, steps, indexing="ij")
    return np.stack([x.ravel(), y.ravel()], axis=1)


def grid_of(num_patches: int) -> int:
    """Patches per side.

    Raises:
        ValueError: the number of patches is not a square, so some patches were dropped.
    """
    grid = math.isqrt(num_patches)
    if grid * grid != num_patches or grid == 0:
        raise ValueError(f"the pointing game needs all patches of a square grid, got {num_patches}")
    return grid


def _inside(boxes: Boxes, centres_P2: Floats) -> NDArray[np.bool_]:
    corner = np.array([[box["x"], box["y"]] for box in boxes], dtype=np.float64)[:, None, :]
    size = np.array([[box["w"], box["h"]] for box in boxes], dtype=np.float64)[:, None, :]
    # Half open: a centre on the shared edge of two boxes belongs to one of them.
    is_inside = (centres_P2 >= corner) & (centres_P2 < corner + size)
    return np.asarray(is_inside.all(-1).any(0))


def pointing_targets(boxes: Sequence[Boxes | None], labels: Sequence[str], grid: int) -> PointingTargets:
    """One question per image and label among `labels` that has a box there.

    Args:
        boxes: per image, dicts with label, x, y (top left), w, h relative to the image; None when nobody
            drew boxes.
        labels: labels to ask for; boxes of other labels count as objects only.
    """
    centres = patch_centres(grid)
    number = {label: i for i, label in enumerate(labels)}
    images, asked, inside, on_object = [], [], [], []
    for image, found in enumerate(boxes):
        wanted = sorted({number[box["label"]] for box in found or () if box["label"] in number})
        if not found or not wanted:
            continue
        anywhere = _inside(found, centres)
        for label in wanted:
            images.append(image)
            asked.append(label)
            inside.append(_inside([box for box in found if box["label"] == labels[label]], centres))
            on_object.append(anywhere)
    shape = (len(images), grid * grid)
    return PointingTargets(
        image=np.array(images, dtype=np.int64),
        label=np.array(asked, dtype=np.int64),
        is_inside=np.array(inside, dtype=np.bool_).reshape(shape),
        is_on_object=np.array(on_object, dtype=np.bool_).reshape(shape),
    )


def best_patches(patch_embeds_BPD: Floats, label_embeds_LD: Floats) -> NDArray[np.int64]:
    """Patch with the highest cosine for every image and label, [B, L]; the first of equal ones."""
    found: NDArray[np.int64] = (patch_embeds_BPD @ label_embeds_LD.T).argmax(1)
    return found


def pointing_game(best_patch_NL: NDArray[np.int64], targets: PointingTargets) -> Pointing:
    """Answer every question with the best patch of its image for its label.

    Hitting some object and hitting the asked one are reported apart: a model can find objects without
    telling them apart.

    Raises:
        ValueError: there is no question.
    """
    if len(targets.image) == 0:
        raise ValueError("the pointing game needs at least one box of an asked label")
    question = np.arange(len(targets.image))
    answer = best_patch_NL[targets.image, targets.label]
    return Pointing(
        is_hit=targets.is_inside[question, answer],
        is_on_object=targets.is_on_object[question, answer],
        chance=float(targets.is_inside.mean()),
        chance_on_object=float(targets.is_on_object.mean()),
        reachable=float(targets.is_inside.any(1).mean()),
    )
