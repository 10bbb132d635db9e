"""A method is data: one frozen recipe that fills the slots of the pair table.

The slots are in `table_slots.py` (one table) and `training_slots.py` (what surrounds the tables); a
recipe says which combinations make sense.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from models.bounds import smallest_safe_temperature
from models.estimators import InfoNCE
from models.table_slots import (
    Baseline,
    Between,
    Bias,
    Candidates,
    Directions,
    EstimatorSlot,
    RegionPool,
    Score,
    SentencePool,
    Targets,
    Temperature,
    Transform,
)
from models.training_slots import Features, Heads, Regularisers, Teacher, TokenSelection

Evidence = Literal["official", "derived", "paper-unverified"]

# Estimators that know pairs and negatives only: a target distribution would be ignored.
_BINARY = ("loob", "jsd", "dv", "sigmoid", "nwj", "tuba", "interp")
_WITHIN_SAMPLE = ("regions", "sentences")


@dataclass(frozen=True, kw_only=True)
class TableRecipe:
    """One pair table and what is made of it.

    Attributes:
        weight: of this table's loss in the total.
        between: the two sides; tables between other features than image and text are extra tables.
        views: image views that take part: `all`, averaged, or the `first`.
    """

    weight: float = 1.0
    between: Between = "image_text"
    views: Literal["all", "first"] = "all"
    score: Score = Score()
    region_pool: RegionPool = RegionPool()
    sentence_pool: SentencePool = SentencePool()
    transform: Transform = Transform()
    candidates: Candidates = Candidates()
    targets: Targets = Targets()
    estimator: EstimatorSlot = InfoNCE()
    directions: Directions = Directions()
    temperature: Temperature = Temperature()
    bias: Bias = Bias()
    baseline: Baseline = Baseline()

    def __post_init__(self) -> None:
        self._check_sides()
        self._check_features()
        self._check_estimator()

    @property
    def is_within_sample(self) -> bool:
        return self.between in _WITHIN_SAMPLE

    @property
    def is_local(self) -> bool:
        """Whether single patches or every text of a report are scored."""
        return self.region_pool.kind != "global" or self.sentence_pool.kind != "none"

    def _check_sides(self) -> None:
        if self.between == "image_regions" and self.region_pool.kind in ("global", "words"):
            raise ValueError(
                "between=image_regions compares an image with patches; set region_pool.kind=each or a pool, "
                f"got {self.region_pool.kind}"
            )
        if self.between not in ("image_text", "image_regions") and (
            self.is_local or self.score.kind != "cosine"
        ):
            raise ValueError(
                f"between={self.between} compares whole features by cosine, got "
                f"region_pool.kind={self.region_pool.kind}, sentence_pool.kind={self.sentence_pool.kind} and "
                f"score.kind={self.score.kind}"
            )
        if self.between not in ("image_text", "image_text2") and self.candidates.kind != "batch":
            raise ValueError(
                f"candidates.kind={self.candidates.kind} needs between=image_text, got {self.between}"
            )
        if (self.targets.kind == "spatial") != (self.between == "regions"):
            raise ValueError(
                f"targets.kind=spatial goes with between=regions, got {self.targets.kind} with {self.between}"
            )
        if self.is_within_sample and self.estimator.kind != "ce":
            raise ValueError(
                f"between={self.between} takes estimator.kind=ce, got {self.estimator.kind}: a text alone in "
                "its report has no negatives"
            )

    def _check_features(self) -> None:
        if self.transform.kind == "hopfield" and self.is_local:
            raise ValueError(
                "Hopfield retrieval works on global features; with "
                f"region_pool.kind={self.region_pool.kind} and "
                f"sentence_pool.kind={self.sentence_pool.kind} set transform.kind=none"
            )
        if self.transform.kind != "none" and (self.candidates.kind != "batch" or self.is_within_sample):
            raise ValueError(
                f"transform.kind={self.transform.kind} works on the batch's pairs, got "
                f"candidates.kind={self.candidates.kind} and between={self.between}"
            )
        if self.region_pool.kind == "words" and self.sentence_pool.kind != "none":
            raise ValueError("region_pool.kind=words scores the words of text 0; set sentence_pool.kind=none")
        if self.region_pool.kind == "each" and self.sentence_pool.kind != "none":
            raise ValueError("region_pool.kind=each makes no image score; set sentence_pool.kind=none")
        if self.is_local and self.candidates.kind not in ("batch", "roll"):
            raise ValueError(
                f"candidates.kind={self.candidates.kind} holds whole features; set region_pool.kind=global "
                "and sentence_pool.kind=none"
            )
        if self.candidates.modality == "both" and (self.is_local or self.score.kind != "cosine"):
            raise ValueError("candidates.modality=both compares whole features; set region_pool.kind=global")
        if self.transform.relaxes and self.region_pool.kind == "noisy_or":
            raise ValueError(
                f"transform.kind={self.transform.kind} limits cosines, and region_pool.kind=noisy_or has none"
            )
        if self.candidates.kind == "prototypes" and self.temperature.policy != "fixed":
            raise ValueError(
                "candidates.kind=prototypes scales each prototype by its own concentration, whose mean is "
                f"temperature.init; set temperature.policy=fixed, got {self.temperature.policy}"
            )
        if self.score.kind == "concat" and (
            self.transform.kind != "none"
            or self.candidates.kind not in ("batch", "roll")
            or self.region_pool.kind in ("mean_region", "attention", "non_local", "words", "noisy_or", "each")
        ):
            raise ValueError(
                "score.kind=concat scores pairs of features: it goes with region_pool.kind=global, max, "
                f"mean, lse, select or pmi and no transform, got region_pool.kind={self.region_pool.kind}, "
                f"transform.kind={self.transform.kind} and candidates.kind={self.candidates.kind}"
            )

    def _check_estimator(self) -> None:
        kind = self.estimator.kind
        if self.targets.kind != "identity" and kind in _BINARY:
            raise ValueError(
                f"estimator.kind={kind} knows pairs and negatives only and would ignore "
                f"targets.kind={self.targets.kind}; set targets.kind=identity or estimator.kind=ce, kl or "
                "relation_kl"
            )
        safe = smallest_safe_temperature(kind)
        if safe > 0 and (self.region_pool.kind == "noisy_or" or self.sentence_pool.kind == "sum"):
            raise ValueError(
                f"estimator.kind={kind} takes exp(score), and a sum over patches or sentences makes it leave "
                "float32; choose another region_pool.kind or sentence_pool.kind"
            )
        if self.score.kind == "cosine" and self.temperature.smallest < safe:
            raise ValueError(
                f"estimator.kind={kind} takes exp(similarity / temperature), which leaves float32 below a "
                f"temperature of {safe:g}; got {self.temperature.smallest:g}. Raise temperature.minimum, or "
                "temperature.init of a fixed one"
            )


@dataclass(frozen=True, kw_only=True)
class MethodRecipe(TableRecipe):
    """A whole method: the main table (inherited slots), more tables, and what surrounds them.

    Attributes:
        name: key in the catalogue.
        source: paper.
        evidence: `official` when values and gradients of the authors' code are reproduced, `derived`
            when the formula is ours from the paper's text, `paper-unverified` otherwise.
        extra_tables: further tables by name, each with its own slots and weight.
    """

    name: str
    source: str
    evidence: Evidence
    features: Features = Features()
    selection: TokenSelection = TokenSelection()
    teacher: Teacher = Teacher()
    extra_tables: Mapping[str, TableRecipe] = field(default_factory=dict)
    regularisers: Regularisers = Regularisers()
    heads: Heads = Heads()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.temperature.policy == "shared":
            raise ValueError("temperature.policy=shared is for extra tables; the main table has its own")
        for name, table in self.tables.items():
            self._check_table(name, table)
        self._check_heads()

    @property
    def tables(self) -> dict[str, TableRecipe]:
        """Every table by name, the main one first."""
        return {"main": self, **self.extra_tables}

    @property
    def needs_teacher(self) -> bool:
        heads = self.heads
        guided = heads.byol.weight or heads.distil.weight or heads.masked_distillation.weight
        return self.selection.needs_teacher or guided > 0 or self.needs_joint_teacher

    @property
    def needs_joint_teacher(self) -> bool:
        """Whether the teacher must embed images and texts, not only score patches."""
        return any(table.candidates.needs_teacher for table in self.tables.values())

    def _check_table(self, name: str, table: TableRecipe) -> None:
        features = self.features
        if table.between == "image_views" and features.num_views < 2:
            raise ValueError(
                f"table '{name}' compares two views, got features.num_views={features.num_views}"
            )
        if table.between in ("texts", "image_text2", "sentences") and features.num_texts < 2:
            raise ValueError(
                f"table '{name}' needs several texts of a pair, got features.num_texts={features.num_texts}"
            )
        if table.sentence_pool.kind != "none" and features.text != "sentence":
            raise ValueError(
                f"table '{name}' pools the sentences of a report; set features.text=sentence and num_texts"
            )
        if table.is_within_sample and self.selection.kind != "none":
            raise ValueError(
                f"table '{name}' knows the place of every patch; set selection.kind=none, got "
                f"{self.selection.kind}"
            )

    def _check_heads(self) -> None:
        if self.heads.simclr.weight and self.features.num_views < 2:
            raise ValueError(
                f"heads.simclr contrasts 2 views, got features.num_views={self.features.num_views}"
            )
        if self.heads.masked_tokens.weight and self.features.text_attention != "full":
            raise ValueError(
                "heads.masked_tokens predicts from both sides of a word; set features.text_attention=full"
            )
