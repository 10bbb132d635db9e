"""Retrieval both ways: recall at k and median rank, one text per image, equal texts share their images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipelines.evaluation.statistics import Floats

# Queries scored at once; memory grows with chunk * candidates, not with candidates squared.
_CHUNK = 512


@dataclass(frozen=True, kw_only=True)
class Retrieval:
    """For each row the number of candidates that stand before its first hit (0 is a hit at 1)."""

    # Query: the row's image; candidates: the distinct texts.
    text_rank: NDArray[np.int64]  # [N]
    # Query: the row's text; candidates: the images of all rows.
    image_rank: NDArray[np.int64]  # [N]
    # Rows that share their text with the row, itself included.
    num_targets: NDArray[np.int64]  # [N]
    num_texts: int


def first_hit_ranks(scores_QN: Floats, is_target_QN: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Candidates before the first target when sorted by score, best first; equal scores in their order."""
    best_Q1 = np.where(is_target_QN, scores_QN, -np.inf).max(1, keepdims=True)
    is_level_QN = scores_QN == best_Q1
    first_Q = (is_level_QN & is_target_QN).argmax(1)
    is_earlier_QN = np.arange(scores_QN.shape[1])[None, :] < first_Q[:, None]
    found: NDArray[np.int64] = ((scores_QN > best_Q1) | (is_level_QN & is_earlier_QN)).sum(1)
    return found


def retrieve(image_embeds_ND: Floats, text_embeds_UD: Floats, text_of_row_N: NDArray[np.int64]) -> Retrieval:
    """Rank the distinct texts for every image and all images for every row's text.

    Equal texts are one target: for an image they are one candidate (otherwise the copies of one wrong
    text would fill the first places), for a text the image of any row with the same text is a hit.

    Args:
        image_embeds_ND: unit rows, one per row.
        text_embeds_UD: unit rows, one per distinct text; equal scores rank in this order.
        text_of_row_N: which distinct text each row carries.

    Raises:
        ValueError: no rows, or embeddings that are not finite.
    """
    num_rows = len(image_embeds_ND)
    if num_rows == 0 or len(text_of_row_N) != num_rows:
        raise ValueError(
            f"retrieval needs rows with texts, got {num_rows} images, {len(text_of_row_N)} texts"
        )
    if not (np.isfinite(image_embeds_ND).all() and np.isfinite(text_embeds_UD).all()):
        raise ValueError("retrieval needs finite embeddings")
    num_texts = len(text_embeds_UD)
    text_rank = np.empty(num_rows, dtype=np.int64)
    for start in range(0, num_rows, _CHUNK):
        rows = slice(start, start + _CHUNK)
        scores_QU = image_embeds_ND[rows] @ text_embeds_UD.T
        text_rank[rows] = first_hit_ranks(scores_QU, text_of_row_N[rows, None] == np.arange(num_texts))
    rank_U = np.empty(num_texts, dtype=np.int64)
    for start in range(0, num_texts, _CHUNK):
        texts = np.arange(start, min(start + _CHUNK, num_texts))
        scores_QN = text_embeds_UD[texts] @ image_embeds_ND.T
        rank_U[texts] = first_hit_ranks(scores_QN, texts[:, None] == text_of_row_N[None, :])
    rows_per_text = np.bincount(text_of_row_N, minlength=num_texts)
    return Retrieval(
        text_rank=text_rank,
        image_rank=rank_U[text_of_row_N],
        num_targets=rows_per_text[text_of_row_N],
        num_texts=num_texts,
    )


def distinct(texts: Sequence[str]) -> tuple[list[str], NDArray[np.int64]]:
    """The distinct texts in order of appearance, and which of them each row carries."""
    numbers: dict[str, int] = {}
    index = np.array([numbers.setdefault(text, len(numbers)) for text in texts], dtype=np.int64)
    return list(numbers), index


def chance_text_recall(found: Retrieval, k: int) -> float:
    """Expected recall at k of a random order of the distinct texts."""
    return min(k, found.num_texts) / found.num_texts


def chance_image_recall(num_targets_N: NDArray[np.int64], k: int) -> float:
    """Expected recall at k of a random order of the images.

    Mean over rows of 1 - C(N - t, k) / C(N, k), with t rows that share the row's text.
    """
    num_rows = len(num_targets_N)
    values, counts = np.unique(num_targets_N, return_counts=True)
    miss = np.ones(len(values))
    for drawn in range(min(k, num_rows)):
        miss *= np.maximum(num_rows - values - drawn, 0) / (num_rows - drawn)
    return float(1 - (miss * counts).sum() / num_rows)
