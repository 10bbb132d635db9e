"""Evaluating a trained run: the selection value during training, the full report at its end."""

from __future__ import annotations

import io
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from pipelines import storage
from pipelines.config import Config, EvalConfig
from pipelines.encode import ModelEncoder, Readout
from pipelines.evaluation.main_metric import main_metric_value, resolve_main_metric, tasks_for_metric
from pipelines.evaluation.task_result import ResultContext, result_record, rows_table
from pipelines.evaluation.tasks import Evaluation
from pipelines.evaluation.tasks import evaluate as evaluate_tasks
from pipelines.few_shot import few_shot_results, plan_few_shot
from pipelines.job import Job
from pipelines.prepared import Prepared
from pipelines.results import publish_result
from pipelines.schemas import SAMPLES
from pipelines.tokenizer import TextTokenizer
from pipelines.train_step import Trainer
from pipelines.versions import versions


def selection_value(config: Config, prepared: Prepared, trainer: Trainer) -> tuple[str, float | None]:
    """Name and value of the main metric on the selection split, by the method's own keep rule.

    No intervals, and only the task the metric needs: this runs many times per sweep.
    """
    settings = config.evaluation.model_copy(update={"resamples": 0})
    table = split_table(prepared.uri, settings.select_on)
    tasks = tasks_for_metric(settings.main_metric, table)
    keep_rule: Readout = "all" if config.recipe.selection.kind == "none" else "kept"
    found = _evaluate(settings, prepared, trainer, split=settings.select_on, keep_rule=keep_rule, tasks=tasks)
    name = ".".join(resolve_main_metric(found.results, settings.main_metric))
    return name, main_metric_value(found.results, settings.main_metric)


def evaluate_trained(
    job: Job, config: Config, prepared: Prepared, trainer: Trainer, *, split: str
) -> list[dict[str, Any]]:
    """Result records of every task the split allows; nothing is written.

    A method that drops patches is scored with all patches and with its keep rule, one with a hash head also
    by its codes.
    """
    return [record for record, _ in _all_results(job, config, prepared, trainer, split=split)]


def publish_evaluation(job: Job, config: Config, prepared: Prepared, trainer: Trainer) -> None:
    """Score the report split and add the results to the store, with sample images beside the run."""
    split = config.evaluation.report_on
    for record, rows in _all_results(job, config, prepared, trainer, split=split):
        publish_result(job.root, record, rows)
    if config.evaluation.num_samples:
        samples = sample_images(config, prepared, trainer)
        storage.write_table(storage.join(job.folder, "samples.parquet"), samples)


def _all_results(
    job: Job, config: Config, prepared: Prepared, trainer: Trainer, *, split: str
) -> Iterator[tuple[dict[str, Any], pa.Table]]:
    table = split_table(prepared.uri, split)
    plan = None
    if config.evaluation.shots:
        plan = plan_few_shot(config.evaluation, prepared, table, seed=trainer.seed)
    for keep_rule in readouts(config):
        found = _evaluate(config.evaluation, prepared, trainer, split=split, keep_rule=keep_rule)
        results = list(found.results)
        # Prompts are fitted by gradients, which the bits of a hash do not pass.
        if plan is not None and keep_rule != "codes":
            encoder = _encoder(prepared, trainer, readout=keep_rule)
            results += few_shot_results(
                plan, trainer, encoder, prepared=prepared, table=table, settings=config.evaluation
            )
        context = _context(job, config, prepared, trainer, split=split, keep_rule=keep_rule)
        for result in results:
            yield result_record(result, context), rows_table(result)


def readouts(config: Config) -> list[Readout]:
    """The ways a method's model is read; stored as the `keep_rule` of a result."""
    found: list[Readout] = ["all"]
    if config.recipe.selection.kind != "none":
        found.append("kept")
    if config.method.heads.hash.weight:
        found.append("codes")
    return found


def sample_images(config: Config, prepared: Prepared, trainer: Trainer) -> pa.Table:
    """Some images of the report split with patch scores and what the method keeps of them."""
    table = split_table(prepared.uri, config.evaluation.report_on)
    table = table.slice(0, config.evaluation.num_samples)
    size = prepared.image_size
    images = np.stack([np.frombuffer(i.as_py(), np.uint8).reshape(size, size, 3) for i in table["image"]])
    encoder = _encoder(prepared, trainer, readout="kept")
    scores = encoder.token_scores(images).cpu().numpy()
    return pa.table(
        {
            "row_id": table["row_id"],
            "image": [_png(image) for image in images],
            "caption": [captions[0] for captions in table["captions"].to_pylist()],
            "grid": [trainer.model.encoder.vision.grid] * len(images),
            "token_scores": scores.tolist(),
            "is_kept": encoder.kept_mask(images).tolist(),
            "boxes": table["boxes"],
        },
        schema=SAMPLES,
    )


@lru_cache(maxsize=4)
def split_table(prepared_uri: str, split: str) -> pa.Table:
    """A split's table; kept, because it is scored again and again."""
    return Prepared.open(prepared_uri).table(split)


@lru_cache(maxsize=2)
def _tokenizer(prepared_uri: str) -> TextTokenizer:
    """The data's tokenizer; kept for the same reason."""
    return Prepared.open(prepared_uri).tokenizer()


def _evaluate(
    settings: EvalConfig,
    prepared: Prepared,
    trainer: Trainer,
    *,
    split: str,
    keep_rule: Readout,
    tasks: tuple[str, ...] | None = None,
) -> Evaluation:
    found = evaluate_tasks(
        _encoder(prepared, trainer, readout=keep_rule),
        split_table(prepared.uri, split),
        image_size=prepared.image_size,
        settings=settings,
        class_names=prepared.manifest["class_names"],
        label_counts=prepared.manifest["label_counts"].get("train", {}),
        tasks=tasks,
        seed=trainer.seed,
    )
    trainer.model.train()
    return found


def _encoder(prepared: Prepared, trainer: Trainer, *, readout: Readout) -> ModelEncoder:
    return ModelEncoder(trainer.model, _tokenizer(prepared.uri), teacher=trainer.teacher, readout=readout)


def _context(
    job: Job, config: Config, prepared: Prepared, trainer: Trainer, *, split: str, keep_rule: str
) -> ResultContext:
    return ResultContext(
        dataset=job.dataset,
        model=config.model.name,
        sweep=job.sweep,
        run_id=job.run_id,
        kind=job.kind,
        method=config.method.name,
        seed=config.seed,
        params=job.params,
        step=trainer.step,
        samples_seen=trainer.step * config.train.batch_size,
        select_on=config.evaluation.select_on,
        report_on=config.evaluation.report_on,
        split=split,
        keep_rule=keep_rule,
        data_sha=prepared.manifest["data_sha"],
        device=str(trainer.device),
        code=versions()["clipfleet"],
    )


def _png(image: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG")
    return buffer.getvalue()
