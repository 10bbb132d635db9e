"""Gradients, curves and state of every method on real gloo processes, next to one process.

`python -m tests.two_process` prints the table; the tests read the same numbers from `--out`. The ranks are
forked from a process that has imported everything and computed nothing, so the imports are paid once. What
one process does is computed once, for any number of ranks.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from models.estimators import DonskerVaradhan, InfoLOOB, JensenShannon
from models.gather import Gather, ProcessGroupGather
from models.outputs import PairBatch
from models.recipe import MethodRecipe
from models.table_slots import Candidates, RegionPool, SentencePool, Targets
from pipelines.config import TrainConfig
from pipelines.train_step import Trainer
from tests.pair_fixture import rows_of
from tests.recipe_fixture import NUM_PAIRS, RECIPES, batch_of, in_the_middle, remembered, trainer_of

_LOCAL_MI, _CLOOB, _MIL = RECIPES["local_mi"], RECIPES["cloob"], RECIPES["mil_lse"]
# Cases that take their first step from nothing: an empty queue, no prototypes, no constant yet.
FROM_NOTHING = {f"{name}_from_nothing": RECIPES[name] for name in ("pcl", "cmc_nce", "aclip")}
# Beyond the catalogue: estimators that need sums and counts, excluded candidates, pools, recombinations.
CASES: dict[str, MethodRecipe] = {
    **RECIPES,
    **FROM_NOTHING,
    "local_mi_jsd": replace(_LOCAL_MI, estimator=JensenShannon()),
    "local_mi_dv": replace(_LOCAL_MI, estimator=DonskerVaradhan()),
    "local_mi_lse": replace(_LOCAL_MI, region_pool=RegionPool(kind="lse")),
    "local_mi_dv_same_text": replace(
        _LOCAL_MI, estimator=DonskerVaradhan(), candidates=Candidates(exclude="same_text")
    ),
    "mil_lse_of_max": replace(_MIL, sentence_pool=SentencePool(kind="max")),
    "cloob_same_group": replace(_CLOOB, candidates=Candidates(exclude="same_group")),
    "clip_both": replace(RECIPES["clip"], candidates=Candidates(modality="both")),
    "cmc_core_loob": replace(RECIPES["cmc_core"], estimator=InfoLOOB()),
    "softclip_same_group": replace(RECIPES["softclip"], candidates=Candidates(exclude="same_group")),
    "clip_to_groups": replace(RECIPES["clip"], targets=Targets(kind="same_group")),
    "cloob_tier_attentive": replace(
        _CLOOB, selection=RECIPES["aclip"].selection, regularisers=RECIPES["tier"].regularisers
    ),
}
WORLDS = (2, 4)
NUM_CURVE_STEPS = 3
# Pairs with one text first: one half of the ranks has no second text at all, the other has them all.
ORDER = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])
# Half way through the run the warm-up of the token selection is over.
TRAIN = TrainConfig(steps=20, batch_size=NUM_PAIRS, warmup_steps=0)
COLLECTIVE_TIMEOUT_S, RUN_TIMEOUT_S = 60, 300

Batches = Callable[[int], PairBatch]


class PlainGather(ProcessGroupGather):
    """The negative control, and what much published code does: only a worker's own rows carry gradient."""

    def __call__(self, local: Tensor) -> Tensor:
        if local.dtype == torch.bool:
            return self(local.to(torch.uint8)).bool()
        parts = [torch.empty_like(local) for _ in range(self.world)]
        dist.all_gather(parts, local.detach().contiguous(), group=self.group)
        parts[self.rank] = local
        return torch.cat(parts)


@dataclass(frozen=True)
class Steps:
    """What one process or one rank did.

    Attributes:
        gradients: of the first step, before clipping, by parameter.
        loss: of the first step.
        curve: losses of the optimiser steps.
        state: what the tables remember after them, by name.
    """

    gradients: dict[str, Tensor]
    loss: float
    curve: list[float]
    state: dict[str, Tensor]


@dataclass(frozen=True)
class Parity:
    """One method on `world` processes against one.

    Attributes:
        gradient: largest relative difference of a parameter's gradient, see `relative_difference`.
        plain_gradient: the same with `PlainGather`.
        loss, worker_loss, plain_loss: of one process and of a worker with either gather.
        curve, worker_curve, other_curve: losses of a few optimiser steps; the last of one process on other
            batches.
        state, other_state: largest difference of anything remembered after these steps, of a worker and
            of the one process on other batches; 0 where nothing is remembered.
        digest: of all weights and buffers of model and teacher after these steps, of every rank.
    """

    world: int
    method: str
    gradient: float
    plain_gradient: float
    loss: float
    worker_loss: float
    plain_loss: float
    curve: list[float]
    worker_curve: list[float]
    other_curve: list[float]
    state: float
    other_state: float
    digest: list[str]

    @property
    def curve_difference(self) -> float:
        return _largest_gap(self.curve, self.worker_curve)

    @property
    def other_curve_difference(self) -> float:
        return _largest_gap(self.curve, self.other_curve)

    def describe(self) -> str:
        return (
            f"{self.method:22s} W={self.world}  gradient {self.gradient:.1e}  "
            f"loss {abs(self.loss - self.worker_loss):.1e}  curve {self.curve_difference:.1e}  "
            f"state {self.state:.1e}  plain gather: gradient {self.plain_gradient:.1e}"
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


def state_difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Largest difference of a remembered number; numbers unknown to both (nan) are equal."""
    gaps = [
        torch.where(found[name] == value, 0.0, (found[name] - value).double().abs()).nan_to_num(nan=0.0)
        for name, value in expected.items()
        if torch.equal(found[name].isnan(), value.isnan())
    ]
    if len(gaps) < len(expected):
        return float("inf")
    return max((float(gap.max()) for gap in gaps), default=0.0)


def start(method: str, gather: Gather | None, batches: Batches) -> Trainer:
    """A trainer in the middle of its run, or after one step from nothing."""
    trainer = trainer_of(CASES[method], TRAIN, gather=gather)
    if method in FROM_NOTHING:
        trainer.run_step(batches(NUM_CURVE_STEPS))
        return trainer
    return in_the_middle(trainer)


def take_steps(trainer: Trainer, batches: Batches, *, num_steps: int = NUM_CURVE_STEPS) -> Steps:
    """Gradients at a trainer's first batch, then optimiser steps."""
    loss = trainer.backward(batches(0)).loss.item()
    gradients = {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}
    curve = [trainer.run_step(batches(step)).loss.item() for step in range(num_steps)]
    return Steps(gradients, loss, curve, remembered(trainer))


def digest(trainer: Trainer) -> str:
    """Equal on two ranks exactly if all weights and buffers are, bit for bit."""
    state = trainer.state_dict()
    tensors = [*state["model"].values(), *(state["teacher"] or {}).values()]
    return hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in tensors)).hexdigest()


