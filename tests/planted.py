"""Trains a recipe on the planted task and asks it for concepts: AUROC and pointing.

The loss is the recipe's whole `Objective`; only the encoders are replaced. A held-out image is scored
against each concept's prompt as the recipe scores pairs, by the pool and the critic of its main table, and
the region with the highest score is where it points. A concept in one region of nine is hard to see in
their mean and easy in the best of them, so a working local path and a global one come apart. The task ranks
plumbing, not methods: nothing in it resembles an image.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from statistics import fmean
from typing import Literal

import torch

from models.features import PairFeatures
from models.gather import SingleProcess
from models.objective import Objective
from models.recipe import MethodRecipe, TableRecipe
from models.similarities import pooled_scores, region_similarities
from models.table_slots import RegionPool
from models.widths import Widths
from pipelines.evaluation.multi_label import score_labels
from tests.planted_world import (
    GRID,
    JOINT_WIDTH,
    NUM_CONCEPTS,
    LinearEncoders,
    World,
    make_world,
    pair_batch,
    prompts,
    read,
)


@dataclass(frozen=True, kw_only=True)
class Training:
    """How a recipe is trained.

    Attributes:
        steps: of Adam, each on new pairs.
        batch_size: pairs of a step.
        lr: of encoders, temperatures and critics alike.
        pairs: `shuffled` gives every image the report of another: nothing can be learnt.
    """

    steps: int = 600
    batch_size: int = 48
    lr: float = 3e-3
    pairs: Literal["planted", "shuffled"] = "planted"


@dataclass(frozen=True)
class Figures:
    """On held-out bags.

    Attributes:
        auroc: of an image's score for a concept, mean over concepts.
        pointing: share of an image's concepts whose best region shows them.
        num_missed: concepts whose AUROC is nearer to chance than to 1.
    """

    auroc: float
    pointing: float
    num_missed: int


def missing_for(recipe: MethodRecipe) -> str | None:
    """What a recipe needs that the task lacks; None when it can be trained."""
    needs = {
        "a teacher": recipe.needs_teacher,
        "views": recipe.features.num_views > 1,
        "patches to remove": recipe.selection.kind != "none",
        "heads": any(getattr(recipe.heads, f.name).weight for f in fields(recipe.heads)),
        "a training split": any(
            table.candidates.kind not in ("batch", "roll") for table in recipe.tables.values()
        ),
    }
    return ", ".join(name for name, is_needed in needs.items() if is_needed) or None


def planted_figures(recipe: MethodRecipe, training: Training | None = None, *, seed: int) -> Figures:
    """Train on the bags of a seed and evaluate; the start of the parameters has the same seed.

    Raises:
        ValueError: the recipe needs what the task lacks.
    """
    training = training or Training()
    if missing := missing_for(recipe):
        raise ValueError(f"the planted task cannot train '{recipe.name}', which needs {missing}")
    world = make_world(seed, training.steps * training.batch_size)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoders, objective = LinearEncoders(), Objective(recipe, _widths(training))
    _train(encoders, objective, world, training=training)
    return _evaluate(encoders, objective, world)


def _widths(training: Training) -> Widths:
    return Widths(
        joint=JOINT_WIDTH,
        vision=JOINT_WIDTH,
        text=JOINT_WIDTH,
        grid=GRID,
        vocab_size=NUM_CONCEPTS,
        max_tokens=1,
        num_rows=training.batch_size,
    )


def _train(encoders: LinearEncoders, objective: Objective, world: World, *, training: Training) -> None:
    recipe, size = objective.recipe, training.batch_size
    bags = world.training if training.pairs == "planted" else world.training.shuffled()
    optimiser = torch.optim.Adam([*encoders.parameters(), *objective.parameters()], training.lr)
    for start in range(0, training.steps * size, size):
        step_bags = bags.rows(slice(start, start + size))
        texts = read(step_bags, recipe.features, fillers_FE=world.fillers)
        outputs = encoders(step_bags.regions, texts, recipe.features)
        loss = objective(outputs, pair_batch(step_bags, texts), None, SingleProcess()).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        objective.finish_step()


@torch.no_grad()
def _evaluate(encoders: LinearEncoders, objective: Objective, world: World) -> Figures:
    recipe, bags = objective.recipe, world.held_out
    outputs = encoders(bags.regions, prompts(world), recipe.features)
    # Of the batch, scores need the number of images alone.
    batch = pair_batch(bags, read(bags, recipe.features, fillers_FE=world.fillers))
    features = PairFeatures(outputs, batch, None, SingleProcess())
    table, state = _table_at_test(recipe), objective.state_of("main")
    scores_KC = pooled_scores(
        table, state, features, view=0, scale=objective.scale("main", outputs.report_embeds)
    )
    best_K1C = region_similarities(table, state, features, outputs.report_embeds, view=0).argmax(
        1, keepdim=True
    )
    is_hit_KC = bags.is_shown.take_along_dim(best_K1C, 1)[:, 0]
    is_there_KC = bags.is_shown.any(1)
    names = [str(concept) for concept in range(NUM_CONCEPTS)]
    found = score_labels(scores_KC.numpy(), is_there_KC.numpy(), names)
    values = [label.auroc for label in found.labels if label.auroc is not None]
    assert len(values) == NUM_CONCEPTS
    return Figures(
        auroc=fmean(values),
        pointing=float(is_hit_KC[is_there_KC].float().mean()),
        num_missed=sum(value < 0.75 for value in values),
    )


def _table_at_test(recipe: MethodRecipe) -> TableRecipe:
    """The main table's score. A prompt is nobody's own text: pools that need one become the maximum."""
    pool = recipe.region_pool
    if pool.kind in ("select", "pmi", "each"):
        pool = RegionPool(kind="max")
    return TableRecipe(score=recipe.score, region_pool=pool)
