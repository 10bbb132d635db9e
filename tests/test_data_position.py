"""Where in its data a checkpoint stands: no row twice or never after a resume, other orders refused."""

from __future__ import annotations

import copy
import json
from collections import Counter
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import ray
import torch.distributed as dist
from typer.testing import CliRunner

from pipelines import storage
from pipelines.checkpoint import CheckpointError, about_checkpoint, latest_place, load_checkpoint
from pipelines.cli import app
from pipelines.data_position import check_position, check_resume, data_position
from pipelines.feed import train_order
from pipelines.job import Job
from pipelines.order import Cursor
from pipelines.port import LocalPort
from pipelines.prepared import Prepared
from pipelines.pretrain import run_job
from pipelines.run_record import read_record
from pipelines.train_step import Trainer
from tests.pipeline_fixture import SMALL, small_config, small_job

pytestmark = pytest.mark.ray

# 192 rows in batches of 32: an epoch is six steps, the run two epochs.
STEPS_PER_EPOCH, STEPS = 6, 12


class Killed(BaseException):
    """Stands for a signal: nothing in the run may catch it."""


class Group(LocalPort):
    """A worker of a group that is killed after a step."""

    def __init__(self, rank: int, world: int, at_step: int | None) -> None:
        self.rank, self.world, self.at_step = rank, world, at_step

    def report(self, metrics: dict[str, Any]) -> None:
        if self.world > 1:
            dist.barrier()
        if metrics["step"] == self.at_step:
            raise Killed


def attempt(job: Job, port: Group) -> list[tuple[int, list[int]]]:
    """Carry out a job until it is done or killed: the steps this worker took and their row ids' hashes."""
    seen: list[tuple[int, list[int]]] = []
    run_step = Trainer.run_step

    def noting(trainer: Trainer, batch):
        seen.append((trainer.step, batch.row_keys.tolist()))
        return run_step(trainer, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "run_step", noting)
        try:
            run_job(job, port)
        except Killed:
            assert port.at_step is not None
    return seen


def attempt_in_group(job: Job, rank: int, meeting: str, at_step: int | None) -> list[tuple[int, list[int]]]:
    dist.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    try:
        return attempt(job, Group(rank, 2, at_step))
    finally:
        dist.destroy_process_group()


def on_two(job: Job, meeting: Path, at_step: int | None = None) -> list[tuple[int, list[int]]]:
    # One call each, so that a worker that died takes no state along.
    task = ray.remote(num_cpus=0.5, max_calls=1)(attempt_in_group)
    found = ray.get([task.remote(job, rank, str(meeting), at_step) for rank in (0, 1)], timeout=120)
    return [line for lines in found for line in lines]


def visits(lines: list[tuple[int, list[int]]]) -> list[Counter[int]]:
    """How often each row id was seen, by epoch."""
    epochs = [Counter[int]() for _ in range(STEPS // STEPS_PER_EPOCH)]
    for step, rows in lines:
        epochs[step // STEPS_PER_EPOCH].update(rows)
    return epochs


def test_rows_are_seen_once_an_epoch_over_kills_and_other_numbers_of_workers(
    tmp_path: Path, small_prepared: str
):
    overrides = (f"train.steps={STEPS}", "train.evaluate_every=1", "train.checkpoint_every=3")
    config = small_config(tmp_path, *overrides)
    one = small_job(config, small_prepared, "run")
    two = replace(one, tree=small_config(tmp_path, *overrides, "train.num_workers=2").tree())
    # Killed at 4 with a checkpoint of 3, then at 8 with one of 6.
    first = attempt(one, Group(0, 1, at_step=4))
    assert place_of(one)["step"] == 3
    second = on_two(two, tmp_path / "meeting", at_step=8)
    assert place_of(two) == place_of(one) | {"step": 6, "epoch": 1, "offset": 0}
    third = attempt(one, Group(0, 1, at_step=None))
    # What came after a checkpoint is in no weights: the next attempt takes those steps again.
    counted = [line for line in first if line[0] < 3] + [line for line in second if line[0] < 6] + third
    epochs = visits(counted)
    assert [set(epoch.values()) for epoch in epochs] == [{1}, {1}]
    assert [len(epoch) for epoch in epochs] == [192, 192]
    assert epochs[0].keys() == epochs[1].keys()
    # The control: the lost steps are seen again.
    assert max(visits(first + second + third)[0].values()) == 2
    record = read_record(one.root, "run")
    assert record is not None
    assert (record["state"], record["steps"], record["attempts"]) == ("complete", STEPS, 3)


def place_of(job: Job) -> dict[str, Any]:
    """The position in a job's newest checkpoint, where its description must give the same."""
    place = latest_place(job.checkpoints)
    assert place is not None
    position = load_checkpoint(place)["position"]
    assert about_checkpoint(place)[1]["position"] == position
    return position


@pytest.fixture(scope="module")
def killed(small_prepared: str, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """A run that was killed after a checkpoint of step 4, on data of its own."""
    folder = tmp_path_factory.mktemp("killed")
    job = small_job(small_config(folder), small_prepared, "clip-s0")
    attempt(job, Group(0, 1, at_step=4))
    return job


def changed_data(prepared: str, change) -> Prepared:
    manifest = copy.deepcopy(Prepared.open(prepared).manifest)
    change(manifest["splits"]["train"]["shards"])
    return Prepared("/elsewhere", manifest)


def test_the_position_is_that_of_the_order(killed: Job):
    prepared = Prepared.open(killed.prepared)
    order = train_order(prepared, batch_size=32, seed=0)
    position = place_of(killed)
    assert Cursor(position["epoch"], position["slice"], position["offset"]) == order.cursor(4)
    assert position == data_position(order, prepared, step=4)
    assert (position["offset"], position["epoch_rows"], position["batch_size"]) == (128, 192, 32)
    # A checkpoint of plain values, readable without this program.
    json.dumps(position)
    check_position(position, order, prepared, where="here")
    assert asdict(order.cursor(6)) == {"epoch": 1, "slice": 0, "offset": 0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda shards: shards[0].update(sha256="0" * 64), r"another: training shards \w{12} -> \w{12}\. Br"),
        (lambda shards: shards.reverse(), r"another: training shards \w{12} -> \w{12}\. Bring back"),
        (lambda shards: shards[0].update(weight=2.0), r"training shards .*, rows of an epoch 192 -> 256\."),
        (
            lambda shards: shards.pop(),
            r"rows of an epoch 192 -> 128, epoch 0 -> 1, offset in the slice 128 ->",
        ),
    ],
)
def test_other_data_is_refused(killed: Job, change, message: str):
    prepared = changed_data(killed.prepared, change)
    order = train_order(prepared, batch_size=32, seed=0)
    with pytest.raises(CheckpointError, match=message) as refusal:
        check_position(place_of(killed), order, prepared, where="here")
    assert "the run in 'here' stands at epoch 0, slice 0, offset 128 of its data" in str(refusal.value)
    assert "'/elsewhere' has another" in str(refusal.value)
    assert "or name another output for a new run" in str(refusal.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 64, "seed": 0}, r"train\.batch_size 32 -> 64, epoch 0 -> 1, offset in the slice 128"),
        ({"batch_size": 32, "seed": 1}, r"another: seed 0 -> 1\."),
    ],
)
def test_another_batch_size_or_seed_is_refused(killed: Job, settings: dict[str, int], message: str):
    prepared = Prepared.open(killed.prepared)
    with pytest.raises(CheckpointError, match=message):
        check_position(place_of(killed), train_order(prepared, **settings), prepared, where="here")


