"""The planted task: which recipes find a concept that stands in one region of nine, and point at it.

Run: `OMP_NUM_THREADS=1 python -m tests.benchmarks.planted [--seeds 3] [--steps 600] [--all] [ROW ...]`.
Rows are combinations of slots and recipes of the catalogue (`--all` takes every one the task can train). All
rows of a seed see the same bags; a few have four times the seeds or one less, as their column says. `missed`
counts concepts near chance, of twenty. `reference` has the figures of an independent implementation of the
task; it is empty where that has none.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

import torch
from rich.console import Console
from rich.table import Table

from models.methods.catalogue import METHODS
from tests.benchmarks.planted_rows import CATALOGUE, COMBINATIONS, PAIRS, REFERENCE, recipe_of
from tests.planted import Figures, Training, missing_for, planted_figures

# What a working local path reaches, and what no mean over regions does.
LOCAL_AUROC, LOCAL_POINTING, GLOBAL_AUROC = 0.95, 0.90, 0.90
# What decides at test time: the other pools find the region that shows what the text says.
_KINDS: Final = {
    "global": "global",
    "mean": "global",
    "mean_region": "global",
    "each": "every region",
    "select": "own region",
    "pmi": "own region",
}
# Winner-take-all pools in one InfoNCE or DV table miss a concept or two of the twenty altogether, at .025 of
# AUROC each: their spread is ten times that of the others.
_UNSTEADY: Final = ("max", "max + dv", "select", "pmi", "mil_max")
# They take five times as long as the others.
_SLOW: Final = ("critic + select", "critic + pmi", "critic + select + dv", "critic + pmi + dv", "dim")


@dataclass(frozen=True)
class Measured:
    """A row's figures, one per seed, and seconds of CPU a seed took."""

    kind: str
    figures: list[Figures]
    seconds: float

    @property
    def auroc(self) -> float:
        return statistics.fmean(figures.auroc for figures in self.figures)

    @property
    def num_missed(self) -> float:
        return statistics.fmean(figures.num_missed for figures in self.figures)

    @property
    def pointing(self) -> float:
        return statistics.fmean(figures.pointing for figures in self.figures)


def measure(row: str, training: Training, *, seeds: Sequence[int]) -> Measured:
    recipe = recipe_of(row)
    start = time.process_time()
    figures = [planted_figures(recipe, training, seed=seed) for seed in seeds]
    seconds = (time.process_time() - start) / len(seeds)
    return Measured(_KINDS.get(recipe.region_pool.kind, "local"), figures, seconds)


def results_table(found: dict[str, Measured], title: str) -> Table:
    """Best AUROC first."""
    table = Table(title=title, box=None)
    for heading in ("row", "kind", "AUROC", "pointing", "missed", "reference", "seeds", "s a seed"):
        table.add_column(heading, justify="left" if heading in ("row", "kind") else "right")
    for row, measured in sorted(found.items(), key=lambda item: -item[1].auroc):
        reference = ["?" if math.isnan(value) else f"{value:.3f}" for value in REFERENCE.get(row, ())]
        table.add_row(
            row,
            measured.kind,
            _mean_and_spread([figures.auroc for figures in measured.figures]),
            _mean_and_spread([figures.pointing for figures in measured.figures]),
            f"{measured.num_missed:.1f}",
            " ".join(reference),
            str(len(measured.figures)),
            f"{measured.seconds:.1f}",
        )
    return table


def _mean_and_spread(values: list[float]) -> str:
    spread = f"{statistics.stdev(values):.3f}" if len(values) > 1 else "?"
    return f"{statistics.fmean(values):.3f} +- {spread}"


def verdicts(found: dict[str, Measured]) -> list[str]:
    """What the task is to show, and every row that does not."""
    local = {row: m for row, m in found.items() if m.kind == "local"}
    whole = {row: m for row, m in found.items() if m.kind == "global"}
    weak = {row: m for row, m in local.items() if m.auroc < LOCAL_AUROC or m.pointing < LOCAL_POINTING}
    strong = {row: m for row, m in whole.items() if m.auroc > GLOBAL_AUROC}
    pairs = [(own, _gaps(found[best], found[own])) for best, own in PAIRS if {best, own} <= set(found)]
    lower = sum(statistics.fmean(gaps) > 0 for _, gaps in pairs)
    return [
        f"local: {len(local) - len(weak)} of {len(local)} rows reach AUROC {LOCAL_AUROC} and pointing "
        f"{LOCAL_POINTING}{_named(weak)}",
        f"global: {len(whole) - len(strong)} of {len(whole)} rows stay at AUROC {GLOBAL_AUROC} or below"
        f"{_named(strong)}",
        f"own region: {lower} of {len(pairs)} rows stay below the best region of every pair: "
        + ", ".join(f"{own} by {_mean_and_error(gaps)}" for own, gaps in pairs),
    ]


def _gaps(best: Measured, own: Measured) -> list[float]:
    """How far AUROC falls on each seed both have."""
    return [a.auroc - b.auroc for a, b in zip(best.figures, own.figures, strict=False)]


def _mean_and_error(values: list[float]) -> str:
    error = f"{statistics.stdev(values) / math.sqrt(len(values)):.3f}" if len(values) > 1 else "?"
    return f"{statistics.fmean(values):.3f} (standard error {error})"


def _named(rows: dict[str, Measured]) -> str:
    """The exceptions of a verdict."""
    if not rows:
        return ""
    return "; not " + ", ".join(f"{row} ({m.auroc:.3f}, {m.pointing:.3f})" for row, m in rows.items())


def _seeds(row: str, count: int) -> range:
    if row in _UNSTEADY:
        return range(4 * count)
    return range(max(1, count - 1) if row in _SLOW else count)


def control(training: Training) -> str:
    """A local recipe on shuffled pairs."""
    shuffled = planted_figures(recipe_of("lse"), replace(training, pairs="shuffled"), seed=0)
    return (
        f"control: lse on shuffled pairs has AUROC {shuffled.auroc:.3f} and pointing {shuffled.pointing:.3f}"
    )


def left_out() -> str:
    """Recipes the task cannot train, by what they need."""
    of_need: dict[str, list[str]] = {}
    for name, recipe in METHODS.items():
        if need := missing_for(recipe):
            of_need.setdefault(need, []).append(name)
    return "not trainable here: " + "; ".join(f"{need}: {', '.join(n)}" for need, n in of_need.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", nargs="*", metavar="ROW", help="these rows alone")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=Training().steps)
    parser.add_argument("--all", action="store_true", help="every recipe of the catalogue the task can train")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    training = Training(steps=arguments.steps)
    rows = arguments.rows or [*COMBINATIONS, *CATALOGUE]
    if arguments.all:
        rows += [name for name in METHODS if name not in rows and missing_for(METHODS[name]) is None]
    found: dict[str, Measured] = {}
    start, cpu = time.perf_counter(), time.process_time()
    for number, row in enumerate(rows, 1):
        found[row] = measure(row, training, seeds=_seeds(row, arguments.seeds))
        auroc, pointing = found[row].auroc, found[row].pointing
        print(f"{number} of {len(rows)}: {row}, {auroc:.3f}, {pointing:.3f}", file=sys.stderr)
    # Wide enough for the table wherever it goes.
    console = Console(width=110)
    console.print(results_table(found, f"planted task, {training.steps} steps of {training.batch_size} bags"))
    for line in (*verdicts(found), control(training), left_out()):
        console.print(line)
    console.print(f"{time.process_time() - cpu:.0f} s of CPU, {time.perf_counter() - start:.0f} s of time")


if __name__ == "__main__":
    main()
