"""Batches: everything random in a row follows from its id, whoever shares the batch."""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import pyarrow as pa
import pytest
import torch

from models.outputs import NUM_TAGS, PairBatch
from pipelines.collate import BatchSettings, collate
from pipelines.keyed_random import Purpose, keyed_uniform, text_key
from pipelines.pair_rows import PairRows
from tests.prepared_fixture import IMAGE_SIZE, prepared_table

TABLE = prepared_table(32)
ROWS = PairRows(TABLE, IMAGE_SIZE)
SETTINGS = BatchSettings(seed=1, text="caption", num_views=2, min_crop_area=0.3, num_patches=4, max_tokens=12)
# Five sentences in every other row.
REPORT_TABLE = prepared_table(32, num_sentences=5)
REPORTS = PairRows(REPORT_TABLE, IMAGE_SIZE)
SENTENCES = REPORT_TABLE["sentence_tokens"].to_pylist()
CAPTIONS = REPORT_TABLE["caption_tokens"].to_pylist()
# Fields whose first axis counts views or texts; pairs are the second.
SECOND_AXIS = {"view_boxes", "selection_noise", "token_ids", "is_real_token", "is_text"}


def batch_of(*rows: int, epoch: int = 0, settings: BatchSettings = SETTINGS) -> PairBatch:
    return collate(ROWS, np.array(rows), settings, epoch=epoch)


def reports(*rows: int, epoch: int = 0, num_texts: int, sentences_per_text: int = 1, **more) -> PairBatch:
    """A batch with several texts per pair."""
    settings = replace(
        SETTINGS, text="sentence", num_texts=num_texts, sentences_per_text=sentences_per_text, **more
    )
    return collate(REPORTS, np.array(rows), settings, epoch=epoch)


def texts_of(batch: PairBatch, text: int = 0) -> list[list[int]]:
    """Token lists of one text of every pair, without padding."""
    pairs = zip(batch.token_ids[text], batch.is_real_token[text], strict=True)
    return [ids[real].tolist() for ids, real in pairs]


def report_of(batch: PairBatch, position: int) -> list[list[int]]:
    """All texts a pair has."""
    num_texts = int(batch.is_text[:, position].sum())
    return [texts_of(batch, text)[position] for text in range(num_texts)]


def row_of(batch: PairBatch, position: int) -> dict[str, object]:
    """What belongs to one row of a batch; the text without padding, whose length is the batch's."""
    picked: dict[str, object] = {"text": texts_of(batch)[position]}
    for field in fields(batch):
        found = getattr(batch, field.name)
        if found is not None and field.name not in ("token_ids", "is_real_token"):
            value = found.select(int(field.name in SECOND_AXIS), position)
            picked[field.name] = value.tolist()
    return picked


def test_shapes_and_types():
    batch = batch_of(4, 9, 2)
    assert batch.images.shape == (3, IMAGE_SIZE, IMAGE_SIZE, 3)
    assert batch.images.dtype == torch.uint8
    assert batch.view_boxes.shape == (2, 3, 4)
    assert batch.teacher_boxes.shape == (3, 4)
    assert batch.selection_noise.shape == (2, 3, 4)
    assert batch.token_ids.shape[:2] == batch.is_real_token.shape[:2] == batch.is_text.shape == (1, 3)
    assert batch.tags.shape == (3, NUM_TAGS)
    floats = (batch.view_boxes, batch.teacher_boxes, batch.selection_noise, batch.tags)
    assert {tensor.dtype for tensor in floats} == {torch.float32}
    keys = (batch.row_keys, batch.group_keys, batch.text_keys, batch.draw_keys, batch.row_index)
    assert all(key.shape == (3,) for key in keys)
    assert {tensor.dtype for tensor in (batch.token_ids, *keys)} == {torch.int64}
    assert {batch.is_real_token.dtype, batch.is_text.dtype} == {torch.bool}


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
    moved = PairRows(TABLE.slice(5, 3), IMAGE_SIZE, positions=np.array([5, 6, 7]))
    assert row_of(collate(moved, np.array([0]), SETTINGS, epoch=0), 0) == row_of(batch_of(5), 0)
    assert batch_of(9, 5).row_index.tolist() == [9, 5]


@pytest.mark.parametrize("change", [{"epoch": 1}, {"settings": replace(SETTINGS, seed=2)}])
def test_epochs_and_seeds_draw_anew(change):
    everything = range(32)
    before, after = batch_of(*everything), batch_of(*everything, **change)
    assert texts_of(before) != texts_of(after)
    for name in ("view_boxes", "teacher_boxes", "selection_noise"):
        one, other = getattr(before, name), getattr(after, name)
        assert not (one == other).all(-1).any(), name
    assert not (before.draw_keys == after.draw_keys).any()
    for name in ("images", "row_keys", "group_keys", "row_index", "tags"):
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


def test_one_text_is_the_option_at_the_rows_first_number():
    """The rule of every stored curve: options[int(u * number of options)]."""
    taken = ROWS.take(np.arange(32))
    for text, options in (("caption", taken.captions), ("sentence", taken.sentences)):
        rows = np.array([row for row in range(32) if options[row]])
        draws = keyed_uniform(taken.row_keys[rows], seed=1, epoch=3, purpose=Purpose.TEXT)[:, 0]
        expected = [options[row][int(u * len(options[row]))] for row, u in zip(rows, draws, strict=True)]
        batch = batch_of(*rows, epoch=3, settings=replace(SETTINGS, text=text))
        assert texts_of(batch) == expected
        assert batch.text_keys.tolist() == [text_key(str(tokens)) for tokens in expected]
        assert texts_of(batch_of(*rows, epoch=4, settings=replace(SETTINGS, text=text))) != expected


