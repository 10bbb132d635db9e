"""Progress of long work on the terminal: what is running, how far, how long still."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from pipelines.job import Job

# A log file gets a line this often, a terminal a live view.
_LINE_EVERY_S = 20.0


class StageProgress:
    """One line per stage of a preparation, at most a few per second."""

    def __init__(self, console: Console) -> None:
        self._console, self._last = console, ("", 0.0)

    def __call__(self, stage: str, done: int, total: int) -> None:
        now = time.monotonic()
        name, when = self._last
        if done < total and stage == name and now - when < 2.0:
            return
        self._last = (stage, now)
        self._console.print(f"  {stage}: {done:,} of {total:,} rows", highlight=False)


class SweepProgress:
    """The live view of a sweep: a bar with the time left, and a line per method."""

    def __init__(
        self,
        console: Console,
        *,
        methods: list[str],
        num_jobs: int,
        num_done: int,
        steps: int,
        num_trials: int,
    ) -> None:
        self._console, self._methods, self._steps, self._num_trials = console, methods, steps, num_trials
        self._num_jobs, self._done_before = num_jobs, num_done
        self._started = self._last_line = time.monotonic()
        self._states: dict[str, Counter[str]] = {method: Counter() for method in methods}
        self._best: dict[str, float] = {}
        self._running: dict[str, tuple[Job, int]] = {}
        self._num_ended = 0
        self._steps_done = self._steps_skipped = 0
        self._live = Live(console=console, refresh_per_second=2, get_renderable=self._render, transient=True)

    def __enter__(self) -> SweepProgress:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._console.is_terminal:
            self._live.stop()

    def on_event(self, event: str, job: Job, details: Mapping[str, Any]) -> None:
        """A job starts, reports or ends; see `QueueSearcher`."""
        if event == "start":
            self._running[job.run_id] = (job, 0)
        elif event == "report":
            before = self._running[job.run_id][1]
            self._running[job.run_id] = (job, int(details["step"]))
            self._steps_done += max(0, int(details["step"]) - before)
        else:
            self._end(job, details)
        if not self._console.is_terminal and time.monotonic() - self._last_line > _LINE_EVERY_S:
            self._last_line = time.monotonic()
            self._console.print(self._summary(), highlight=False)

    def add_restored(self, records: Mapping[str, Mapping[str, Any]]) -> None:
        """Count what an earlier session finished."""
        for record in records.values():
            if record["state"] != "running":
                self._count(record)

    def _end(self, job: Job, record: Mapping[str, Any]) -> None:
        _, step = self._running.pop(job.run_id)
        self._num_ended += 1
        # A trial that was stopped early will not take its remaining steps.
        self._steps_skipped += max(0, self._steps - step)
        self._count(record)
        if record["state"] == "failed":
            self._console.print(f"[red]{job.run_id} failed:[/red] {record['error']}", highlight=False)

    def _count(self, record: Mapping[str, Any]) -> None:
        method, kind, state = record["method"], record["kind"], record["state"]
        if method not in self._states:
            return
        self._states[method][f"{kind}/{state}"] += 1
        selection = record.get("selection") or {}
        value = selection.get("value")
        if kind == "trial" and state == "complete" and value is not None:
            self._best[method] = max(value, self._best.get(method, value))

    def _remaining_s(self) -> float | None:
        """Seconds left at the pace so far; None before anything was measured."""
        elapsed = time.monotonic() - self._started
        left = (self._num_jobs - self._done_before) * self._steps - self._steps_done - self._steps_skipped
        if self._steps_done == 0:
            return None
        return max(0.0, left) * elapsed / self._steps_done

    def _summary(self) -> str:
        done = self._done_before + self._num_ended
        remaining = self._remaining_s()
        eta = "estimating" if remaining is None else f"about {_clock(remaining)} left"
        now = ", ".join(f"{run} {step}/{self._steps}" for run, (_, step) in self._running.items())
        return (
            f"{done}/{self._num_jobs} runs, {_clock(time.monotonic() - self._started)} elapsed, {eta}; {now}"
        )

    def _render(self) -> RenderableType:
        table = Table(box=None, pad_edge=False, header_style="dim")
        for heading in ("method", "trials", "pruned", "failed", "best on selection", "final runs"):
            table.add_column(heading, justify="left" if heading == "method" else "right")
        for method in self._methods:
            states = self._states[method]
            trials = sum(count for key, count in states.items() if key.startswith("trial/"))
            failed = sum(count for key, count in states.items() if key.endswith("/failed"))
            finals = states["best/complete"] + states["default/complete"]
            best = f"{self._best[method]:.3f}" if method in self._best else "–"
            pruned = str(states["trial/pruned"])
            table.add_row(method, f"{trials}/{self._num_trials}", pruned, str(failed), best, str(finals))
        done = self._done_before + self._num_ended
        bar = ProgressBar(total=self._num_jobs, completed=done, width=40)
        # The bar last: it ends no line.
        return Group(Text(self._summary()), table, bar)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"
