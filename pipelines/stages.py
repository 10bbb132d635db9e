"""The verbs' work: connect to Ray where needed, run a stage, print what came of it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pyarrow.csv as pa_csv
from rich.console import Console
from rich.table import Table

from pipelines import storage
from pipelines.config import Config
from pipelines.job import Job
from pipelines.prepared import Prepared
from pipelines.progress import StageProgress
from pipelines.run_record import RECORD_FILE, read_record


def prepare_stage(config: Config, console: Console, *, dry_run: bool) -> str:
    """Prepare the data unless it is there; print counts. Returns its location.

    A run with scoring.mode=offline takes what `score` wrote instead.
    """
    from pipelines.cluster import connect
    from pipelines.prepare_once import ensure_prepared, prepared_place
    from pipelines.prepared import read_manifest
    from pipelines.sources.open_source import open_source
    from pipelines.stages_score import scored_place

    if config.scoring.mode == "offline":
        place = scored_place(config)
        console.print(f"data: {config.data.source}, with scores -> {place}", highlight=False, soft_wrap=True)
        if not dry_run:
            connect(address=config.ray_address)
        return place
    source = open_source(config.data)
    place = prepared_place(config, source)
    exists = read_manifest(place) is not None
    console.print(
        f"data: {config.data.source} -> {place}{' (there already)' if exists else ''}",
        highlight=False,
        soft_wrap=True,
    )
    if source.notes:
        console.print(f"  {'; '.join(source.notes)}", highlight=False)
    if dry_run:
        return place
    connect(address=config.ray_address)
    ensure_prepared(config, source=source, on_progress=StageProgress(console))
    manifest = Prepared.open(place).manifest
    rows = ", ".join(f"{split} {found['rows']:,}" for split, found in manifest["splits"].items())
    console.print(f"rows: {rows}; vocabulary {manifest['vocab_size']:,}", highlight=False)
    if manifest["quarantine"]:
        counts = ", ".join(f"{reason} {count}" for reason, count in manifest["quarantine"].items())
        console.print(
            f"[yellow]set aside:[/yellow] {counts}; see {storage.join(place, 'quarantine.parquet')}",
            highlight=False,
            soft_wrap=True,
        )
    return place


def sweep_stage(config: Config, console: Console, *, dry_run: bool) -> None:
    """Check, show the plan, prepare, sweep, rank, report."""
    from pipelines.fine_tuning import check_start, pin_start
    from pipelines.plan import sweep_plan
    from pipelines.sweep import check_sweep, run_sweep

    config = pin_start(config)
    check_sweep(config)
    console.print(sweep_plan(config))
    place = prepare_stage(config, console, dry_run=dry_run)
    if dry_run:
        return
    check_start(config, Prepared.open(place))
    run_sweep(config, place, console=console)
    results_stage(config.output, console)
    report_stage(config.output, console, output=None)


def pretrain_stage(config: Config, console: Console, *, local: bool, dry_run: bool) -> None:
    """Train one run at `config.output` and print its results.

    Raises:
        AlreadyExistsError: the run there is finished.
        ValueError: what it is to start from is not there or does not fit, or an interrupted run there has
            another configuration or other data.
        RunFailedError: it ended as failed.
    """
    from pipelines.check_data import check_data
    from pipelines.data_position import check_resume
    from pipelines.fine_tuning import check_start, start_summary
    from pipelines.launch import RunFailedError, run_here, run_in_train
    from pipelines.plan import pretrain_plan
    from pipelines.prepare_once import dataset_name
    from pipelines.scoring import check_scoring
    from pipelines.train_step import NonFiniteLossError

    name = config.output.partition("?")[0].rstrip("/").rpartition("/")[2]
    run_id = f"{config.method.name}-s{config.seed}"
    check_scoring(config)
    config, continues = _begin(config, run_id)
    console.print(pretrain_plan(config))
    place = prepare_stage(config, console, dry_run=dry_run)
    if dry_run:
        return
    check_data(config, Prepared.open(place))
    if not continues:
        check_start(config, Prepared.open(place))
    job = Job(
        root=config.output,
        run_id=run_id,
        kind="single",
        sweep=name,
        prepared=place,
        dataset=dataset_name(config),
        tree=config.tree(),
        params={},
    )
    check_resume(job)
    job.write()
    console.print(f"training {run_id}", highlight=False)
    try:
        (run_here if local else run_in_train)(job)
    except NonFiniteLossError as error:
        raise RunFailedError(f"run '{run_id}' failed: {error}") from error
    record = read_record(job.root, run_id)
    assert record is not None
    if summary := start_summary(job.folder):
        console.print(summary, highlight=False, soft_wrap=True)
    console.print(f"{run_id}: {record['state']} after {record['seconds']:.0f} s of training", highlight=False)
    _print_results(config.output, console, run_id=run_id)


def evaluate_stage(
    run: str, overrides: Sequence[str], console: Console, *, split: str, dry_run: bool, as_json: bool
) -> None:
    """Score a run's newest checkpoint on a split.

    Raises:
        ValueError: no run, several runs, or no checkpoint at `run`; an override outside `evaluation`.
    """
    from pipelines.evaluate import evaluate_trained
    from pipelines.finished_run import find_run

    found = find_run(run)
    job = found.job
    if split not in ("selection", "test"):
        raise ValueError(f"--split must be selection or test, got '{split}'")
    if not as_json:
        console.print(f"evaluating {found.checkpoint} on '{split}' of {job.prepared}", highlight=False)
    if dry_run:
        return
    config, trainer = found.load(overrides)
    records = evaluate_trained(job, config, Prepared.open(job.prepared), trainer, split=split)
    if not records:
        raise ValueError(f"the rows of split '{split}' in '{job.prepared}' allow no evaluation")
    if as_json:
        print(json.dumps(records, indent=1))
    else:
        console.print(_metrics_table(records, title=job.run_id))


def results_stage(
    root: str, console: Console, *, csv: bool = False, as_json: bool = False, dry_run: bool = False
) -> None:
    """The ranked table of a run root, or all of its numbers."""
    import sys

    from pipelines.leaderboard import leaderboards
    from pipelines.report.console import leaderboard_json, print_leaderboard
    from pipelines.results import Store, query

    store = Store(root)
    if dry_run:
        console.print(f"{len(store.runs())} runs and {len(store.results())} results below '{root}'")
    elif csv:
        pa_csv.write_csv(query(store), sys.stdout.buffer)
    elif as_json:
        print(leaderboard_json(leaderboards(store)))
    else:
        print_leaderboard(console, leaderboards(store))


def report_stage(root: str, console: Console, *, output: str | None, dry_run: bool = False) -> None:
    """Write the static report and say where it is."""
    from pipelines.report.render import write_report
    from pipelines.results import Store

    store = Store(root)
    if dry_run:
        console.print(f"would write {output or storage.join(root, 'report')} from {len(store.runs())} runs")
        return
    place = write_report(root, output)
    console.print(f"report: {place}", highlight=False, soft_wrap=True)


def _begin(config: Config, run_id: str) -> tuple[Config, bool]:
    """The configuration with its start's hash, and whether the run continues from its own checkpoint.

    Raises:
        AlreadyExistsError: the run is finished.
        ValueError: what it is to start from is not there, or is another one than it started from.
    """
    from pipelines.checkpoint import latest_place
    from pipelines.fine_tuning import pin_start

    record = read_record(config.output, run_id)
    if record is None:
        return pin_start(config), False
    folder = storage.join(config.output, "runs", run_id)
    if record["state"] != "running":
        raise storage.AlreadyExistsError(
            f"'{storage.join(folder, RECORD_FILE)}' is a finished run and is never overwritten; name another "
            "output or seed"
        )
    continues = latest_place(storage.join(folder, "checkpoints")) is not None
    return pin_start(config, recorded=record["config"] if continues else None), continues


def _print_results(root: str, console: Console, *, run_id: str) -> None:
    from pipelines.results import Store

    records = [r for r in Store(root).results() if r["clipfleet"]["run_id"] == run_id]
    console.print(_metrics_table(records, title=run_id))


def _metrics_table(records: list[dict[str, Any]], title: str) -> Table:
    """Every metric of some result records with its interval."""
    split = records[0]["clipfleet"]["split"]
    # As narrow as it gets: it must fit 80 columns.
    table = Table(
        title=f"{title} on {split}", title_justify="left", box=None, padding=(0, 1, 0, 0), pad_edge=False
    )
    sources = {record["dataset"] for record in records}
    headings = ["dataset"] if len(sources) > 1 else []
    for heading in (*headings, "task", "metric", "value", "interval", "rows"):
        table.add_column(heading, no_wrap=True, justify="right" if heading in ("value", "rows") else "left")
    for record in records:
        ours = record["clipfleet"]
        task = record["task"].removeprefix("zeroshot_").replace("_", " ")
        task += f" ({ours['keep_rule']})" if ours["keep_rule"] != "all" else ""
        for metric, value in record["metrics"].items():
            if metric == "main_metric":
                continue
            shown = f"{value:.3f}" if value is not None else "–"
            interval = ours["ci"].get(metric)
            span = f"[{interval['low']:.3f}, {interval['high']:.3f}]" if interval else ""
            span = span or ours["undefined"].get(metric, "")
            table.add_row(
                *([record["dataset"]] if headings else []), task, metric, shown, span, str(ours["n"])
            )
    return table
