"""Classifying with prompts that were fitted on a few training images: `evaluation.shots`.

A head for evaluation alone: the towers stay as they are, and nothing goes into a checkpoint.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from models import zero_shot
from pipelines.config import EvalConfig
from pipelines.encode import ModelEncoder
from pipelines.evaluation.encoder import TextBank, encode_images
from pipelines.evaluation.few_shot_task import (
    FewShotScores,
    Shots,
    choose_shots,
    few_shot_fields,
    short_classes,
)
from pipelines.evaluation.planning import make_plan, plan_tasks
from pipelines.evaluation.statistics import Bootstrap
from pipelines.evaluation.task_result import CLASSIFICATION, FEW_SHOT, TaskResult, prompts_sha
from pipelines.evaluation.zero_shot_tasks import ClassificationTask, prompt_embeddings
from pipelines.prepared import Prepared
from pipelines.prompt_fitter import PromptFitter
from pipelines.train_step import Trainer

FITTED_ON = "train"
PAPER_CONTEXT = "a photo of a"  # CPL, arXiv 2210.10362


@dataclass(frozen=True, kw_only=True)
class FewShotPlan:
    """What is fitted on and what is scored, settled before a model is needed.

    Attributes:
        tasks: classification of each source of the split.
        shots: rows of the training split.
        context: words before the class name at the start, and `context_ids` their tokens.
        name_ids: tokens of each class name.
    """

    tasks: list[ClassificationTask]
    shots: Shots
    context: str
    context_ids: list[int]
    name_ids: list[list[int]]


def plan_few_shot(settings: EvalConfig, prepared: Prepared, table: pa.Table, *, seed: int) -> FewShotPlan:
    """Draw the shots and settle the rows to score.

    Args:
        table: the split to score.
        seed: of the draw.

    Raises:
        ValueError: the training split lacks classes or one of their rows, no row to score has a class, or a
            prompt is longer than texts may be.
    """
    classes = prepared.manifest["class_names"]
    rows = prepared.table(FITTED_ON, columns=["row_id", "class_name"])
    shots = choose_shots(
        rows["row_id"].to_pylist(),
        rows["class_name"].to_pylist(),
        classes=classes,
        num_shots=settings.shots,
        seed=seed,
    )
    if short := short_classes(shots, classes):
        print(short, file=sys.stderr)
    counts = prepared.manifest["label_counts"].get(FITTED_ON, {})
    plan = make_plan(table, [CLASSIFICATION], settings, class_names=classes, label_counts=counts)
    planned, skipped = plan_tasks(plan, [CLASSIFICATION])
    if not planned:
        reasons = "; ".join(f"'{task.source}': {task.reason}" for task in skipped)
        raise ValueError(f"evaluation.shots={settings.shots}: nothing to classify ({reasons})")
    context = first_context(settings)
    context_ids, *name_ids = _token_ids(prepared, [context, *classes])
    return FewShotPlan(
        tasks=[task for task in planned if isinstance(task, ClassificationTask)],
        shots=shots,
        context=context,
        context_ids=context_ids,
        name_ids=name_ids,
    )


def first_context(settings: EvalConfig) -> str:
    """Words before the class name that the prompts start from."""
    if settings.prompts.context is not None:
        return settings.prompts.context
    name = zero_shot.PLACEHOLDER
    before = [
        template.removesuffix(name).strip() for template in settings.templates if template.endswith(name)
    ]
    return max(before, key=len, default="") or PAPER_CONTEXT


def _token_ids(prepared: Prepared, texts: list[str]) -> list[list[int]]:
    """Tokens of the context and of every class name, without start and end."""
    tokenizer = prepared.tokenizer()
    found = [ids[1:-1] for ids in tokenizer.encode(texts)]
    longest = len(found[0]) + max(map(len, found[1:])) + 2
    if longest > tokenizer.max_tokens:
        raise ValueError(
            f"prompts of '{texts[0]}' and a class name have up to {longest} tokens, texts at most "
            f"{tokenizer.max_tokens} (data.max_tokens); shorten evaluation.prompts.context"
        )
    return found


def few_shot_results(
    plan: FewShotPlan,
    trainer: Trainer,
    encoder: ModelEncoder,
    *,
    prepared: Prepared,
    table: pa.Table,
    settings: EvalConfig,
) -> list[TaskResult]:
    """Fit prompts on the shots, with and without the counterfactual term, and classify the table's rows.

    Args:
        encoder: of the trainer's model, in the readout to evaluate.
        table: the split the plan was made for.

    Returns:
        One result per source; the same for the same weights, seed and settings.
    """
    start = time.perf_counter()
    size = prepared.image_size
    shots = encode_images(encoder, training_images(prepared, plan.shots.at), image_size=size).image_embeds
    rows = encode_images(encoder, table["image"], image_size=size).image_embeds
    fitter = prompt_fitter(plan, trainer, prepared, settings)
    fits = fitter.fit(torch.from_numpy(shots), torch.from_numpy(plan.shots.labels))
    bootstrap = None
    if settings.resamples:
        bootstrap = Bootstrap(resamples=settings.resamples, confidence=settings.confidence, seed=trainer.seed)
    compared = [f"{plan.context} {name}" for name in plan.tasks[0].class_names]
    sha = prompts_sha(compared, f"shots={settings.shots}", settings.prompts.model_dump_json())
    fields = []
    for task in plan.tasks:
        embeds = torch.from_numpy(rows[task.rows.at])
        classes = prompt_embeddings(TextBank(encoder, task.texts()), task.texts(), len(task.class_names))
        scores = FewShotScores(
            fitted=fitter.scores(fits[0], embeds),
            no_counterfactual=fitter.scores(fits[1], embeds),
            zero_shot=zero_shot.class_scores(embeds, classes).numpy(),
        )
        fields.append(few_shot_fields(task, scores, plan.shots, bootstrap))
    trainer.model.train()
    seconds = (time.perf_counter() - start) / len(plan.tasks)
    return [
        TaskResult(
            task=FEW_SHOT,
            source=task.rows.source,
            prompts_sha=sha,
            seconds=seconds,
            fitted_on=FITTED_ON,
            **own,
        )
        for task, own in zip(plan.tasks, fields, strict=True)
    ]


def prompt_fitter(
    plan: FewShotPlan, trainer: Trainer, prepared: Prepared, settings: EvalConfig
) -> PromptFitter:
    """What fits a plan's prompts on a trainer's model."""
    return PromptFitter(
        trainer,
        prepared.tokenizer(),
        settings.prompts,
        context_ids=plan.context_ids,
        name_ids=plan.name_ids,
        row_counts=[len(task.rows.at) for task in plan.tasks],
    )


def training_images(prepared: Prepared, at: NDArray[np.int64]) -> pa.ChunkedArray:
    """The `image` column of training rows in the order of `at`, with one shard in memory at a time."""
    ascending = np.sort(at)
    chunks, first = [], 0
    for number, shard in enumerate(prepared.manifest["splits"][FITTED_ON]["shards"]):
        inside = ascending[(ascending >= first) & (ascending < first + shard["rows"])] - first
        if len(inside):
            chunks += prepared.shard(FITTED_ON, number)["image"].take(pa.array(inside)).chunks
        first += shard["rows"]
    return pa.chunked_array(chunks).take(pa.array(np.searchsorted(ascending, at)))
