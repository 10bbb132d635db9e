"""The verb `score`, and where runs find what it wrote."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from rich.console import Console

from models.teacher import TokenScorer
from models.training_slots import Teacher
from pipelines.checkpoint import about_checkpoint
from pipelines.config import Config
from pipelines.prepared import Prepared, read_manifest
from pipelines.sources.open_source import source_identity
from pipelines.storage import AlreadyExistsError

if TYPE_CHECKING:
    from pipelines.finished_run import FoundRun
    from pipelines.score_shards import ScoreSource


def score_stage(
    run: str, output: str, console: Console, *, data: str | None = None, dry_run: bool = False
) -> None:
    """Score every prepared row with a run's newest checkpoint.

    Args:
        run: a run root, or the folder of one run.
        data: prepared data to score; None means what the run was trained on.

    Raises:
        ValueError: no run or several, no checkpoint, or data the run's model cannot see.
        AlreadyExistsError: the output is complete.
    """
    from pipelines.cluster import connect
    from pipelines.finished_run import find_run
    from pipelines.progress import StageProgress
    from pipelines.score_shards import score_prepared

    found = find_run(run)
    job = found.job
    config, prepared = job.config, Prepared.open(data or job.prepared)
    if prepared.image_size != config.data.image_size:
        raise ValueError(
            f"the run sees images of {config.data.image_size} pixels, '{prepared.uri}' holds "
            f"{prepared.image_size}; prepare with data.image_size={config.data.image_size}"
        )
    if read_manifest(output) is not None:
        raise AlreadyExistsError(f"'{output}' is complete; name another output")
    console.print(
        f"scoring {sum(prepared.num_rows(split) for split in prepared.manifest['splits']):,} rows of "
        f"'{prepared.uri}' with {found.checkpoint} -> {output}",
        highlight=False,
        soft_wrap=True,
    )
    if dry_run:
        return
    connect(address=config.ray_address)
    score_prepared(
        prepared,
        output,
        _source(found),
        pool=config.scoring,
        on_progress=StageProgress(console),
    )
    console.print(
        f"train on it with scoring.mode=offline scoring.scored_data={output}",
        highlight=False,
        soft_wrap=True,
    )


def _source(run: FoundRun) -> ScoreSource:
    """The run's EMA teacher, or its model where it has no teacher."""
    from pipelines.score_shards import ScoreSource

    _, trainer = run.load()
    scorer = (
        TokenScorer(trainer.model.encoder.vision, None, replace(trainer.recipe, teacher=Teacher()))
        if trainer.teacher is None
        else trainer.teacher.scorer()
    )
    about = {
        "run_id": run.job.run_id,
        "method": trainer.recipe.name,
        "step": trainer.step,
        "checkpoint_sha256": about_checkpoint(run.checkpoint)[0],
        "scorer": "model" if trainer.teacher is None else "teacher",
        "image_scale": scorer.recipe.teacher.image_scale,
    }
    return ScoreSource(scorer, run.job.config.train.precision, about)


def scored_place(config: Config) -> str:
    """Location of the scored data of a run with scoring.mode=offline.

    Raises:
        ValueError: there is none, it holds no scores, or it was prepared from other data.
    """
    place = str(config.scoring.scored_data)
    manifest = read_manifest(place)
    if manifest is None:
        raise ValueError(
            f"scoring.scored_data: no prepared data at '{place}'; write it with `clipfleet score`"
        )
    if "token_scores" not in manifest:
        raise ValueError(
            f"scoring.scored_data: '{place}' holds no scores; write some with `clipfleet score RUN --output "
            "PLACE`"
        )
    identity = source_identity(config.data)
    if (manifest["source_identity"], manifest["config"]) != (identity, config.tree()["data"]):
        raise ValueError(
            f"scoring.scored_data: '{place}' was prepared from '{manifest['config']['source']}' with other "
            f"settings than data.source={config.data.source} has; score the data of this configuration"
        )
    return place
