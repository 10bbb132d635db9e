"""The four zero-shot tasks: which texts each needs, and its scores on the rows of one source."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from models import zero_shot
from pipelines.evaluation.classification import classify, describe_classes
from pipelines.evaluation.encoder import EncodedImages, TextBank
from pipelines.evaluation.grounding import Boxes, pointing_game, pointing_targets
from pipelines.evaluation.multi_label import auroc_intervals, describe_labels, score_labels
from pipelines.evaluation.retrieval import (
    Retrieval,
    chance_image_recall,
    chance_text_recall,
    distinct,
    retrieve,
)
from pipelines.evaluation.statistics import Bootstrap, Floats, Interval, bootstrap_means
from pipelines.evaluation.task_result import (
    CLASSIFICATION,
    MULTI_LABEL,
    POINTING,
    RETRIEVAL,
    prompts_sha,
    with_main_metric,
)

MAIN_RECALL_AT = 5
_CERTAIN = 1 - 1e-9


@dataclass(frozen=True, kw_only=True)
class Rows:
    """The rows of one source that a task uses; `at` is where they stand in the encoded table."""

    source: str
    at: NDArray[np.int64]
    row_ids: list[str]
    group_ids: list[str | None]


class ZeroShotTask(Protocol):
    """One task on one source."""

    @property
    def task(self) -> str: ...
    @property
    def rows(self) -> Rows: ...

    def texts(self) -> list[str]:
        """Every text the task compares images with."""
        ...

    def score(self, images: EncodedImages, bank: TextBank, bootstrap: Bootstrap | None) -> dict[str, Any]:
        """All fields of a `TaskResult` but task, source and seconds."""
        ...


def prompt_embeddings(bank: TextBank, prompts: Sequence[str], num_classes: int) -> torch.Tensor:
    """Class-major prompts to class embeddings, [C, D]."""
    embeds = torch.from_numpy(bank(prompts))
    return zero_shot.class_embeddings(embeds.reshape(num_classes, -1, embeds.shape[-1]))


def _row_fields(
    rows: Rows, values: dict[str, Floats], bootstrap: Bootstrap | None
) -> tuple[dict[str, Any], dict[str, Interval]]:
    fields = {
        "n": len(rows.row_ids),
        "row_ids": rows.row_ids,
        "group_ids": rows.group_ids,
        "row_values": values,
    }
    if bootstrap is None or not values:
        return fields, {}
    stacked = np.stack(list(values.values()))
    found = bootstrap_means(stacked, bootstrap, group_ids=rows.group_ids, bounds=(0.0, 1.0))
    return fields, dict(zip(values, found, strict=True))


@dataclass(frozen=True, kw_only=True)
class ClassificationTask:
    """Which class is this? Prompts per class, cosine, argmax."""

    rows: Rows
    class_names: list[str]
    target: NDArray[np.int64]
    templates: list[str]
    task: str = field(default=CLASSIFICATION, init=False)

    def texts(self) -> list[str]:
        return zero_shot.format_prompts(self.class_names, self.templates)

    def score(self, images: EncodedImages, bank: TextBank, bootstrap: Bootstrap | None) -> dict[str, Any]:
        classes = prompt_embeddings(bank, self.texts(), len(self.class_names))
        embeds = torch.from_numpy(images.image_embeds[self.rows.at])
        found = classify(zero_shot.class_scores(embeds, classes).numpy(), self.target)
        values: dict[str, Floats] = {
            "acc1": found.is_top1.astype(np.float64),
            "mean_per_class_recall": found.recall_values,
        }
        undefined = {}
        if found.is_top5 is None:
            undefined["acc5"] = f"there are only {len(self.class_names)} classes"
        else:
            values["acc5"] = found.is_top5.astype(np.float64)
        fields, intervals = _row_fields(self.rows, values, bootstrap)
        metrics: dict[str, float | None] = {
            "acc1": float(found.is_top1.mean()),
            "acc5": None if found.is_top5 is None else float(found.is_top5.mean()),
            "mean_per_class_recall": found.mean_per_class_recall,
            "chance": 1 / len(self.class_names),
        }
        return {
            **fields,
            **with_main_metric(self.task, metrics, intervals, undefined),
            "labels": describe_classes(found, self.class_names),
            "prompts_sha": prompts_sha(self.texts()),
        }


@dataclass(frozen=True, kw_only=True)
class MultiLabelTask:
    """Which labels are present? Positive against negative prompts, AUROC per label."""

    rows: Rows
    names: list[str]
    is_positive: NDArray[np.bool_]
    # Where not, a row does not count for a label.
    is_known: NDArray[np.bool_]
    positive_templates: list[str]
    negative_templates: list[str]
    negative_texts: list[str]
    score_name: str
    task: str = field(default=MULTI_LABEL, init=False)

    def _positive(self) -> list[str]:
        return zero_shot.format_prompts(self.names, self.positive_templates)

    def _negative(self) -> list[str]:
        return self.negative_texts or zero_shot.format_prompts(self.names, self.negative_templates)

    def texts(self) -> list[str]:
        return self._positive() + self._negative()

    def score(self, images: EncodedImages, bank: TextBank, bootstrap: Bootstrap | None) -> dict[str, Any]:
        positive = prompt_embeddings(bank, self._positive(), len(self.names))
        negative = prompt_embeddings(bank, self._negative(), 1 if self.negative_texts else len(self.names))
        embeds = torch.from_numpy(images.image_embeds[self.rows.at])
        scores = zero_shot.multi_label_scores(embeds, positive, negative, score=self.score_name).numpy()
        found = score_labels(scores, self.is_positive, self.names, is_known_NL=self.is_known)
        values = {} if found.row_values is None else {"auroc_macro": found.row_values}
        fields, _ = _row_fields(self.rows, values, None)
        per_label: dict[str, Interval] = {}
        intervals: dict[str, Interval] = {}
        if bootstrap is not None:
            per_label, macro = auroc_intervals(
                scores,
                self.is_positive,
                found,
                bootstrap,
                group_ids=self.rows.group_ids,
                is_known_NL=self.is_known,
            )
            intervals = {} if macro is None else {"auroc_macro": macro}
        metrics: dict[str, float | None] = {
            "auroc_macro": found.auroc_macro,
            "num_labels_scored": float(found.num_defined),
            "num_labels": float(len(self.names)),
            "chance": 0.5,
        }
        undefined = {"auroc_macro": str(found.reason)} if found.auroc_macro is None else {}
        return {
            **fields,
            **with_main_metric(self.task, metrics, intervals, undefined),
            "labels": describe_labels(found, per_label),
            "prompts_sha": prompts_sha(self._positive(), self.score_name, *self._negative()),
        }


@dataclass(frozen=True, kw_only=True)
class RetrievalTask:
    """Find the text of an image and the image of a text, among the rows of this source."""

    rows: Rows
    captions: list[str]
    recall_at: list[int]
    task: str = field(default=RETRIEVAL, init=False)

    def texts(self) -> list[str]:
        return self.captions

    def score(self, images: EncodedImages, bank: TextBank, bootstrap: Bootstrap | None) -> dict[str, Any]:
        unique, text_of_row = distinct(self.captions)
        found = retrieve(images.image_embeds[self.rows.at], bank(unique), text_of_row)
        values, undefined = _recalls(found, sorted({*self.recall_at, MAIN_RECALL_AT}))
        by_image = chance_image_recall(found.num_targets, MAIN_RECALL_AT)
        chance = (by_image + chance_text_recall(found, MAIN_RECALL_AT)) / 2
        fields, intervals = _row_fields(self.rows, values, bootstrap)
        metrics: dict[str, float | None] = {
            **{name: float(hits.mean()) for name, hits in values.items()},
            **dict.fromkeys(undefined, None),
            "image_retrieval_median_rank": float(np.median(found.image_rank)) + 1,
            "text_retrieval_median_rank": float(np.median(found.text_rank)) + 1,
            "num_distinct_texts": float(found.num_texts),
            "chance": chance,
        }
        return {
            **fields,
            **with_main_metric(self.task, metrics, intervals, undefined),
            "labels": [],
            "prompts_sha": prompts_sha(self.captions),
        }


def _recalls(found: Retrieval, ks: Sequence[int]) -> tuple[dict[str, Floats], dict[str, str]]:
    """Hits per row for every recall that can be missed, and why the others are undefined."""
    values: dict[str, Floats] = {}
    undefined: dict[str, str] = {}
    for k in ks:
        ranks = {"image_retrieval": found.image_rank, "text_retrieval": found.text_rank}
        chances = (chance_image_recall(found.num_targets, k), chance_text_recall(found, k))
        for (name, rank), chance in zip(ranks.items(), chances, strict=True):
            if chance < _CERTAIN:
                values[f"{name}_recall@{k}"] = (rank < k).astype(np.float64)
            else:
                undefined[f"{name}_recall@{k}"] = f"any order of the candidates hits at {k}"
    both = [f"{name}_retrieval_recall@{MAIN_RECALL_AT}" for name in ("image", "text")]
    main = f"mean_recall@{MAIN_RECALL_AT}"
    if all(name in values for name in both):
        values[main] = (values[both[0]] + values[both[1]]) / 2
    else:
        undefined[main] = next(undefined[name] for name in both if name in undefined)
    return values, undefined


@dataclass(frozen=True, kw_only=True)
class PointingTask:
    """Where is this label? The best patch for its prompt against its boxes."""

    rows: Rows
    boxes: list[Boxes | None]
    # Labels of all sources, in the order of the best patches.
    names: list[str]
    templates: list[str]
    task: str = field(default=POINTING, init=False)

    def texts(self) -> list[str]:
        return zero_shot.format_prompts(self.names, self.templates)

    def score(self, images: EncodedImages, bank: TextBank, bootstrap: Bootstrap | None) -> dict[str, Any]:
        assert images.best_patch is not None
        assert images.grid is not None
        targets = pointing_targets(self.boxes, self.names, images.grid)
        found = pointing_game(images.best_patch[self.rows.at], targets)
        asked = [self.names[label] for label in targets.label]
        # Several questions about one image are not independent: they are resampled together.
        questions = Rows(
            source=self.rows.source,
            at=self.rows.at[targets.image],
            row_ids=[f"{self.rows.row_ids[i]}#{name}" for i, name in zip(targets.image, asked, strict=True)],
            group_ids=[self.rows.group_ids[i] or self.rows.row_ids[i] for i in targets.image],
        )
        values: dict[str, Floats] = {
            "pointing_accuracy": found.is_hit.astype(np.float64),
            "pointing_any_object": found.is_on_object.astype(np.float64),
        }
        fields, intervals = _row_fields(questions, values, bootstrap)
        metrics: dict[str, float | None] = {
            **{name: float(hits.mean()) for name, hits in values.items()},
            "pointing_chance": found.chance,
            "pointing_any_object_chance": found.chance_on_object,
            "pointing_reachable": found.reachable,
            "chance": found.chance,
        }
        labels = [
            {
                "name": self.names[i],
                "n": int(is_own.sum()),
                "pointing_accuracy": float(found.is_hit[is_own].mean()),
            }
            for i in np.unique(targets.label)
            for is_own in [targets.label == i]
        ]
        return {
            **fields,
            **with_main_metric(self.task, metrics, intervals, {}),
            "labels": labels,
            "prompts_sha": prompts_sha(self.texts()),
        }
