"""Batches: everything random in a row follows from its id, whoever shares the batch."""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import pytest
import torch

from models.outputs import PairBatch
from pipelines.collate import BatchSettings, PairRows, collate
from tests.prepared_fixture import IMAGE_SIZE, prepared_table

TABLE = prepared_table(32)
ROWS = PairRows(TABLE, IMAGE_SIZE)
SETTINGS = BatchSettings(seed=1, text="caption", num_views=2, min_crop_area=0.3, num_patches=4)
# Which axis of a field counts pairs.
PAIR_AXIS = {"view_boxes": 1, "selection_noise": 1}


def batch_of(*rows: int, epoch: int = 0, settings: BatchSettings = SETTINGS) -> PairBatch:
    return collate(ROWS, np.array(rows), settings, epoch=epoch)


def texts_of(batch: PairBatch) -> list[list[int]]:
    """Token lists without padding."""
    pairs = zip(batch.token_ids, batch.is_real_token, strict=True)
    return [ids[real].tolist() for ids, real in pairs]


def row_of(batch: PairBatch, position: int) -> dict[str, object]:
    """What belongs to one row of a batch; the text without padding, whose length is the batch's."""
    picked: dict[str, object] = {"text": texts_of(batch)[position]}
    for field in fields(batch):
        if field.name not in ("token_ids", "is_real_token"):
            value = getattr(batch, field.name).select(PAIR_AXIS.get(field.name, 0), position)
            picked[field.name] = value.tolist()
    return picked


def test_shapes_and_types():
    batch = batch_of(4, 9, 2)
    assert batch.images.shape == (3, IMAGE_SIZE, IMAGE_SIZE, 3)
    assert batch.images.dtype == torch.uint8
    assert batch.view_boxes.shape == (2, 3, 4)
    assert batch.teacher_boxes.shape == (3, 4)
    assert batch.selection_noise.shape == (2, 3, 4)
    floats = (batch.view_boxes, batch.teacher_boxes, batch.selection_noise)
    assert {tensor.dtype for tensor in floats} == {torch.float32}
    integers = (batch.token_ids, batch.row_keys, batch.group_keys, batch.text_keys)
    assert {tensor.dtype for tensor in integers} == {torch.int64}


def test_pixels_are_those_of_the_row():
    raw = np.frombuffer(TABLE["image"][9].as_py(), np.uint8).reshape(IMAGE_SIZE, IMAGE_SIZE, 3)
    np.testing.assert_array_equal(batch_of(4, 9).images[1].numpy(), raw)


def test_a_row_is_the_same_in_any_company():
    alone = row_of(batch_of(5), 0)
    assert row_of(batch_of(9, 5, 20, 31), 1) == alone
    assert row_of(batch_of(31, 2, 5), 2) == alone
    # The comparison sees differences: its neighbour is another row.
    assert row_of(batch_of(9, 5), 0) != alone


def test_a_row_is_the_same_wherever_it_is_stored():
    """A worker that reads other shards has the row at another position."""
    moved = PairRows(TABLE.slice(5, 3), IMAGE_SIZE)
    assert row_of(collate(moved, np.array([0]), SETTINGS, epoch=0), 0) == row_of(batch_of(5), 0)


@pytest.mark.parametrize("change", [{"epoch": 1}, {"settings": replace(SETTINGS, seed=2)}])
def test_epochs_and_seeds_draw_anew(change):
    everything = range(32)
    before, after = batch_of(*everything), batch_of(*everything, **change)
    assert texts_of(before) != texts_of(after)
    for name in ("view_boxes", "teacher_boxes", "selection_noise"):
        one, other = getattr(before, name), getattr(after, name)
        assert not (one == other).all(-1).any(), name
    for name in ("images", "row_keys", "group_keys"):
        assert torch.equal(getattr(before, name), getattr(after, name))


