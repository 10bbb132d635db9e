"""Storage: whole files or none, nothing overwritten, the same calls for paths and URIs."""

from __future__ import annotations

import resource
from pathlib import Path

import pyarrow as pa
import pyarrow.fs as pafs
import pytest

from pipelines import storage
from pipelines.storage import AlreadyExistsError


@pytest.mark.parametrize("prefix", ["", "file://"])
def test_what_is_written_is_read(tmp_path, prefix):
    root = f"{prefix}{tmp_path}"
    storage.write_json(storage.join(root, "a", "one.json"), {"b": [1, None], "a": "ü"})
    storage.write_bytes(storage.join(root, "a", "b", "two.bin"), b"\x00\xff")
    table = pa.table({"x": [1, 2], "y": ["p", "q"]})
    storage.write_table(storage.join(root, "t.parquet"), table)
    assert storage.read_json(storage.join(root, "a/one.json")) == {"a": "ü", "b": [1, None]}
    assert storage.read_bytes(storage.join(root, "a/b/two.bin")) == b"\x00\xff"
    assert storage.read_table(storage.join(root, "t.parquet")).equals(table)
    assert storage.read_table(storage.join(root, "t.parquet"), columns=["y"]).column_names == ["y"]
    assert storage.list_files(root) == ["a/b/two.bin", "a/one.json", "t.parquet"]
    assert storage.list_files(root, suffix=".json") == ["a/one.json"]
    assert storage.list_files(root, recursive=False) == ["t.parquet"]


def test_same_value_same_bytes(tmp_path):
    for name, value in (("one", {"a": 1, "b": 2}), ("two", {"b": 2, "a": 1})):
        storage.write_json(str(tmp_path / name), value)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_absent_places(tmp_path):
    assert storage.list_files(str(tmp_path / "none")) == []
    assert not storage.exists(str(tmp_path / "none"))
    assert storage.exists(str(tmp_path))
    with pytest.raises(FileNotFoundError):
        storage.read_bytes(str(tmp_path / "none"))


def test_nothing_published_twice(tmp_path):
    place = str(tmp_path / "run" / "final.json")
    storage.publish_json(place, {"value": 1})
    for publish in (lambda: storage.publish_json(place, {}), lambda: storage.publish_bytes(place, b"")):
        with pytest.raises(AlreadyExistsError, match=r"final\.json' exists already and is never overwritten"):
            publish()
    with pytest.raises(AlreadyExistsError, match="name another output"):
        storage.refuse_existing(str(tmp_path / "run"))
    assert storage.read_json(place) == {"value": 1}
    storage.refuse_existing(str(tmp_path / "other"))


def test_a_file_is_seen_whole_or_not_at_all(tmp_path, monkeypatch):
    """A reader looks at the moment before the rename: the old content is there, the part is not listed."""
    place = str(tmp_path / "state.json")
    storage.write_json(place, "old")
    seen = []

    class Watched(pafs.LocalFileSystem):
        def move(self, source: str, target: str) -> None:
            seen.append((storage.read_json(place), storage.list_files(str(tmp_path)), Path(source).name))
            super().move(source, target)

    monkeypatch.setattr(storage, "filesystem", lambda uri: (Watched(), str(Path(uri))))
    storage.write_json(place, "new")
    ((content, listed, partial),) = seen
    assert content == "old"
    assert listed == ["state.json"]
    assert partial.endswith(".partial")
    assert storage.read_json(place) == "new"


def test_leftovers_of_a_killed_writer_are_not_listed(tmp_path):
    storage.write_bytes(str(tmp_path / "000000000.jsonl"), b"{}\n")
    (tmp_path / "000000005.jsonl.1a2b3c4d.partial").write_bytes(b'{"st')
    assert storage.list_files(str(tmp_path)) == ["000000000.jsonl"]


def test_values_json_does_not_know_are_refused(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        storage.write_json(str(tmp_path / "x.json"), {"loss": float("nan")})
    assert storage.list_files(str(tmp_path)) == []


@pytest.mark.parametrize(
    ("base", "parts", "joined"),
    [
        ("/data/runs", ("a", "b.json"), "/data/runs/a/b.json"),
        ("/data/runs/", ("a",), "/data/runs/a"),
        ("s3://bucket/p", ("a", "b"), "s3://bucket/p/a/b"),
        (
            "s3://bucket/p?endpoint_override=h:1&scheme=http",
            ("a",),
            "s3://bucket/p/a?endpoint_override=h:1&scheme=http",
        ),
    ],
)
def test_parts_are_appended_before_the_query(base, parts, joined):
    assert storage.join(base, *parts) == joined


def test_options_of_a_uri_reach_the_file_system():
    uri = "s3://bucket/p/a?endpoint_override=127.0.0.1:1&scheme=http&region=eu-west-3"
    fs, path = storage.filesystem(uri)
    assert isinstance(fs, pafs.S3FileSystem)
    assert fs.region == "eu-west-3"
    assert path == "bucket/p/a"


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("s4://bucket/x", "cannot open 's4://bucket/x': Unrecognized filesystem type"),
        ("://x", "cannot open '://x': Cannot parse URI"),
        (
            "s3://b/x?endpoint=h:1&region=r",
            r"unknown options \['endpoint'\]; known: anonymous, endpoint_override",
        ),
    ],
)
def test_places_that_cannot_be_opened(uri, message):
    with pytest.raises(ValueError, match=message):
        storage.filesystem(uri)


def test_folders_are_deleted_with_all_below(tmp_path):
    storage.write_bytes(str(tmp_path / "a" / "b" / "c"), b"")
    storage.write_bytes(str(tmp_path / "d"), b"")
    storage.delete_folder(str(tmp_path / "a"))
    assert storage.list_files(str(tmp_path)) == ["d"]


def test_a_write_that_fails_leaves_nothing_behind(tmp_path):
    """A file size limit stands in for the full disk."""
    storage.write_bytes(str(tmp_path / "kept.bin"), b"old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(OSError, match="too large"):
            storage.write_bytes(str(tmp_path / "kept.bin"), bytes(10_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [file.name for file in tmp_path.iterdir()] == ["kept.bin"]
    assert storage.read_bytes(str(tmp_path / "kept.bin")) == b"old"
