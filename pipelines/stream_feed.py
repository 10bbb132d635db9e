"""The training feed through Ray Data: tasks read shards, build batches and stream them to a worker.

Each worker streams its own part of every global batch. Rows of a global batch are sorted by shard, so
the parts of different workers come from different shards and little is read twice.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import ray
import ray.data.exceptions
from numpy.typing import NDArray

from models.outputs import PairBatch
from pipelines.collate import BatchSettings, collate
from pipelines.order import SHARDS_PER_SLICE, StepOrder
from pipelines.pair_rows import PairRows
from pipelines.prepared import Prepared
from pipelines.shard_cache import ShardCache
from pipelines.wire import pack, unpack

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
        cache: keeps shards of an object store on the disks of the machines that read them.
    """

    prepared_uri: str
    order: StepOrder
    settings: BatchSettings
    rank: int = 0
    world: int = 1
    max_tasks: int = 2
    gate: Gate | None = None
    cache: ShardCache | None = None

    def batches(self, start: int, stop: int) -> Iterator[PairBatch]:
        """See `Feed`.

        Raises:
            ExecutionTimeoutError: nothing moved for Ray Data's `execution_no_progress_timeout_s` while a
                batch was waited for.
        """
        expected = start
        while expected < stop:
            dataset, asked = self.dataset(expected, stop), time.monotonic()
            try:
                for table in dataset.iter_batches(batch_size=None, batch_format="pyarrow"):
                    for batch in table["batch"]:
                        yield unpack(batch)
                        expected, asked = expected + 1, time.monotonic()
            except ray.data.exceptions.ExecutionTimeoutError:
                # A full queue behind a trainer that evaluates for long does not move either.
                if time.monotonic() - asked >= dataset.context.execution_no_progress_timeout_s:
                    raise

    def dataset(self, start: int, stop: int) -> ray.data.Dataset:
        """One row per step, in order: its number and the packed batch. There must be a step."""
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


def _build_batches(span: dict[str, NDArray[Any]], feed: StreamFeed) -> Iterator[pa.Table]:
    """Ray Data task: the worker's batches of a span of steps, one row each."""
    for first, last in zip(span["first"].tolist(), span["last"].tolist(), strict=True):
        for step in range(first, last):
            if feed.gate is not None:
                feed.gate.wait(step)
            index, epochs = feed.order.batch(step, rank=feed.rank, world=feed.world)
            rows, local = _read_rows(feed, index)
            batch = collate(rows, local, feed.settings, epoch=epochs)
            yield pa.table({"step": pa.array([step]), "batch": pack(batch)})


def _read_rows(feed: StreamFeed, index: NDArray[np.int64]) -> tuple[PairRows, NDArray[np.int64]]:
    """The shards that hold the rows at `index`, and where in them those rows are."""
    shard_rows = feed.order.shard_rows
    starts = np.concatenate([[0], np.cumsum(shard_rows)])
    shard_of = np.searchsorted(starts, index, side="right") - 1
    shards = np.unique(shard_of)
    firsts = np.concatenate([[0], np.cumsum([shard_rows[shard] for shard in shards])])
    table = pa.concat_tables([_shard(feed.prepared_uri, int(shard), feed.cache) for shard in shards])
    positions = np.concatenate([np.arange(starts[shard], starts[shard + 1]) for shard in shards])
    rows = PairRows(table, _open(feed.prepared_uri).image_size, positions=positions)
    return rows, firsts[np.searchsorted(shards, shard_of)] + index - starts[shard_of]


@lru_cache(maxsize=SHARDS_PER_SLICE)
def _shard(prepared_uri: str, shard: int, cache: ShardCache | None) -> pa.Table:
    return _open(prepared_uri).shard("train", shard, cache=cache)


@lru_cache(maxsize=2)
def _open(prepared_uri: str) -> Prepared:
    return Prepared.open(prepared_uri)
