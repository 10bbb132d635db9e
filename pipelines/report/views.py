"""From aggregated values to what each section of the page shows: texts, rows, figures."""

from __future__ import annotations

from typing import Any

import yaml

from pipelines.leaderboard import RANKED_KINDS, TRIAL_STATES, Board
from pipelines.report import figures as charts
from pipelines.report.console import (
    default_of,
    format_estimate,
    format_p,
    format_seconds,
    metric_label,
    short_params,
    title_of,
)
from pipelines.report.palette import Look
from pipelines.results import Json

Figures = dict[str, Json]


def headline(report: Json) -> str:
    """One sentence per board: who leads, with which number, and whether the lead is clear."""
    sentences = []
    for board in report["boards"]:
        ranked = [row for row in board.rows if row.rank is not None]
        if not ranked:
            continue
        first = ranked[0]
        parts = [
            f"{first.method} leads on {board.dataset} with {board.metric} {format_estimate(first.estimate)}"
        ]
        close = [row.method for row in ranked[1:] if row.p_value is None or row.p_value >= 0.05]
        if close:
            parts.append(f"not told apart from it at p < .05: {', '.join(close)}")
        elif len(ranked) > 1:
            parts.append("every other ranked method is behind at p < .05")
        absent = [row.method for row in board.rows if row.kind in RANKED_KINDS and row.rank is None]
        if absent:
            parts.append(f"without a result: {', '.join(absent)}")
        sentences.append("; ".join(parts) + ".")
    return " ".join(sentences) or "No method has a final result yet."


def missing_runs(report: Json) -> str | None:
    """How far an unfinished sweep is; None when nothing is missing."""
    rows = report["progress"]
    missing, running = (sum(row[key] for row in rows) for key in ("missing", "running"))
    if not missing and not running:
        return None
    expected = sum(row["expected"] for row in rows)
    finished = sum(min(row["finished"], row["expected"]) for row in rows)
    return (
        f"Unfinished sweep: {finished} of {expected} runs have finished, {running} "
        f"{'is' if running == 1 else 'are'} running, {missing} {'is' if missing == 1 else 'are'} missing."
    )


def facts(header: Json) -> list[tuple[str, str]]:
    """Name and value of each line of the header."""
    seeds = ", ".join(map(str, header["seeds"])) or "–"
    found = [
        ("Dataset", header["dataset"] or "–"),
        ("Data identity", (header["data_sha"] or "–")[:12]),
        ("Chosen on / reported on", f"{header['select_on'] or '–'} / {header['report_on'] or '–'}"),
        ("Final seeds", seeds),
        ("Tuning trials per method", str(header["num_trials"] or "–")),
        ("Runs", str(header["num_runs"])),
        ("Training time", format_seconds(header["training_seconds"])),
        ("Evaluation time", format_seconds(header["evaluation_seconds"])),
        ("Pairs seen in training", f"{header['samples_seen']:,}"),
        ("Started", (header["created"] or "–")[:16].replace("T", " ")),
    ]
    return [(name, str(value)) for name, value in found]


def board_views(boards: list[Board], looks: dict[str, Look], figures: Figures) -> list[Json]:
    """Table lines and the interval chart of each board."""
    views = []
    for index, board in enumerate(boards):
        ranked = [row for row in board.rows if row.kind in RANKED_KINDS]
        chart = f"intervals-{index}" if any(row.rank for row in ranked) else None
        height = 0
        if chart:
            figure = charts.interval_chart(board, looks)
            figures[chart], height = charts.as_json(figure), int(figure.layout.height)
        names = dict.fromkeys(metric_label(other, board) for row in ranked for other in row.others)
        views.append(
            {
                "board": board,
                "title": title_of(board),
                "chart": chart,
                "height": height,
                "other_names": list(names),
                "lines": [_board_line(board, row) for row in ranked],
            }
        )
    return views


