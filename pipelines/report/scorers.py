"""Runs whose patches were scored outside the trainer: how old the scores were, and what scoring cost."""

from __future__ import annotations

from collections import Counter
from typing import Final

from pipelines.report import figures as charts
from pipelines.report.palette import Look
from pipelines.results import Json, Store

# Column of the page: diagnostic of the metric log, and how the lines of a run are summed up.
COLUMNS: Final = {
    "staleness": ("scoring/staleness_mean", "mean"),
    "oldest": ("scoring/staleness_max", "max"),
    "fallback": ("scoring/fallback_share", "mean"),
    "iou": ("scoring/iou_with_sync", "mean"),
    "utilisation": ("scoring/utilisation", "mean"),
    "waiting": ("feed/wait_share", "mean"),
    "in_flight": ("feed/rows_in_flight", "max"),
    "store": ("feed/object_store_mib", "max"),
}


def scorers_of(store: Store, runs: list[Json]) -> list[Json]:
    """What the metric logs say about scorers, for every run that had some.

    Rows of rank 0 only; means are over lines of the log, of which each sums up the steps since the last.
    """
    found = []
    for run in runs:
        if (run["config"].get("scoring") or {}).get("mode") != "stream":
            continue
        lines = [line for line in store.curve(run["run_id"]) if "diagnostics" in line]
        ages: Counter[int] = Counter()
        for line in lines:
            ages.update({int(age): count for age, count in (line.get("score_ages") or {}).items()})
        found.append(
            {
                **{key: run[key] for key in ("run_id", "method", "kind", "seed")},
                **{name: _summed(lines, *column) for name, column in COLUMNS.items()},
                "ages": sorted(ages.items()),
            }
        )
    return found


def scorer_views(report: Json, looks: dict[str, Look], figures: dict[str, Json]) -> list[Json]:
    """One chart of ages and one table per method."""
    views = []
    for method in report["methods"]:
        runs = [run for run in report["scorers"] if run["method"] == method]
        if not runs:
            continue
        chart = f"scorers-{method}"
        ages: Counter[int] = Counter()
        for run in runs:
            ages.update(dict(run["ages"]))
        figures[chart] = charts.as_json(charts.age_chart(dict(sorted(ages.items())), looks[method]))
        views.append({"method": method, "chart": chart, "runs": runs})
    return views


def _summed(lines: list[Json], name: str, how: str) -> float | None:
    values = [line["diagnostics"][name] for line in lines if name in line["diagnostics"]]
    if not values:
        return None
    return float(max(values)) if how == "max" else float(sum(values) / len(values))
