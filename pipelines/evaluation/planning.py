"""Which zero-shot tasks the rows of each source allow, and why the others are left out."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from pipelines.evaluation.task_result import CLASSIFICATION, MULTI_LABEL, POINTING, RETRIEVAL
from pipelines.evaluation.zero_shot_tasks import (
    ClassificationTask,
    MultiLabelTask,
    PointingTask,
    RetrievalTask,
    Rows,
    ZeroShotTask,
)
from pipelines.schemas import UNKNOWN_LABELS

logger = logging.getLogger(__name__)

_MAX_LISTED = 30


class EvalSettings(Protocol):
    """What evaluation reads from the configuration."""

    @property
    def templates(self) -> Sequence[str]: ...
    @property
    def positive_templates(self) -> Sequence[str]: ...
    @property
    def negative_templates(self) -> Sequence[str]: ...
    @property
    def negative_texts(self) -> Sequence[str]: ...
    @property
    def multi_label_score(self) -> str: ...
    @property
    def labels(self) -> Sequence[str] | None: ...
    @property
    def ignore_labels(self) -> Sequence[str]: ...
    @property
    def recall_at(self) -> Sequence[int]: ...
    @property
    def resamples(self) -> int: ...
    @property
    def confidence(self) -> float: ...


@dataclass(frozen=True, kw_only=True)
class SkippedTask:
    """A task left out for a source, and why."""

    task: str
    source: str
    reason: str


class _NotPossibleError(Exception):
    """The data of a source does not allow a task."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What the planners share: the columns as lists, and the labels to score."""

    columns: dict[str, list[Any]]
    settings: EvalSettings
    class_names: Sequence[str] | Mapping[str, Sequence[str]]
    labels: list[str]
    box_labels: list[str]

    def rows(self, source: str, at: list[int]) -> Rows:
        return Rows(
            source=source,
            at=np.array(at, dtype=np.int64),
            row_ids=[self.columns["row_id"][i] for i in at],
            group_ids=[self.columns["group_id"][i] for i in at],
        )


def make_plan(
    table: pa.Table,
    wanted: list[str],
    settings: EvalSettings,
    *,
    class_names: Sequence[str] | Mapping[str, Sequence[str]],
    label_counts: Mapping[str, int],
) -> Plan:
    """Read the columns the wanted tasks use and settle the labels to score.

    Raises:
        ValueError: `settings.labels` names a label that neither training nor this split has.
    """
    needed = ["row_id", "group_id", "source", "class_name", "labels", "captions"]
    columns = {name: table[name].to_pylist() for name in needed}
    # Only where the data leaves labels open.
    if UNKNOWN_LABELS.name in table.column_names:
        columns[UNKNOWN_LABELS.name] = table[UNKNOWN_LABELS.name].to_pylist()
    # Boxes are the one column that is slow to turn into Python objects.
    columns["boxes"] = table["boxes"].to_pylist() if POINTING in wanted else [None] * table.num_rows
    ignored = set(settings.ignore_labels)
    known = set(label_counts).union(*columns["labels"])
    if settings.labels is None:
        labels = sorted(label for label, count in label_counts.items() if count > 0)
    else:
        labels = list(dict.fromkeys(settings.labels))
        refuse_unknown(labels, known, "label")
    if missing := ignored - known:
        logger.info("eval.ignore_labels names labels this data does not have: %s", sorted(missing))
    drawn = {box["label"] for boxes in columns["boxes"] for box in boxes or ()}
    asked = drawn if settings.labels is None else drawn & set(settings.labels)
    return Plan(
        columns=columns,
        settings=settings,
        class_names=class_names,
        labels=[label for label in labels if label not in ignored],
        box_labels=sorted(asked - ignored),
    )


def refuse_unknown(names: Sequence[str], known: Collection[str], kind: str) -> None:
    """Raise ValueError for the first name that is not known, with the nearest that is."""
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name, sorted(known), n=1)
            hint = f"; did you mean '{close[0]}'?" if close else ""
            listed = f" Known: {', '.join(sorted(known))}" if len(known) <= _MAX_LISTED else ""
            raise ValueError(f"unknown {kind} '{name}'{hint}{listed}")


