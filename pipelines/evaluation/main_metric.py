"""One number per evaluation, to choose trials by: resolves its name and averages over sources."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Final

import numpy as np
import pyarrow as pa

from pipelines.evaluation.task_result import (
    CLASSIFICATION,
    MAIN_METRICS,
    MULTI_LABEL,
    POINTING,
    RETRIEVAL,
    TaskResult,
)

AUTO: Final = "auto"
_AUTO_ORDER: Final = (CLASSIFICATION, MULTI_LABEL, RETRIEVAL, POINTING)


def resolve_main_metric(results: Sequence[TaskResult], name: str) -> tuple[str, str]:
    """Task and metric that a name means for these results.

    Args:
        name: "auto" (top-1 accuracy if anything was classified, else macro AUROC, else mean R@5, else
            pointing accuracy), "<task>.<metric>", or a metric that only one task has.

    Raises:
        ValueError: nothing was evaluated, or an unknown or ambiguous name; it lists the names.
    """
    if not results:
        raise ValueError(f"main metric '{name}': no task could be evaluated on this data")
    if name == AUTO:
        task = next(task for task in _AUTO_ORDER if any(result.task == task for result in results))
        return task, MAIN_METRICS[task]
    pairs = sorted({(result.task, metric) for result in results for metric in result.metrics})
    found = [pair for pair in pairs if name in (pair[1], ".".join(pair))]
    names = [".".join(pair) for pair in pairs]
    if len(found) > 1:
        choices = ", ".join(".".join(pair) for pair in found)
        raise ValueError(f"main metric '{name}' is ambiguous; write one of {choices}")
    if not found:
        close = difflib.get_close_matches(name, [*names, *(metric for _, metric in pairs)], n=1)
        hint = f"; did you mean '{close[0]}'?" if close else ""
        raise ValueError(f"unknown main metric '{name}'{hint} This data offers: auto, {', '.join(names)}")
    return found[0]


def main_metric_value(results: Sequence[TaskResult], name: str) -> float | None:
    """Mean over sources of the named metric; rows of different sources are never pooled.

    Sources where the metric is undefined are left out; None when it is undefined in all of them.

    Raises:
        ValueError: as `resolve_main_metric`.
    """
    task, metric = resolve_main_metric(results, name)
    values = [result.metrics.get(metric) for result in results if result.task == task]
    defined = [value for value in values if value is not None]
    return float(np.mean(defined)) if defined else None


def tasks_for_metric(name: str, table: pa.Table) -> tuple[str, ...] | None:
    """The tasks to run when only the main metric is wanted, from the columns alone.

    Returns:
        One task, or None (run all) for a bare metric name whose task is not known from the name.
    """
    if name != AUTO:
        task = name.split(".", 1)[0]
        return (task,) if task in MAIN_METRICS else _task_of(name)
    if table["class_name"].null_count < table.num_rows:
        return (CLASSIFICATION,)
    has_labels = any(table["labels"].to_pylist())
    return (MULTI_LABEL,) if has_labels else (RETRIEVAL,)


def _task_of(metric: str) -> tuple[str, ...] | None:
    tasks = [task for task, main in MAIN_METRICS.items() if main == metric]
    return (tasks[0],) if tasks else None
