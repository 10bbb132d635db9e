"""Gradients and loss curves of every method on real gloo processes, next to one process.

`python -m tests.two_process` prints the table; the tests read the same numbers from `--out`. The ranks are
forked from a process that has imported everything and computed nothing, so the imports are paid once.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from models.estimators import DonskerVaradhan, JensenShannon
from models.gather import Gather, ProcessGroupGather
from models.methods.aclip import ACLIP
from models.methods.catalogue import METHODS
from models.methods.clip import CLIP
from models.methods.cloob import CLOOB
from models.methods.local_mi import LOCAL_MI
from models.methods.softclip import SOFTCLIP
from models.methods.tier import TIER
from models.outputs import PairBatch
from models.recipe import Candidates, MethodRecipe, RegionPool
from pipelines.config import TrainConfig
from pipelines.train_step import Trainer
from tests.pair_fixture import TEXT, TOWERS, generator, make_batch, rows_of

# Beyond the catalogue: the estimators that need sums and counts, excluded candidates, a recombination.
CASES: dict[str, MethodRecipe] = {
    **METHODS,
    "local_mi_jsd": replace(LOCAL_MI, estimator=JensenShannon()),
    "local_mi_dv": replace(LOCAL_MI, estimator=DonskerVaradhan()),
    "local_mi_lse": replace(LOCAL_MI, region_pool=RegionPool(kind="lse")),
    "cloob_same_group": replace(CLOOB, candidates=Candidates(exclude="same_group")),
    "softclip_same_group": replace(SOFTCLIP, candidates=Candidates(exclude="same_group")),
    "local_mi_dv_same_text": replace(
        LOCAL_MI, estimator=DonskerVaradhan(), candidates=Candidates(exclude="same_text")
    ),
    "cloob_tier_attentive": replace(
        CLOOB, selection=ACLIP.selection, regularisers=TIER.regularisers, features=CLIP.features
    ),
}
ON_FOUR = ("cloob", "aclip")
NUM_PAIRS, NUM_CURVE_STEPS = 8, 3
# Half way through the run the warm-up of the token selection is over.
TRAIN = TrainConfig(steps=20, batch_size=NUM_PAIRS, warmup_steps=0)
COLLECTIVE_TIMEOUT_S, RUN_TIMEOUT_S = 60, 240


class PlainGather(ProcessGroupGather):
    """The negative control, and what much published code does: only a worker's own rows carry gradient."""

    def __call__(self, local: Tensor) -> Tensor:
        parts = [torch.empty_like(local) for _ in range(self.world)]
        dist.all_gather(parts, local.detach().contiguous(), group=self.group)
        parts[self.rank] = local
        return torch.cat(parts)


@dataclass(frozen=True)
class Parity:
    """One method on `world` processes against one.

    Attributes:
        gradient: largest relative difference of a parameter's gradient, see `relative_difference`.
        plain_gradient: the same with `PlainGather`.
        loss, worker_loss: of one process and of a worker.
        curve, worker_curve, plain_curve: losses of a few optimiser steps.
    """

    world: int
    method: str
    gradient: float
    plain_gradient: float
    loss: float
    worker_loss: float
    curve: list[float]
    worker_curve: list[float]
    plain_curve: list[float]

    @property
    def curve_difference(self) -> float:
        return _largest_gap(self.curve, self.worker_curve)

    @property
    def plain_curve_difference(self) -> float:
        return _largest_gap(self.curve, self.plain_curve)

    def describe(self) -> str:
        return (
            f"{self.method:22s} W={self.world}  gradient {self.gradient:.1e}  "
            f"loss {abs(self.loss - self.worker_loss):.1e}  curve {self.curve_difference:.1e}  "
            f"plain gather: gradient {self.plain_gradient:.1e}  curve {self.plain_curve_difference:.1e}"
        )


def _largest_gap(a: list[float], b: list[float]) -> float:
    return max(abs(x - y) for x, y in zip(a, b, strict=True))


