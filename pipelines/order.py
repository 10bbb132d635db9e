"""The order in which an epoch visits rows: a pure function of (shard sizes, seed, epoch).

Shards are permuted and cut into slices, rows are permuted within a slice, and the stream of rows is cut
into global batches. A worker takes its part of each global batch, so a batch holds the same rows on any
number of workers, and a resume at step k is a jump to batch k.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# Rows are shuffled within this many shards at a time: the shuffle is as wide as that, and a streaming
# worker holds no more than that.
SHARDS_PER_SLICE = 16


@dataclass(frozen=True)
class StepOrder:
    """Which rows each optimiser step takes.

    Attributes:
        shard_rows: rows of each shard; row ids here are positions in their concatenation.
        batch_size: of all workers together.
        seed: of the order.
    """

    shard_rows: tuple[int, ...]
    batch_size: int
    seed: int

    def __post_init__(self) -> None:
        if self.steps_per_epoch == 0:
            raise ValueError(
                f"train.batch_size={self.batch_size} exceeds the {sum(self.shard_rows)} training rows; "
                "lower it"
            )

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches in an epoch; the remainder, another one each epoch, is left out."""
        return sum(self.shard_rows) // self.batch_size

    def epoch_of(self, step: int) -> int:
        return step // self.steps_per_epoch

    def rows(self, step: int, *, rank: int = 0, world: int = 1) -> NDArray[np.int64]:
        """Positions of a worker's rows in the concatenated shards, [batch_size / world].

        Within a global batch rows are sorted, so that a worker's part comes from few shards.
        """
        position = step % self.steps_per_epoch
        order = _epoch_rows(self.shard_rows, self.seed, self.epoch_of(step))
        batch = np.sort(order[position * self.batch_size : (position + 1) * self.batch_size])
        local = self.batch_size // world
        return batch[rank * local : (rank + 1) * local]


_CACHE: dict[tuple[tuple[int, ...], int], tuple[int, NDArray[np.int64]]] = {}


def _epoch_rows(shard_rows: tuple[int, ...], seed: int, epoch: int) -> NDArray[np.int64]:
    """All rows in the order of one epoch; the last epoch asked for is kept."""
    key = (shard_rows, seed)
    if key not in _CACHE or _CACHE[key][0] != epoch:
        _CACHE.clear()
        _CACHE[key] = (epoch, _permute(shard_rows, seed, epoch))
    return _CACHE[key][1]


def _permute(shard_rows: Sequence[int], seed: int, epoch: int) -> NDArray[np.int64]:
    generator = np.random.default_rng([seed, epoch])
    starts = np.concatenate([[0], np.cumsum(shard_rows)])
    shards = generator.permutation(len(shard_rows))
    slices = []
    for first in range(0, len(shards), SHARDS_PER_SLICE):
        chosen = shards[first : first + SHARDS_PER_SLICE]
        rows = np.concatenate([np.arange(starts[s], starts[s + 1]) for s in chosen])
        slices.append(generator.permutation(rows))
    return np.concatenate(slices).astype(np.int64)
