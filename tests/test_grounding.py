"""Pointing game against a loop, the stored case, and chance."""

from __future__ import annotations

import numpy as np
import pytest

from pipelines.evaluation.grounding import (
    best_patches,
    grid_of,
    patch_centres,
    pointing_game,
    pointing_targets,
)
from tests.golden_files import load
from tests.oracles.evaluation import loop_pointing


def box(label: str, x: float, y: float, w: float, h: float) -> dict:
    return {"label": label, "x": x, "y": y, "w": w, "h": h}


def random_problem(num_images: int = 40, grid: int = 5, seed: int = 0):
    generator = np.random.default_rng(seed)
    labels = ["a", "b", "c"]
    boxes = []
    for _ in range(num_images):
        found = [
            box(labels[generator.integers(3)], *generator.random(2) * 0.6, *(0.1 + 0.4 * generator.random(2)))
            for _ in range(generator.integers(0, 4))
        ]
        boxes.append(found)
    patches = generator.normal(size=(num_images, grid * grid, 8))
    return patches, generator.normal(size=(3, 8)), boxes, labels


@pytest.mark.parametrize("seed", [0, 1])
def test_hits_equal_the_loop(seed):
    patches, embeds, boxes, labels = random_problem(seed=seed)
    targets = pointing_targets(boxes, labels, 5)
    found = pointing_game(best_patches(patches, embeds), targets)
    expected, expected_any = [], []
    for image, own in enumerate(boxes):
        for i, label in enumerate(labels):
            rects = [(b["x"], b["y"], b["w"], b["h"]) for b in own if b["label"] == label]
            if rects:
                every = [(b["x"], b["y"], b["w"], b["h"]) for b in own]
                expected.append(loop_pointing(patches[image].tolist(), embeds[i].tolist(), rects))
                expected_any.append(loop_pointing(patches[image].tolist(), embeds[i].tolist(), every))
    assert found.is_hit.tolist() == expected
    assert found.is_on_object.tolist() == expected_any
    # Negative control: a transposed grid points elsewhere.
    flipped = patches.reshape(-1, 5, 5, 8).swapaxes(1, 2).reshape(-1, 25, 8)
    assert pointing_game(best_patches(flipped, embeds), targets).is_hit.tolist() != expected


def test_stored_map_and_box():
    case = load("mil_derived_eval")
    rows, columns = np.nonzero(case["box"])
    drawn = box(
        "finding",
        columns.min() / 28,
        rows.min() / 28,
        (columns.max() + 1 - columns.min()) / 28,
        (rows.max() + 1 - rows.min()) / 28,
    )
    targets = pointing_targets([[drawn]], ["finding"], 7)
    found = pointing_game(best_patches(case["sim"].reshape(1, 49, 1), np.ones((1, 1))), targets)
    assert found.is_hit.tolist() == [bool(case["pointing_hit"])]
    lowest = pointing_game(best_patches(-case["sim"].reshape(1, 49, 1), np.ones((1, 1))), targets)
    assert lowest.is_hit.tolist() == [False]


def test_patch_centres_are_row_major():
    assert patch_centres(2).tolist() == [[0.25, 0.25], [0.75, 0.25], [0.25, 0.75], [0.75, 0.75]]


def test_cell_boxes_hold_exactly_their_patch():
    boxes = [[box("a", column / 4, row / 4, 0.25, 0.25)] for row in range(4) for column in range(4)]
    targets = pointing_targets(boxes, ["a"], 4)
    assert targets.is_inside.tolist() == np.eye(16, dtype=bool).tolist()


def test_several_boxes_of_a_label_are_one_question():
    boxes = [[box("a", 0, 0, 0.5, 0.5), box("a", 0.5, 0.5, 0.5, 0.5), box("b", 0.5, 0, 0.5, 0.5)], None, []]
    targets = pointing_targets(boxes, ["b", "a"], 2)
    assert targets.image.tolist() == [0, 0]
    assert targets.label.tolist() == [0, 1]
    assert targets.is_inside.tolist() == [[False, True, False, False], [True, False, False, True]]
    assert targets.is_on_object.tolist() == [[True, True, False, True]] * 2


def test_boxes_of_other_labels_count_as_objects_only():
    boxes = [[box("a", 0, 0, 0.5, 0.5), box("other", 0.5, 0, 0.5, 0.5)], [box("other", 0, 0, 1, 1)]]
    targets = pointing_targets(boxes, ["a"], 2)
    assert targets.image.tolist() == [0]
    found = pointing_game(np.array([[1], [0]]), targets)
    assert found.is_hit.tolist() == [False]
    assert found.is_on_object.tolist() == [True]


def test_chance_is_the_share_of_centres_inside():
    boxes = [[box("a", 0, 0, 0.5, 0.5)], [box("a", 0, 0, 1, 0.5)]]
    targets = pointing_targets(boxes, ["a"], 4)
    found = pointing_game(np.zeros((2, 1), dtype=int), targets)
    assert found.chance == pytest.approx((4 / 16 + 8 / 16) / 2)
    assert found.reachable == 1.0


def test_random_patches_reach_chance():
    patches, embeds, boxes, labels = random_problem(num_images=1500)
    found = pointing_game(best_patches(patches, embeds), pointing_targets(boxes, labels, 5))
    assert found.is_hit.mean() == pytest.approx(found.chance, abs=0.02)
    assert found.is_on_object.mean() == pytest.approx(found.chance_on_object, abs=0.02)


def test_a_box_between_the_centres_cannot_be_hit():
    targets = pointing_targets([[box("a", 0.4, 0.4, 0.2, 0.2)]], ["a"], 2)
    assert pointing_game(np.zeros((1, 1), dtype=int), targets).reachable == 0.0


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="all patches of a square grid, got 8"):
        grid_of(8)
    with pytest.raises(ValueError, match="at least one box of an asked label"):
        pointing_game(np.zeros((1, 1), dtype=int), pointing_targets([[], None], ["a"], 2))
