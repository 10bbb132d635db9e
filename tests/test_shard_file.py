"""Shards as files: mapped where they lie, the same bytes for the same rows, damage named."""

from __future__ import annotations

import io
from dataclasses import fields, replace

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pytest
import torch

from models.outputs import PairBatch
from pipelines import shard_file, storage
from pipelines.collate import BatchSettings, collate
from pipelines.pair_rows import PairRows
from pipelines.schemas import PREPARED
from pipelines.shard_file import pack_shard, read_shard
from pipelines.wire import pack, unpack
from tests.prepared_fixture import IMAGE_SIZE, prepared_table

TABLE = prepared_table(12)


def saved(folder, table: pa.Table = TABLE) -> str:
    uri = str(folder / "shard.arrow")
    storage.write_bytes(uri, pack_shard(table))
    return uri


def test_what_is_read_is_what_was_written(tmp_path):
    table = read_shard(saved(tmp_path))
    assert table.schema == PREPARED
    assert table.equals(TABLE.combine_chunks())
    assert not table.equals(prepared_table(12, seed=1))
    some = read_shard(saved(tmp_path), columns=["row_id", "never_heard_of"])
    assert some.equals(TABLE.select(["row_id"]))


def test_bytes_depend_on_rows_alone():
    parts = pa.concat_tables([TABLE.slice(0, 5), TABLE.slice(5)])
    assert pack_shard(parts) == pack_shard(TABLE)
    assert pack_shard(TABLE.slice(0, 11)) != pack_shard(TABLE)


def test_a_local_shard_is_mapped_and_not_read(tmp_path):
    uri = saved(tmp_path)
    before = pa.total_allocated_bytes()
    table = read_shard(uri)
    assert pa.total_allocated_bytes() - before < table["image"].nbytes / 2
    copied = pa.ipc.open_file(pa.py_buffer(storage.read_bytes(uri))).read_all().combine_chunks()
    assert copied.equals(table)


@pytest.mark.parametrize("damage", [b"", b"PAR1 is another format", None])
def test_damage_is_named(tmp_path, damage):
    uri = saved(tmp_path)
    whole = storage.read_bytes(uri)
    storage.write_bytes(uri, whole[: len(whole) // 2] if damage is None else damage)
    with pytest.raises(ValueError, match=r"shard\.arrow' is not a readable shard .* prepare again"):
        read_shard(uri)


class CountedFile(io.FileIO):
    """Counts the bytes that are read of it."""

    num_read = 0

    def read(self, size: int = -1) -> bytes:
        data = super().read(size)
        CountedFile.num_read += len(data or b"")
        return data


class StoreOfCountedFiles(fsspec.AbstractFileSystem):
    def isfile(self, path):
        return True

    def open(self, path, mode="rb", **_):
        return CountedFile(path)


def test_of_a_shard_on_a_store_only_the_columns_asked_for_are_fetched(tmp_path, monkeypatch):
    uri, table = saved(tmp_path, prepared_table(200)), prepared_table(200)
    store = pafs.PyFileSystem(pafs.FSSpecHandler(StoreOfCountedFiles()))
    monkeypatch.setattr(shard_file, "filesystem", lambda uri: (store, uri))
    monkeypatch.setattr(shard_file, "is_local", lambda uri: False)
    num_read = []
    for columns in (None, ["labels", "row_id", "never_heard_of"]):
        CountedFile.num_read = 0
        found = read_shard(uri, columns=columns)
        assert found.equals(table.combine_chunks() if columns is None else table.select(["labels", "row_id"]))
        num_read.append(CountedFile.num_read)
    assert num_read[0] > table["image"].nbytes > 2 * num_read[1]


def test_rows_come_in_the_order_asked_for_from_any_chunk():
    whole = PairRows(TABLE, IMAGE_SIZE)
    parts = PairRows(pa.concat_tables([TABLE.slice(0, 5), TABLE.slice(5, 0), TABLE.slice(5)]), IMAGE_SIZE)
    index = np.array([11, 0, 5, 4, 11])
    one, other = whole.take(index), parts.take(index)
    for field in fields(one):
        np.testing.assert_equal(getattr(one, field.name), getattr(other, field.name))
    expected = np.stack([np.frombuffer(TABLE["image"][int(i)].as_py(), np.uint8) for i in index])
    np.testing.assert_array_equal(one.images.reshape(5, -1), expected)
    assert one.captions == [TABLE["caption_tokens"][int(i)].as_py() for i in index]
    assert one.positions.tolist() == index.tolist()
    assert (whole.take(np.array([11, 0, 5, 4, 10])).images != one.images).any()


def test_a_batch_is_the_same_behind_the_wire():
    settings = BatchSettings(
        seed=1, text="sentence", num_views=2, min_crop_area=0.3, num_patches=4, max_tokens=12, num_texts=2
    )
    batch = collate(PairRows(TABLE, IMAGE_SIZE), np.arange(6), settings, epoch=2)
    for sent in (batch, replace(batch, whole_scores=torch.rand(6, 4))):
        found = unpack(pack(sent)[0])
        for field in fields(PairBatch):
            ours, theirs = getattr(found, field.name), getattr(sent, field.name)
            assert (ours is None) == (theirs is None), field.name
            if ours is not None:
                assert ours.dtype == theirs.dtype
                assert torch.equal(ours, theirs), field.name
                assert ours.data_ptr() % 8 == 0
    other = replace(batch, row_keys=batch.row_keys + 1)
    assert not torch.equal(unpack(pack(other)[0]).row_keys, batch.row_keys)
