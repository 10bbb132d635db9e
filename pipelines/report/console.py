"""The leaderboard as a terminal table, as CSV and as JSON."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from collections.abc import Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipelines.evaluation.task_result import MAIN_METRICS
from pipelines.leaderboard import RANKED_KINDS, TRIAL_STATES, Board, OtherMetric, Row
from pipelines.report.estimates import Estimate

MISSING = "–"


def print_leaderboard(console: Console, boards: Sequence[Board]) -> None:
    """Print each board: the ranking, the other metrics, the best configurations; fits 80 columns."""
    if not boards:
        console.print("no results yet", style="yellow")
    for board in boards:
        console.print(_ranking(board, is_wide=console.width >= 100))
        for line in _footnotes(board):
            console.print(Text(line, style="dim"))
        ranked = [row for row in board.rows if row.kind in RANKED_KINDS]
        longest = max((len(metric_label(other, board)) for row in ranked for other in row.others), default=0)
        per_table = max(1, (console.width - longest) // 11)
        for start in range(0, len(ranked), per_table):
            table = _other_metrics(board, ranked[start : start + per_table])
            if table.row_count:
                console.print(table)
        console.print("best configurations", style="italic")
        for row in ranked:
            console.print(Text(f"  {row.method}: {short_params(row.params) or MISSING}"))


def leaderboard_json(boards: Sequence[Board]) -> str:
    return json.dumps([dataclasses.asdict(board) for board in boards], indent=1, allow_nan=False)


def leaderboard_csv(boards: Sequence[Board]) -> str:
    """One line per dataset, method, kind and metric; params as JSON in one column."""
    sink = io.StringIO()
    lines = [line for board in boards for row in board.rows for line in _csv_lines(board, row)]
    writer = csv.DictWriter(sink, fieldnames=_CSV_COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return sink.getvalue()


def format_estimate(estimate: Estimate | None) -> str:
    """`0.756 [0.669, 0.830]`, without brackets when there is no interval, a dash when undefined."""
    if estimate is None or estimate.value is None:
        return MISSING
    if estimate.low is None or estimate.high is None:
        return f"{estimate.value:.3f}"
    return f"{estimate.value:.3f} [{estimate.low:.3f}, {estimate.high:.3f}]"


def format_p(p_value: float | None) -> str:
    if p_value is None:
        return MISSING
    return "< .001" if p_value < 0.001 else f"{p_value:.3f}".replace("0.", ".", 1)


def format_seconds(seconds: float | None) -> str:
    """Seconds below two minutes, then minutes, then hours."""
    if seconds is None:
        return MISSING
    if seconds < 120:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def short_params(params: dict[str, Any]) -> str:
    """`temperature.init=0.05 beta=8`: parameters by the last parts of their path that tell them apart."""
    names = {path: path.split(".") for path in params}
    parts = []
    for path, value in params.items():
        pieces = names[path]
        depth = 1 if sum(other[-1] == pieces[-1] for other in names.values()) == 1 else 2
        depth = max(depth, 2) if pieces[-1] in ("init", "weight") else depth
        text = f"{value:.3g}" if isinstance(value, float) else str(value)
        parts.append(f"{'.'.join(pieces[-depth:])}={text}")
    return " ".join(parts)


def default_of(board: Board, method: str) -> Row | None:
    return next((row for row in board.rows if (row.method, row.kind) == (method, "default")), None)


def title_of(board: Board) -> str:
    kept = "" if board.keep_rule == "all" else f", {board.keep_rule} tokens"
    return f"{board.dataset}: {board.metric}{kept} ({board.task.replace('_', ' ')})"


def metric_label(other: OtherMetric, board: Board) -> str:
    """Name of a further metric; a task that neither ranks nor shows in the metric's name is put before it."""
    task = other.task.removeprefix("zeroshot_")
    prefix = "" if other.task == board.task or task in other.metric else f"{task.replace('_', ' ')} "
    return f"{prefix}{other.metric}{'' if other.keep_rule == 'all' else f' ({other.keep_rule})'}"


