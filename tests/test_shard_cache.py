"""Shards of an object store on the local disk: fetched once, checked, making room, never in the way."""

from __future__ import annotations

import hashlib
import logging
import os
from pathlib import Path

import pyarrow as pa
import pytest

from pipelines import storage
from pipelines.prepared import Prepared
from pipelines.shard_cache import ShardCache
from pipelines.shard_file import pack_shard
from tests.prepared_fixture import prepared_table

DATA = [bytes(pack_shard(prepared_table(4, seed=seed))) for seed in range(3)]
SHA = [hashlib.sha256(data).hexdigest() for data in DATA]


@pytest.fixture
def store(tmp_path, monkeypatch) -> list[str]:
    """What is fetched from a folder that plays the object store."""
    fetched: list[str] = []
    plain = storage.read_bytes

    def read(uri: str) -> bytes:
        fetched.append(Path(uri).name)
        return plain(uri)

    for number, data in enumerate(DATA):
        storage.write_bytes(str(tmp_path / "store" / f"{number}.arrow"), data)
    monkeypatch.setattr(storage, "read_bytes", read)
    return fetched


def cache_in(folder: Path, *, num_shards: int = 3) -> ShardCache:
    return ShardCache(str(folder / "cache"), num_shards * max(map(len, DATA)))


def copy_of(cache: ShardCache, folder: Path, number: int) -> str | None:
    return cache.local_copy(str(folder / "store" / f"{number}.arrow"), sha256=SHA[number])


def test_a_shard_is_fetched_once(store, tmp_path):
    first = copy_of(cache_in(tmp_path), tmp_path, 0)
    assert Path(first).read_bytes() == DATA[0]
    # Another process of another run finds it.
    assert copy_of(cache_in(tmp_path), tmp_path, 0) == first
    assert store == ["0.arrow"]
    assert copy_of(cache_in(tmp_path), tmp_path, 1) != first
    assert store == ["0.arrow", "1.arrow"]


def test_what_was_used_longest_ago_makes_room(store, tmp_path):
    cache = cache_in(tmp_path, num_shards=2)
    paths = [copy_of(cache, tmp_path, number) for number in (0, 1)]
    for age, path in zip((20, 10), paths, strict=True):
        os.utime(path, (1e9 - age, 1e9 - age))
    mapped = pa.ipc.open_file(pa.memory_map(paths[1])).read_all()
    # The older one is used again, so the other one goes.
    assert copy_of(cache, tmp_path, 0) == paths[0]
    copy_of(cache, tmp_path, 2)
    assert [os.path.exists(path) for path in paths] == [True, False]
    assert mapped["row_id"].to_pylist() == prepared_table(4, seed=1)["row_id"].to_pylist()
    assert ShardCache(cache.folder, 10).local_copy(str(tmp_path / "store" / "1.arrow"), sha256=SHA[1]) is None


def test_content_that_is_not_the_manifests_is_refused(store, tmp_path):
    cache = cache_in(tmp_path)
    with pytest.raises(
        ValueError, match=r"0\.arrow': the manifest says sha256 .*, found .* prepare the data"
    ):
        cache.local_copy(str(tmp_path / "store" / "0.arrow"), sha256=SHA[1])
    assert not list(Path(cache.folder).glob("*.arrow"))
    with pytest.raises(FileNotFoundError):
        cache.local_copy(str(tmp_path / "store" / "absent.arrow"), sha256=SHA[1])


def test_a_disk_that_cannot_be_written_to_is_no_failure(store, tmp_path, monkeypatch, caplog):
    (tmp_path / "cache").write_text("a file where the folder should be")
    with caplog.at_level(logging.WARNING):
        assert copy_of(cache_in(tmp_path), tmp_path, 0) is None
    assert "read from the store again" in caplog.text
    os.remove(tmp_path / "cache")

    def full(uri: str, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(storage, "write_bytes", full)
    assert copy_of(cache_in(tmp_path), tmp_path, 0) is None
    assert "No space left" in caplog.text


def test_prepared_data_uses_it_for_what_is_not_local(store, tmp_path, monkeypatch):
    shards = [{"path": f"{n}.arrow", "rows": 4, "sha256": sha} for n, sha in enumerate(SHA)]
    prepared = Prepared(str(tmp_path / "store"), {"splits": {"train": {"rows": 12, "shards": shards}}})
    cache = cache_in(tmp_path)
    plain = prepared.shard("train", 1)
    assert prepared.shard("train", 1, cache=cache).equals(plain)
    assert store == []
    monkeypatch.setattr("pipelines.prepared.is_local", lambda uri: False)
    assert prepared.shard("train", 1, cache=cache).equals(plain)
    assert store == ["1.arrow"]
