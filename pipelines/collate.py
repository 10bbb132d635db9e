"""Prepared rows -> one worker's batch: text choice, crop boxes and noise, all drawn from row keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from models.outputs import NUM_TAGS, PairBatch
from pipelines.keyed_random import Epochs, Purpose, keyed_hash, keyed_uniform, text_key

# Aspect ratios of random crops, as everywhere in the field.
_ASPECT = (3 / 4, 4 / 3)


@dataclass(frozen=True)
class BatchSettings:
    """What a method wants of its batches.

    Attributes:
        seed: of every draw.
        text: `caption` or `sentence`; a row without sentences gives captions.
        num_views: crops per image.
        min_crop_area: smallest share of the image a crop covers; 1 means no cropping.
        num_patches: of the vision tower's grid, for selection noise.
        max_tokens: longest text, start and end token included; joined sentences are cut to it.
        num_texts: texts per pair, in the report's order; no sentence is in two of them.
        sentences_per_text: sentences joined into one text; captions are never joined, each says it all.
    """

    seed: int
    text: Literal["caption", "sentence"]
    num_views: int
    min_crop_area: float
    num_patches: int
    max_tokens: int
    num_texts: int = 1
    sentences_per_text: int = 1


class PairRows:
    """Prepared rows in memory: pixels as one array, texts as token lists, labels as hashed bags."""

    def __init__(
        self, table: pa.Table, image_size: int, *, positions: NDArray[np.int64] | None = None
    ) -> None:
        """Take over a table in schemas.PREPARED or SCORED.

        Args:
            positions: of the rows in their split, int64; None when the table is the whole split.
        """
        table = table.combine_chunks()
        flat = np.frombuffer(b"".join(table["image"].to_pylist()), dtype=np.uint8)
        self.images = flat.reshape(len(table), image_size, image_size, 3)
        self.captions: list[list[list[int]]] = table["caption_tokens"].to_pylist()
        self.sentences: list[list[list[int]]] = table["sentence_tokens"].to_pylist()
        row_ids = table["row_id"].to_pylist()
        self.row_keys = np.array([text_key(row_id) for row_id in row_ids], np.int64)
        # A row of unknown group is a group of its own.
        groups = zip(table["group_id"].to_pylist(), row_ids, strict=True)
        self.group_keys = np.array([text_key(group or f"row:{row_id}") for group, row_id in groups], np.int64)
        self.positions = np.arange(len(table), dtype=np.int64) if positions is None else positions
        self.token_scores: NDArray[np.float32] | None = None
        if "token_scores" in table.column_names:
            scores = table["token_scores"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
            self.token_scores = scores.reshape(len(table), -1)
        # The class of a row without labels is what it shows.
        labels = zip(table["labels"].to_pylist(), table["class_name"].to_pylist(), strict=True)
        self.tags = _hashed_bags([listed or ([name] if name else []) for listed, name in labels])

    def __len__(self) -> int:
        return len(self.row_keys)


def collate(rows: PairRows, index: NDArray[np.int64], settings: BatchSettings, *, epoch: Epochs) -> PairBatch:
    """A batch of the rows at `index`; the same for the same (seed, epoch, row id) wherever it runs.

    Args:
        epoch: of all rows, or of each, int64 [B].
    """
    keys = rows.row_keys[index]
    texts = _choose_texts(rows, index, keys, settings, epoch)
    token_ids, is_real, is_text = _pad(texts, num_texts=settings.num_texts)
    boxes = _view_boxes(keys, settings, epoch, side=rows.images.shape[1])
    noise = [
        keyed_uniform(
            keys,
            seed=settings.seed,
            epoch=epoch,
            purpose=Purpose.SELECTION,
            stream=view,
            count=settings.num_patches,
        )
        for view in range(settings.num_views)
    ]
    return PairBatch(
        images=torch.from_numpy(rows.images[index]),
        view_boxes=torch.from_numpy(boxes),
        teacher_boxes=torch.from_numpy(
            _teacher_boxes(boxes, keys, settings, epoch, side=rows.images.shape[1])
        ),
        token_ids=token_ids,
        is_real_token=is_real,
        is_text=is_text,
        selection_noise=torch.from_numpy(np.stack(noise).astype(np.float32)),
        row_keys=torch.from_numpy(keys),
        group_keys=torch.from_numpy(rows.group_keys[index]),
        text_keys=torch.tensor([text_key(str(first)) for first, *_ in texts]),
        draw_keys=torch.from_numpy(keyed_hash(keys, seed=settings.seed, epoch=epoch, purpose=Purpose.MODEL)),
        row_index=torch.from_numpy(rows.positions[index]),
        tags=torch.from_numpy(rows.tags[index].astype(np.float32)),
        whole_scores=None if rows.token_scores is None else torch.from_numpy(rows.token_scores[index]),
    )


def first_texts(
    rows: PairRows, index: NDArray[np.int64], settings: BatchSettings
) -> tuple[torch.Tensor, torch.Tensor]:
    """The first text of each row, nothing drawn: token ids [B, T] and what is real [B, T]."""
    texts = []
    for row in index.tolist():
        if settings.text == "sentence" and rows.sentences[row]:
            sentences = rows.sentences[row][: settings.sentences_per_text]
            texts.append(_join(sentences, settings.sentences_per_text, max_tokens=settings.max_tokens))
        else:
            texts.append(rows.captions[row][:1])
    token_ids, is_real, _ = _pad(texts, num_texts=1)
    return token_ids[0], is_real[0]


def _choose_texts(
    rows: PairRows, index: NDArray[np.int64], keys: NDArray[np.int64], settings: BatchSettings, epoch: Epochs
) -> list[list[list[int]]]:
    """Between one and `num_texts` texts of each row, as token lists."""
    draws = keyed_uniform(
        keys,
        seed=settings.seed,
        epoch=epoch,
        purpose=Purpose.TEXT,
        count=settings.num_texts * settings.sentences_per_text,
    )
    chosen = []
    for row, row_draws in zip(index.tolist(), draws.tolist(), strict=True):
        if settings.text == "sentence" and rows.sentences[row]:
            sentences = _sample(rows.sentences[row], row_draws)
            chosen.append(_join(sentences, settings.sentences_per_text, max_tokens=settings.max_tokens))
        else:
            chosen.append(_sample(rows.captions[row], row_draws[: settings.num_texts]))
    return chosen


def _sample(options: list[list[int]], draws: list[float]) -> list[list[int]]:
    """As many different options as there are draws, or all, in the order they stand in."""
    if len(options) <= len(draws):
        return options
    left = list(range(len(options)))
    # Each uniform draw picks one of those left.
    picked = [left.pop(int(draw * len(left))) for draw in draws]
    return [options[position] for position in sorted(picked)]


def _join(sentences: list[list[int]], per_text: int, *, max_tokens: int) -> list[list[int]]:
    """Texts of so many sentences each, the last one perhaps of fewer, without the tokens between them."""
    if per_text == 1:
        return sentences
    joined = []
    for first in range(0, len(sentences), per_text):
        parts = sentences[first : first + per_text]
        words = [token for part in parts for token in part[1:-1]][: max_tokens - 2]
        joined.append([parts[0][0], *words, parts[0][-1]])
    return joined


def _pad(texts: list[list[list[int]]], *, num_texts: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Token ids padded to the longest text with 0, what is real [M, B, T], and which texts exist [M, B]."""
    counts = np.array([len(row) for row in texts])
    # A text that is missing still passes through the tower: start and end token.
    by_text = [
        [row[text] if text < len(row) else [row[0][0], row[0][-1]] for row in texts]
        for text in range(num_texts)
    ]
    lengths = np.array([[len(tokens) for tokens in pairs] for pairs in by_text])
    is_real = np.arange(lengths.max()) < lengths[:, :, None]
    token_ids = np.zeros(is_real.shape, np.int64)
    token_ids[is_real] = [token for pairs in by_text for tokens in pairs for token in tokens]
    is_text = np.arange(num_texts)[:, None] < counts[None, :]
    return torch.from_numpy(token_ids), torch.from_numpy(is_real), torch.from_numpy(is_text)