def whole_batches(method: str, *, seed: int = 0) -> Batches:
    """The global batch of each step."""
    return lambda step: rows_of(batch_of(CASES[method], seed=seed + step), ORDER)


def one_process(method: str) -> dict[str, Any]:
    """What one process does, and does on other batches."""
    batches, others = whole_batches(method), whole_batches(method, seed=100)
    steps = take_steps(start(method, None, batches), batches)
    other = start(method, None, batches)
    curve = [other.run_step(others(step)).loss.item() for step in range(NUM_CURVE_STEPS)]
    return asdict(steps) | {
        "other_curve": curve,
        "other_state": state_difference(remembered(other), steps.state),
    }


def measure(method: str, gather: ProcessGroupGather, expected: dict[str, Any]) -> Parity:
    """Run by every rank."""
    world, rank = gather.world, gather.rank
    share, whole = slice(rank * NUM_PAIRS // world, (rank + 1) * NUM_PAIRS // world), whole_batches(method)

    def mine(step: int) -> PairBatch:
        return rows_of(whole(step), share)

    trainer = start(method, gather, mine)
    found = take_steps(trainer, mine)
    plain = take_steps(start(method, PlainGather(), mine), mine, num_steps=0)
    return Parity(
        world=world,
        method=method,
        gradient=relative_difference(found.gradients, expected["gradients"]),
        plain_gradient=relative_difference(plain.gradients, expected["gradients"]),
        loss=expected["loss"],
        worker_loss=found.loss,
        plain_loss=plain.loss,
        curve=expected["curve"],
        worker_curve=found.curve,
        other_curve=expected["other_curve"],
        state=state_difference(found.state, expected["state"]),
        other_state=expected["other_state"],
        digest=[digest(trainer)],
    )


def _be_exact() -> None:
    # Before anything is built: float64 parameters show a wrong factor at 1e-12, float32 hides it at 1e-5.
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)


def _expect(part: int, num_parts: int, methods: Sequence[str], folder: str) -> None:
    _be_exact()
    for method in methods[part::num_parts]:
        torch.save(one_process(method), Path(folder, f"{method}.pt"))


def _rank(rank: int, world: int, methods: Sequence[str], folder: str) -> None:
    _be_exact()
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store-{world}",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=COLLECTIVE_TIMEOUT_S),
    )
    found = [
        asdict(measure(method, ProcessGroupGather(), torch.load(Path(folder, f"{method}.pt"))))
        for method in methods
    ]
    dist.destroy_process_group()
    Path(folder, f"world-{world}-rank-{rank}.json").write_text(json.dumps(found))


def _fork(work: Callable[..., None], num: int, *others: Any) -> None:
    """`work(number, num, *others)` in each of `num` processes.

    Raises:
        RuntimeError: one of them failed or took too long.
    """
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=work, args=(number, num, *others)) for number in range(num)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(RUN_TIMEOUT_S)
        if process.exitcode != 0:
            for other in processes:
                other.kill()
            raise RuntimeError(f"one of {num} processes ended with exit code {process.exitcode}")


def run_ranks(world: int, methods: Sequence[str], folder: str) -> list[Parity]:
    """What the ranks measured, of each method that of the rank furthest off."""
    _fork(_rank, world, methods, folder)
    per_rank = [
        [Parity(**entry) for entry in json.loads(Path(folder, f"world-{world}-rank-{r}.json").read_text())]
        for r in range(world)
    ]
    return [
        replace(
            max(same, key=lambda parity: (parity.gradient, parity.state)),
            digest=[parity.digest[0] for parity in same],
        )
        for same in zip(*per_rank, strict=True)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", help="JSON file to write")
    parser.add_argument("--methods", nargs="*", choices=CASES, default=list(CASES))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        _fork(_expect, 2, arguments.methods, folder)
        found = [parity for world in WORLDS for parity in run_ranks(world, arguments.methods, folder)]
    for parity in found:
        print(parity.describe())
    if arguments.out:
        document: list[dict[str, Any]] = [asdict(parity) for parity in found]
        Path(arguments.out).write_text(json.dumps(document))


if __name__ == "__main__":
    main()
