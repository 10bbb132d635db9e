"""From the store to the plain values the pages show; nothing here knows HTML or charts."""

from __future__ import annotations

import dataclasses
from typing import Any, Final

from pipelines.evaluation.statistics import Bootstrap
from pipelines.leaderboard import Board, leaderboards, replaced_runs
from pipelines.report.kept_tokens import sample_views
from pipelines.report.scorers import scorers_of
from pipelines.results import Json, Store

MAX_CURVE_POINTS: Final = 300  # per run; more cannot be told apart on a screen
_LABEL_METRICS: Final = ("auroc", "recall", "pointing_accuracy")
LOG_SPAN: Final = 10.0  # a searched range wider than this factor is drawn on a log axis


def aggregate(store: Store, *, bootstrap: Bootstrap | None = None) -> Json:
    """Everything the report shows, as JSON types, except the boards, which stay typed.

    Returns:
        `header`, `progress`, `boards` (list of `Board`), `curves` and `responses` by method, `labels`,
        `samples` by method, `configurations`, `scorers`, `failures`, `quarantine`, `runs`.
    """
    sweep, runs, results = store.sweep(), store.runs(), store.results()
    boards = leaderboards(store, bootstrap=bootstrap)
    replaced = replaced_runs(runs)
    current = [run for run in runs if run["run_id"] not in replaced]
    results = [result for result in results if result["clipfleet"]["run_id"] not in replaced]
    methods = list(dict.fromkeys([*sweep.get("methods", []), *(run["method"] for run in runs)]))
    return {
        "methods": methods,
        "header": header(sweep, runs, store.results()),
        "progress": progress(sweep, runs),
        "boards": boards,
        "curves": {method: curves_of(store, runs, method) for method in methods},
        "responses": {method: responses_of(runs, boards, method) for method in methods},
        "labels": [table for board in boards for table in label_tables(results, board)],
        "samples": {method: samples_of(store, current, method) for method in methods},
        "configurations": configurations(current, methods),
        "scorers": scorers_of(store, runs),
        "failures": [run for run in runs if run["state"] == "failed"],
        "quarantine": sweep.get("quarantine") or {},
        "runs": runs,
    }


def header(sweep: Json, runs: list[Json], results: list[Json]) -> Json:
    """What was compared, on which data, how it was judged and what it cost."""
    evaluation = sum(float(result["clipfleet"].get("seconds") or 0.0) for result in results)
    return {
        **{
            key: sweep.get(key)
            for key in ("name", "dataset", "data_sha", "select_on", "report_on", "created")
        },
        "main_metric": sweep.get("main_metric"),
        "seeds": sweep.get("seeds") or [],
        "num_trials": sweep.get("num_trials"),
        "num_runs": len(runs),
        "training_seconds": sum(float(run["seconds"]) for run in runs),
        "evaluation_seconds": evaluation,
        "samples_seen": sum(int(run["samples_seen"]) for run in runs),
    }


def progress(sweep: Json, runs: list[Json]) -> list[Json]:
    """Per method and kind of run: how many are wanted, finished, running and missing."""
    tuning = (sweep.get("config") or {}).get("sweep") or {}
    wanted = {
        "trial": sweep.get("num_trials") or 0,
        "best": len(sweep.get("seeds") or []) if sweep.get("num_trials") else 0,
        "default": tuning.get("num_default_seeds", 0),
    }
    rows = []
    for method in sweep.get("methods", []):
        for kind, expected in wanted.items():
            states = [run["state"] for run in runs if (run["method"], run["kind"]) == (method, kind)]
            running = states.count("running")
            finished = len(states) - running
            counts = {"expected": expected, "finished": finished, "running": running}
            missing = max(0, expected - finished - running)
            rows.append({"method": method, "kind": kind, **counts, "missing": missing})
    return rows


def curves_of(store: Store, runs: list[Json], method: str) -> list[Json]:
    """Loss and selection metric of every run of a method, by step."""
    found = []
    for run in runs:
        if run["method"] != method:
            continue
        lines = store.curve(run["run_id"])
        loss = [(line["step"], line["loss"]) for line in lines if line.get("loss") is not None]
        scores = [(line["step"], line["selection"]) for line in lines if line.get("selection")]
        found.append(
            {
                **{key: run[key] for key in ("run_id", "kind", "number", "seed", "state")},
                "num_logged": len(loss),
                "loss": thinned(loss),
                "selection": thinned([(step, s["value"]) for step, s in scores if s["value"] is not None]),
                "metric": scores[-1][1]["metric"] if scores else None,
            }
        )
    return found


