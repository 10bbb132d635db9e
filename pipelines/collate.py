"""Prepared rows -> one worker's batch: text choice, crop boxes and noise, all drawn from row keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from models.outputs import PairBatch
from pipelines.keyed_random import Epochs, Purpose, keyed_hash, keyed_uniform, text_key
from pipelines.pair_rows import PairRows, TakenRows, Texts

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


def collate(rows: PairRows, index: NDArray[np.int64], settings: BatchSettings, *, epoch: Epochs) -> PairBatch:
    """A batch of the rows at `index`; the same for the same (seed, epoch, row id) wherever it runs.

    Args:
        epoch: of all rows, or of each, int64 [B].
    """
    taken = rows.take(index)
    keys, side = taken.row_keys, rows.image_size
    texts = _choose_texts(taken, settings, epoch)
    token_ids, is_real, is_text = _pad(texts, num_texts=settings.num_texts)
    boxes = _view_boxes(keys, settings, epoch, side=side)
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
        images=torch.from_numpy(taken.images),
        view_boxes=torch.from_numpy(boxes),
        teacher_boxes=torch.from_numpy(_teacher_boxes(boxes, keys, settings, epoch, side=side)),
        token_ids=token_ids,
        is_real_token=is_real,
        is_text=is_text,
        selection_noise=torch.from_numpy(np.stack(noise).astype(np.float32)),
        row_keys=torch.from_numpy(keys),
        group_keys=torch.from_numpy(taken.group_keys),
        text_keys=torch.tensor([text_key(str(first)) for first, *_ in texts]),
        draw_keys=torch.from_numpy(keyed_hash(keys, seed=settings.seed, epoch=epoch, purpose=Purpose.MODEL)),
        row_index=torch.from_numpy(taken.positions),
        tags=torch.from_numpy(taken.tags.astype(np.float32)),
        whole_scores=None if taken.token_scores is None else torch.from_numpy(taken.token_scores),
    )


def first_texts(taken: TakenRows, settings: BatchSettings) -> tuple[torch.Tensor, torch.Tensor]:
    """The first text of each row, nothing drawn: token ids [B, T] and what is real [B, T]."""
    texts = []
    for captions, sentences in zip(taken.captions, taken.sentences, strict=True):
        if settings.text == "sentence" and sentences:
            first = sentences[: settings.sentences_per_text]
            texts.append(_join(first, settings.sentences_per_text, max_tokens=settings.max_tokens))
        else:
            texts.append(captions[:1])
    token_ids, is_real, _ = _pad(texts, num_texts=1)
    return token_ids[0], is_real[0]


def _choose_texts(taken: TakenRows, settings: BatchSettings, epoch: Epochs) -> list[Texts]:
    """Between one and `num_texts` texts of each row, as token lists."""
    draws = keyed_uniform(
        taken.row_keys,
        seed=settings.seed,
        epoch=epoch,
        purpose=Purpose.TEXT,
        count=settings.num_texts * settings.sentences_per_text,
    )
    chosen = []
    for captions, sentences, row_draws in zip(taken.captions, taken.sentences, draws.tolist(), strict=True):
        if settings.text == "sentence" and sentences:
            sampled = _sample(sentences, row_draws)
            chosen.append(_join(sampled, settings.sentences_per_text, max_tokens=settings.max_tokens))
        else:
            chosen.append(_sample(captions, row_draws[: settings.num_texts]))
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