def test_a_worker_refuses_other_data_under_the_same_path(killed: Job, tmp_path: Path):
    """What a job is given is not what its checkpoint was trained on, whoever starts it."""
    job = moved(killed, tmp_path)
    manifest = storage.read_json(storage.join(job.prepared, "manifest.json"))
    manifest["splits"]["train"]["shards"][0]["sha256"] = "0" * 64
    storage.write_json(storage.join(job.prepared, "manifest.json"), manifest)
    for resume in (check_resume, lambda job: run_job(job, LocalPort())):
        with pytest.raises(ValueError, match=r"stands at epoch 0, slice 0, offset 128 .*training shards"):
            resume(job)


def moved(job: Job, folder: Path) -> Job:
    """A copy of a run and its data."""
    for source, name in ((job.folder, "root/runs/clip-s0"), (job.prepared, "data")):
        for file in storage.list_files(source):
            data = storage.read_bytes(storage.join(source, file))
            storage.write_bytes(str(folder / name / file), data)
    return replace(job, root=str(folder / "root"), prepared=str(folder / "data"))


def test_a_refused_resume_leaves_the_run_as_it_was(killed: Job, tmp_path: Path):
    job = moved(killed, tmp_path)
    job.write()
    before = {file: storage.read_bytes(storage.join(job.root, file)) for file in storage.list_files(job.root)}
    places = (f"output={job.root}", f"prepared={Path(killed.prepared).parent}")
    refused = CliRunner().invoke(app, ["pretrain", "--local", *SMALL, *places, "train.lr=0.01"])
    assert refused.exit_code == 2
    assert "was written with another configuration; name another output" in refused.stderr
    after = {file: storage.read_bytes(storage.join(job.root, file)) for file in storage.list_files(job.root)}
    assert after == before
    # Started as it was, it goes on.
    done = CliRunner().invoke(app, ["pretrain", "--local", *SMALL, *places])
    assert done.exit_code == 0, done.output
    record = read_record(job.root, "clip-s0")
    assert record is not None
    assert (record["state"], record["attempts"]) == ("complete", 2)


def test_a_checkpoint_without_a_position_gives_its_weights_only(killed: Job, tmp_path: Path):
    job = moved(killed, tmp_path)
    place = latest_place(job.checkpoints)
    assert place is not None
    manifest = storage.read_json(storage.join(place, "MANIFEST.json"))
    storage.write_json(storage.join(place, "MANIFEST.json"), manifest | {"schema_version": 1})
    assert load_checkpoint(place)["step"] == 4
    with pytest.raises(
        CheckpointError, match=r"schema_version 1\) does not say where in its data the run sto"
    ):
        check_resume(job)
    with pytest.raises(CheckpointError, match=f"take its weights: train.start_from={place}"):
        run_job(job, LocalPort())
    storage.write_json(storage.join(place, "MANIFEST.json"), manifest | {"schema_version": 3})
    with pytest.raises(
        CheckpointError, match=r"schema_version must be one of \(1, 2\), found 3; use the vers"
    ):
        load_checkpoint(place)
