"""Every location on an S3-compatible server: storage calls, whole runs, a server that dies, wrong keys.

The server is tests/s3_server.py, a process of its own on loopback.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest
from typer.testing import CliRunner

from pipelines import storage
from pipelines.checkpoint import latest_place
from pipelines.cli import app
from pipelines.launch import run_here
from pipelines.port import LocalPort
from pipelines.prepare import prepare
from pipelines.pretrain import run_job
from pipelines.results import Store, read_curve
from pipelines.run_record import read_record
from tests.pipeline_fixture import small_config, small_job
from tests.s3_server import S3Server, running

BUCKET = "lab"
AWAY_S = 4.0
# What a restarting store or a changed route takes.
OUTAGE_S = 20.0


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    storage._s3.cache_clear()
    with running(tmp_path_factory.mktemp("s3"), bucket=BUCKET) as started:
        yield started
    storage._s3.cache_clear()


def test_storage_works_as_on_a_disk(server: S3Server):
    root = server.uri(BUCKET, "store")
    place = storage.join(root, "deep", "file.bin")
    data = os.urandom(12_000_000)  # above the size at which an upload has several parts
    storage.publish_bytes(place, data)
    assert storage.read_bytes(place) == data
    with pytest.raises(storage.AlreadyExistsError, match="never overwritten"):
        storage.publish_bytes(place, b"other")
    storage.write_table(storage.join(root, "table.parquet"), pa.table({"a": [1, 2]}))
    assert storage.read_table(storage.join(root, "table.parquet"))["a"].to_pylist() == [1, 2]
    assert storage.list_files(root) == ["deep/file.bin", "table.parquet"]
    storage.delete_folder(storage.join(root, "deep"))
    assert storage.list_files(root) == ["table.parquet"]
    assert not storage.exists(place)


def test_options_of_a_uri_are_checked(server: S3Server):
    with pytest.raises(
        ValueError, match=r"unknown options \['endpont'\]; known: anonymous, endpoint_override"
    ):
        storage.exists("s3://lab/x?endpont=here")
    # Anonymous requests carry no key, and this server wants one.
    anonymous = server.uri(BUCKET, "store", "table.parquet") + "&anonymous=true"
    with pytest.raises(OSError, match="ACCESS_DENIED"):
        storage.read_bytes(anonymous)


def test_a_server_that_is_away_for_a_while_is_waited_for(server: S3Server):
    place = server.uri(BUCKET, "patience")
    storage.write_bytes(place, b"there")
    server.kill()
    threading.Timer(AWAY_S, server.start).start()
    assert storage.read_bytes(place) == b"there"


@pytest.mark.ray
def test_a_run_on_the_server_survives_its_death(server: S3Server, tmp_path: Path, ray_session: None):
    """Source, prepared shards, checkpoints, record and results on S3; the server dies between two steps."""
    steps = ("train.steps=12", "train.evaluate_every=4", "train.checkpoint_every=1")
    config = small_config(tmp_path, f"output={server.uri(BUCKET, 'runs')}", "train.feed=stream", *steps)
    prepared = server.uri(BUCKET, "prepared")
    prepare(config.data, prepared)
    job = small_job(config, prepared, "clip-s0")
    job.write()

    class Dying(LocalPort):
        """The server dies when step 4 is reported."""

        def report(self, metrics: dict[str, object]) -> None:
            if metrics["step"] == 4:
                server.kill()
                threading.Timer(OUTAGE_S, server.start).start()

    run_job(job, Dying())
    record = read_record(config.output, "clip-s0")
    assert record is not None
    assert (record["state"], record["steps"], record["attempts"]) == ("complete", 12, 1)
    # The steps after the outage waited for it; nothing was skipped.
    assert record["seconds"] > OUTAGE_S
    assert latest_place(job.checkpoints) is not None
    assert {result["pretrained"] for result in Store(config.output).results()} == {"clip-s0"}
    local = small_config(tmp_path, "train.feed=memory", *steps)
    twin = small_job(local, prepared, "clip-s0")
    twin.write()
    run_here(twin)
    curves = [
        [(line["step"], line["loss"]) for line in read_curve(root, "clip-s0") if "loss" in line]
        for root in (config.output, local.output)
    ]
    assert curves[0] == curves[1]
    assert [step for step, _ in curves[0]] == list(range(1, 13))
    ours, theirs = (
        {(r["task"], r["clipfleet"]["keep_rule"]): r["metrics"] for r in Store(root).results()}
        for root in (config.output, local.output)
    )
    assert ours == theirs


def test_wrong_keys_are_one_clear_line(server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "stranger")
    root, here = server.uri(BUCKET, "runs"), f"prepared={tmp_path}"
    verbs = {
        "results": [root],
        "report": [root],
        "evaluate": [root],
        "prepare of a source there": ["--source", f"parquet:{server.uri(BUCKET, 'pairs')}", here],
        "prepare to there": [f"prepared={root}"],
        "pretrain": ["--output", root, here],
        "sweep": ["--output", root, here],
    }
    for verb, arguments in verbs.items():
        storage._s3.cache_clear()
        done = CliRunner().invoke(app, [verb.split()[0], *arguments])
        assert done.exit_code == 2, (verb, done.exception)
        assert re.search("AWS Error (INVALID_ACCESS_KEY_ID|ACCESS_DENIED) during", done.stderr), verb
        assert "AWS_SECRET_ACCESS_KEY" in done.stderr, verb
        assert done.stderr.count("\n") == 1, verb
    storage._s3.cache_clear()
