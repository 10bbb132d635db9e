"""`evaluate`: every zero-shot task a split allows, source by source, each image encoded once."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa

from pipelines.evaluation.encoder import EncodedImages, PairEncoder, TextBank, encode_images
from pipelines.evaluation.planning import (
    EvalSettings,
    SkippedTask,
    make_plan,
    plan_tasks,
    refuse_unknown,
    skip_task,
)
from pipelines.evaluation.statistics import Bootstrap
from pipelines.evaluation.task_result import MAIN_METRICS, TaskResult
from pipelines.evaluation.zero_shot_tasks import PointingTask, ZeroShotTask, prompt_embeddings
from pipelines.schemas import PREPARED, check_schema


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Results per task and source, and what was left out."""

    results: list[TaskResult]
    skipped: list[SkippedTask]


def evaluate(
    encoder: PairEncoder,
    table: pa.Table,
    *,
    image_size: int,
    settings: EvalSettings,
    class_names: Sequence[str] | Mapping[str, Sequence[str]],
    label_counts: Mapping[str, int],
    tasks: Sequence[str] | None = None,
    seed: int = 0,
) -> Evaluation:
    """Score a model on one split.

    Everything is computed per value of the `source` column: a score that pools sources can be had from
    the source alone (chest X-rays of two archives: AUROC 0.77 for pneumonia without looking at the image).

    Args:
        table: rows of one split, schema `PREPARED`.
        class_names: candidates of the single-label task; a mapping gives each source its own.
        label_counts: positives per label among the training rows; chooses the labels to score unless
            `settings.labels` does.
        tasks: names to run; None for all that the data allows.
        seed: of the bootstrap; `settings.resamples` = 0 leaves the intervals out.

    Returns:
        One result per task and source, and the tasks left out with reasons.

    Raises:
        ValueError: an empty or mistyped table, an unknown task, label or class, an encoder that returns
            vectors that are not unit length.
    """
    check_schema(table.schema, PREPARED, where="evaluation")
    if table.num_rows == 0:
        raise ValueError("evaluation needs at least one row")
    refuse_unknown(tasks or (), MAIN_METRICS, "task")
    wanted = [name for name in MAIN_METRICS if tasks is None or name in tasks]
    bootstrap = None
    if settings.resamples:
        bootstrap = Bootstrap(resamples=settings.resamples, confidence=settings.confidence, seed=seed)
    plan = make_plan(table, wanted, settings, class_names=class_names, label_counts=label_counts)
    planned, skipped = plan_tasks(plan, wanted)
    if not planned:
        return Evaluation(results=[], skipped=skipped)
    start = time.perf_counter()
    bank = TextBank(encoder, [text for task in planned for text in task.texts()])
    images = _encode(encoder, table, image_size, planned, bank)
    seconds_per_row = (time.perf_counter() - start) / table.num_rows
    results = []
    for task in planned:
        if isinstance(task, PointingTask) and images.best_patch is None:
            skipped.append(skip_task(task.task, task.rows.source, "the encoder gives no complete patch grid"))
        else:
            results.append(_score(task, images, bank, bootstrap, seconds_per_row=seconds_per_row))
    return Evaluation(results=results, skipped=skipped)


def _score(
    task: ZeroShotTask,
    images: EncodedImages,
    bank: TextBank,
    bootstrap: Bootstrap | None,
    *,
    seconds_per_row: float,
) -> TaskResult:
    start = time.perf_counter()
    fields = task.score(images, bank, bootstrap)
    # Each task is charged its rows' share of the encoding that all tasks use.
    seconds = time.perf_counter() - start + seconds_per_row * len(task.rows.at)
    return TaskResult(task=task.task, source=task.rows.source, seconds=seconds, **fields)


def _encode(
    encoder: PairEncoder, table: pa.Table, image_size: int, planned: list[ZeroShotTask], bank: TextBank
) -> EncodedImages:
    point_at = None
    pointing = next((task for task in planned if isinstance(task, PointingTask)), None)
    if pointing is not None:
        point_at = prompt_embeddings(bank, pointing.texts(), len(pointing.names)).numpy()
    return encode_images(encoder, table["image"], image_size=image_size, point_at=point_at)
