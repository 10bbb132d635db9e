"""Every kind of file on an S3-compatible server yields the rows it yields on a disk.

The server is tests/s3_server.py, a process of its own on loopback.
"""

from __future__ import annotations

import gzip
import re
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines import storage
from pipelines.config import MixturePart
from pipelines.sources.open_source import open_source
from tests.s3_server import S3Server, running
from tests.source_fixtures import data_config, picture, rows_of, samples, write_tar
from tests.test_sources_coco import coco
from tests.test_sources_hugging_face import FEATURES, animals, saved

BUCKET = "lab"
AWAY_S = 3.0
KINDS = {
    "parquet": "parquet:{}/pairs",
    "webdataset": "webdataset:{}/tars/{{00000..00001}}.tar",
    "packed tars": "webdataset:{}/packed",
    "csv": "csv:{}/pairs.csv",
    "packed csv": "csv:{}/pairs.csv.gz",
    "hf": "hf:{}/pets",
    "coco": "coco:{}/annotations",
    "folder": "folder:{}/classes",
}


def upload(data: bytes, uri: str) -> None:
    fs, path = storage.filesystem(uri)
    # What ends in .gz is packed already.
    with fs.open_output_stream(path, compression=None) as stream:
        stream.write(data)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One of each kind."""
    root = tmp_path_factory.mktemp("tree")
    coco(root, "captions_train2017.json", range(3))
    saved(root / "pets", animals(5), FEATURES)
    for shard in range(2):
        write_tar(root / "tars" / f"{shard:05d}.tar", samples(range(4 * shard, 4 * shard + 4)))
    write_tar(root / "packed" / "a.tgz", samples(range(3)), mode="w:gz")
    rows = "".join(f"images/{i:012d}.png,caption {i}\n" for i in range(3)) + "images/none.png,x\n"
    (root / "pairs.csv").write_text("filepath,title\n" + rows)
    (root / "pairs.csv.gz").write_bytes(gzip.compress((root / "pairs.csv").read_bytes()))
    (root / "classes" / "a cat").mkdir(parents=True)
    (root / "classes" / "a cat" / "0.png").write_bytes(picture())
    (root / "pairs").mkdir()
    table = pa.table({"id": ["a", "b"], "image": [picture(0), picture(1)], "caption": ["x", "y"]})
    pq.write_table(table, root / "pairs" / "part-0.parquet")
    names = ["images/000000000001.png", f"s3://{BUCKET}/images/000000000002.png", "images/none.png"]
    table = pa.table({"id": ["a", "b", "c"], "image": names, "caption": ["x", "y", "z"]})
    pq.write_table(table, root / "named.parquet")
    return root


@pytest.fixture(scope="module")
def server(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "tester")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        storage._s3.cache_clear()
        with running(tmp_path_factory.mktemp("s3"), bucket=BUCKET) as started:
            for file in tree.rglob("*"):
                if file.is_file():
                    upload(file.read_bytes(), started.uri(BUCKET, str(file.relative_to(tree))))
            yield started
    storage._s3.cache_clear()


def on_server(server: S3Server, source: str) -> str:
    """The source with its place on the server instead of on the disk."""
    place, query = server.uri(BUCKET).split("?")
    return f"{source.format(place)}?{query}"


def without_problems(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows less the messages, which name places."""
    return [{**row, "problem": (row.get("problem") or {}).get("reason")} for row in rows]


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_those_of_the_disk(server, tree, kind):
    source = KINDS[kind]
    remote = rows_of(data_config(on_server(server, source)))
    assert without_problems(remote) == without_problems(rows_of(data_config(source.format(tree))))
    assert len(remote) >= 1


def test_images_are_named_by_path_and_by_uri(server):
    """A URI in a row takes the endpoint from the place of its file."""
    rows = rows_of(data_config(on_server(server, "parquet:{}/named.parquet")))
    assert [row["image"] for row in rows] == [picture(1), picture(2), b""]
    assert [(row.get("problem") or {}).get("reason") for row in rows] == [None, None, "missing_image"]


