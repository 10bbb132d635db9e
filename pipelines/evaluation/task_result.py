"""The result of one task on one source, and the form in which the results store keeps it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import pyarrow as pa

from pipelines.evaluation.statistics import Floats, Interval

SCHEMA_VERSION: Final = 1

CLASSIFICATION: Final = "zeroshot_classification"
MULTI_LABEL: Final = "zeroshot_multi_label"
RETRIEVAL: Final = "zeroshot_retrieval"
POINTING: Final = "pointing_game"
# Not zero-shot, so never among the tasks a run is selected by.
FEW_SHOT: Final = "fewshot_classification"

# The metric that stands for a zero-shot task. R@5 of both directions, because R@10 of a few hundred rows is
# close to its ceiling and R@1 moves in steps of single rows.
MAIN_METRICS: Final[dict[str, str]] = {
    CLASSIFICATION: "acc1",
    MULTI_LABEL: "auroc_macro",
    RETRIEVAL: "mean_recall@5",
    POINTING: "pointing_accuracy",
}
_MAIN_METRIC_OF: Final = MAIN_METRICS | {FEW_SHOT: "acc1"}

ROWS: Final = pa.schema(
    [
        pa.field("row_id", pa.string(), nullable=False),
        pa.field("metric", pa.string(), nullable=False),
        pa.field("value", pa.float64(), nullable=False),
        # What a paired test resamples; null when the row stands alone.
        pa.field("group_id", pa.string()),
    ]
)


@dataclass(frozen=True, kw_only=True)
class TaskResult:
    """One task on the rows of one source.

    `metrics` maps names to numbers or None, with the reason of every None in `undefined`; "main_metric"
    is always among them. `row_values[metric]` holds one number per entry of `row_ids` whose mean is the
    metric. In the pointing game an entry is an image and a label, "<row id>#<label>". `fitted_on` names the
    split that something was fitted on before the rows were scored; None for zero-shot tasks.
    """

    task: str
    source: str
    metrics: dict[str, float | None]
    ci: dict[str, dict[str, Any]]
    undefined: dict[str, str]
    labels: list[dict[str, Any]]
    n: int
    row_ids: list[str]
    group_ids: list[str | None]
    row_values: dict[str, Floats]
    prompts_sha: str
    seconds: float
    fitted_on: str | None = None


def with_main_metric(
    task: str, metrics: dict[str, float | None], ci: dict[str, Interval], undefined: dict[str, str]
) -> dict[str, Any]:
    """The metric fields of a `TaskResult`, with the main metric also under its own key.

    Raises:
        ValueError: a number that is not finite, or a None without a reason.
    """
    main = _MAIN_METRIC_OF[task]
    metrics = {**metrics, "main_metric": metrics[main]}
    if main in undefined:
        undefined = {**undefined, "main_metric": undefined[main]}
    if main in ci:
        ci = {**ci, "main_metric": ci[main]}
    for name, value in metrics.items():
        if value is None and name not in undefined:
            raise ValueError(f"{task}: metric '{name}' is undefined without a reason")
        if value is not None and not np.isfinite(value):
            raise ValueError(f"{task}: metric '{name}' is {value}")
    return {
        "metrics": metrics,
        "ci": {name: interval.to_json() for name, interval in ci.items()},
        "undefined": undefined,
    }


def prompts_sha(texts: Sequence[str], *settings: str) -> str:
    """Identity of the texts a task compared the images with, in order."""
    return hashlib.sha256(json.dumps([list(texts), *settings]).encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class ResultContext:
    """What a stored result says about the model and run behind it."""

    dataset: str
    model: str
    sweep: str
    run_id: str
    kind: str
    method: str
    seed: int
    params: dict[str, Any]
    step: int
    samples_seen: int
    select_on: str
    report_on: str
    split: str
    keep_rule: str
    data_sha: str
    device: str
    code: str


def result_record(result: TaskResult, context: ResultContext) -> dict[str, Any]:
    """JSON object of the results store: CLIP_benchmark's keys, and ours under `clipfleet`.

    `metrics` holds scalars and nulls only, so CLIP_benchmark's table builder reads it unchanged.
    """
    dataset = context.dataset
    if result.source not in ("", dataset):
        dataset = f"{dataset}/{result.source}"
    run_fields = {k: v for k, v in dataclasses.asdict(context).items() if k not in ("dataset", "model")}
    return {
        "dataset": dataset,
        "model": context.model,
        "pretrained": context.run_id,
        "task": result.task,
        "language": "en",
        "metrics": result.metrics,
        "clipfleet": {
            "schema_version": SCHEMA_VERSION,
            **run_fields,
            "source": result.source,
            "n": result.n,
            "labels": result.labels,
            "ci": result.ci,
            "undefined": result.undefined,
            "prompts_sha": result.prompts_sha,
            "seconds": result.seconds,
            **({} if result.fitted_on is None else {"fitted_on": result.fitted_on}),
        },
    }


def rows_table(result: TaskResult) -> pa.Table:
    """Per-row values behind a result (schema `ROWS`), for intervals over seeds and paired tests."""
    metrics = list(result.row_values)
    repeated = len(metrics)
    return pa.table(
        {
            "row_id": result.row_ids * repeated,
            "metric": [metric for metric in metrics for _ in result.row_ids],
            "value": np.concatenate([result.row_values[m].astype(np.float64) for m in metrics])
            if metrics
            else np.zeros(0),
            "group_id": result.group_ids * repeated,
        },
        schema=ROWS,
    )
