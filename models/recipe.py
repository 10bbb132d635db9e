"""A method is data: one frozen recipe that fills the slots of the pair table.

The slots are in `table_slots.py` (one table) and `training_slots.py` (what surrounds the tables);
`recipe_checks.py` says which combinations of a table make sense.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from models.estimators import InfoNCE
from models.recipe_checks import check_name, check_table, check_temperature
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
        check_table(self)

    @property
    def is_within_sample(self) -> bool:
        return self.between in _WITHIN_SAMPLE

    @property
    def is_local(self) -> bool:
        """Whether single patches or every text of a report are scored."""
        return self.region_pool.kind != "global" or self.sentence_pool.kind != "none"


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
        if self.between != "image_text":
            raise ValueError(
                f"the main table is between image and text; between={self.between} needs an extra one"
            )
        for name, table in self.extra_tables.items():
            check_name(name)
            if table.temperature.policy == "shared":
                check_temperature(table, self.temperature)
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