def relative_difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Largest over parameters of max |difference| / max |gradient|.

    Parameters whose gradient is below 1e-4 of the largest are measured against that: the key biases'
    gradient is zero but for rounding, since a softmax ignores what all its logits share.
    """
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    return max(
        float((found[name] - gradient).abs().max()) / max(float(gradient.abs().max()), 1e-4 * largest)
        for name, gradient in expected.items()
    )


def build_trainer(recipe: MethodRecipe, gather: Gather | None) -> Trainer:
    """A trainer in the middle of its run, its teacher away from the online weights."""
    trainer = Trainer(recipe, TOWERS, TEXT, TRAIN, seed=0, gather=gather)
    trainer.step = TRAIN.steps // 2
    if trainer.teacher is not None:
        for parameter in trainer.teacher.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator(1)))
    return trainer


def gradients(
    recipe: MethodRecipe, gather: Gather | None, batch: PairBatch
) -> tuple[dict[str, Tensor], float]:
    """Gradient of every parameter and the loss."""
    trainer = build_trainer(recipe, gather)
    report = trainer.backward(batch)
    named = trainer.model.named_parameters()
    return {name: p.grad.clone() for name, p in named if p.grad is not None}, report.loss.item()


def curve(recipe: MethodRecipe, gather: Gather | None, batch: Callable[[int], PairBatch]) -> list[float]:
    """Loss of each of the first steps."""
    trainer = build_trainer(recipe, gather)
    return [trainer.run_step(batch(step)).loss.item() for step in range(NUM_CURVE_STEPS)]


def measure(method: str, gather: ProcessGroupGather) -> Parity:
    """Run by every rank; the one-process side is computed on each, which costs no more than waiting."""
    recipe, world = CASES[method], gather.world
    share = slice(gather.rank * NUM_PAIRS // world, (gather.rank + 1) * NUM_PAIRS // world)

    def whole(step: int) -> PairBatch:
        return make_batch(num_views=recipe.features.num_views, seed=step)

    def mine(step: int) -> PairBatch:
        return rows_of(whole(step), share)

    expected, loss = gradients(recipe, None, whole(0))
    found, worker_loss = gradients(recipe, gather, mine(0))
    plain, _ = gradients(recipe, PlainGather(), mine(0))
    return Parity(
        world=world,
        method=method,
        gradient=relative_difference(found, expected),
        plain_gradient=relative_difference(plain, expected),
        loss=loss,
        worker_loss=worker_loss,
        curve=curve(recipe, None, whole),
        worker_curve=curve(recipe, gather, mine),
        plain_curve=curve(recipe, PlainGather(), mine),
    )


def _rank(rank: int, world: int, methods: list[str], folder: str) -> None:
    # Before anything is built: float64 parameters show a wrong factor at 1e-12, float32 hides it at 1e-5.
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store-{world}",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=COLLECTIVE_TIMEOUT_S),
    )
    found = [asdict(measure(method, ProcessGroupGather())) for method in methods]
    dist.destroy_process_group()
    Path(folder, f"world-{world}-rank-{rank}.json").write_text(json.dumps(found))


def run_ranks(world: int, methods: list[str], folder: str) -> list[Parity]:
    """What the ranks measured, of each method that of the rank furthest off."""
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=_rank, args=(rank, world, methods, folder)) for rank in range(world)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(RUN_TIMEOUT_S)
        if process.exitcode != 0:
            for other in ranks:
                other.kill()
            raise RuntimeError(f"a rank of {world} ended with exit code {process.exitcode}")
    per_rank = [
        [Parity(**entry) for entry in json.loads(Path(folder, f"world-{world}-rank-{r}.json").read_text())]
        for r in range(world)
    ]
    return [max(same, key=lambda parity: parity.gradient) for same in zip(*per_rank, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", help="JSON file to write")
    out = parser.parse_args().out
    with tempfile.TemporaryDirectory() as folder:
        found = run_ranks(2, list(CASES), folder) + run_ranks(4, list(ON_FOUR), folder)
    for parity in found:
        print(parity.describe())
    if out:
        document: list[dict[str, Any]] = [asdict(parity) for parity in found]
        Path(out).write_text(json.dumps(document))


if __name__ == "__main__":
    main()
