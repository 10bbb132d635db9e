"""The training feed through Ray Data: tasks read shards, build batches and stream them to a worker.

Each worker streams its own part of every global batch. Rows of a global batch are sorted by shard, so
the parts of different workers come from different shards and little is read twice.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import ray
from numpy.typing import NDArray

from models.outputs import PairBatch
from pipelines.collate import BatchSettings, PairRows, collate
from pipelines.order import StepOrder
from pipelines.prepared import Prepared

# Steps one task builds: enough to pay for reading its shards, few enough to start early.
_STEPS_PER_TASK = 8
CPUS_PER_TASK = 0.25


class Gate(Protocol):
    """Holds back a task until the batch of a step may be built."""

    def wait(self, step: int) -> None: ...


@dataclass(frozen=True)
class StreamFeed:
    """Batches of one worker, built by Ray Data tasks; the same as `MemoryFeed` gives.

    Attributes:
        max_tasks: that build batches at the same time.
        gate: None builds as far ahead as Ray Data's own limits allow.
    """

    prepared_uri: str
    order: StepOrder
    settings: BatchSettings
    rank: int = 0
    world: int = 1
    max_tasks: int = 2
    gate: Gate | None = None

    def batches(self, start: int, stop: int) -> Iterator[PairBatch]:
        if start < stop:
            for row in self.dataset(start, stop).iter_rows():
                yield pickle.loads(row["batch"])

    def dataset(self, start: int, stop: int) -> ray.data.Dataset:
        """One row per step, in order: its number and the pickled batch. There must be a step."""
        spans = [
            {"first": first, "last": min(first + _STEPS_PER_TASK, stop)}
            for first in range(start, stop, _STEPS_PER_TASK)
        ]
        dataset = ray.data.from_items(spans, override_num_blocks=len(spans)).map_batches(
            _build_batches,
            fn_args=(self,),
            batch_size=1,
            # Ray warns of a pool that is larger than its work.
            compute=ray.data.TaskPoolStrategy(size=min(self.max_tasks, len(spans))),
            num_cpus=CPUS_PER_TASK,
        )
        # Batches of later steps must not overtake: the step decides what a batch is.
        dataset.context.execution_options.preserve_order = True
        return dataset


def _build_batches(span: dict[str, NDArray[Any]], feed: StreamFeed) -> Iterator[dict[str, list[Any]]]:
    """Ray Data task: the worker's batches of a span of steps, one row each."""
    for first, last in zip(span["first"].tolist(), span["last"].tolist(), strict=True):
        for step in range(first, last):
            if feed.gate is not None:
                feed.gate.wait(step)
            index, epochs = feed.order.batch(step, rank=feed.rank, world=feed.world)
            rows, local = _read_rows(feed.prepared_uri, feed.order.shard_rows, index)
            batch = collate(rows, local, feed.settings, epoch=epochs)
            yield {"step": [step], "batch": [pickle.dumps(batch, protocol=5)]}


def _read_rows(
    prepared_uri: str, shard_rows: tuple[int, ...], index: NDArray[np.int64]
) -> tuple[PairRows, NDArray[np.int64]]:
    """Only the rows at `index` (sorted), and their positions in what is returned."""
    starts = np.concatenate([[0], np.cumsum(shard_rows)])
    shard_of = np.searchsorted(starts, index, side="right") - 1
    parts = [
        _shard(prepared_uri, int(shard)).take(pa.array(index[shard_of == shard] - starts[shard]))
        for shard in np.unique(shard_of)
    ]
    table = pa.concat_tables(parts)
    rows = PairRows(table, Prepared.open(prepared_uri).image_size, positions=index)
    return rows, np.arange(len(index))


@lru_cache(maxsize=16)
def _shard(prepared_uri: str, shard: int) -> pa.Table:
    return Prepared.open(prepared_uri).shard("train", shard)
