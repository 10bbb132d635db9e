"""Where patches are scored, and how old a score may be: settings, and the rules that follow from them.

Everything here is a function of the step, so that trainer and scorers agree without talking. Versions of
the teacher are named by the training step at whose start they were reached.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from models.recipe import MethodRecipe
from models.schedules import ema_decay, ema_lag
from models.training_slots import TokenSelection

if TYPE_CHECKING:
    from pipelines.config import Config

Phase = Literal["random", "scored", "whole"]

# The trainer works on one batch while the next one is scored.
_FEWEST_STEPS_AHEAD = 2


class ScoringConfig(BaseModel):
    """Who scores patches for methods that keep them by a teacher's score.

    `sync`: the trainer, in every step. `stream`: actors of the Ray Data stream that feeds the trainer, with
    weights the trainer publishes now and then. `offline`: nobody, scores of the whole images lie beside the
    data. `random` and `none` put random blocks, or all patches, in the place of the method's own selection.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    mode: Literal["sync", "stream", "offline", "random", "none"] = "sync"
    # Stream, for each training worker: the pool of scorers grows and shrinks between these.
    min_actors: int = Field(1, ge=1)
    max_actors: int = Field(1, ge=1)
    cpus_per_actor: float = Field(0.5, ge=0)
    gpus_per_actor: float = Field(0.0, ge=0, le=1)
    # Labels a node must have to hold scorers, e.g. {role: data}; empty: any node.
    node_labels: dict[str, str] = {}
    # Shares of the teacher's own lag: how often weights are published, and the age at which a row's score is
    # no longer used and its patches are drawn at random.
    push_share: float = Field(0.05, ge=0)
    staleness_share: float = Field(0.1, ge=0)
    # Scorers wait for weights at most so many steps old; 0 gives what `sync` gives, bit for bit; null: never.
    max_staleness: int | None = Field(None, ge=0)
    # Rows of a training worker between being built and being trained on.
    max_rows_in_flight: int = Field(2048, ge=2)
    # Longest wait of any one party for another.
    timeout_s: float = Field(600.0, gt=0)
    # Offline: what `clipfleet score` wrote.
    scored_data: str | None = None

    @model_validator(mode="after")
    def _pool_has_a_size(self) -> ScoringConfig:
        if self.max_actors < self.min_actors:
            raise ValueError(
                f"max_actors must be at least min_actors={self.min_actors}, got {self.max_actors}"
            )
        return self

    @model_validator(mode="after")
    def _offline_has_scores(self) -> ScoringConfig:
        if self.mode == "offline" and self.scored_data is None:
            raise ValueError(
                "mode=offline reads scores that lie beside the data; write them with `clipfleet score RUN "
                "--output PLACE` and name the place with scoring.scored_data"
            )
        return self


def recipe_in_mode(recipe: MethodRecipe, mode: str) -> MethodRecipe:
    """The recipe that is trained: `random` and `none` replace its selection."""
    if mode == "random":
        return replace(recipe, selection=replace(recipe.selection, kind="random"))
    if mode == "none":
        return replace(recipe, selection=replace(recipe.selection, kind="none"))
    return recipe


def check_scoring(config: Config) -> None:
    """Refuse a mode that the method or the feed cannot have.

    Raises:
        ValueError: naming method, setting and reason.
    """
    recipe, scoring = config.method, config.scoring
    mode = scoring.mode
    if mode in ("stream", "offline", "random") and not recipe.selection.needs_teacher:
        raise ValueError(
            f"scoring.mode={mode} is for methods that keep patches by a teacher's score (selection.kind "
            f"attentive, high or mixed); '{recipe.name}' has selection.kind={recipe.selection.kind}. Use "
            "scoring.mode=sync"
        )
    if mode != "stream":
        return
    if recipe.needs_joint_teacher:
        raise ValueError(
            f"scoring.mode=stream: '{recipe.name}' fills a memory or clusters with the teacher's embeddings "
            "of images and texts, so the whole teacher runs in the trainer anyway; use scoring.mode=sync"
        )
    if recipe.heads.masked_distillation.weight:
        raise ValueError(
            f"scoring.mode=stream: heads.masked_distillation of '{recipe.name}' predicts every patch of the "
            "teacher, which would travel with each row; use scoring.mode=sync"
        )
    if config.train.feed == "memory":
        raise ValueError("scoring.mode=stream scores rows as they stream; set train.feed=stream or auto")
    local_rows = config.train.batch_size // config.train.num_workers
    if scoring.max_rows_in_flight < local_rows:
        raise ValueError(
            f"scoring.max_rows_in_flight={scoring.max_rows_in_flight} holds not one batch of {local_rows} "
            "rows of a worker; raise it"
        )