def _hashed_bags(labels: list[list[str]]) -> NDArray[np.bool_]:
    """Each row's labels as a bag of hashes, [rows, NUM_TAGS]; labels that share a hash count as one."""
    bags = np.zeros((len(labels), NUM_TAGS), np.bool_)
    for row, names in enumerate(labels):
        bags[row, [text_key(name) % NUM_TAGS for name in names]] = True
    return bags


def _view_boxes(
    keys: NDArray[np.int64], settings: BatchSettings, epoch: Epochs, *, side: int
) -> NDArray[np.float32]:
    """Random crops (top, left, height, width) in pixels, [V, B, 4]."""
    boxes = np.empty((settings.num_views, len(keys), 4), np.float32)
    for view in range(settings.num_views):
        if settings.min_crop_area == 1:
            boxes[view] = (0, 0, side, side)
            continue
        area, aspect, down, right = keyed_uniform(
            keys, seed=settings.seed, epoch=epoch, purpose=Purpose.CROP, stream=view, count=4
        ).T
        area = settings.min_crop_area + (1 - settings.min_crop_area) * area
        # A crop of nearly the whole image is nearly square: cutting its long side off would cover less
        # than min_crop_area.
        low, high = np.log(np.maximum(_ASPECT[0], area)), np.log(np.minimum(_ASPECT[1], 1 / area))
        ratio = np.exp(low + (high - low) * aspect)
        height = np.minimum(side, side * np.sqrt(area / ratio))
        width = np.minimum(side, side * np.sqrt(area * ratio))
        boxes[view] = np.stack([down * (side - height), right * (side - width), height, width], 1)
    return boxes


def _teacher_boxes(
    boxes: NDArray[np.float32], keys: NDArray[np.int64], settings: BatchSettings, epoch: Epochs, *, side: int
) -> NDArray[np.float32]:
    """A crop that covers every view, each edge moved outwards at random, [B, 4].

    Source: A-CLIP, arXiv 2212.08653, as described; the released box misses parts of the views.
    """
    draws = keyed_uniform(keys, seed=settings.seed, epoch=epoch, purpose=Purpose.TEACHER_CROP, count=4)
    top, left = boxes[:, :, 0].min(0), boxes[:, :, 1].min(0)
    bottom = (boxes[:, :, 0] + boxes[:, :, 2]).max(0)
    right = (boxes[:, :, 1] + boxes[:, :, 3]).max(0)
    top, left = top * draws[:, 0], left * draws[:, 1]
    bottom, right = bottom + (side - bottom) * draws[:, 2], right + (side - right) * draws[:, 3]
    return np.stack([top, left, bottom - top, right - left], 1).astype(np.float32)
