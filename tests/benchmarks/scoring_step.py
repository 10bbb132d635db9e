"""Time of a training step with patches scored in the trainer, outside it, and with plain CLIP.

Run: `OMP_NUM_THREADS=1 python -m tests.benchmarks.scoring_step [rounds] [method]`. The trainers share this
process and take turns within each round, so that other load on the machine falls on all of them alike;
the scorers are Ray actors. CPU time is that of the training thread alone, from asking for a batch to the
end of the step: teacher, publishing, unpickling the batch, forward, backward, optimiser. Wall time of the
same span without the wait for the batch stands beside it; on busy cores it says less. At last the trainer
with scorers steps alone, without the pauses the others' turns give its scorers.
"""

from __future__ import annotations

import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, field

import torch
from rich.console import Console
from rich.table import Table

from models.outputs import PairBatch
from pipelines.cluster import connect, disconnect
from pipelines.collate import BatchSettings
from pipelines.config import Config
from pipelines.config_tree import load_config
from pipelines.feed import train_order
from pipelines.prepare_once import ensure_prepared
from pipelines.prepared import Prepared
from pipelines.pretrain import build_trainer
from pipelines.score_tokens import Lead, score_stream
from pipelines.stream_feed import StreamFeed
from pipelines.train_step import Trainer

# The paper's grid of 14 x 14 patches on a tower small enough for a core.
SETTINGS = (
    "data.source=scenes:quick",
    "data.num_train=512",
    "data.num_selection=16",
    "data.num_test=16",
    "data.image_size=112",
    "model.patch_size=8",
    "model.vision_width=128",
    "model.vision_layers=4",
    "model.text_width=128",
    "model.text_layers=2",
    "train.batch_size=32",
    "train.min_crop_area=0.5",
    # Long enough that the teacher's lag leaves room for K > 1.
    "train.steps=2000",
)
_FIRST_STEP = 400


@dataclass
class Runner:
    """One trainer with its feed."""

    trainer: Trainer
    batches: Iterator[PairBatch]
    lead: Lead | None
    cpu_s: list[float] = field(default_factory=list)
    wall_s: list[float] = field(default_factory=list)
    waited_s: list[float] = field(default_factory=list)
    scorer_s: list[float] = field(default_factory=list)

    def step(self) -> None:
        cpu, wall = time.thread_time(), time.perf_counter()
        if self.lead is not None:
            self.lead.ask()
        waiting = time.perf_counter()
        batch = next(self.batches)
        waited = time.perf_counter() - waiting
        self.trainer.run_step(batch)
        self.cpu_s.append(time.thread_time() - cpu)
        self.wall_s.append(time.perf_counter() - wall - waited)
        self.waited_s.append(waited)
        if batch.scored is not None:
            self.scorer_s.append(batch.scored.seconds)


def main(rounds: int, method: str) -> None:
    torch.set_num_threads(1)
    connect(num_cpus=4)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        modes = {
            "clip": ("method=clip",),
            f"{method} sync": (f"method={method}",),
            f"{method} stream": (f"method={method}", "scoring.mode=stream"),
            f"{method} random": (f"method={method}", "scoring.mode=random"),
        }
        runners = {
            name: _runner(load_config([], [*SETTINGS, *mode, f"prepared={folder}"]), 3 * rounds + 30, stack)
            for name, mode in modes.items()
        }
        for number, runner in itertools.product(range(rounds + 2), runners.values()):
            runner.step()
            # Two rounds to warm up: caches, actors, the first publication.
            if number < 2:
                for values in (runner.cpu_s, runner.wall_s, runner.waited_s, runner.scorer_s):
                    values.clear()
        _print(runners, rounds)
        _step_alone(runners[f"{method} stream"], rounds)
    disconnect()


def _step_alone(runner: Runner, rounds: int) -> None:
    found, _ = runner.trainer.meter.take()
    ages = {
        name: round(value, 2) for name, value in found.items() if "staleness" in name or "fallback" in name
    }
    Console(width=110).print(ages)
    # What was scored during the others' turns goes first.
    for _ in range(runner.trainer.policy.steps_ahead(runner.trainer.step) + rounds):
        runner.step()
    waited, worked = sum(runner.waited_s[-rounds:]), sum(runner.wall_s[-rounds:])
    scorer = sum(runner.scorer_s[-rounds:]) / (waited + worked)
    Console(width=110).print(
        f"alone: waits {waited / (waited + worked):.1%} of its time, the scorer works {scorer:.1%} of it"
    )


def _runner(config: Config, num_steps: int, stack: ExitStack) -> Runner:
    prepared = Prepared.open(ensure_prepared(config))
    trainer = build_trainer(config, prepared)
    # As if resumed: past the warm-up, where scores count and the teacher has a lag.
    trainer.step = _FIRST_STEP
    features = config.recipe.features
    settings = BatchSettings(
        seed=0,
        text=features.text,
        num_views=features.num_views,
        min_crop_area=config.train.min_crop_area,
        num_patches=trainer.model.encoder.vision.grid**2,
        max_tokens=config.data.max_tokens,
    )
    order = train_order(prepared, batch_size=config.train.batch_size, seed=0)
    feed, lead = StreamFeed(prepared.uri, order, settings), None
    if config.scoring.mode == "stream":
        scored, lead = score_stream(trainer, feed, run_id="benchmark")
        stack.callback(lead.close)
        batches = scored.batches(_FIRST_STEP, _FIRST_STEP + num_steps)
    else:
        batches = feed.batches(_FIRST_STEP, _FIRST_STEP + num_steps)
    return Runner(trainer, stack.enter_context(closing(batches)), lead)


def _print(runners: dict[str, Runner], rounds: int) -> None:
    table = Table(title=f"a step of 32 pairs, medians of {rounds} interleaved rounds", box=None)
    headings = (
        "trainer",
        "CPU ms",
        "x clip",
        "x sync",
        "wall ms",
        "x clip",
        "x sync",
        "waited ms",
        "scorer ms",
    )
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "trainer" else "right")
    names = list(runners)
    clip, sync = runners[names[0]], runners[names[1]]
    for name, own in runners.items():
        cells = []
        for kind in ("cpu_s", "wall_s"):
            values = getattr(own, kind)
            cells.append(f"{1000 * statistics.median(values):.0f}")
            for base in (clip, sync):
                ratios = [a / b for a, b in zip(values, getattr(base, kind), strict=True)]
                cells.append(f"{statistics.median(ratios):.2f}")
        cells.append(f"{1000 * statistics.median(own.waited_s):.0f}")
        cells.append(f"{1000 * statistics.median(own.scorer_s):.0f}" if own.scorer_s else "")
        table.add_row(name, *cells)
    Console(width=110).print(table)


if __name__ == "__main__":
    main(
        int(sys.argv[1]) if len(sys.argv) > 1 else 12,
        sys.argv[2] if len(sys.argv) > 2 else "aclip",
    )
