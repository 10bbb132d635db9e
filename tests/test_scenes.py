"""Embedded scenes: true to their design, deterministic, and described only by what they show."""

from __future__ import annotations

import dataclasses
import io
import math
import re

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from pipelines.captions import DIGIT_NAMES, default_prompts, place_phrase, scene_captions
from pipelines.scenes import DESIGNS, SPLIT_ROWS, draw, lay_out, make_scene_texts, make_scenes
from pipelines.schemas import PAIRS, check_schema

QUICK, TOKENS = DESIGNS["quick"], DESIGNS["tokens"]
BOTH = pytest.mark.parametrize("design", [QUICK, TOKENS], ids=lambda design: design.name)


def rows_of(design, *, split="train", indices=range(200), seed=0):
    return make_scenes(design, split=split, indices=indices, seed=seed).to_pylist()


def pixels_of(row) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(row["image"])))


def words_of(text: str) -> list[str]:
    return re.findall(r"[a-z]+", text)


def bilinear(image: np.ndarray, size: int) -> np.ndarray:
    """Textbook bilinear enlargement, pixel by pixel."""
    out = np.zeros((size, size))
    last = len(image) - 1
    for i in range(size):
        for j in range(size):
            y = min(max((i + 0.5) * len(image) / size - 0.5, 0), last)
            x = min(max((j + 0.5) * len(image) / size - 0.5, 0), last)
            y0, x0 = math.floor(y), math.floor(x)
            y1, x1 = min(y0 + 1, last), min(x0 + 1, last)
            upper = image[y0, x0] * (1 - (x - x0)) + image[y0, x1] * (x - x0)
            lower = image[y1, x0] * (1 - (x - x0)) + image[y1, x1] * (x - x0)
            out[i, j] = upper * (1 - (y - y0)) + lower * (y - y0)
    return out


@BOTH
def test_rows_have_the_schema_and_canvas_of_the_design(design):
    table = make_scenes(design, split="test", indices=range(3), seed=0)
    check_schema(table.schema, PAIRS, where="scenes")
    assert pixels_of(table.to_pylist()[0]).shape == (design.size, design.size)
    assert table["row_id"].to_pylist() == [f"{design.name}-test-{i:06d}" for i in range(3)]
    assert set(table["source"].to_pylist()) == {f"scenes-{design.name}"}


def test_splits_are_whole_forms_and_share_no_digit():
    covered = [row for rows in SPLIT_ROWS.values() for row in rows]
    assert sorted(covered) == list(range(1797))
    target = load_digits().target
    for rows in SPLIT_ROWS.values():  # a form opens with 0-9 written three times
        assert target[rows.start : rows.start + 30].tolist() == list(range(10)) * 3
    assert target[1000:1030].tolist() != list(range(10)) * 3  # not just any row


@BOTH
@pytest.mark.parametrize("split", SPLIT_ROWS)
def test_every_mark_comes_from_the_splits_own_writers(design, split):
    scenes = [lay_out(design, split=split, index=index, seed=1) for index in range(300)]
    used = {mark.digit for s in scenes for mark in [*s.digits, *(scribble for scribble, _ in s.scribbles)]}
    assert used <= set(SPLIT_ROWS[split])
    assert len(used) > 100


@BOTH
def test_a_row_depends_on_seed_split_and_index_only(design):
    whole = rows_of(design, indices=range(20))
    assert rows_of(design, indices=[13, 2, 7]) == [whole[13], whole[2], whole[7]]
    assert rows_of(design, indices=range(20), seed=1)[5]["image"] != whole[5]["image"]
    assert rows_of(design, indices=range(20), split="test")[5]["captions"] != whole[5]["captions"]


@BOTH
def test_texts_alone_are_the_texts_of_the_scenes(design):
    texts = make_scene_texts(design, split="train", indices=range(20), seed=3)
    assert texts.equals(make_scenes(design, split="train", indices=range(20), seed=3).drop_columns("image"))


@BOTH
def test_boxes_hold_the_digits_and_nothing_else_is_drawn(design):
    clean = dataclasses.replace(design, noise=0.0)
    digits = load_digits()
    for index in range(40):
        scene = lay_out(clean, split="test", index=index, seed=0)
        row = make_scenes(clean, split="test", indices=[index], seed=0).to_pylist()[0]
        canvas = draw(scene, design=clean, seed=0).astype(float)
        for box, mark in zip(row["boxes"], scene.digits, strict=True):
            assert box["label"] == DIGIT_NAMES[digits.target[mark.digit]]
            x, y, side = (round(box[key] * design.size) for key in ("x", "y", "w"))
            expected = np.rint(bilinear(digits.images[mark.digit] / 16, design.digit_px) * 255)
            inside = canvas[y : y + side, x : x + side].copy()
            np.testing.assert_allclose(inside, expected, atol=1.001)  # rounding of a half
            assert not np.allclose(np.roll(inside, 1), expected, atol=1.001)
            canvas[y : y + side, x : x + side] = 0
        for mark, _ in scene.scribbles:
            canvas[mark.y : mark.y + design.digit_px, mark.x : mark.x + design.digit_px] = 0
        assert canvas.max() == 0


@BOTH
def test_marks_stay_in_distinct_cells(design):
    for index in range(100):
        scene = lay_out(design, split="train", index=index, seed=0)
        marks = [*scene.digits, *(mark for mark, _ in scene.scribbles)]
        assert len({mark.cell for mark in marks}) == len(marks)
        for mark in marks:
            row, column = divmod(mark.cell, design.grid)
            assert row * design.cell_px <= mark.y <= (row + 1) * design.cell_px - design.digit_px
            assert column * design.cell_px <= mark.x <= (column + 1) * design.cell_px - design.digit_px