def test_several_texts_are_different_sentences_in_the_reports_order():
    seen = set()
    for epoch in range(60):
        texts = report_of(reports(7, epoch=epoch, num_texts=3), 0)
        numbers = tuple(SENTENCES[7].index(text) for text in texts)
        assert len(set(numbers)) == 3
        assert list(numbers) == sorted(numbers)
        seen.add(numbers)
    # All of the 10 ways to take 3 of 5.
    assert len(seen) == 10


def test_every_sentence_is_as_likely_as_another():
    rows = PairRows(prepared_table(4000, num_sentences=5), IMAGE_SIZE)
    settings = replace(SETTINGS, text="sentence", num_texts=2)
    batch = collate(rows, np.arange(1, 4000, 2), settings, epoch=0)
    numbers = (batch.token_ids[:, :, 1] - torch.arange(1, 4000, 2) - 400) // 100
    pairs = (5 * numbers[0] + numbers[1]).bincount(minlength=25)
    # 10 pairs, 200 each expected; chi-square with 9 degrees of freedom, 33.7 is its 0.9999 quantile.
    assert (pairs > 0).sum() == 10
    assert ((pairs[pairs > 0] - 200.0) ** 2 / 200).sum() < 33.7


def test_a_report_with_fewer_sentences_gives_all_and_says_which_are_missing():
    batch = reports(7, 6, num_texts=7)
    assert report_of(batch, 0) == SENTENCES[7]
    # A row without sentences gives its captions.
    assert report_of(batch, 1) == CAPTIONS[6]
    assert batch.is_text.sum(0).tolist() == [5, 3]
    assert batch.is_text.tolist() == [[True, True]] * 3 + [[True, False]] * 2 + [[False, False]] * 2
    assert texts_of(batch, 5) == texts_of(batch, 6) == [[1, 2], [1, 2]]


def test_joined_sentences_have_one_start_and_one_end():
    words = [sentence[1:-1] for sentence in SENTENCES[7]]
    batch = reports(7, 6, num_texts=2, sentences_per_text=3)
    assert report_of(batch, 0) == [[1, *words[0], *words[1], *words[2], 2], [1, *words[3], *words[4], 2]]
    # Captions say the same in other words: they are never joined.
    captions = report_of(batch, 1)
    assert len(captions) == 2
    assert all(caption in CAPTIONS[6] for caption in captions)
    for epoch in range(20):
        first, second = report_of(reports(7, epoch=epoch, num_texts=2, sentences_per_text=2), 0)
        numbers = [words.index([word]) for text in (first, second) for word in text[1:-1]]
        assert numbers == sorted(set(numbers))
        assert len(numbers) == 4


def test_joined_sentences_are_cut_before_the_end_token():
    whole = report_of(reports(7, num_texts=1, sentences_per_text=5), 0)[0]
    assert len(whole) == 7
    assert report_of(reports(7, num_texts=1, sentences_per_text=5, max_tokens=5), 0) == [[*whole[:4], 2]]


def test_text_0_and_its_key_belong_together():
    batch = reports(*range(32), num_texts=3)
    assert batch.text_keys.tolist() == [text_key(str(text)) for text in texts_of(batch)]


def test_a_report_is_the_same_in_any_company():
    alone = reports(7, num_texts=3)
    in_company = reports(9, 7, 6, num_texts=3)
    assert report_of(in_company, 1) == report_of(alone, 0)
    assert report_of(in_company, 0) != report_of(alone, 0)


def test_tags_are_the_rows_labels():
    batch = batch_of(*range(32))
    assert set(batch.tags.unique().tolist()) == {0, 1}
    for row in range(32):
        labels = TABLE["labels"][row].as_py()
        expected = {text_key(label) % NUM_TAGS for label in labels}
        assert set(batch.tags[row].nonzero()[:, 0].tolist()) == expected
        assert len(labels) == row % 3


def test_draw_keys_differ_between_rows_and_from_row_keys():
    batch = batch_of(*range(32))
    assert len(set(batch.draw_keys.tolist())) == 32
    assert (batch.draw_keys >= 0).all()
    assert not (batch.draw_keys == batch.row_keys).any()


def test_texts_are_padded_to_the_longest_of_the_batch():
    batch = batch_of(*range(32))
    texts = texts_of(batch)
    assert batch.token_ids.shape[2] == max(len(text) for text in texts)
    assert (batch.token_ids[~batch.is_real_token] == 0).all()
    for text, real in zip(texts, batch.is_real_token[0].tolist(), strict=True):
        assert real == [True] * len(text) + [False] * (len(real) - len(text))
        assert (text[0], text[-1]) == (1, 2)


def test_views_are_crops_of_the_wanted_area_and_shape():
    side = 100
    table = prepared_table(512)
    black = pa.array([bytes(side * side * 3)] * 512, pa.binary())
    rows = PairRows(table.set_column(table.schema.get_field_index("image"), "image", black), side)
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
