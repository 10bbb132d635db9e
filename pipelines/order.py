"""The order in which rows are visited: a pure function of (shard sizes, seed).

Epochs follow each other without a gap. In each, shards are permuted and cut into slices and rows are
permuted within a slice; the endless stream of rows is cut into global batches, so every row is seen exactly
once an epoch, whatever the batch size, and a batch may end one epoch and begin the next. A worker takes
its part of each global batch: a batch holds the same rows on any number of workers, and a resume at step
k is a jump to batch k.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

# Rows are shuffled within this many shards at a time: the shuffle is as wide as that, and a streaming
# worker holds no more than that.
SHARDS_PER_SLICE = 16

# With fewer batches an epoch, moving rows away from its start could reach its end.
_BATCHES_TO_MOVE_ROWS = 4


@dataclass(frozen=True)
class Cursor:
    """A place in the stream of rows: `offset` rows into a slice of an epoch."""

    epoch: int
    slice: int
    offset: int


@dataclass(frozen=True)
class StepOrder:
    """Which rows each optimiser step takes.

    Attributes:
        shard_rows: rows of each shard; row ids here are positions in their concatenation.
        batch_size: of all workers together.
        seed: of the order.
        shard_weights: how often an epoch visits the rows of each shard; None means once. Of a weight of
            2.5 every row is seen twice and another half of them, drawn anew each epoch, a third time.
    """

    shard_rows: tuple[int, ...]
    batch_size: int
    seed: int
    shard_weights: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if self.batch_size > sum(self.shard_rows):
            raise ValueError(
                f"train.batch_size={self.batch_size} exceeds the {sum(self.shard_rows)} training rows; "
                "lower it"
            )
        if self.epoch_rows == 0:
            raise ValueError(
                f"the weights {list(self.shard_weights or ())} leave no training row; raise them"
            )

    @property
    def visits(self) -> tuple[int, ...]:
        """Rows an epoch takes of each shard."""
        if self.shard_weights is None:
            return self.shard_rows
        return tuple(
            round(rows * weight) for rows, weight in zip(self.shard_rows, self.shard_weights, strict=True)
        )

    @property
    def epoch_rows(self) -> int:
        """Rows of an epoch; with weights a row may count several times or not at all."""
        return sum(self.visits)

    def epoch_of(self, step: int) -> int:
        """The epoch that the first row of a step's batch belongs to."""
        return step * self.batch_size // self.epoch_rows

    def cursor(self, step: int) -> Cursor:
        """Where in the stream of rows a step's batch begins."""
        epoch, left = divmod(step * self.batch_size, self.epoch_rows)
        visits = np.array(self.visits)
        # From the order of the shards alone: the trainer need not know that of the rows.
        for number, shards in enumerate(_slices(self, np.random.default_rng([self.seed, epoch]))):
            rows = int(visits[shards].sum())
            if left < rows:
                return Cursor(epoch, number, left)
            left -= rows
        raise AssertionError("an epoch has as many rows as its slices")

    def rows(self, step: int, *, rank: int = 0, world: int = 1) -> NDArray[np.int64]:
        """Positions of a worker's rows in the concatenated shards, [batch_size / world]."""
        return self.batch(step, rank=rank, world=world)[0]

    def batch(
        self, step: int, *, rank: int = 0, world: int = 1
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """A worker's rows and the epoch each is visited in, both int64 [batch_size / world].

        Within a global batch rows are sorted, so that a worker's part comes from few shards.
        """
        places = step * self.batch_size + np.arange(self.batch_size)
        epochs, within = np.divmod(places, self.epoch_rows)
        rows = np.concatenate(
            [_epoch(self, int(epoch))[within[epochs == epoch]] for epoch in np.unique(epochs)]
        )
        by_place = np.argsort(rows, kind="stable")
        local = self.batch_size // world
        part = by_place[rank * local : (rank + 1) * local]
        return rows[part], epochs[part]


# The last epochs asked for: a batch can need two, and two data sets may be in use at once.
@lru_cache(maxsize=4)
def _epoch(order: StepOrder, epoch: int) -> NDArray[np.int64]:
    """The rows of an epoch in the order they are visited."""
    found = _permuted(order, epoch)
    end_of_last = epoch * order.epoch_rows % order.batch_size
    if end_of_last and order.epoch_rows >= _BATCHES_TO_MOVE_ROWS * order.batch_size:
        before = _permuted(order, epoch - 1)[-end_of_last:]
        _keep_apart(found, before, order.batch_size - end_of_last)
    return found


def _slices(order: StepOrder, generator: np.random.Generator) -> list[NDArray[np.int64]]:
    """Numbers of the shards in each slice of an epoch; the first thing its generator draws."""
    shards = generator.permutation(len(order.shard_rows))
    return [shards[first : first + SHARDS_PER_SLICE] for first in range(0, len(shards), SHARDS_PER_SLICE)]


def _permuted(order: StepOrder, epoch: int) -> NDArray[np.int64]:
    generator = np.random.default_rng([order.seed, epoch])
    starts = np.concatenate([[0], np.cumsum(order.shard_rows)])
    slices = []
    for chosen in _slices(order, generator):
        rows = np.concatenate([_visited(starts[s], order, int(s), generator) for s in chosen])
        slices.append(generator.permutation(rows))
    return np.concatenate(slices).astype(np.int64)


def _visited(start: int, order: StepOrder, shard: int, generator: np.random.Generator) -> NDArray[np.int64]:
    """Rows of a shard in one epoch, as often as its weight says."""
    rows = np.arange(start, start + order.shard_rows[shard])
    visits = order.visits[shard]
    if visits == len(rows):
        return rows
    whole, rest = divmod(visits, len(rows))
    drawn: Sequence[NDArray[np.int64]] = [generator.permutation(rows)[:rest]]
    return np.concatenate([*[rows] * whole, *drawn])


def _keep_apart(rows: NDArray[np.int64], before: NDArray[np.int64], num_first: int) -> None:
    """Move rows that end the last epoch out of the first places of this one, in place.

    Otherwise a batch that spans both could hold a row twice, as a negative of itself.
    """
    is_taken = np.isin(rows, before)
    clashing = np.flatnonzero(is_taken[:num_first])
    free = num_first + np.flatnonzero(~is_taken[num_first:])[: len(clashing)]
    # With large weights there may be too few other rows.
    clashing = clashing[: len(free)]
    rows[clashing], rows[free] = rows[free].copy(), rows[clashing].copy()