def test_a_scribble_moves_every_block_and_keeps_the_ink():
    for index in range(50):
        for _, order in lay_out(QUICK, split="train", index=index, seed=0).scribbles:
            assert sorted(order) == list(range(16))
            assert all(place != block for place, block in enumerate(order))


def test_noise_has_the_stated_spread():
    blank = dataclasses.replace(QUICK, noise=0.12)
    scene = dataclasses.replace(
        lay_out(QUICK, split="train", index=0, seed=0), digits=(), scribbles=(), index=0
    )
    values = np.concatenate(
        [draw(dataclasses.replace(scene, index=i), design=blank, seed=0).ravel() for i in range(40)]
    )
    # Half of a normal distribution survives on a black sheet: its second moment is sigma^2 / 2.
    assert np.sqrt(2 * np.mean((values / 255.0) ** 2)) == pytest.approx(0.12, rel=0.02)


@BOTH
def test_labels_class_and_captions_name_the_same_digits(design):
    rows = rows_of(design, indices=range(400))
    for row in rows:
        named = [box["label"] for box in row["boxes"]]
        assert row["labels"] == sorted(set(named))
        assert row["class_name"] == (named[0] if len(named) == 1 else None)
        assert len(row["captions"]) == len(set(row["captions"])) == 3
        for caption in row["captions"]:
            # Exactly the boxed digits, so never a scribble's.
            assert sorted(word for word in words_of(caption) if word in DIGIT_NAMES) == row["labels"]
        told = [word for text in row["sentences"] for word in words_of(text) if word in DIGIT_NAMES]
        assert told == named
    assert max(len(row["labels"]) for row in rows) == 3


def test_scenes_without_a_digit_say_so_and_only_they_speak_of_scribbles():
    rows = rows_of(QUICK, indices=range(400))
    empty = [row for row in rows if not row["labels"]]
    assert empty
    assert all(row["boxes"] == [] and row["class_name"] is None for row in empty)
    assert all(set(default_prompts().negative_texts) <= set(row["captions"]) for row in empty)
    assert all(row["sentences"] == ["there is no digit"] for row in empty)
    others = " ".join(text for row in rows if row["labels"] for text in row["captions"] + row["sentences"])
    assert not {"scribbles", "no", "without"} & set(words_of(others))


@BOTH
def test_shares_of_scenes_with_no_digit_and_one(design):
    counts = [len(lay_out(design, split="test", index=index, seed=0).digits) for index in range(1500)]
    assert np.mean(np.equal(counts, 0)) == pytest.approx(0.06, abs=0.02)
    assert 1 / 3 < np.mean(np.equal(counts, 1)) < 1 / 2
    scribbles = [len(lay_out(design, split="test", index=i, seed=0).scribbles) for i in range(200)]
    assert (min(scribbles), max(scribbles)) == design.num_scribbles


def test_sentences_place_each_digit_where_its_box_is():
    for row in rows_of(TOKENS, indices=range(100)):
        for box, sentence in zip(row["boxes"], row["sentences"], strict=bool(row["boxes"])):
            centre_x, centre_y = box["x"] + box["w"] / 2, box["y"] + box["h"] / 2
            assert ("left" in sentence) == (centre_x < 1 / 3)
            assert ("right" in sentence) == (centre_x > 2 / 3)
            assert ("top" in sentence) == (centre_y < 1 / 3)
            assert ("bottom" in sentence) == (centre_y > 2 / 3)


def test_places_of_a_four_by_four_grid():
    told = [[place_phrase(row, column, grid=4) for column in range(4)] for row in range(4)]
    assert told[0] == ["at the top left", "at the top", "at the top", "at the top right"]
    assert told[1] == told[2] == ["on the left", "in the middle", "in the middle", "on the right"]
    assert told[3] == ["at the bottom left", "at the bottom", "at the bottom", "at the bottom right"]


def test_the_article_of_eight():
    texts = [text for row in rows_of(QUICK) for text in row["captions"] + row["sentences"]]
    text = " ".join(texts)
    assert "an eight" in text
    assert not re.search(r"\ba eight|\ban (?!eight)", text)
    assert default_prompts().class_texts["eight"] == "an eight"
    assert default_prompts().class_texts["seven"] == "a seven"


def test_places_are_said_now_and_then_and_the_order_varies():
    objects = [("seven", "at the top left"), ("two", "on the right")]
    rng = np.random.default_rng(0)
    captions = [scene_captions(objects, rng=rng)[0] for _ in range(500)]
    share = np.mean(["at the top left" in caption for caption in captions])
    assert share == pytest.approx(0.6, abs=0.06)
    first = np.mean([words_of(caption)[1] == "seven" for caption in captions])
    assert first == pytest.approx(0.5, abs=0.07)


def test_prompts_are_phrased_like_the_captions():
    prompts = default_prompts()
    assert list(prompts.class_texts) == list(DIGIT_NAMES)
    said = {text for row in rows_of(QUICK, indices=range(300)) for text in row["captions"]}
    assert {"a seven", "a picture of a seven", *prompts.negative_texts} <= said
    assert prompts.templates[1].format(prompts.class_texts["seven"]) == "a picture of a seven"