def test_a_mixture_lies_on_the_server_too(server, tree):
    parts = [MixturePart(source=on_server(server, KINDS[kind])) for kind in ("webdataset", "csv")]
    rows = rows_of(data_config("mixture", mixture=parts))
    assert [row["source"] for row in rows] == ["tars"] * 8 + ["pairs"] * 4
    listed = "- {source: 'csv:pairs.csv'}\n- {source: 'webdataset:tars'}\n"
    storage.write_bytes(server.uri(BUCKET, "mix.yaml"), listed.encode())
    rows = rows_of(data_config(on_server(server, "mixture:{}/mix.yaml")))
    assert [row["source"] for row in rows] == ["pairs"] * 4 + ["tars"] * 8


def test_a_file_is_not_asked_for_more_often_than_needed(server):
    """One listing and one footer for each file; a process that reads pieces reads the footer once more."""
    names = ["a.parquet", "b.parquet", "deep/c.parquet"]
    rows = [{"id": str(i), "image": picture(i), "caption": "x", "split": "train"} for i in range(4)]
    for number, name in enumerate(names):
        own = [{**row, "id": f"{number}/{row['id']}"} for row in rows]
        sink = pa.BufferOutputStream()
        # Two row groups, each a piece.
        pq.write_table(pa.Table.from_pylist(own), sink, row_group_size=2)
        upload(sink.getvalue().to_pybytes(), server.uri(BUCKET, "many", name))
    server.requests()
    source = open_source(data_config(on_server(server, "parquet:{}/many"), rows_per_shard=2))
    opening = server.requests()
    assert sum("list-type=2" in line and "max-keys=1000" in line for line in opening) == 1
    assert Counter(map(footer_read, opening)) == {None: len(opening) - 3, **dict.fromkeys(names, 1)}
    # Beside the footers, the splits: one column of each file. The place itself is looked for first.
    assert len(opening) <= 3 + 2 * len(names)
    found = [
        table
        for with_images in (False, True)
        for piece in source.pieces()
        for table in source.read(piece, with_images=with_images)
    ]
    assert sum(map(len, found)) == 2 * 12
    reading = server.requests()
    assert Counter(map(footer_read, reading)) == {None: len(reading) - 3, **dict.fromkeys(names, 1)}
    assert not [line for line in opening[1:] + reading if line.startswith("HEAD")]


def footer_read(request: str) -> str | None:
    """The file below `many` whose end a request reads: small files are read whole with their footer."""
    found = re.fullmatch(r"GET /lab/many/(\S+) bytes=0-\d+", request)
    return found[1] if found else None


def test_a_server_that_dies_while_images_are_read_loses_none(server, tree):
    config = data_config(on_server(server, KINDS["csv"]))
    source = open_source(config)
    server.kill()
    threading.Timer(AWAY_S, server.start).start()
    rows = [row for piece in source.pieces() for t in source.read(piece) for row in t.to_pylist()]
    local = rows_of(data_config(KINDS["csv"].format(tree)))
    assert without_problems(rows) == without_problems(local)


def test_absent_and_forbidden_places_are_one_clear_error(server, monkeypatch):
    with pytest.raises(ValueError, match=r"'s3://lab/none\.csv.*' does not exist"):
        open_source(data_config(on_server(server, "csv:{}/none.csv")))
    with pytest.raises(ValueError, match="matches no tar"):
        open_source(data_config(on_server(server, "webdataset:{}/none/{{0..2}}.tar")))
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "stranger")
    storage._s3.cache_clear()
    for source in KINDS.values():
        with pytest.raises(ValueError, match=r"data\.source: cannot read '.*ACCESS_DENIED"):
            open_source(data_config(on_server(server, source)))
    storage._s3.cache_clear()
