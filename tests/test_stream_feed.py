"""The streaming feed against the feed in memory: the same batches bit for bit, from any step and rank."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields, replace

import numpy as np
import pytest
import torch

from models.outputs import PairBatch
from pipelines import storage
from pipelines.collate import BatchSettings
from pipelines.feed import MemoryFeed, load_rows, streams, train_order
from pipelines.prepared import Prepared
from pipelines.shard_file import pack_shard
from pipelines.stream_feed import StreamFeed
from tests.prepared_fixture import prepared_table, write_prepared

SHARD_ROWS = (20, 13, 31)
SETTINGS = BatchSettings(
    seed=3, text="sentence", num_views=2, min_crop_area=0.5, num_patches=4, max_tokens=8, num_texts=2
)
# Fields whose first axis counts views or texts; pairs are the second.
SECOND_AXIS = {"view_boxes", "selection_noise", "is_text"}
# Each worker pads to its own longest text.
PADDED = {"token_ids", "is_real_token"}
# 4 batches an epoch: every range below crosses epochs, and 19 steps are three tasks of 8.
BATCH_SIZE = 16


@pytest.fixture(scope="module")
def uri(tmp_path_factory) -> str:
    return write_prepared(tmp_path_factory.mktemp("prepared"), shard_rows=SHARD_ROWS)


def memory_feed(uri: str, *, seed: int = 7, rank: int = 0, world: int = 1) -> MemoryFeed:
    order = train_order(Prepared.open(uri), batch_size=BATCH_SIZE, seed=seed)
    return MemoryFeed(load_rows(uri, "train"), order, SETTINGS, rank=rank, world=world)


def stream_feed(uri: str, *, rank: int = 0, world: int = 1) -> StreamFeed:
    order = train_order(Prepared.open(uri), batch_size=BATCH_SIZE, seed=7)
    return StreamFeed(uri, order, SETTINGS, rank=rank, world=world)


def same(one: PairBatch, other: PairBatch) -> bool:
    pairs = [(getattr(one, f.name), getattr(other, f.name)) for f in fields(one)]
    pairs = [(a, b) for a, b in pairs if not (a is None and b is None)]
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)


def all_same(ones: Iterable[PairBatch], others: Iterable[PairBatch]) -> bool:
    return all(same(one, other) for one, other in zip(ones, others, strict=True))


def test_shards_are_read_one_by_one(uri):
    table = prepared_table(sum(SHARD_ROWS))
    assert Prepared.open(uri).shard("train", 1).equals(table.slice(20, 13).combine_chunks())
    with pytest.raises(ValueError, match=r"split must be one of \['train'\], got 'test'"):
        Prepared.open(uri).shard("test", 0)


def test_a_shard_that_changed_is_refused(tmp_path):
    uri = write_prepared(tmp_path, shard_rows=(4, 4))
    storage.write_bytes(storage.join(uri, "shards/train-00001.arrow"), pack_shard(prepared_table(3)))
    with pytest.raises(ValueError, match="the manifest says 4 rows, found 3"):
        Prepared.open(uri).shard("train", 1)


def test_memory_feed_starts_at_any_step(uri):
    whole = list(memory_feed(uri).batches(0, 10))
    assert all_same(memory_feed(uri).batches(6, 10), whole[6:])
    assert not all_same(memory_feed(uri).batches(5, 9), whole[6:])
    assert not all_same(memory_feed(uri, seed=8).batches(0, 10), whole)


def test_two_workers_hold_the_batch_of_one(uri):
    for whole, *parts in zip(
        memory_feed(uri).batches(0, 6),
        memory_feed(uri, rank=0, world=2).batches(0, 6),
        memory_feed(uri, rank=1, world=2).batches(0, 6),
        strict=True,
    ):
        for name in {f.name for f in fields(whole) if getattr(whole, f.name) is not None} - PADDED:
            joined = torch.cat([getattr(part, name) for part in parts], int(name in SECOND_AXIS))
            assert torch.equal(joined, getattr(whole, name)), name


@pytest.mark.ray
@pytest.mark.parametrize(("rank", "world", "start"), [(0, 1, 0), (0, 2, 0), (1, 2, 0), (1, 2, 11)])
def test_streamed_batches_are_those_in_memory(ray_session, uri, rank, world, start):
    streamed = list(stream_feed(uri, rank=rank, world=world).batches(start, 19))
    assert len(streamed) == 19 - start
    assert all_same(streamed, memory_feed(uri, rank=rank, world=world).batches(start, 19))
    # Another worker's and another step's batches are told apart.
    if world == 2:
        assert not any(map(same, streamed, memory_feed(uri, rank=1 - rank, world=2).batches(start, 19)))
    assert not any(map(same, streamed, memory_feed(uri, rank=rank, world=world).batches(start + 1, 20)))


@pytest.mark.ray
def test_stopping_early_leaves_nothing_running(ray_session, uri):
    """A trial that is stopped drops its feed in the middle; the next one must still get its turn."""
    for _ in range(2):
        first = next(iter(stream_feed(uri).batches(0, 40)))
        assert same(first, next(iter(memory_feed(uri).batches(0, 1))))


@pytest.mark.ray
def test_streamed_batches_name_the_rows_they_hold(ray_session, uri):
    """Shards are read one by one: a row's place in its shard must not pass for its place in the split."""
    order = train_order(Prepared.open(uri), batch_size=BATCH_SIZE, seed=7)
    batches = list(stream_feed(uri, rank=1, world=2).batches(2, 4))
    for step, batch in zip((2, 3), batches, strict=True):
        assert batch.row_index.tolist() == order.rows(step, rank=1, world=2).tolist()
        assert torch.equal(
            batch.row_keys, torch.from_numpy(load_rows(uri, "train").take(batch.row_index.numpy()).row_keys)
        )


def test_nothing_to_stream(uri):
    assert list(stream_feed(uri).batches(5, 5)) == []


def test_pixels_on_a_store_decide_between_memory_and_streaming(uri, monkeypatch):
    local = Prepared.open(uri)
    num_bytes = sum(SHARD_ROWS) * 8 * 8 * 3
    on_store = replace(local, uri="s3://bucket/prepared?endpoint_override=localhost:9")
    monkeypatch.setattr("pipelines.feed.MEMORY_LIMIT_BYTES", num_bytes)
    assert not streams("auto", on_store)
    monkeypatch.setattr("pipelines.feed.MEMORY_LIMIT_BYTES", num_bytes - 1)
    assert streams("auto", on_store)
    assert not streams("memory", on_store)
    # Mapped files cost no memory of their own.
    assert not streams("auto", local)
    assert streams("stream", local)


def test_order_knows_the_shards(uri):
    order = train_order(Prepared.open(uri), batch_size=BATCH_SIZE, seed=7)
    assert order.shard_rows == SHARD_ROWS
    assert (order.epoch_rows, order.shard_weights) == (sum(SHARD_ROWS), None)
    rows = np.concatenate([order.rows(step) for step in range(4)])
    assert len(set(rows.tolist())) == 64