def plan_tasks(plan: Plan, wanted: list[str]) -> tuple[list[ZeroShotTask], list[SkippedTask]]:
    """The wanted tasks of every source, sources in alphabetical order, and those its rows do not allow."""
    planners = {
        CLASSIFICATION: _plan_classification,
        MULTI_LABEL: _plan_multi_label,
        RETRIEVAL: _plan_retrieval,
        POINTING: _plan_pointing,
    }
    planned: list[ZeroShotTask] = []
    skipped = []
    for source, at in _rows_by_source(plan.columns["source"]):
        for name in wanted:
            try:
                planned.append(planners[name](plan, source, at))
            except _NotPossibleError as error:
                skipped.append(skip_task(name, source, str(error)))
    return planned, skipped


def skip_task(task: str, source: str, reason: str) -> SkippedTask:
    """Log and record a task that is left out."""
    logger.info("%s left out for source '%s': %s", task, source, reason)
    return SkippedTask(task=task, source=source, reason=reason)


def _rows_by_source(sources: list[str]) -> Iterator[tuple[str, list[int]]]:
    for source in sorted(set(sources)):
        yield source, [i for i, found in enumerate(sources) if found == source]


def _plan_classification(plan: Plan, source: str, at: list[int]) -> ZeroShotTask:
    column = plan.columns["class_name"]
    at = [i for i in at if column[i] is not None]
    if not at:
        raise _NotPossibleError("no row has a class")
    names = plan.class_names
    candidates = list(names.get(source, ()) if isinstance(names, Mapping) else names)
    number = {name: i for i, name in enumerate(candidates)}
    refuse_unknown([column[i] for i in at], number, "class")
    if len(candidates) < 2:
        raise _NotPossibleError(f"there is only one class, '{candidates[0]}'")
    return ClassificationTask(
        rows=plan.rows(source, at),
        class_names=candidates,
        target=np.array([number[column[i]] for i in at], dtype=np.int64),
        templates=list(plan.settings.templates),
    )


def _plan_multi_label(plan: Plan, source: str, at: list[int]) -> ZeroShotTask:
    found = [set(plan.columns["labels"][i]) for i in at]
    if not any(found):
        raise _NotPossibleError("no row has labels")
    if not plan.labels:
        raise _NotPossibleError("no label has a positive among the training rows")
    number = {label: i for i, label in enumerate(plan.labels)}
    is_positive = np.zeros((len(at), len(number)), dtype=np.bool_)
    for row, labels in enumerate(found):
        is_positive[row, [number[label] for label in labels if label in number]] = True
    is_known = np.ones_like(is_positive)
    if unknown := plan.columns.get(UNKNOWN_LABELS.name):
        for row, i in enumerate(at):
            is_known[row, [number[label] for label in unknown[i] or () if label in number]] = False
    settings = plan.settings
    return MultiLabelTask(
        rows=plan.rows(source, at),
        names=plan.labels,
        is_positive=is_positive,
        is_known=is_known,
        positive_templates=list(settings.positive_templates),
        negative_templates=list(settings.negative_templates),
        negative_texts=list(settings.negative_texts),
        score_name=settings.multi_label_score,
    )


def _plan_retrieval(plan: Plan, source: str, at: list[int]) -> ZeroShotTask:
    captions = plan.columns["captions"]
    at = [i for i in at if captions[i] and captions[i][0]]
    texts = [captions[i][0] for i in at]
    if len(set(texts)) < 2:
        raise _NotPossibleError(f"retrieval needs at least 2 different texts, found {len(set(texts))}")
    return RetrievalTask(rows=plan.rows(source, at), captions=texts, recall_at=list(plan.settings.recall_at))


def _plan_pointing(plan: Plan, source: str, at: list[int]) -> ZeroShotTask:
    boxes = plan.columns["boxes"]
    at = [i for i in at if boxes[i]]
    if not any(box["label"] in plan.box_labels for i in at for box in boxes[i]):
        raise _NotPossibleError("no row has a box of a scored label")
    return PointingTask(
        rows=plan.rows(source, at),
        boxes=[boxes[i] for i in at],
        names=plan.box_labels,
        templates=list(plan.settings.positive_templates),
    )
