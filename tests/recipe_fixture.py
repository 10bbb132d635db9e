"""Any recipe's trainer, batches and middle of the run, for the suites that cover the whole catalogue."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from models.estimators import InfoNCE
from models.gather import Gather
from models.memory import FeatureQueue, MemoryBank
from models.methods.catalogue import METHODS
from models.outputs import PairBatch
from models.prototypes import PairClusters, Prototypes
from models.recipe import MethodRecipe
from pipelines.config import TrainConfig
from pipelines.train_step import Trainer
from tests.pair_fixture import NUM_ROWS, TEXT, TOWERS, draw, generator, make_batch, unit

NUM_PAIRS = 8
TRAIN = TrainConfig(steps=60, batch_size=NUM_PAIRS, warmup_steps=3, lr=1e-3, weight_decay=0.0)


# Cosines of fresh weights lie between -.6 and -.3, losses around log 8: the recipes' cap of .8 and slack of
# .1 would do nothing. Above a cap on all pairs there is no gradient, so that one leaves most of them free.
_LIMITS = {"cap": -0.5, "leaky": -0.5, "cap_all": -0.3}
_SLACK = 2.0


def with_relaxation_in_reach(recipe: MethodRecipe) -> MethodRecipe:
    """The recipe, its relaxation of pairs moved to where fresh weights are."""
    if recipe.transform.relaxes:
        limit = _LIMITS[recipe.transform.kind]
        return replace(recipe, transform=replace(recipe.transform, limit=limit))
    if isinstance(recipe.estimator, InfoNCE) and recipe.estimator.slack:
        return replace(recipe, estimator=InfoNCE(slack=_SLACK))
    return recipe


# The catalogue, as the suites run it.
RECIPES = {name: with_relaxation_in_reach(recipe) for name, recipe in METHODS.items()}


@contextmanager
def float64() -> Iterator[None]:
    """Everything built inside is double: a wrong factor shows at 1e-12, which float32 hides at 1e-5."""
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def trainer_of(
    recipe: MethodRecipe, train: TrainConfig, *, seed: int = 0, gather: Gather | None = None
) -> Trainer:
    """A trainer on small towers, before its first step."""
    return Trainer(recipe, TOWERS, TEXT, train, seed=seed, num_rows=NUM_ROWS, gather=gather)


def batch_of(recipe: MethodRecipe, seed: int = 0) -> PairBatch:
    """As many views and texts as a recipe asks for, of rows from all over the training split.

    The last pair is the row of the first once more: a batch across the end of an epoch may hold one twice.
    """
    features = recipe.features
    batch = make_batch(num_views=features.num_views, num_texts=features.num_texts, seed=seed)
    rows = torch.randperm(NUM_ROWS, generator=generator(seed))[:NUM_PAIRS]
    rows[-1] = rows[0]
    return replace(batch, row_index=rows)


def in_the_middle(trainer: Trainer, *, seed: int = 1) -> Trainer:
    """The same trainer half way through its run, every part of its state where a run would have it.

    At the first step some terms are off: a queue is empty, prototypes are unknown, the teacher is the
    model's copy and chooses no patches yet. The queue is left partly full, so that its gaps matter.
    """
    trainer.step = trainer.train.steps // 2
    if trainer.teacher is not None:
        for number, parameter in enumerate(trainer.teacher.parameters()):
            parameter.add_(0.02 * draw(*parameter.shape, seed=seed + number).to(parameter))
    for number, module in enumerate(trainer.model.modules()):
        _fill(module, seed=100 * seed + number)
    return trainer


def set_prototypes(trainer: Trainer, *, seed: int = 1) -> None:
    """Prototypes as after the first epoch, for recipes that have some."""
    for module in trainer.model.modules():
        if isinstance(module, Prototypes):
            _fill(module, seed=seed)


@torch.no_grad()
def _fill(module: nn.Module, *, seed: int) -> None:
    if isinstance(module, FeatureQueue):
        module.push_(unit(NUM_PAIRS * 5 // 2, module.rows.shape[1], seed=seed))
    elif isinstance(module, MemoryBank):
        width = module.images.shape[1]
        every_row = torch.arange(module.num_rows)
        module.update_(every_row, unit(NUM_ROWS, width, seed=seed), unit(NUM_ROWS, width, seed=seed + 1))
        # About what unrelated unit features at CMC's temperature give: the scores' normal distribution.
        estimate = math.log(NUM_ROWS) + 0.5 / (0.07**2 * width)
        module.image_log_normaliser.fill_(estimate)
        module.text_log_normaliser.fill_(estimate - 0.5)
    elif isinstance(module, Prototypes):
        module.set_([_clusters(module, number, seed=seed) for number in range(len(module.num_clusters))])


def _clusters(prototypes: Prototypes, number: int, *, seed: int) -> PairClusters:
    """Random centres; the split is too small to be clustered as finely as the recipes ask."""
    count, g = prototypes.num_clusters[number], generator(seed + number)
    width = prototypes.get_buffer(f"sets.{number}.image_centroids").shape[1]
    return PairClusters(
        image_centroids=unit(count, width, seed=seed + number),
        text_centroids=unit(count, width, seed=seed + number + 10),
        concentration=0.1 + 0.2 * torch.rand(count, generator=g, dtype=torch.float64),
        assignment=torch.randint(count, (NUM_ROWS,), generator=g),
    )


def remembered(trainer: Trainer) -> dict[str, torch.Tensor]:
    """What tables hold of earlier batches, by name: queues, memories, prototypes, constants."""
    return {name: buffer.clone() for name, buffer in trainer.model.objective.named_buffers()}


def inputs_of_a_step(trainer: Trainer, batch: PairBatch) -> tuple[Any, ...]:
    """What the model is given in a step, gradients left behind: batch, patches kept, teacher, gather."""
    seen: list[tuple[Any, ...]] = []
    hook = trainer.model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs))
    trainer.backward(batch)
    hook.remove()
    return seen[0]
