"""Whether prepared data can carry a run: found out before anything is trained."""

from __future__ import annotations

from typing import Any

from pipelines.config import Config
from pipelines.evaluate import split_table
from pipelines.evaluation.preflight import check_main_metric, check_report_split
from pipelines.feed import train_order
from pipelines.few_shot import plan_few_shot
from pipelines.prepared import Prepared


def check_data(config: Config, prepared: Prepared) -> None:
    """Refuse data that a run of this configuration could not be trained, selected or reported on.

    Raises:
        ValueError: fewer training rows than a batch or than prototypes, an empty split, an unknown label or
            metric, a main metric the selection split does not define, a report split that allows no task, or
            shots of classes without a training row.
    """
    train_order(prepared, batch_size=config.train.batch_size, seed=config.seed)
    _refuse_more_clusters_than_rows(config, prepared)
    settings = config.evaluation.model_copy(update={"resamples": 0})
    for key in ("select_on", "report_on"):
        _refuse_empty_split(prepared, getattr(settings, key), key=key)
    known: dict[str, Any] = {
        "class_names": prepared.manifest["class_names"],
        "label_counts": prepared.manifest["label_counts"].get("train", {}),
    }
    check_main_metric(
        split_table(prepared.uri, settings.select_on),
        settings.main_metric,
        image_size=prepared.image_size,
        settings=settings,
        **known,
    )
    reported = split_table(prepared.uri, settings.report_on)
    check_report_split(reported, settings=settings, **known)
    if settings.shots:
        plan_few_shot(settings, prepared, reported, seed=config.seed)


def _refuse_more_clusters_than_rows(config: Config, prepared: Prepared) -> None:
    num_rows = prepared.num_rows("train")
    for name, table in config.method.tables.items():
        counts = table.candidates.num_clusters
        if table.candidates.kind == "prototypes" and max(counts) > num_rows:
            path = "method." if name == "main" else f"method.extra_tables.{name}."
            raise ValueError(
                f"{path}candidates.num_clusters={list(counts)}: there can be no more prototypes than the "
                f"{num_rows} training rows; lower the largest"
            )


def _refuse_empty_split(prepared: Prepared, split: str, *, key: str) -> None:
    if prepared.num_rows(split):
        return
    counts = ", ".join(f"{name} {found['rows']}" for name, found in prepared.manifest["splits"].items())
    raise ValueError(
        f"evaluation.{key}={split}: the data has no rows in that split (rows: {counts}). Name the values of "
        "the split column that belong to it in data.split_names, or set data.columns.split=null to divide "
        "the rows 80/10/10 by the hash of their group"
    )