def test_every_caption_gets_its_turn():
    firsts = {text[1] // 100 for epoch in range(40) for text in texts_of(batch_of(7, epoch=epoch))}
    assert firsts == {1, 2, 3}


def test_sentences_fall_back_to_captions():
    settings = replace(SETTINGS, text="sentence")
    for epoch in range(10):
        without, with_sentences = texts_of(batch_of(6, 7, epoch=epoch, settings=settings))
        assert without[1] // 100 in (1, 2, 3)
        assert with_sentences[1] // 100 in (4, 5)
        assert texts_of(batch_of(7, epoch=epoch))[0][1] // 100 in (1, 2, 3)


def test_texts_are_padded_to_the_longest_of_the_batch():
    batch = batch_of(*range(32))
    texts = texts_of(batch)
    assert batch.token_ids.shape[1] == max(len(text) for text in texts)
    assert (batch.token_ids[~batch.is_real_token] == 0).all()
    for text, real in zip(texts, batch.is_real_token.tolist(), strict=True):
        assert real == [True] * len(text) + [False] * (len(real) - len(text))
        assert (text[0], text[-1]) == (1, 2)


def test_views_are_crops_of_the_wanted_area_and_shape():
    side = 100
    rows = PairRows(prepared_table(512), IMAGE_SIZE)
    rows.images = np.zeros((512, side, side, 3), np.uint8)
    for min_area in (0.08, 0.3, 0.9):
        settings = replace(SETTINGS, min_crop_area=min_area)
        boxes = collate(rows, np.arange(512), settings, epoch=0).view_boxes.double()
        top, left, height, width = boxes.unbind(-1)
        # float32 boxes on 100 pixels: 1e-5 relative.
        assert (torch.stack([top, left]) >= 0).all()
        assert (torch.stack([top + height, left + width]) <= side + 1e-4).all()
        area = height * width / side**2
        assert area.min() >= min_area * (1 - 1e-5)
        assert area.max() <= 1 + 1e-5
        assert area.max() - area.min() > 0.8 * (1 - min_area)
        ratio = width / height
        assert ratio.min() >= 0.75 - 1e-5
        assert ratio.max() <= 4 / 3 + 1e-5
        assert not torch.equal(boxes[0], boxes[1])


def test_the_teachers_crop_covers_every_view():
    for num_views in (1, 2, 3):
        settings = replace(SETTINGS, num_views=num_views)
        batch = batch_of(*range(32), settings=settings)
        views, teacher = batch.view_boxes.double(), batch.teacher_boxes.double()
        # float32 boxes on 8 pixels: 1e-5 absolute.
        assert (teacher[:, :2] <= views[:, :, :2] + 1e-5).all()
        assert (teacher[:, :2] + teacher[:, 2:] >= views[:, :, :2] + views[:, :, 2:] - 1e-5).all()
        assert (teacher[:, :2] >= 0).all()
        assert (teacher[:, :2] + teacher[:, 2:] <= IMAGE_SIZE + 1e-5).all()
        # Not simply the whole image.
        assert (teacher[:, 2:] < IMAGE_SIZE - 1e-3).any()


def test_no_cropping_is_the_whole_image():
    batch = batch_of(*range(32), settings=replace(SETTINGS, min_crop_area=1))
    whole = torch.tensor([0.0, 0.0, IMAGE_SIZE, IMAGE_SIZE])
    assert (batch.view_boxes == whole).all()
    assert (batch.teacher_boxes == whole).all()


def test_views_select_tokens_independently():
    noise = batch_of(*range(32)).selection_noise
    assert not torch.equal(noise[0], noise[1])
    assert noise.min() >= 0
    assert noise.max() < 1


def test_a_row_without_group_is_a_group_of_its_own():
    keys = batch_of(*range(6)).group_keys.tolist()
    assert keys[0] == keys[1]
    assert len(set(keys[1:])) == 5


def test_equal_texts_have_equal_keys():
    batch = batch_of(*range(32))
    by_text: dict[str, set[int]] = {}
    for text, key in zip(texts_of(batch), batch.text_keys.tolist(), strict=True):
        by_text.setdefault(str(text), set()).add(key)
    assert all(len(keys) == 1 for keys in by_text.values())
    assert len(set().union(*by_text.values())) == len(by_text)
