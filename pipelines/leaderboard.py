"""Methods ranked by their zero-shot results: one board per dataset and source, never pooled.

Every number is a mean over training seeds with its interval; beside the best configuration of a method
stands its untuned default, and each row carries what the tuning cost.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from pipelines.evaluation.statistics import Bootstrap
from pipelines.evaluation.task_result import MAIN_METRICS
from pipelines.report.estimates import Estimate, RowMatrix, estimate_metric, paired_p, row_matrix
from pipelines.results import Json, Store

MAIN: Final = "main_metric"
RANKED_KINDS: Final = ("best", "single")
FINAL_KINDS: Final = ("best", "single", "default")
TRIAL_STATES: Final = ("complete", "pruned", "failed", "running")
_TASKS: Final = tuple(MAIN_METRICS)
# Rows are comparable only when these agree; the block says on what a number was computed.
_SAME: Final = ("data_sha", "prompts_sha", "n")


@dataclass(frozen=True, kw_only=True)
class OtherMetric:
    """A metric that does not rank: another task, another name, or kept tokens only."""

    task: str
    metric: str
    keep_rule: str
    estimate: Estimate


@dataclass(frozen=True, kw_only=True)
class Row:
    """One method on one board: its best configuration ("best"), its defaults, or a single run."""

    method: str
    kind: str
    rank: int | None
    estimate: Estimate
    seeds: list[int]
    seed_values: list[float | None]
    num_rows: int | None
    params: Json
    run_ids: list[str]
    trials: dict[str, int]
    seconds_total: float
    seconds_per_run: float | None
    p_value: float | None
    p_note: str | None
    others: list[OtherMetric] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Board:
    """Ranked rows of one dataset and source by one metric of one task."""

    dataset: str
    task: str
    metric: str
    keep_rule: str
    select_on: str | None
    report_on: str | None
    chance: float | None
    notes: list[str]
    rows: list[Row]


def leaderboards(store: Store, *, bootstrap: Bootstrap | None = None) -> list[Board]:
    """One board per dataset and source; a method without a finished final run has a row without value.

    Args:
        bootstrap: how intervals and tests are made; 1000 resamples at 95 % by default.
    """
    sweep, runs = store.sweep(), store.runs()
    replaced = replaced_runs(runs)
    results = [result for result in store.results() if result["clipfleet"]["run_id"] not in replaced]
    final = [result for result in results if _is_final(result)]
    datasets = list(dict.fromkeys(result["dataset"] for result in final))
    boards = []
    for dataset in datasets or [name for name in [sweep.get("dataset")] if name]:
        of_dataset = [result for result in final if result["dataset"] == dataset]
        builder = _BoardBuilder(store, sweep, runs, of_dataset, bootstrap or Bootstrap())
        boards.append(builder.board(dataset))
    return boards


def replaced_runs(runs: Sequence[Json]) -> set[str]:
    """Ids of final runs of a configuration that a longer sweep has replaced by a better one.

    They stay in the store, but a mean over the seeds of two configurations would describe neither.
    """
    newest: dict[str, Json] = {}
    for run in runs:
        before = newest.get(run["method"])
        if run["kind"] == "best" and (before is None or run["started"] >= before["started"]):
            newest[run["method"]] = run
    return {
        run["run_id"]
        for run in runs
        if run["kind"] == "best" and run["params"] != newest[run["method"]]["params"]
    }


def main_metric_of(results: Sequence[Json], wanted: str) -> tuple[str, str]:
    """Task and metric that rank these results of one dataset.

    A dataset that lacks the wanted metric is ranked by the main metric of its first task.

    Args:
        wanted: a metric, "<task>.<metric>", or "auto".
    """
    tasks = sorted({result["task"] for result in results}, key=_task_order)
    task_wanted, _, metric_wanted = wanted.rpartition(".")
    for task in tasks:
        of_task = [result for result in results if result["task"] == task]
        if task_wanted in ("", task) and any(metric_wanted in result["metrics"] for result in of_task):
            return task, metric_wanted
    first = tasks[0] if tasks else ""
    return first, MAIN_METRICS.get(first, MAIN)


def chance_level(results: Sequence[Json], metric: str) -> float | None:
    """What guessing reaches, as the results say it; known for the main metric of a task only."""
    for result in results:
        if metric in (MAIN_METRICS.get(result["task"]), MAIN):
            chance = result["metrics"].get("chance")
            return None if chance is None else float(chance)
    return None


@dataclass(frozen=True, kw_only=True, eq=False)  # identity: arrays have no truth value
class _Entry:
    method: str
    kind: str
    results: list[Json]
    rows: RowMatrix | None
    estimate: Estimate


class _BoardBuilder:
    """What the rows of one board share: the results of one dataset and the sweep around them."""

    def __init__(
        self, store: Store, sweep: Json, runs: list[Json], results: list[Json], bootstrap: Bootstrap
    ) -> None:
        self.store, self.sweep, self.runs, self.results, self.bootstrap = (
            store,
            sweep,
            runs,
            results,
            bootstrap,
        )
        self.task, self.metric = main_metric_of(results, sweep.get(MAIN) or "auto")
        rules = {result["clipfleet"]["keep_rule"] for result in results if result["task"] == self.task}
        # All tokens rank, because then every method is used the same way; kept tokens stand beside.
        self.keep_rule = "kept" if rules == {"kept"} else "all"

    def board(self, dataset: str) -> Board:
        key = self.task, self.keep_rule
        main = [r for r in self.results if (r["task"], r["clipfleet"]["keep_rule"]) == key]
        stamp = main[0]["clipfleet"] if main else self.sweep
        entries = self._entries(main)
        ranked = [e for e in entries if e.kind in RANKED_KINDS and e.estimate.value is not None]
        return Board(
            dataset=dataset,
            task=self.task,
            metric=self.metric,
            keep_rule=self.keep_rule,
            select_on=stamp.get("select_on"),
            report_on=stamp.get("report_on"),
            chance=chance_level(main, self.metric),
            notes=_comparability_notes(main),
            rows=[self._row(entry, ranked) for entry in entries],
        )

    def _entries(self, main: list[Json]) -> list[_Entry]:
        """Best first; what has no value comes last."""
        methods = dict.fromkeys([*self.sweep.get("methods", []), *(r["clipfleet"]["method"] for r in main)])
        entries = []
        for method in methods:
            for kind in FINAL_KINDS:
                found = sorted(_of(main, method, kind), key=lambda result: result["clipfleet"]["seed"])
                # A missing best run is shown as missing; a missing default may not be wanted.
                if found or (kind == "best" and not _of(main, method, "single")):
                    rows = row_matrix(self.store, found, self.metric)
                    estimate = estimate_metric(found, self.metric, bootstrap=self.bootstrap, rows=rows)
                    entries.append(
                        _Entry(method=method, kind=kind, results=found, rows=rows, estimate=estimate)
                    )
        return sorted(entries, key=lambda e: (e.estimate.value is None, -(e.estimate.value or 0.0)))

    def _row(self, entry: _Entry, ranked: list[_Entry]) -> Row:
        p_value, p_note = None, None
        if entry.estimate.value is not None and ranked and entry is not ranked[0]:
            p_value, p_note = paired_p(entry.rows, ranked[0].rows, self.bootstrap)
        own = [run for run in self.runs if run["method"] == entry.method]
        trials = Counter(run["state"] for run in own if run["kind"] == "trial")
        shown = {result["clipfleet"]["run_id"] for result in entry.results}
        finals = [run for run in own if run["run_id"] in shown and run["state"] == "complete"]
        return Row(
            method=entry.method,
            kind=entry.kind,
            rank=ranked.index(entry) + 1 if entry in ranked else None,
            estimate=entry.estimate,
            seeds=[result["clipfleet"]["seed"] for result in entry.results],
            seed_values=[result["metrics"].get(self.metric) for result in entry.results],
            num_rows=entry.results[0]["clipfleet"]["n"] if entry.results else None,
            params=finals[0]["params"] if finals else {},
            run_ids=[result["clipfleet"]["run_id"] for result in entry.results],
            trials={state: trials[state] for state in TRIAL_STATES},
            seconds_total=sum(float(run["seconds"]) for run in own),
            seconds_per_run=sum(float(run["seconds"]) for run in finals) / len(finals) if finals else None,
            p_value=p_value,
            p_note=p_note,
            others=self._others(entry.method, entry.kind),
        )

    def _others(self, method: str, kind: str) -> list[OtherMetric]:
        groups: dict[tuple[str, str], list[Json]] = {}
        for result in _of(self.results, method, kind):
            groups.setdefault((result["task"], result["clipfleet"]["keep_rule"]), []).append(result)
        found = []
        for task, keep_rule in sorted(groups, key=lambda key: (_task_order(key[0]), key)):
            results = groups[task, keep_rule]
            names = dict.fromkeys(
                name for result in results for name in result["metrics"] if _is_outcome(name)
            )
            for metric in names:
                if (task, keep_rule, metric) != (self.task, self.keep_rule, self.metric):
                    estimate = estimate_metric(results, metric, bootstrap=self.bootstrap)
                    found.append(
                        OtherMetric(task=task, metric=metric, keep_rule=keep_rule, estimate=estimate)
                    )
        return found


def _of(results: Sequence[Json], method: str, kind: str) -> list[Json]:
    return [r for r in results if (r["clipfleet"]["method"], r["clipfleet"]["kind"]) == (method, kind)]


def _is_final(result: Json) -> bool:
    block = result["clipfleet"]
    return block["kind"] in FINAL_KINDS and block["split"] == block["report_on"]


def _is_outcome(metric: str) -> bool:
    """Whether a metric says how good a model is; counts and chance levels describe the test set."""
    return metric not in (MAIN, "chance") and not metric.startswith("num_")


def _task_order(task: str) -> tuple[int, str]:
    return (_TASKS.index(task) if task in _TASKS else len(_TASKS)), task


def _comparability_notes(results: Sequence[Json]) -> list[str]:
    found: list[str] = []
    for key in _SAME:
        values: dict[Any, set[str]] = {}
        for result in results:
            values.setdefault(result["clipfleet"].get(key), set()).add(result["clipfleet"]["method"])
        if len(values) > 1:
            groups = "; ".join(f"{value}: {', '.join(sorted(names))}" for value, names in values.items())
            found.append(f"rows differ in {key} and are not strictly comparable ({groups})")
    return found
