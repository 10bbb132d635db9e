"""CPU time of an optimiser step per method, as a ratio to CLIP's in the same run.

Run: `OMP_NUM_THREADS=1 python -m tests.benchmarks.step_time [rounds]`. Methods take turns within each
round, so that other load on the machine falls on all of them alike; ratios of CPU time repeat to about 5 %.
"""

from __future__ import annotations

import statistics
import sys
import time

import torch
from rich.console import Console
from rich.table import Table

from models.methods.catalogue import METHODS
from pipelines.config_tree import load_config
from pipelines.plan import random_batch, stand_in_trainer

NUM_PAIRS = 64


def main(rounds: int) -> None:
    torch.set_num_threads(1)
    runs = {}
    for name in METHODS:
        config = load_config([], [f"method={name}", f"train.batch_size={NUM_PAIRS}", "train.steps=100000"])
        trainer = stand_in_trainer(config)
        runs[name] = (trainer, random_batch(config, trainer, NUM_PAIRS))
        trainer.run_step(runs[name][1])
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, (trainer, batch) in runs.items():
            start = time.process_time()
            trainer.run_step(batch)
            seconds[name].append(time.process_time() - start)
    table = Table(title=f"CPU time of a step of {NUM_PAIRS} pairs, {rounds} interleaved rounds", box=None)
    for heading in ("method", "ms (median)", "x CLIP (median of ratios)"):
        table.add_column(heading, justify="left" if heading == "method" else "right")
    for name, own in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(own, seconds["clip"], strict=True))
        table.add_row(name, f"{1000 * statistics.median(own):.1f}", f"{ratio:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 20)
