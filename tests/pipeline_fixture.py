"""A small prepared data set and configurations for tests that run the pipeline."""

from __future__ import annotations

from pathlib import Path

from pipelines.config import Config
from pipelines.config_tree import load_config
from pipelines.job import Job

# Small enough that a run takes a second, large enough that every task has rows.
SMALL = (
    "data.num_train=192",
    "data.num_selection=64",
    "data.num_test=64",
    "data.rows_per_shard=64",
    "model.vision_width=32",
    "model.vision_layers=1",
    "model.text_width=32",
    "model.text_layers=1",
    "model.embed_dim=16",
    "train.batch_size=32",
    "train.steps=6",
    "train.evaluate_every=2",
    "train.checkpoint_every=2",
    "train.log_every=1",
    "train.warmup_steps=2",
    "evaluation.resamples=50",
    "evaluation.num_samples=2",
)


def small_config(folder: Path, *overrides: str) -> Config:
    """A configuration of the pipeline's smallest runs below `folder`."""
    places = (f"output={folder / 'root'}", f"prepared={folder / 'prepared'}")
    return load_config([], [*SMALL, *places, *overrides])


def small_job(config: Config, prepared: str, run_id: str, *, kind: str = "single") -> Job:
    return Job(
        root=config.output,
        run_id=run_id,
        kind=kind,
        sweep="test",
        prepared=prepared,
        dataset="scenes-quick",
        tree=config.tree(),
        params={},
        number=0 if kind == "trial" else None,
    )