def curve_views(report: Json, looks: dict[str, Look], figures: Figures) -> list[Json]:
    """One chart and one table of end points per method."""
    views = []
    for method, curves in report["curves"].items():
        if not any(curve["loss"] or curve["selection"] for curve in curves):
            continue
        metric = next((curve["metric"] for curve in curves if curve["metric"]), None)
        chart = f"curves-{method}"
        figure = charts.learning_curves(curves, looks[method], chance=_chance_of(report["boards"], metric))
        figures[chart] = charts.as_json(figure)
        views.append(
            {
                "method": method,
                "chart": chart,
                "metric": metric or "selection metric",
                "runs": [_curve_end(curve) for curve in curves],
            }
        )
    return views


def response_views(report: Json, looks: dict[str, Look], figures: Figures) -> list[Json]:
    """One chart per method and searched parameter, all over the same range of the metric."""
    every = [response for responses in report["responses"].values() for response in responses]
    metric = next((response["metric"] for response in every if response["metric"]), None)
    chance = _chance_of(report["boards"], metric)
    y_range = charts.shared_range(every)
    views = []
    for method, responses in report["responses"].items():
        shown = []
        for index, response in enumerate(responses):
            chart = f"response-{method}-{index}"
            figure = charts.response_chart(response, looks[method], y_range=y_range, chance=chance)
            figures[chart] = charts.as_json(figure)
            shown.append({**response, "id": chart, "chosen_text": number_text(response["chosen"])})
        if shown:
            trials = [run for run in report["runs"] if (run["method"], run["kind"]) == (method, "trial")]
            views.append(
                {
                    "method": method,
                    "metric": metric or "selection metric",
                    "charts": shown,
                    "params": [response["param"] for response in responses],
                    "trials": [_trial_line(run) for run in trials],
                }
            )
    return views


def label_views(report: Json) -> list[Json]:
    """Per-label tables with their columns in the order of the methods."""
    views = []
    for table in report["labels"]:
        present = {method for label in table["labels"] for method in label["methods"]}
        cells = [
            {**label, "methods": {m: {**cell, "how": None} for m, cell in label["methods"].items()}}
            for label in table["labels"]
        ]
        methods = [method for method in report["methods"] if method in present]
        views.append({**table, "labels": cells, "methods": methods})
    return views


def configuration_views(configurations: list[Json]) -> list[Json]:
    """Searched parameters as texts and the resolved tree as YAML."""
    return [
        {
            "method": entry["method"],
            "run_id": entry["run_id"],
            "params": [(name, number_text(value)) for name, value in entry["params"].items()],
            "yaml": yaml.safe_dump(entry["config"], sort_keys=False, allow_unicode=True),
        }
        for entry in configurations
    ]


def run_views(runs: list[Json]) -> list[Json]:
    """Run records with their texts."""
    return [
        {
            **run,
            "score": (run["selection"] or {}).get("value"),
            "time": format_seconds(float(run["seconds"])),
            "short_params": short_params(run["params"]),
        }
        for run in runs
    ]


def number_text(value: Any) -> str:
    """Four significant digits of a float; everything else as it is."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _board_line(board: Board, row: Any) -> Json:
    default = default_of(board, row.method)
    return {
        "row": row,
        "default": default.estimate if default else None,
        "p": format_p(row.p_value),
        "others": {metric_label(other, board): other.estimate for other in row.others},
        "finished": sum(row.trials[state] for state in TRIAL_STATES if state != "running"),
        "total": format_seconds(row.seconds_total),
        "per_run": format_seconds(row.seconds_per_run),
    }


def _curve_end(curve: Json) -> Json:
    scores = [value for _, value in curve["selection"]]
    return {
        "run_id": curve["run_id"],
        "state": curve["state"],
        "last_step": curve["loss"][-1][0] if curve["loss"] else None,
        "last_loss": curve["loss"][-1][1] if curve["loss"] else None,
        "last_score": scores[-1] if scores else None,
        "best_score": max(scores, default=None),
    }


def _trial_line(run: Json) -> Json:
    return {
        "run_id": run["run_id"],
        "state": run["state"],
        "value": (run["selection"] or {}).get("value"),
        "params": run["params"],
        "texts": {name: number_text(value) for name, value in run["params"].items()},
    }


def _chance_of(boards: list[Board], metric: str | None) -> float | None:
    """Chance level of the selection metric, when a board ranks by the same one."""
    name = (metric or "").rpartition(".")[2]
    return next((board.chance for board in boards if board.metric == name), None)
