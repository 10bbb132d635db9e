"""Rows a run trains on when its processes are killed: each once an epoch, counted where they are trained on.

Processes end themselves with SIGKILL in the middle of what they do: nothing in them can catch it or clean up.
"""

from __future__ import annotations

import json
import os
import signal
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from models.outputs import PairBatch
from models.teacher import EmaTeacher, TokenScorer
from pipelines import launch, storage
from pipelines.job import Job
from pipelines.keyed_random import text_key
from pipelines.launch import run_here, run_in_train
from pipelines.prepared import Prepared
from pipelines.results import Store
from pipelines.stream_feed import StreamFeed
from pipelines.train_step import Trainer
from tests.pipeline_fixture import small_config, small_job

pytestmark = pytest.mark.ray

NUM_ROWS, BATCH_SIZE = 192, 24
STEPS_PER_EPOCH = NUM_ROWS // BATCH_SIZE
# Two epochs of eight batches from three shards. What step 8 logs lies beyond the checkpoint of step 6.
RUN = (
    f"train.batch_size={BATCH_SIZE}",
    f"train.steps={2 * STEPS_PER_EPOCH}",
    "train.checkpoint_every=6",
    "train.evaluate_every=8",
    "train.feed=stream",
)
# In the second epoch, between two checkpoints, and in the middle of the eight steps a task builds.
DEADLY_STEP = 11
LAST_CHECKPOINT = 6


@dataclass(frozen=True)
class Trained:
    """A worker's part of a step, as its trainer was given it."""

    attempt: int
    rank: int
    step: int
    row_keys: list[int]


@dataclass(frozen=True)
class Notebook:
    """Where every worker writes down what it has trained on."""

    folder: Path

    def write(self, found: Trained) -> None:
        with (self.folder / f"{found.attempt}-{found.rank}.jsonl").open("a") as file:
            file.write(json.dumps(found.__dict__) + "\n")

    def read(self) -> list[Trained]:
        lines = [line for file in self.folder.glob("*.jsonl") for line in file.read_text().splitlines()]
        return [Trained(**json.loads(line)) for line in lines]


def die_once(grave: Path) -> None:
    if not grave.exists():
        grave.touch()
        os.kill(os.getpid(), signal.SIGKILL)


def attempt_of(job: Job) -> int:
    return int(storage.read_json(storage.join(job.folder, "run.json"))["attempts"])


def notebook_of(job: Job) -> Notebook:
    folder = Path(job.root) / "notebook"
    folder.mkdir(parents=True, exist_ok=True)
    return Notebook(folder)


def record_steps(
    job: Job, patch: pytest.MonkeyPatch, *, rank: int = 0, deadly_step: int | None = None
) -> None:
    """From now on the trainers of this process write down each batch they have trained on."""
    plain, notebook = Trainer.run_step, notebook_of(job)

    def run_step(trainer: Trainer, batch: PairBatch) -> Any:
        report = plain(trainer, batch)
        # After the step: by then rank 0 has started the record, which counts the attempts.
        notebook.write(Trained(attempt_of(job), rank, trainer.step, batch.row_keys.tolist()))
        if trainer.step == deadly_step:
            die_once(notebook.folder / "grave")
        return report

    patch.setattr(Trainer, "run_step", run_step)


def recording_worker(loop_config: dict[str, Any]) -> None:
    """In the place of `launch._train_worker`: the last rank dies in the first attempt."""
    from ray import train

    rank, world = train.get_context().get_world_rank(), train.get_context().get_world_size()
    with pytest.MonkeyPatch.context() as patch:
        record_steps(
            Job(**loop_config["job"]),
            patch,
            rank=rank,
            deadly_step=DEADLY_STEP if rank == world - 1 else None,
        )
        PLAIN_WORKER(loop_config)


PLAIN_WORKER = launch._train_worker


def surviving(found: list[Trained]) -> list[Trained]:
    """Of every attempt the steps before those that a later one has taken again."""
    begins = {
        number: min(t.step for t in found if t.attempt == number) for number in {t.attempt for t in found}
    }
    return [one for one in found if all(one.step < begins[later] for later in begins if later > one.attempt)]