def thinned(points: list[Any]) -> list[Any]:
    """At most `MAX_CURVE_POINTS` of the points, evenly spaced, first and last kept."""
    if len(points) <= MAX_CURVE_POINTS:
        return points
    step = (len(points) - 1) / (MAX_CURVE_POINTS - 1)
    return [points[round(index * step)] for index in range(MAX_CURVE_POINTS)]


def responses_of(runs: list[Json], boards: list[Board], method: str) -> list[Json]:
    """Per searched parameter: its value and the selection metric of every trial.

    A boolean or text parameter has `is_numeric` false; `chosen` is its value in the best configuration.
    """
    trials = [run for run in runs if run["method"] == method and run["kind"] == "trial"]
    best = next(
        (row.params for b in boards for row in b.rows if (row.method, row.kind) == (method, "best")), {}
    )
    found = []
    for path in sorted({path for run in trials for path in run["params"]}):
        with_path = [run for run in trials if path in run["params"]]
        values = [run["params"][path] for run in with_path]
        is_numeric = all(isinstance(x, int | float) and not isinstance(x, bool) for x in values)
        found.append(
            {
                "param": path,
                "is_numeric": is_numeric,
                "is_log": is_numeric and min(values) > 0 and max(values) / min(values) > LOG_SPAN,
                "chosen": best.get(path),
                "metric": next((run["selection"]["metric"] for run in with_path if run["selection"]), None),
                "points": [
                    {
                        "x": value if is_numeric else str(value),
                        "y": (run["selection"] or {}).get("value"),
                        **{key: run[key] for key in ("state", "run_id", "number")},
                    }
                    for run, value in zip(with_path, values, strict=True)
                ],
            }
        )
    return found


def label_tables(results: list[Json], board: Board) -> list[Json]:
    """Per class or label: the value of each method's best configuration, mean and range over seeds."""
    tables: dict[tuple[str, str], dict[str, dict[str, list[Json]]]] = {}
    for result in results:
        block = result["clipfleet"]
        is_shown = block["kind"] in ("best", "single") and block["split"] == block["report_on"]
        if result["dataset"] == board.dataset and is_shown and block["keep_rule"] == board.keep_rule:
            for label in block.get("labels") or []:
                key = result["task"], next(name for name in _LABEL_METRICS if name in label)
                by_label = tables.setdefault(key, {})
                by_label.setdefault(str(label["name"]), {}).setdefault(block["method"], []).append(label)
    return [
        {
            "dataset": board.dataset,
            "task": task,
            "metric": metric,
            "labels": [
                {
                    "name": name,
                    "n": next(iter(by_method.values()))[0].get("n_pos" if metric == "auroc" else "n"),
                    "methods": {m: _label_cell(entries, metric) for m, entries in by_method.items()},
                }
                for name, by_method in by_label.items()
            ],
        }
        for (task, metric), by_label in tables.items()
    ]


def samples_of(store: Store, runs: list[Json], method: str) -> Json | None:
    """Sample images of the first final run of a method that has any."""
    for run in runs:
        if run["method"] == method and run["kind"] in ("best", "single"):
            table = store.samples(run["run_id"])
            if table is not None and table.num_rows:
                return {"run_id": run["run_id"], "images": sample_views(table)}
    return None


def configurations(runs: list[Json], methods: list[str]) -> list[Json]:
    """The first best (or single) run of each method: searched parameters and resolved tree."""
    found = []
    for method in methods:
        own = [run for run in runs if run["method"] == method and run["kind"] in ("best", "single")]
        if own:
            found.append({key: own[0][key] for key in ("method", "run_id", "params", "config", "versions")})
    return found


def boards_as_json(boards: list[Board]) -> list[Json]:
    return [dataclasses.asdict(board) for board in boards]


def _label_cell(entries: list[Json], metric: str) -> Json:
    values = [float(entry[metric]) for entry in entries if entry.get(metric) is not None]
    if len(values) < len(entries):
        reason = next(e.get("reason") for e in entries if e.get(metric) is None)
        return {"value": None, "low": None, "high": None, "reason": reason or "undefined"}
    mean = sum(values) / len(values)
    return {"value": mean, "low": min(values), "high": max(values), "reason": None}
