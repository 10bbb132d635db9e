"""A run with weights, opened again: its job, its data and its trainer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pipelines import storage
from pipelines.checkpoint import latest_place, load_checkpoint
from pipelines.config import Config
from pipelines.config_tree import validate_tree, with_overrides
from pipelines.job import Job
from pipelines.prepared import Prepared
from pipelines.pretrain import build_trainer
from pipelines.train_step import Trainer


@dataclass(frozen=True)
class FoundRun:
    """Where a run and its newest checkpoint are."""

    job: Job
    checkpoint: str

    def load(self, overrides: Sequence[str] = ()) -> tuple[Config, Trainer]:
        """Its configuration, with overrides below `evaluation`, and a trainer with its weights.

        Raises:
            ValueError: an override of another part.
        """
        # What the run did not know yet has its default.
        tree = self.job.config.tree()
        config = validate_tree(with_overrides(tree, overrides, below="evaluation"))
        trainer = build_trainer(config, Prepared.open(self.job.prepared))
        trainer.load_state_dict(load_checkpoint(self.checkpoint)["trainer"])
        return config, trainer


def find_run(run: str) -> FoundRun:
    """The run that a root or a run folder means.

    Raises:
        ValueError: there is none with a checkpoint, or several.
    """
    folder = _folder(run)
    place = latest_place(storage.join(folder, "checkpoints"))
    if place is None:
        raise ValueError(f"no checkpoint below '{folder}'; trials of a sweep keep none")
    return FoundRun(Job(**storage.read_json(storage.join(folder, "job.json"))), place)


def _folder(run: str) -> str:
    if storage.exists(storage.join(run, "job.json")):
        return run
    found = storage.list_files(storage.join(run, "runs"), suffix="job.json")
    with_weights = [
        file.removesuffix("/job.json")
        for file in found
        if storage.list_files(storage.join(run, "runs", file.removesuffix("/job.json"), "checkpoints"))
    ]
    if len(with_weights) != 1:
        raise ValueError(
            f"'{run}' must be one run's folder, or a root with one run that has a checkpoint; found "
            f"{len(with_weights)}: {', '.join(with_weights[:8]) or 'none'}"
        )
    return storage.join(run, "runs", with_weights[0])