def predicts_teacher(recipe: MethodRecipe) -> bool:
    """Whether a head predicts the teacher's feature of the image."""
    return bool(recipe.heads.byol.weight or recipe.heads.distil.weight)


def selection_phase(selection: TokenSelection, *, step: int, total_steps: int) -> Phase:
    """How a step chooses the patches it keeps: at random, by score, or not at all."""
    if selection.kind == "none" or step >= (1 - selection.unmasked_share) * total_steps:
        return "whole"
    is_warm = step >= selection.warmup_share * total_steps
    return "scored" if selection.needs_teacher and is_warm else "random"


@lru_cache(maxsize=4)
def ema_lags(total_steps: int, decay: float) -> tuple[float, ...]:
    """Mean age in steps of the weights inside each version of the teacher, [total_steps].

    Version 0 is the copy it starts as; from then on L_t = m_t (L_{t-1} + 1).
    """
    lags = [0.0]
    for step in range(1, total_steps):
        lags.append(ema_lag(lags[-1], ema_decay(step, total_steps, decay)))
    return tuple(lags)


@dataclass(frozen=True)
class ScoringPolicy:
    """When weights are published and which scores are too old.

    Attributes:
        recipe: that is trained.
        local_rows: of a batch, on one worker.
    """

    scoring: ScoringConfig
    recipe: MethodRecipe
    total_steps: int
    local_rows: int

    def phase(self, step: int) -> Phase:
        return selection_phase(self.recipe.selection, step=step, total_steps=self.total_steps)

    def needs_scorer(self, step: int) -> bool:
        """Whether a step's rows pass the teacher at all."""
        return self.phase(step) == "scored" or predicts_teacher(self.recipe)

    def lag(self, step: int) -> float:
        """The teacher's own lag L_t at a step, in steps."""
        return ema_lags(self.total_steps, self.recipe.teacher.decay)[step]

    def push_interval(self, step: int) -> int:
        """Steps between two publications, K_t."""
        return max(1, math.floor(self.scoring.push_share * self.lag(step)))

    def steps_ahead(self, step: int) -> int:
        """Batches that may have been built and not yet taken when the trainer asks for that of `step`, which
        counts as one of them.

        What publishing leaves of the staleness budget, but never less than keeps both sides busy, nor more
        than `max_rows_in_flight`.
        """
        most = max(1, self.scoring.max_rows_in_flight // self.local_rows)
        if self.scoring.max_staleness is not None or self.phase(step) != "scored":
            return most
        left = math.floor((self.scoring.staleness_share - self.scoring.push_share) * self.lag(step))
        return min(most, max(_FEWEST_STEPS_AHEAD, left))

    def publishes(self, step: int, *, last: int | None) -> bool:
        """Whether the trainer publishes its teacher at the start of a step.

        Args:
            last: version that was published last in this attempt.
        """
        ahead = min(self.total_steps - 1, step + self.steps_ahead(step))
        if not (self.needs_scorer(step) or self.needs_scorer(ahead)):
            return False
        if last is None:
            return True
        due = self.push_interval(step)
        if self.scoring.max_staleness is not None:
            due = min(due, self.scoring.max_staleness + 1)
        return step - last >= due

    def oldest_version(self, step: int) -> int:
        """The version that scorers of a step wait for; any later one will do."""
        return 0 if self.scoring.max_staleness is None else step - self.scoring.max_staleness

    def is_too_old(self, step: int, versions: Tensor) -> Tensor:
        """Rows whose score is not to be used in a step: older than the share of the lag, or missing.

        Args:
            versions: `ScoredTokens.ema_version`, int64 [B].

        Returns:
            bool [B].
        """
        age = step - versions
        return (versions < 0) | (age > self.scoring.staleness_share * self.lag(step))