def times_seen(found: Iterable[Trained], *, epoch: int) -> Counter[int]:
    """Rows by key: how often the steps of an epoch (from 0) trained on each."""
    return Counter(key for one in found if (one.step - 1) // STEPS_PER_EPOCH == epoch for key in one.row_keys)


def each_once(prepared: str) -> Counter[int]:
    row_ids = Prepared.open(prepared).table("train")["row_id"].to_pylist()
    assert len(set(row_ids)) == NUM_ROWS
    return Counter(text_key(row_id) for row_id in row_ids)


def losses(root: str) -> list[float]:
    return [line["loss"] for line in Store(root).curve("run") if "loss" in line]


def recorded_run(folder: Path, prepared: str, *overrides: str) -> tuple[list[Trained], list[float]]:
    """A run in this process: what it trained on and its losses."""
    job = small_job(small_config(folder, *RUN, *overrides), prepared, "run")
    with pytest.MonkeyPatch.context() as patch:
        record_steps(job, patch)
        run_here(job)
    return notebook_of(job).read(), losses(job.root)


def test_a_killed_train_worker_repeats_no_row_and_leaves_none_out(
    tmp_path: Path, small_prepared: str, monkeypatch: pytest.MonkeyPatch
):
    config = small_config(
        tmp_path, *RUN, "train.num_workers=2", "train.cpus_per_worker=0.5", "train.max_failures=1"
    )
    job = small_job(config, small_prepared, "run")
    monkeypatch.setattr(launch, "_train_worker", recording_worker)
    run_in_train(job)
    found, expected = notebook_of(job).read(), each_once(small_prepared)
    assert (notebook_of(job).folder / "grave").exists()
    assert {(one.attempt, one.rank) for one in found} == {(1, 0), (1, 1), (2, 0), (2, 1)}
    # It went on from its checkpoint, which the log says too.
    assert min(one.step for one in found if one.attempt == 2) == LAST_CHECKPOINT + 1
    assert max(one.step for one in found if one.attempt == 1) == DEADLY_STEP
    lines = [line for line in Store(job.root).curve("run") if "loss" in line]
    assert [(line["step"], line["attempt"]) for line in lines] == [
        (step, 1 if step <= LAST_CHECKPOINT else 2) for step in range(1, 2 * STEPS_PER_EPOCH + 1)
    ]
    lineage = surviving(found)
    assert [times_seen(lineage, epoch=epoch) for epoch in (0, 1)] == [expected, expected]
    # Control: what was trained on and then lost counts as well, and the count shows it.
    for epoch in (0, 1):
        assert set(times_seen(found, epoch=epoch).values()) == {1, 2}
    # The order of sums on two workers is another one.
    _, whole = recorded_run(tmp_path / "whole", small_prepared, "train.feed=memory")
    assert losses(job.root) == pytest.approx(whole, rel=1e-4)
    _, other = recorded_run(tmp_path / "other", small_prepared, "train.feed=memory", "seed=1")
    assert losses(job.root) != pytest.approx(other, rel=1e-3)


@dataclass(frozen=True)
class DeadlyGate:
    """Kills the process of a task that builds batches, once, when it has built some of its span."""

    grave: Path
    trainer_pid: int

    def wait(self, step: int) -> None:
        if step == DEADLY_STEP and os.getpid() != self.trainer_pid:
            die_once(self.grave)


def test_a_killed_task_that_builds_batches_goes_unnoticed(
    tmp_path: Path, small_prepared: str, monkeypatch: pytest.MonkeyPatch
):
    _, whole = recorded_run(tmp_path / "whole", small_prepared, "train.feed=memory")
    grave = tmp_path / "grave"
    gate = DeadlyGate(grave, os.getpid())
    monkeypatch.setattr("pipelines.pretrain.StreamFeed", partial(StreamFeed, gate=gate))
    found, curve = recorded_run(tmp_path / "killed", small_prepared)
    assert grave.exists()
    assert_unharmed(found, small_prepared)
    assert curve == whole


class DyingScorer(TokenScorer):
    """Kills its process once, at its second batch, wherever it is not the trainer's."""

    def __init__(self, scorer: TokenScorer, grave: Path) -> None:
        super().__init__(scorer.vision, scorer.projector, scorer.recipe)
        self.trainer_pid, self.grave, self.calls = os.getpid(), grave, 0

    def forward(self, batch: PairBatch) -> tuple[Tensor, Tensor]:
        self.calls += 1
        if self.calls == 2 and os.getpid() != self.trainer_pid:
            die_once(self.grave)
        scores: tuple[Tensor, Tensor] = super().forward(batch)
        return scores


def test_a_killed_scorer_goes_unnoticed(tmp_path: Path, small_prepared: str, monkeypatch: pytest.MonkeyPatch):
    plain, grave = EmaTeacher.scorer, tmp_path / "grave"
    monkeypatch.setattr(EmaTeacher, "scorer", lambda teacher: DyingScorer(plain(teacher), grave))
    scored = ("method=aclip", "scoring.mode=stream", "scoring.timeout_s=120")
    # The curve is a matter of timing here, as the age of a score is; the rows are not.
    found, _ = recorded_run(tmp_path, small_prepared, *scored)
    assert grave.exists()
    assert_unharmed(found, small_prepared)


def assert_unharmed(found: list[Trained], prepared: str) -> None:
    """One attempt, every row once an epoch."""
    assert [(one.attempt, one.step) for one in found] == [
        (1, step) for step in range(1, 2 * STEPS_PER_EPOCH + 1)
    ]
    assert [times_seen(found, epoch=epoch) for epoch in (0, 1)] == [each_once(prepared)] * 2
    # Control: a step left out, or taken twice, is told apart.
    assert times_seen(found[1:], epoch=0) != each_once(prepared)
    assert times_seen([*found, found[-1]], epoch=1) != each_once(prepared)
