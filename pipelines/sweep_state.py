"""What a sweep has done, is doing and will do: a queue of jobs rebuilt from the run records.

Trials of all methods take turns; as soon as a method's budget is used, its best configuration is re-run
with fresh seeds. Untuned defaults run with the same seeds. Nothing here knows Ray.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from pipelines import storage
from pipelines.checkpoint import drop_checkpoints
from pipelines.config import Config, Tree
from pipelines.job import Job, identity, start_record
from pipelines.results import read_curve
from pipelines.run_record import RECORD_FILE, RunRecord, read_record
from pipelines.spaces import Space, apply_params, default_params, distributions, method_tree, space_of
from pipelines.studies import MethodStudy, open_storage


class SweepMismatchError(ValueError):
    """The output holds a sweep with another configuration."""


@dataclasses.dataclass
class _Method:
    """A method's part of the sweep."""

    tree: Tree
    space: Space
    study: MethodStudy
    num_asked: int = 0
    num_done: int = 0
    has_final_jobs: bool = False


class SweepState:
    """The queue of a sweep; `next_job` hands out work, `on_*` book what came of it."""

    def __init__(self, config: Config, *, name: str, prepared: str, dataset: str) -> None:
        """Read what is done below `config.output` and queue the rest.

        Raises:
            ValueError: a bad search space.
            SweepMismatchError: the output belongs to another sweep.
        """
        self.config, self.name = config, name
        self._prepared, self._dataset = prepared, dataset
        self._records = _read_records(config.output)
        self._queue: deque[Job] = deque()
        self._running: dict[str, Job] = {}
        optuna_storage = open_storage(config.output, config.sweep.methods)
        self._methods = {method: self._open(method, optuna_storage) for method in config.sweep.methods}
        for method in self._methods:
            self._restore(method)
        for method in self._methods:
            self._queue_final(method)
        for method in self._methods:
            self._queue_defaults(method)

    @property
    def records(self) -> Mapping[str, Mapping[str, Any]]:
        """Run records by run id, as far as known."""
        return self._records

    @property
    def num_jobs(self) -> int:
        """All jobs of the sweep, done ones included."""
        sweep = self.config.sweep
        per_method = sweep.num_trials + len(sweep.seeds) + min(sweep.num_default_seeds, len(sweep.seeds))
        return per_method * len(self._methods)

    @property
    def num_done(self) -> int:
        """Jobs of `num_jobs` that have ended.

        Counted from what is left: a longer sweep may have found another best configuration, and the final
        runs of the old one are no part of it.
        """
        sweep = self.config.sweep
        to_ask = sum(max(0, sweep.num_trials - method.num_asked) for method in self._methods.values())
        to_come = sum(len(sweep.seeds) for method in self._methods.values() if not method.has_final_jobs)
        return self.num_jobs - to_ask - to_come - len(self._queue) - len(self._running)

    @property
    def is_exhausted(self) -> bool:
        """True when nothing is queued, running or still to come."""
        return (
            not self._queue
            and not self._running
            and all(method.has_final_jobs for method in self._methods.values())
        )

    def next_job(self) -> Job | None:
        """A job to start now; None when everything left waits for something running."""
        for method in self._methods:
            self._queue_final(method)
        job = self._queue.popleft() if self._queue and self._queue[0].kind != "default" else None
        job = job or self._next_trial() or (self._queue.popleft() if self._queue else None)
        if job is not None:
            self._running[job.run_id] = job
        return job

    def should_stop(self, run_id: str, step: int, value: float | None) -> bool:
        """Book an intermediate value of a running job; True stops it early."""
        job = self._running[run_id]
        if job.kind != "trial" or job.number is None or value is None:
            return False
        if step >= self.config.train.steps:
            return False
        return self._methods[job.config.method.name].study.should_stop(job.number, step, value)

    def on_end(self, run_id: str, state: str, *, error: str | None = None) -> Mapping[str, Any]:
        """Book the end of a job and return its record.

        Args:
            state: `complete`; `pruned` and `failed` also finish the record, whose process is gone.
        """
        job = self._running.pop(run_id)
        record = read_record(self.config.output, run_id)
        lines = read_curve(self.config.output, run_id)
        values = selection_values(lines)
        if record is None or record["state"] == "running":
            record = self._finish_record(job, record, state, lines, error)
        self._records[run_id] = record
        if job.kind == "trial" and job.number is not None:
            drop_checkpoints(job.checkpoints)
            method = self._methods[record["method"]]
            method.num_done += 1
            final = values[max(values)] if values else None
            method.study.finish(job.number, record["state"], final)
        return record

    def running(self, run_id: str) -> Job:
        return self._running[run_id]

    def _open(self, method: str, optuna_storage: Any) -> _Method:
        tree, space = method_tree(self.config, method), space_of(self.config, method)
        # Each method has a stream of its own: adding a method leaves the others' trials as they are.
        digest = hashlib.sha256(f"{self.config.sweep.seed}/{method}".encode()).digest()
        study = MethodStudy(
            method,
            distributions(space),
            default_params=default_params(tree, space),
            pruner=self.config.sweep.pruner,
            seed=int.from_bytes(digest[:4], "little"),
            optuna_storage=optuna_storage,
        )
        return _Method(tree, space, study)

    def _restore(self, name: str) -> None:
        """Book a method's finished trials and queue its interrupted ones."""
        method = self._methods[name]
        trials = [r for r in self._records.values() if r["method"] == name and r["kind"] == "trial"]
        for record in sorted(trials, key=lambda r: r["number"]):
            values = selection_values(read_curve(self.config.output, record["run_id"]))
            method.num_asked = max(method.num_asked, record["number"] + 1)
            if record["state"] == "running":
                method.study.ask_again(record["number"], record["params"], values)
                self._queue.append(self._job(name, "trial", record["params"], number=record["number"]))
            else:
                method.study.add_finished(record, values)
                method.num_done += 1
        # Two started at once and the sweep was killed before the first of them wrote its record.
        for number in sorted({*range(method.num_asked)} - {record["number"] for record in trials}):
            self._queue.append(self._job(name, "trial", method.study.ask(number), number=number))

    def _next_trial(self) -> Job | None:
        """The next trial of the method that is furthest behind."""
        budget = self.config.sweep.num_trials
        behind = [name for name, method in self._methods.items() if method.num_asked < budget]
        if not behind:
            return None
        name = min(behind, key=lambda name: self._methods[name].num_asked)
        method = self._methods[name]
        number = method.num_asked
        method.num_asked += 1
        return self._job(name, "trial", method.study.ask(number), number=number)

    def _queue_defaults(self, name: str) -> None:
        sweep = self.config.sweep
        params = default_params(self._methods[name].tree, self._methods[name].space)
        for seed in sweep.seeds[: sweep.num_default_seeds]:
            self._queue_unless_done(self._job(name, "default", params, seed=seed))

    def _queue_final(self, name: str) -> None:
        """Queue the best configuration's seeds once every trial of the method has ended."""
        method = self._methods[name]
        if method.has_final_jobs or method.num_done < self.config.sweep.num_trials:
            return
        method.has_final_jobs = True
        params = method.study.best_params()
        for seed in self.config.sweep.seeds:
            self._queue_unless_done(self._job(name, "best", params, seed=seed))

    def _queue_unless_done(self, job: Job) -> None:
        record = self._records.get(job.run_id)
        if record is None or record["state"] == "running":
            self._queue.append(job)

    def _job(
        self,
        name: str,
        kind: str,
        params: Mapping[str, Any],
        *,
        number: int | None = None,
        seed: int | None = None,
    ) -> Job:
        """A job whose run id says what it is.

        Final runs carry a hash of their values, since a longer sweep may find another best.
        """
        tree = apply_params(self._methods[name].tree, params)
        tree["seed"] = self.config.seed if seed is None else seed
        tag = f"t{number:03d}" if number is not None else f"{_short_hash(params)}-s{seed}"
        return Job(
            root=self.config.output,
            run_id=f"{name}-{tag}" if kind == "trial" else f"{name}-{kind}-{tag}",
            kind=kind,
            sweep=self.name,
            prepared=self._prepared,
            dataset=self._dataset,
            tree=tree,
            params=dict(params),
            number=number,
        )

    def _finish_record(
        self,
        job: Job,
        record: Mapping[str, Any] | None,
        state: str,
        lines: Sequence[Mapping[str, Any]],
        error: str | None,
    ) -> dict[str, Any]:
        """Write the final record of a process that was stopped or died."""
        writer = start_record(job) if record is None else RunRecord(job.root, job.run_id)
        trained = [line for line in lines if "loss" in line]
        step = max([line["step"] for line in trained], default=0)
        selection = None
        if values := selection_values(lines):
            last = max(values)
            selection = {"metric": self.config.evaluation.main_metric, "value": values[last], "step": last}
        writer.finish(
            state,
            seconds=trained[-1]["seconds"] if trained else 0.0,
            steps=step,
            samples_seen=step * self.config.train.batch_size,
            selection=selection,
            error=error,
        )
        found = read_record(job.root, job.run_id)
        assert found is not None
        return found


def sweep_identity(config: Config) -> str:
    """Hash of what must not change between the sessions of a sweep; budgets and methods may grow."""
    tree = config.tree()
    sweep = {"space": config.sweep.space, "pruner": tree["sweep"]["pruner"], "seed": config.sweep.seed}
    return hashlib.sha256((identity(tree) + json.dumps(sweep, sort_keys=True)).encode()).hexdigest()[:16]


def selection_values(lines: Sequence[Mapping[str, Any]]) -> dict[int, float]:
    """Values of the selection metric by step, from the lines of a metric log."""
    return {
        int(line["step"]): float(line["selection"]["value"])
        for line in lines
        if line.get("selection") and line["selection"]["value"] is not None
    }


def _read_records(root: str) -> dict[str, dict[str, Any]]:
    files = storage.list_files(storage.join(root, "runs"), suffix=RECORD_FILE)
    records = [storage.read_json(storage.join(root, "runs", file)) for file in files]
    return {record["run_id"]: record for record in records}


def _short_hash(params: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(dict(params), sort_keys=True).encode()).hexdigest()[:6]
