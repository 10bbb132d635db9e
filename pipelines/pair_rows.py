"""Prepared rows as batches take them: nothing is read of a row before its turn comes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from models.outputs import NUM_TAGS
from pipelines.keyed_random import text_key
from pipelines.prepared import image_array

_ANNOTATIONS = ("row_id", "caption_tokens", "sentence_tokens", "group_id", "labels", "class_name")
_SCORES = "token_scores"

Texts = list[list[int]]


@dataclass(frozen=True)
class TakenRows:
    """Some rows, in the order they were asked for.

    Attributes:
        images: uint8 [B, S, S, 3].
        captions, sentences: texts of each row as token lists.
        row_keys, group_keys: 63-bit hashes of row id and group, int64 [B]; a row of unknown group is a group
            of its own.
        positions: of the rows in their split, int64 [B].
        tags: each row's labels as a bag of hashes, bool [B, NUM_TAGS].
        token_scores: float32 [B, patches]; None unless the data was scored ahead.
    """

    images: NDArray[np.uint8]
    captions: list[Texts]
    sentences: list[Texts]
    row_keys: NDArray[np.int64]
    group_keys: NDArray[np.int64]
    positions: NDArray[np.int64]
    tags: NDArray[np.bool_]
    token_scores: NDArray[np.float32] | None


class PairRows:
    """A view on a table in schemas.PREPARED or SCORED, mapped from its shards or held in memory."""

    def __init__(
        self, table: pa.Table, image_size: int, *, positions: NDArray[np.int64] | None = None
    ) -> None:
        """Look at a table.

        Args:
            positions: of the rows in their split, int64; None when the table is the whole split.
        """
        self.image_size = image_size
        self._positions = positions
        scores = [_SCORES] if _SCORES in table.column_names else []
        # One record batch per shard: `take` on a whole table would first join its chunks.
        batches = [batch for batch in table.to_batches() if len(batch)]
        self._annotations = [batch.select([*_ANNOTATIONS, *scores]) for batch in batches]
        self._images = [
            image_array(pa.chunked_array([batch.column("image")]), size=image_size) for batch in batches
        ]
        self._starts = np.cumsum([0, *(len(batch) for batch in batches)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def take(self, index: NDArray[np.int64]) -> TakenRows:
        """The rows at `index`, in any order."""
        chunk_of = np.searchsorted(self._starts, index, side="right") - 1
        within = index - self._starts[chunk_of]
        found = self._take_annotations(chunk_of, within)
        row_ids: list[str] = [row["row_id"] for row in found]
        groups = [row["group_id"] or f"row:{row['row_id']}" for row in found]
        # The class of a row without labels is what it shows.
        labels = [row["labels"] or ([row["class_name"]] if row["class_name"] else []) for row in found]
        return TakenRows(
            images=self._take_images(chunk_of, within),
            captions=[row["caption_tokens"] for row in found],
            sentences=[row["sentence_tokens"] for row in found],
            row_keys=np.array([text_key(row_id) for row_id in row_ids], np.int64),
            group_keys=np.array([text_key(group) for group in groups], np.int64),
            positions=index if self._positions is None else self._positions[index],
            tags=_hashed_bags(labels),
            token_scores=_stacked([row.get(_SCORES) for row in found]),
        )

    def _take_images(self, chunk_of: NDArray[np.int64], within: NDArray[np.int64]) -> NDArray[np.uint8]:
        images = np.empty((len(within), self.image_size, self.image_size, 3), np.uint8)
        for place, (chunk, row) in enumerate(zip(chunk_of.tolist(), within.tolist(), strict=True)):
            images[place] = self._images[chunk][row]
        return images

    def _take_annotations(
        self, chunk_of: NDArray[np.int64], within: NDArray[np.int64]
    ) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = [{}] * len(within)
        for chunk in np.unique(chunk_of).tolist():
            places = np.flatnonzero(chunk_of == chunk)
            rows = self._annotations[chunk].take(pa.array(within[places])).to_pylist()
            for place, row in zip(places.tolist(), rows, strict=True):
                found[place] = row
        return found


def _stacked(scores: list[list[float] | None]) -> NDArray[np.float32] | None:
    if not scores or scores[0] is None:
        return None
    return np.array(scores, np.float32)


def _hashed_bags(labels: list[list[str]]) -> NDArray[np.bool_]:
    """Each row's labels as a bag of hashes, [rows, NUM_TAGS]; labels that share a hash count as one."""
    bags = np.zeros((len(labels), NUM_TAGS), np.bool_)
    for row, names in enumerate(labels):
        bags[row, [text_key(name) % NUM_TAGS for name in names]] = True
    return bags
