"""Whether a split answers the question a run will be judged by: found out before anything is trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipelines.evaluation.encoder import ImageEncodings
from pipelines.evaluation.main_metric import main_metric_value, resolve_main_metric, tasks_for_metric
from pipelines.evaluation.planning import EvalSettings, make_plan, plan_tasks
from pipelines.evaluation.task_result import MAIN_METRICS
from pipelines.evaluation.tasks import evaluate

_WIDTH = 4


def check_main_metric(
    table: pa.Table,
    name: str,
    *,
    image_size: int,
    settings: EvalSettings,
    class_names: Sequence[str],
    label_counts: Mapping[str, int],
) -> None:
    """Refuse a main metric that the rows of the selection split do not have or do not define.

    Which metrics there are depends on the rows and the settings alone, so random vectors stand for a model.

    Args:
        table: the selection split, schema `PREPARED`, at least one row.
        settings: with `resamples` = 0.

    Raises:
        ValueError: no task is possible, the name is unknown (those there are get listed), or its value is
            undefined.
    """
    found = evaluate(
        _RandomEncoder(),
        table,
        image_size=image_size,
        settings=settings,
        class_names=class_names,
        label_counts=label_counts,
        tasks=tasks_for_metric(name, table),
    )
    if not found.results:
        reasons = "; ".join(f"{task.task} of '{task.source}': {task.reason}" for task in found.skipped)
        raise ValueError(f"main metric '{name}': the selection split allows no such task ({reasons})")
    task, metric = resolve_main_metric(found.results, name)
    if main_metric_value(found.results, name) is None:
        reasons = "; ".join(
            f"'{result.source}': {result.undefined[metric]}"
            for result in found.results
            if result.task == task
        )
        raise ValueError(
            f"main metric '{task}.{metric}' is undefined on the selection split ({reasons}); choose another "
            "evaluation.main_metric"
        )


def check_report_split(
    table: pa.Table,
    *,
    settings: EvalSettings,
    class_names: Sequence[str],
    label_counts: Mapping[str, int],
) -> None:
    """Refuse a report split on which no task is possible.

    Raises:
        ValueError: giving the reason of every task.
    """
    wanted = list(MAIN_METRICS)
    plan = make_plan(table, wanted, settings, class_names=class_names, label_counts=label_counts)
    planned, skipped = plan_tasks(plan, wanted)
    if not planned:
        reasons = "; ".join(f"{task.task} of '{task.source}': {task.reason}" for task in skipped)
        raise ValueError(f"the split to report on allows no evaluation ({reasons})")


class _RandomEncoder:
    """Stands for a model; one patch per image."""

    def __init__(self) -> None:
        self._generator = np.random.default_rng(0)

    def encode_images(self, images: NDArray[np.uint8]) -> ImageEncodings:
        embeds = self._unit(len(images))
        return ImageEncodings(image_embeds=embeds, patch_embeds=embeds[:, None])

    def encode_texts(self, texts: list[str]) -> NDArray[np.float32]:
        return self._unit(len(texts))

    def _unit(self, num_rows: int) -> NDArray[np.float32]:
        drawn = self._generator.standard_normal((num_rows, _WIDTH))
        unit: NDArray[np.float32] = (drawn / np.linalg.norm(drawn, axis=1, keepdims=True)).astype(np.float32)
        return unit