def _ranking(board: Board, *, is_wide: bool) -> Table:
    table = Table(
        title=title_of(board), title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False
    )
    table.add_column("#", justify="right")
    table.add_column("method", style="bold", no_wrap=True)
    levels = {row.estimate.level for row in board.rows if row.estimate.level}
    table.add_column(f"{board.metric} [{max(levels):.0%}]" if levels else board.metric, no_wrap=True)
    table.add_column("untuned", no_wrap=True)
    table.add_column("p vs\n1st", justify="right", no_wrap=True)
    table.add_column("trials run/\npruned/failed", justify="right", no_wrap=True)
    table.add_column("training", justify="right", no_wrap=True)
    for row in board.rows:
        if row.kind in RANKED_KINDS:
            table.add_row(*_cells(board, row, is_wide=is_wide))
    return table


def _cells(board: Board, row: Row, *, is_wide: bool) -> list[str]:
    default = default_of(board, row.method)
    untuned = default.estimate if default else None
    finished = sum(row.trials[state] for state in TRIAL_STATES if state != "running")
    return [
        str(row.rank or MISSING),
        row.method,
        format_estimate(row.estimate),
        format_estimate(untuned) if is_wide else _value(untuned),
        format_p(row.p_value),
        f"{finished}/{row.trials['pruned']}/{row.trials['failed']}",
        format_seconds(row.seconds_total),
    ]


def _other_metrics(board: Board, rows: Sequence[Row]) -> Table:
    """Main metrics of the other tasks downwards, methods across: a terminal has room for few columns."""
    table = Table(
        title="other metrics", title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False
    )
    table.add_column("")
    cells: dict[str, dict[str, Estimate]] = {}
    for row in rows:
        table.add_column(row.method, justify="right", no_wrap=True)
        for other in row.others:
            # The rest is in the report and in the CSV: a terminal shows what stands for each task.
            if other.metric != MAIN_METRICS.get(other.task):
                continue
            cells.setdefault(metric_label(other, board), {})[row.method] = other.estimate
    for name, by_method in cells.items():
        table.add_row(name, *(_value(by_method.get(row.method)) for row in rows))
    return table


def _value(estimate: Estimate | None) -> str:
    return MISSING if estimate is None or estimate.value is None else f"{estimate.value:.3f}"


def _footnotes(board: Board) -> list[str]:
    sizes = {f"{row.num_rows} rows x {len(row.seeds)} seeds" for row in board.rows if row.seeds}
    chance = "" if board.chance is None else f"; chance {board.chance:.3f}"
    lines = [
        f"{', '.join(sorted(sizes)) or 'no results yet'}; selected on '{board.select_on}', reported on "
        f"'{board.report_on}'{chance}; training sums all runs of a method",
        *board.notes,
    ]
    for row in board.rows:
        if row.estimate.reason:
            lines.append(f"{MISSING} {row.method} ({row.kind}): {row.estimate.reason}")
    return lines


_CSV_COLUMNS = (
    "dataset", "task", "metric", "keep_rule", "is_main", "rank", "method", "kind", "value", "low", "high",
    "level", "interval", "undefined", "n", "num_seeds", "seeds", "p_vs_first", "chance", "select_on",
    "report_on", *(f"trials_{state}" for state in TRIAL_STATES), "seconds_total", "seconds_per_run", "params",
)  # fmt: skip


def _csv_lines(board: Board, row: Row) -> list[dict[str, Any]]:
    shared = {
        "dataset": board.dataset,
        "rank": row.rank,
        "method": row.method,
        "kind": row.kind,
        "n": row.num_rows,
        "num_seeds": len(row.seeds),
        "seeds": " ".join(map(str, row.seeds)),
        "select_on": board.select_on,
        "report_on": board.report_on,
        **{f"trials_{state}": row.trials[state] for state in TRIAL_STATES},
        "seconds_total": row.seconds_total,
        "seconds_per_run": row.seconds_per_run,
        "params": json.dumps(row.params, sort_keys=True),
    }
    main = OtherMetric(task=board.task, metric=board.metric, keep_rule=board.keep_rule, estimate=row.estimate)
    lines = []
    for other in (main, *row.others):
        estimate = other.estimate
        line = {"task": other.task, "metric": other.metric, "keep_rule": other.keep_rule, **shared}
        line |= {key: getattr(estimate, key) for key in ("value", "low", "high", "level")}
        line |= {"interval": estimate.how, "undefined": estimate.reason, "is_main": other is main}
        if other is main:
            line |= {"p_vs_first": row.p_value, "chance": board.chance}
        lines.append(line)
    return lines
