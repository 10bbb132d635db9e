"""A training run: steps, log, checkpoints, selection metric, and the final evaluation.

`run_job` is the loop itself, the same in a plain process, a Tune trial and a Ray Train worker;
`pipelines/launch.py` decides where it runs.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from models.gather import Gather, ProcessGroupGather, SingleProcess
from models.outputs import PairBatch
from pipelines import storage
from pipelines.checkpoint import load_latest, save_checkpoint
from pipelines.collate import BatchSettings
from pipelines.config import Config
from pipelines.evaluate import publish_evaluation, selection_value
from pipelines.feed import Feed, MemoryFeed, fits_in_memory, load_rows, train_order
from pipelines.job import Job, identity
from pipelines.port import Port
from pipelines.prepared import Prepared
from pipelines.run_record import RunRecord
from pipelines.train_step import NonFiniteLossError, TextSpec, Trainer
from pipelines.versions import versions


@dataclass(frozen=True)
class Outcome:
    """What a finished run leaves behind besides its record."""

    run_id: str
    selection: float | None
    seconds: float
    steps: int


def run_job(job: Job, port: Port) -> Outcome:
    """Train to the last step, resuming from the run's newest checkpoint, then evaluate.

    Every worker of a group calls this. Rank 0 alone writes: record, checkpoints and results.

    Raises:
        ValueError: the data or the configuration cannot be used.
        NonFiniteLossError: training diverged; the record says so.
    """
    config = job.config
    prepared = Prepared.open(job.prepared)
    device = pick_device(config)
    # Threads of several workers on one machine spin on each other's cores.
    torch.set_num_threads(max(1, int(config.train.cpus_per_worker)))
    trainer = build_trainer(config, prepared, gather=_gather(port), device=device)
    run = _Run(job, config, prepared, trainer, port)
    run.resume()
    for batch in _feed(job, config, prepared, trainer, port).batches(trainer.step, config.train.steps):
        run.step(batch)
    return run.finish()


def build_trainer(
    config: Config, prepared: Prepared, *, gather: Gather | None = None, device: torch.device | None = None
) -> Trainer:
    """The trainer of a configuration on prepared data, with freshly seeded weights."""
    tokenizer = prepared.tokenizer()
    text = TextSpec(tokenizer.vocab_size, tokenizer.pad_id, tokenizer.start_id, tokenizer.end_id)
    return Trainer(
        config.method, config.model, text, config.train, seed=config.seed, gather=gather, device=device
    )


def pick_device(config: Config) -> torch.device:
    """The configured device.

    Raises:
        ValueError: a GPU is asked for and there is none.
    """
    wanted = config.train.device
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ValueError("train.device=cuda, but this worker sees no GPU; set train.device=cpu")
    return torch.device("cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu")


class _Run:
    """State of one run in one worker."""

    def __init__(self, job: Job, config: Config, prepared: Prepared, trainer: Trainer, port: Port) -> None:
        self.job, self.config, self.prepared, self.trainer, self.port = job, config, prepared, trainer, port
        self.identity = identity(job.tree)
        self.checkpoints = storage.join(job.folder, "checkpoints")
        self.record = RunRecord(job.root, job.run_id) if port.rank == 0 else None
        self.steps_per_epoch = train_order(
            prepared, batch_size=config.train.batch_size, seed=config.seed
        ).steps_per_epoch
        self.seconds_before = 0.0
        self.started = time.monotonic()
        self.selection: dict[str, Any] | None = None

    @property
    def seconds(self) -> float:
        """Training wall seconds of all attempts."""
        return self.seconds_before + time.monotonic() - self.started

    def resume(self) -> None:
        """Start the record and continue from the newest checkpoint, if there is one."""
        if self.record is not None:
            self.record.start(
                method=self.config.method.name,
                kind=self.job.kind,
                seed=self.config.seed,
                params=self.job.params,
                config=self.job.tree,
                number=self.job.number,
                versions=versions(),
            )
        state = load_latest(self.checkpoints, identity=self.identity)
        if state is None:
            return
        self.trainer.load_state_dict(state["trainer"])
        self.seconds_before = float(state["seconds"])
        self.selection = state["selection"]

    def step(self, batch: PairBatch) -> None:
        """One optimiser step and whatever is due after it."""
        train = self.config.train
        with self._recording_failure():
            report = self.trainer.run_step(batch)
        step = self.trainer.step
        is_last = step == train.steps
        if self.record is not None and (step % train.log_every == 0 or step == 1 or is_last):
            position = {"step": step, "epoch": (step - 1) // self.steps_per_epoch}
            seen = {"samples_seen": step * train.batch_size, "seconds": self.seconds}
            line = report.as_line()
            self.record.log({**position, **seen, **line, "temperature": line["diagnostics"]["temperature/main"]})
        evaluates = step % train.evaluate_every == 0 or is_last
        if evaluates:
            self._select(step)
        if step % train.checkpoint_every == 0 or is_last:
            self._checkpoint()
        if evaluates:
            self._report(step)

    def finish(self) -> Outcome:
        """Final evaluation (unless a trial), then the final record."""
        value = self.selection["value"] if self.selection else None
        outcome = Outcome(self.job.run_id, value, self.seconds, self.trainer.step)
        if self.record is None:
            return outcome
        if self.job.kind == "trial":
            # Only runs that are reported keep their weights; a sweep would fill the disk.
            storage.delete_folder(self.checkpoints)
        else:
            with self._recording_failure():
                publish_evaluation(self.job, self.config, self.prepared, self.trainer)
        self._finish_record("complete")
        return outcome

    def _select(self, step: int) -> None:
        """Value of the selection metric; rank 0 evaluates while the others wait at the report."""
        if self.record is None:
            return
        metric, value = selection_value(self.config, self.prepared, self.trainer)
        self.selection = {"metric": metric, "value": value, "step": step}
        self.record.log({"step": step, "selection": {"metric": metric, "value": value}})

    def _checkpoint(self) -> None:
        if self.record is None:
            return
        # The log first: a resume from this checkpoint must find every line before it.
        self.record.flush()
        state = {
            "step": self.trainer.step,
            "trainer": self.trainer.state_dict(),
            "seconds": self.seconds,
            "selection": self.selection,
        }
        save_checkpoint(self.checkpoints, state, identity=self.identity)

    def _report(self, step: int) -> None:
        if self.record is not None:
            self.record.flush()
        value = self.selection["value"] if self.selection else None
        self.port.report({"step": step, "steps": self.config.train.steps, "value": value})

    @contextlib.contextmanager
    def _recording_failure(self) -> Iterator[None]:
        """An error that would come again leaves its reason in the record; others may be retried."""
        try:
            yield
        except (NonFiniteLossError, ValueError) as error:
            if self.record is not None:
                self._finish_record("failed", error=f"{type(error).__name__}: {error}")
            raise

    def _finish_record(self, state: str, *, error: str | None = None) -> None:
        assert self.record is not None
        step = self.trainer.step
        self.record.finish(
            state,
            seconds=self.seconds,
            steps=step,
            samples_seen=step * self.config.train.batch_size,
            selection=self.selection,
            error=error,
        )


def _gather(port: Port) -> Gather:
    return ProcessGroupGather() if port.world > 1 else SingleProcess()


def _feed(job: Job, config: Config, prepared: Prepared, trainer: Trainer, port: Port) -> Feed:
    order = train_order(prepared, batch_size=config.train.batch_size, seed=config.seed)
    features = config.method.features
    settings = BatchSettings(
        seed=config.seed,
        text=features.text,
        num_views=features.num_views,
        min_crop_area=config.train.min_crop_area,
        num_patches=trainer.model.vision.grid**2,
    )
    kind = config.train.feed
    if kind == "memory" or (kind == "auto" and fits_in_memory(prepared)):
        rows = load_rows(job.prepared, "train")
        return MemoryFeed(rows, order, settings, rank=port.rank, world=port.world)
    from pipelines.stream_feed import StreamFeed

    return StreamFeed(job.prepared, order, settings, rank=port.rank, world=port.world)
