"""Every location on an S3-compatible server: storage calls, whole runs, a server that dies, wrong keys.

The server is tests/s3_server.py, a process of its own on loopback.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest
from typer.testing import CliRunner

import pipelines.prepare
import pipelines.survey
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


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "tester")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        # Without it a client on no cloud machine asks the network for its role.
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
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


def test_a_run_on_the_server_survives_its_death(
    server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Prepared shards, checkpoints, record and results on S3; the server dies between two steps."""
    # The workers of the session's Ray were started without this server's keys.
    for module in (pipelines.prepare, pipelines.survey):
        monkeypatch.setattr(module, "map_pieces", lambda pieces, task: map(task, pieces))
    shared = ("train.steps=4", "train.checkpoint_every=1")
    config = small_config(tmp_path, f"output={server.uri(BUCKET, 'runs')}", *shared)
    prepared = server.uri(BUCKET, "prepared")
    prepare(config.data, prepared)
    job = small_job(config, prepared, "clip-s0")
    job.write()

    class Dying(LocalPort):
        """The server dies when step 2 is reported."""

        def report(self, metrics: dict[str, object]) -> None:
            if metrics["step"] == 2:
                server.kill()
                threading.Timer(AWAY_S, server.start).start()

    run_job(job, Dying())
    record = read_record(config.output, "clip-s0")
    assert record is not None
    assert record["state"] == "complete"
    assert latest_place(job.checkpoints) is not None
    assert {result["pretrained"] for result in Store(config.output).results()} == {"clip-s0"}
    local = small_config(tmp_path, *shared)
    twin = small_job(local, prepared, "clip-s0")
    twin.write()
    run_here(twin)
    losses = [
        [line["loss"] for line in read_curve(root, "clip-s0") if "loss" in line]
        for root in (config.output, local.output)
    ]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 4


def test_wrong_keys_are_one_clear_line(server: S3Server, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "stranger")
    storage._s3.cache_clear()
    done = CliRunner().invoke(app, ["results", server.uri(BUCKET, "runs")])
    storage._s3.cache_clear()
    assert done.exit_code == 2
    assert "INVALID_ACCESS_KEY_ID" in done.stderr
    assert "AWS_SECRET_ACCESS_KEY" in done.stderr
    assert done.stderr.count("\n") == 1
