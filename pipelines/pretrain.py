"""A training run: steps, log, checkpoints, selection metric, and the final evaluation.

`run_job` is the loop itself, the same in a plain process, a Tune trial and a Ray Train worker;
`pipelines/launch.py` decides where it runs.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from models.gather import Gather, ProcessGroupGather, SingleProcess
from models.outputs import PairBatch
from pipelines.checkpoint import drop_checkpoints, load_latest, save_checkpoint
from pipelines.collate import BatchSettings
from pipelines.config import Config
from pipelines.data_position import check_position, data_position
from pipelines.evaluate import publish_evaluation, selection_value
from pipelines.feed import Feed, MemoryFeed, load_rows, streams, train_order
from pipelines.fine_tuning import describe_run, start_trainer, write_start
from pipelines.job import Job, identity, note_failure, start_record
from pipelines.object_store import StoreGauge
from pipelines.order import StepOrder
from pipelines.port import Port
from pipelines.prepared import Prepared
from pipelines.prototype_step import embedder, refresh_prototypes
from pipelines.run_record import RunRecord
from pipelines.score_tokens import Lead, ScoredFeed, score_stream
from pipelines.shard_cache import ShardCache
from pipelines.stream_feed import StreamFeed
from pipelines.train_step import NonFiniteLossError, TextSpec, Trainer


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
    # Threads of several workers on one machine spin on each other's cores.
    torch.set_num_threads(max(1, int(config.train.cpus_per_worker)))
    run = _Run(job, config, port)
    with run.recording_failure():
        run.build()
        with contextlib.closing(run.batches()) as batches:
            for batch in batches:
                run.step(batch)
        return run.finish()


def build_trainer(
    config: Config, prepared: Prepared, *, gather: Gather | None = None, device: torch.device | None = None
) -> Trainer:
    """The trainer of a configuration on prepared data, with freshly seeded weights."""
    tokenizer = prepared.tokenizer()
    text = TextSpec(tokenizer.vocab_size, tokenizer.pad_id, tokenizer.start_id, tokenizer.end_id)
    return Trainer(
        config.recipe,
        config.model,
        text,
        config.train,
        seed=config.seed,
        num_rows=prepared.num_rows("train"),
        scoring=config.scoring,
        gather=gather,
        device=device,
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

    prepared: Prepared
    trainer: Trainer

    def __init__(self, job: Job, config: Config, port: Port) -> None:
        self.job, self.config, self.port = job, config, port
        self.identity = identity(job.tree)
        # Rank 0 holds the only writer.
        self.record: RunRecord | None = None
        self.seconds_before = 0.0
        self.started = time.monotonic()
        self.selection: dict[str, Any] | None = None
        # Of the last step; None before the first of this attempt.
        self.epoch: int | None = None

    @property
    def seconds(self) -> float:
        """Training wall seconds of all attempts."""
        return self.seconds_before + time.monotonic() - self.started

    def build(self) -> None:
        """Start the record, build the trainer and continue from the newest checkpoint, if there is one."""
        if self.port.rank == 0:
            self.record = start_record(self.job)
        self.prepared = Prepared.open(self.job.prepared)
        gather = ProcessGroupGather() if self.port.world > 1 else SingleProcess()
        self.trainer = build_trainer(
            self.config, self.prepared, gather=gather, device=pick_device(self.config)
        )
        state = load_latest(self.job.checkpoints, identity=self.identity)
        if state is not None:
            check_position(state["position"], self.order, self.prepared, where=self.job.checkpoints)
            self.trainer.load_state_dict(state["trainer"])
            self.seconds_before = float(state["seconds"])
            self.selection = state["selection"]
        elif self.config.train.start_from is not None:
            found = start_trainer(self.trainer, self.config.train)
            if self.record is not None:
                write_start(self.job.folder, self.config, found)
        self.started = time.monotonic()

    def batches(self) -> Generator[PairBatch]:
        """The batches still to be trained on; closing it ends whatever feeds them."""
        scores_elsewhere = self.config.scoring.mode == "stream"
        feed, lead = self.scored_feed() if scores_elsewhere else (self.feed(), None)
        store = None if self.record is None or isinstance(feed, MemoryFeed) else StoreGauge()
        first, end = self.trainer.step, self.config.train.steps
        with contextlib.ExitStack() as stack:
            if lead is not None:
                stack.callback(lead.close)
            found = stack.enter_context(contextlib.closing(feed.batches(first, end)))
            for _ in range(first, end):
                if lead is not None:
                    lead.ask()
                started = time.perf_counter()
                batch = next(found)
                self.trainer.meter.add_wait(time.perf_counter() - started)
                self.trainer.meter.add_store(store.look() if store is not None else None)
                yield batch

    def scored_feed(self) -> tuple[ScoredFeed, Lead]:
        """Batches whose patches are scored on the way, and what lets them come."""
        return score_stream(self.trainer, self.stream_feed(), run_id=self.job.run_id)

    def feed(self) -> Feed:
        """The training batches of this worker."""
        if streams(self.config.train.feed, self.prepared):
            return self.stream_feed()
        rows, settings = load_rows(self.job.prepared, "train"), self._batch_settings()
        return MemoryFeed(rows, self.order, settings, rank=self.port.rank, world=self.port.world)

    def stream_feed(self) -> StreamFeed:
        """The training batches of this worker, built by tasks of Ray Data."""
        train = self.config.train
        cache = None
        if train.shard_cache is not None:
            cache = ShardCache(train.shard_cache, int(train.shard_cache_gib * 2**30))
        return StreamFeed(
            self.job.prepared,
            self.order,
            self._batch_settings(),
            rank=self.port.rank,
            world=self.port.world,
            cache=cache,
        )

    def step(self, batch: PairBatch) -> None:
        """One optimiser step and whatever is due before and after it."""
        train = self.config.train
        clustered = self._refresh_prototypes()
        self._watch_scorers(batch)
        meter, started = self.trainer.meter, time.perf_counter()
        report = self.trainer.run_step(batch)
        meter.add_step(time.perf_counter() - started)
        step = self.trainer.step
        is_last = step == train.steps
        is_logged = step % train.log_every == 0 or step == 1 or is_last or clustered is not None
        if self.record is not None and is_logged:
            position = {"step": step, "epoch": self.order.epoch_of(step - 1)}
            seen = {"samples_seen": step * train.batch_size, "seconds": self.seconds}
            line = report.as_line() | ({} if clustered is None else {"prototypes": clustered})
            found, ages = meter.take()
            line["diagnostics"] |= found
            if ages:
                line["score_ages"] = ages
            self.record.log(
                {**position, **seen, **line, "temperature": line["diagnostics"]["temperature/main"]}
            )
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
            drop_checkpoints(self.job.checkpoints)
        else:
            publish_evaluation(self.job, self.config, self.prepared, self.trainer)
        self._finish_record("complete")
        return outcome

    def _refresh_prototypes(self) -> dict[str, Any] | None:
        """At the start of an epoch, and of an attempt; what to log where the method has prototypes."""
        epoch = self.order.epoch_of(self.trainer.step)
        if epoch == self.epoch:
            return None
        self.epoch = epoch
        embed = embedder(self.trainer, self.prepared, self._batch_settings(), port=self.port)
        return refresh_prototypes(self.trainer, embed, epoch=epoch)

    def _watch_scorers(self, batch: PairBatch) -> None:
        """Note what scorers outside the trainer did for a batch."""
        if batch.scored is None or self.record is None:
            return
        self.trainer.meter.add_scored(batch.scored.seconds, actors=self.config.scoring.max_actors)
        if (self.trainer.step + 1) % self.config.train.evaluate_every == 0:
            overlap = self.trainer.overlap_with_own_scores(batch)
            if overlap is not None:
                self.trainer.meter.add_overlap(overlap)

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
        position = data_position(self.order, self.prepared, step=self.trainer.step)
        state = {
            "step": self.trainer.step,
            "position": position,
            "trainer": self.trainer.state_dict(),
            "seconds": self.seconds,
            "selection": self.selection,
        }
        about = {**describe_run(self.config, self.prepared), "position": position}
        save_checkpoint(self.job.checkpoints, state, identity=self.identity, about=about)

    def _report(self, step: int) -> None:
        if self.record is not None:
            self.record.flush()
        value = self.selection["value"] if self.selection else None
        self.port.report({"step": step, "steps": self.config.train.steps, "value": value})

    @contextlib.contextmanager
    def recording_failure(self) -> Iterator[None]:
        """Leave the reason of a failure beside the record; an error that would come again ends the run."""
        try:
            yield
        except (NonFiniteLossError, ValueError) as error:
            if self.record is not None:
                self._finish_record("failed", error=f"{type(error).__name__}: {error}")
            raise
        except (RuntimeError, OSError, ImportError, MemoryError) as error:
            # May pass when tried again elsewhere; if it does not, this is what the record will quote.
            if self.record is not None:
                note_failure(self.job, f"{type(error).__name__}: {error}")
            raise

    def _batch_settings(self) -> BatchSettings:
        features = self.config.recipe.features
        return BatchSettings(
            seed=self.config.seed,
            text=features.text,
            num_views=features.num_views,
            min_crop_area=self.config.train.min_crop_area,
            num_patches=self.trainer.model.encoder.vision.grid**2,
            max_tokens=self.config.data.max_tokens,
            num_texts=features.num_texts,
            sentences_per_text=features.sentences_per_text,
        )

    @cached_property
    def order(self) -> StepOrder:
        """Order of the training rows."""
        return train_order(self.prepared, batch_size=self.config.train.batch_size, seed=self.config.seed)

    def _finish_record(self, state: str, *, error: str | None = None) -> None:
        assert self.record is not None
        step = self.trainer.step if hasattr(self, "trainer") else 0
        self.record.finish(
            state,
            seconds=self.seconds,
            steps=step,
            samples_seen=step * self.config.train.batch_size,
            selection=self.selection,
            error=error,
        )
