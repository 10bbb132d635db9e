"""What each way of scoring patches is worth: zero-shot results of one method at a fixed number of steps.

Run: `OMP_NUM_THREADS=1 python -m tests.benchmarks.scoring_modes OUTPUT [key=value ...]`, for example with
`data.source=scenes:tokens train.steps=600` or `data.source=parquet:emoji.parquet data.image_size=64`.
`seeds=5` and `method=attentive_2views` may be among the values. Every mode is trained with every seed, one
run after the other; finished ones are kept, so the same command continues. Each model is read with all
patches and with its own keep rule. Intervals are 95 % of a t distribution over seeds; seconds are of
training, the start of scorers among them.
"""

from __future__ import annotations

import statistics
import sys
from collections import defaultdict
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from scipy.stats import t as student

from pipelines.cluster import connect, disconnect
from pipelines.config import Config
from pipelines.config_tree import load_config
from pipelines.job import Job
from pipelines.launch import run_here
from pipelines.prepare_once import dataset_name, ensure_prepared
from pipelines.results import Store
from pipelines.run_record import read_record
from pipelines.scoring import check_scoring

MODES = {
    "sync": ("scoring.mode=sync",),
    "stream": ("scoring.mode=stream",),
    "random": ("scoring.mode=random",),
    "high": ("method.selection.kind=high",),
    "none": ("scoring.mode=none",),
}
Cells = dict[tuple[str, str], list[float]]


def main(output: str, overrides: list[str]) -> None:
    torch.set_num_threads(1)
    own = dict(value.split("=", 1) for value in overrides if value.startswith(("seeds=", "method=")))
    settings = [value for value in overrides if not value.startswith(("seeds=", "method="))]
    num_seeds, method = int(own.get("seeds", 3)), own.get("method", "aclip")
    connect(num_cpus=4)
    found: dict[str, tuple[list[float], Cells]] = {}
    # Seed by seed, so that other load on the machine falls on all modes alike.
    for seed in range(1, num_seeds + 1):
        for mode, changes in MODES.items():
            values = (f"method={method}", f"output={output}", f"seed={seed}", *settings, *changes)
            config = load_config([], list(values))
            check_scoring(config)
            seconds, cells = found.setdefault(mode, ([], defaultdict(list)))
            seconds.append(_train(config, f"{mode}-s{seed}"))
            for result in Store(output).results():
                block = result["clipfleet"]
                if block["run_id"] == f"{mode}-s{seed}" and result["metrics"]["main_metric"] is not None:
                    cells[result["task"], block["keep_rule"]].append(result["metrics"]["main_metric"])
    disconnect()
    _print(found, title=f"{method}, {num_seeds} seeds, {output}")


def _train(config: Config, run_id: str) -> float:
    """Seconds of training of a run, which is carried out unless it is there."""
    record = read_record(config.output, run_id)
    if record is None or record["state"] == "running":
        job = Job(
            root=config.output,
            run_id=run_id,
            kind="single",
            sweep="modes",
            prepared=ensure_prepared(config),
            dataset=dataset_name(config),
            tree=config.tree(),
            params={},
        )
        job.write()
        run_here(job)
        record = read_record(config.output, run_id)
    assert record is not None
    return float(record["seconds"])


def _print(found: dict[str, tuple[list[float], Cells]], *, title: str) -> None:
    columns = list(dict.fromkeys(key for _, cells in found.values() for key in cells))
    table = Table(title=title, box=None)
    table.add_column("mode")
    table.add_column("seconds", justify="right")
    for task, keep_rule in columns:
        table.add_column(f"{task.removeprefix('zeroshot_')} ({keep_rule})", justify="right")
    for mode, (seconds, cells) in found.items():
        table.add_row(
            mode, _interval(seconds, "%.0f"), *(_interval(cells.get(key, []), "%.3f") for key in columns)
        )
    Console(width=40 + 24 * len(columns)).print(table)


def _interval(values: list[float], shape: str) -> str:
    if not values:
        return "–"
    middle: Any = shape % statistics.mean(values)
    if len(values) < 2:
        return str(middle)
    half = student.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    return f"{middle} ± {shape % half}"


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
