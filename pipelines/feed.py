"""Batches for one worker, by step, from prepared data.

Two feeds give the same batches bit for bit: `MemoryFeed` takes them from a split that is mapped into the
worker's memory, `StreamFeed` (pipelines/stream_feed.py) lets Ray Data tasks read shards and build them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from typing import Protocol

from models.outputs import PairBatch
from pipelines.collate import BatchSettings, collate
from pipelines.order import StepOrder
from pipelines.pair_rows import PairRows
from pipelines.prepared import Prepared
from pipelines.storage import is_local

# Above this many bytes of pixels a worker streams what it would have to fetch and hold. Local shards are
# mapped, whatever their size: the page cache holds what fits, once for all workers of a machine.
MEMORY_LIMIT_BYTES = 2 << 30


class Feed(Protocol):
    """Batches of one worker."""

    def batches(self, start: int, stop: int) -> Iterator[PairBatch]:
        """The batches of steps start..stop-1, in order; the same whenever asked for."""
        ...


class MemoryFeed:
    """A split in memory; any step can be asked for."""

    def __init__(
        self, rows: PairRows, order: StepOrder, settings: BatchSettings, *, rank: int = 0, world: int = 1
    ) -> None:
        self._rows, self._order, self._settings = rows, order, settings
        self._rank, self._world = rank, world

    def batches(self, start: int, stop: int) -> Iterator[PairBatch]:
        """See `Feed`; a thread builds the next batch while the one at hand is trained on."""
        # Closing what this gives waits for the thread.
        with ThreadPoolExecutor(1, thread_name_prefix="feed") as thread:
            begun: deque[Future[PairBatch]] = deque()
            for step in range(start, stop):
                begun.append(thread.submit(self._batch, step))
                if len(begun) > 1:
                    yield begun.popleft().result()
            if begun:
                yield begun.popleft().result()

    def _batch(self, step: int) -> PairBatch:
        index, epochs = self._order.batch(step, rank=self._rank, world=self._world)
        return collate(self._rows, index, self._settings, epoch=epochs)


@lru_cache(maxsize=2)
def load_rows(prepared_uri: str, split: str) -> PairRows:
    """A view on a whole split; kept, because the trials of a sweep share a process and the data."""
    prepared = Prepared.open(prepared_uri)
    return PairRows(prepared.table(split), prepared.image_size)


def train_order(prepared: Prepared, *, batch_size: int, seed: int) -> StepOrder:
    """Order of the training rows; a mixture's weights are those of the shards its sources fill."""
    shards = prepared.manifest["splits"]["train"]["shards"]
    weights = tuple(float(shard.get("weight", 1)) for shard in shards)
    return StepOrder(
        tuple(int(shard["rows"]) for shard in shards),
        batch_size,
        seed,
        None if set(weights) <= {1.0} else weights,
    )


def streams(kind: str, prepared: Prepared) -> bool:
    """Whether a feed setting (`auto`, `memory`, `stream`) means streaming for this data."""
    if kind != "auto":
        return kind == "stream"
    if is_local(prepared.uri):
        return False
    return prepared.num_rows("train") * prepared.image_size**2 * 3 > MEMORY_LIMIT_BYTES
