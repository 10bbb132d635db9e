"""One training run as data: what a worker, a Tune trial or a plain process needs to carry it out."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any

from pipelines import storage
from pipelines.config import Config
from pipelines.config_tree import validate_tree
from pipelines.run_record import RunRecord
from pipelines.versions import versions

_FILE = "job.json"
_FAILURE_FILE = "last_failure.json"

# What may change between an interrupted run and its continuation without changing the result.
_FREE = {
    "output": None,
    "prepared": None,
    "ray_address": None,
    "sweep": None,
    # What is scored beside the zero-shot tasks at the end; nothing in a run depends on it.
    "evaluation": {"shots", "prompts"},
    "train": {
        "num_workers",
        "cpus_per_worker",
        "device",
        "feed",
        "embed_actors",
        "embed_gpus",
        "log_every",
        "checkpoint_every",
        "max_failures",
        # Where the weights lie; start_sha256 says which they are.
        "start_from",
        "table_rows_per_chunk",
    },
    "scoring": {
        "min_actors",
        "max_actors",
        "cpus_per_actor",
        "gpus_per_actor",
        "node_labels",
        "timeout_s",
        # The place; the scores in it are named by the prepared data's own manifest.
        "scored_data",
    },
}


@dataclass(frozen=True)
class Job:
    """A run of a sweep, or a single one.

    Attributes:
        root: run root, local or S3.
        run_id: folder of the run below `<root>/runs`.
        kind: trial, best, default or single.
        sweep: name of the sweep for the result files.
        prepared: location of the prepared data.
        dataset: name for the result files.
        tree: the resolved configuration.
        params: searched values by config path.
        number: of the trial; None for other kinds.
    """

    root: str
    run_id: str
    kind: str
    sweep: str
    prepared: str
    dataset: str
    tree: dict[str, Any]
    params: dict[str, Any]
    number: int | None = None

    @property
    def config(self) -> Config:
        return validate_tree(self.tree)

    @property
    def folder(self) -> str:
        return storage.join(self.root, "runs", self.run_id)

    @property
    def checkpoints(self) -> str:
        """Where the run's checkpoints are."""
        return storage.join(self.folder, "checkpoints")

    def write(self) -> None:
        """Put the job into its run's folder, where the process that runs it finds it."""
        storage.write_json(storage.join(self.folder, _FILE), self.as_dict())

    @staticmethod
    def read(root: str, run_id: str) -> Job:
        return Job(**storage.read_json(storage.join(root, "runs", run_id, _FILE)))

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def start_record(job: Job) -> RunRecord:
    """The writer of a run's record, its record started or, after a kill, taken up again."""
    record = RunRecord(job.root, job.run_id)
    record.start(
        method=job.tree["method"]["name"],
        kind=job.kind,
        seed=job.tree["seed"],
        params=job.params,
        config=job.tree,
        number=job.number,
        versions=versions(),
    )
    return record


def note_failure(job: Job, reason: str) -> None:
    """Keep the reason of an attempt's failure for the record of the run, should no attempt succeed."""
    storage.write_json(storage.join(job.folder, _FAILURE_FILE), {"error": reason})


def noted_failure(root: str, run_id: str) -> str | None:
    """What `note_failure` kept last."""
    uri = storage.join(root, "runs", run_id, _FAILURE_FILE)
    return str(storage.read_json(uri)["error"]) if storage.exists(uri) else None


def identity(tree: dict[str, Any]) -> str:
    """Hash of everything in a configuration that decides a run's result."""
    kept = {}
    for key, value in tree.items():
        free = _FREE.get(key, set())
        if free is None:
            continue
        kept[key] = {k: v for k, v in value.items() if k not in free} if isinstance(value, dict) else value
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:16]
