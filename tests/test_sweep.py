"""Sweeps on Ray: equal budgets, results, table and report, growth, refusals, failure, worker groups."""

from __future__ import annotations

import io
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import optuna
import pytest
from rich.console import Console

from pipelines import storage
from pipelines.config import Config
from pipelines.job import Job, start_record
from pipelines.leaderboard import leaderboards
from pipelines.prepared import Prepared
from pipelines.report.aggregate import aggregate
from pipelines.results import Store, read_curve
from pipelines.stages import report_stage, results_stage
from pipelines.sweep import SweepFailedError, check_sweep, run_sweep, write_sweep_file
from pipelines.sweep_state import SweepMismatchError, SweepState, selection_values
from tests.pipeline_fixture import small_config
from tests.report_fixture import publish_class_result, write_root, write_run

pytestmark = pytest.mark.ray

# Two methods, and per method two trials, one seed of the best and one of the defaults.
BUDGET = (
    "sweep.methods=[clip,cloob]",
    "sweep.num_trials=2",
    "sweep.seeds=[5]",
    "sweep.num_default_seeds=1",
)
DIVERGES = ("train.lr=1e30", "train.max_grad_norm=null", "train.warmup_steps=0")


@dataclass(frozen=True)
class Swept:
    """A finished sweep and what it printed."""

    folder: Path
    prepared: str
    printed: str

    def config(self, *overrides: str) -> Config:
        return small_config(self.folder, *BUDGET, *overrides)

    @property
    def store(self) -> Store:
        return Store(self.config().output)


def carry_out(config: Config, prepared: str) -> str:
    """Run a sweep; what it printed, without line breaks."""
    console = Console(width=200, record=True, file=io.StringIO())
    run_sweep(config, prepared, console=console)
    return " ".join(console.export_text().split())


@pytest.fixture(scope="module")
def swept(small_prepared: str, tmp_path_factory: pytest.TempPathFactory) -> Swept:
    folder = tmp_path_factory.mktemp("swept")
    printed = carry_out(small_config(folder, *BUDGET), small_prepared)
    return Swept(folder, small_prepared, printed)


def record_bytes(root: str) -> dict[str, bytes]:
    """Content of every run record by run id."""
    files = storage.list_files(storage.join(root, "runs"), suffix="run.json")
    return {file.split("/")[0]: storage.read_bytes(storage.join(root, "runs", file)) for file in files}


def test_every_method_gets_the_same_budget(swept: Swept):
    runs = swept.store.runs()
    counts = Counter((run["method"], run["kind"]) for run in runs)
    assert counts == {
        (method, kind): number
        for method in ("clip", "cloob")
        for kind, number in (("trial", 2), ("best", 1), ("default", 1))
    }
    assert {run["state"] for run in runs if run["kind"] != "trial"} == {"complete"}
    assert {run["state"] for run in runs} <= {"complete", "pruned"}
    assert {run["steps"] for run in runs if run["state"] == "complete"} == {6}


def test_final_runs_are_reported_on_the_other_split_and_trials_are_not(swept: Swept):
    results = swept.store.results()
    finals = {run["run_id"] for run in swept.store.runs() if run["kind"] != "trial"}
    assert {result["clipfleet"]["run_id"] for result in results} == finals
    assert {(r["clipfleet"]["split"], r["clipfleet"]["select_on"]) for r in results} == {
        ("test", "selection")
    }
    weights = storage.list_files(storage.join(swept.config().output, "runs"), suffix="state.pt")
    assert {file.split("/")[0] for file in weights} == finals


def test_table_and_report_show_every_method(swept: Swept):
    console = Console(width=200, record=True, file=io.StringIO())
    root = swept.config().output
    results_stage(root, console)
    report_stage(root, console, output=None)
    shown = console.export_text()
    assert "clip" in shown
    assert "cloob" in shown
    assert storage.exists(storage.join(root, "report", "index.html"))


def test_the_same_command_again_does_nothing(swept: Swept):
    before = record_bytes(swept.config().output)
    assert "All 8 runs of 'root' are done already." in carry_out(swept.config(), swept.prepared)
    assert record_bytes(swept.config().output) == before


def test_other_settings_in_the_same_output_are_refused(swept: Swept):
    with pytest.raises(SweepMismatchError, match="another configuration; name another output"):
        check_sweep(swept.config("train.lr=0.01"))
    check_sweep(swept.config("sweep.num_trials=9", "sweep.methods=[tier]"))


def test_other_data_in_the_same_output_are_refused(swept: Swept, tmp_path: Path):
    manifest = storage.read_json(storage.join(swept.prepared, "manifest.json"))
    for shard in [shard for split in manifest["splits"].values() for shard in split["shards"]]:
        data = storage.read_bytes(storage.join(swept.prepared, shard["path"]))
        storage.write_bytes(str(tmp_path / shard["path"]), data)
    storage.write_json(str(tmp_path / "manifest.json"), {**manifest, "data_sha": "another"})
    with pytest.raises(SweepMismatchError, match="on other data"):
        carry_out(swept.config(), str(tmp_path))


def test_output_with_single_runs_is_refused(tmp_path: Path):
    config = small_config(tmp_path, *BUDGET)
    storage.write_json(storage.join(config.output, "runs", "clip-s0", "run.json"), {"state": "complete"})
    with pytest.raises(SweepMismatchError, match="holds single runs, no sweep"):
        check_sweep(config)


def test_a_longer_budget_adds_exactly_what_is_missing(swept: Swept):
    config = swept.config("sweep.num_trials=3")
    before = record_bytes(config.output)
    carry_out(config, swept.prepared)
    after = record_bytes(config.output)
    assert {run_id: after[run_id] for run_id in before} == before
    added = Counter(run_id.rpartition("-")[0].partition("-best")[0] for run_id in set(after) - set(before))
    new_trials = {f"{method}-t002" for method in ("clip", "cloob")}
    assert new_trials <= set(after) - set(before)
    # A method whose third trial was its best has its final run repeated with those values.
    assert all(count <= 2 for count in added.values())
    (board,) = leaderboards(Store(config.output))
    assert all(row.seeds == [5] for row in board.rows)
    state = SweepState(config, name="root", prepared=swept.prepared, dataset="scenes-quick")
    assert (state.num_done, state.next_job()) == (10, None)


def test_final_runs_of_a_replaced_best_are_not_ranked_with_the_new_ones(tmp_path: Path):
    root = write_root(str(tmp_path), methods=("clip",), seeds=(101,))
    (board,) = leaderboards(Store(root))
    before = next(row for row in board.rows if row.kind == "best")
    final = {"method": "clip", "kind": "best", "seed": 101, "value": 0.9}
    # A longer sweep found better values and repeated the final run with them.
    write_run(root, "clip-best-z-s101", params={"method.temperature.init": 0.2}, state="complete", **final)
    publish_class_result(root, "clip-best-z-s101", dataset="scenes-quick", **final)
    (board,) = leaderboards(Store(root))
    after = next(row for row in board.rows if row.kind == "best")
    assert (before.run_ids, after.run_ids) == (["clip-best-s101"], ["clip-best-z-s101"])
    assert (after.seeds, after.params) == ([101], {"method.temperature.init": 0.2})
    # What the replaced run cost is still counted.
    assert after.seconds_total > before.seconds_total
    (shown,) = aggregate(Store(root))["configurations"]
    assert shown["run_id"] == "clip-best-z-s101"


def test_a_sweep_in_which_everything_fails_gives_up(small_prepared: str, tmp_path: Path):
    config = small_config(tmp_path, *BUDGET, "sweep.num_trials=6", *DIVERGES)
    with pytest.raises(SweepFailedError, match=r"all failed.*\n.*NonFiniteLossError: step \d of method"):
        carry_out(config, small_prepared)
    # Of the 16 runs those that had begun when the fourth failed are the last.
    states = Counter(run["state"] for run in Store(config.output).runs())
    assert 4 <= states["failed"] <= 6
    assert set(states) <= {"failed", "running"}


def finish(job: Job) -> None:
    """Leave the record of a complete run."""
    record = start_record(job)
    selection = {"metric": "acc1", "value": 0.5, "step": 2}
    record.finish("complete", seconds=1.0, steps=2, samples_seen=64, selection=selection)


def test_a_trial_of_two_workers_runs_in_a_train_group(small_prepared: str, tmp_path: Path):
    config = small_config(
        tmp_path,
        "sweep.methods=[clip]",
        "sweep.num_trials=1",
        "sweep.seeds=[5]",
        "sweep.num_default_seeds=0",
        "train.num_workers=2",
        "train.steps=2",
        "train.warmup_steps=1",
        "train.evaluate_every=1",
    )
    write_sweep_file(config, Prepared.open(small_prepared), name="root")
    # A group takes long to start: the final run counts as done, only the trial is left.
    state = SweepState(config, name="root", prepared=small_prepared, dataset="scenes-quick")
    for _ in range(2):
        job = state.next_job()
        assert job is not None
        finish(job)
        state.on_end(job.run_id, "complete")
    storage.delete_folder(storage.join(config.output, "runs", "clip-t000"))
    carry_out(config, small_prepared)
    final, trial = Store(config.output).runs()
    assert (final["kind"], final["seconds"]) == ("best", 1.0)
    assert (trial["kind"], trial["state"], trial["steps"]) == ("trial", "complete", 2)
    # What rank 0 reported came through to the study of the sweep.
    assert list(selection_values(read_curve(config.output, "clip-t000"))) == [1, 2]
    (booked,) = optuna.load_study(study_name="clip", storage=journal(config.output)).trials
    assert (booked.state.name, list(booked.intermediate_values)) == ("COMPLETE", [1])


def journal(root: str) -> optuna.storages.JournalStorage:
    backend = optuna.storages.journal.JournalFileBackend(storage.join(root, "studies.journal"))
    return optuna.storages.JournalStorage(backend)


def test_a_trial_killed_before_its_record_is_asked_again(tmp_path: Path):
    config = small_config(tmp_path, *BUDGET, "sweep.methods=[clip]")
    state = SweepState(config, name="root", prepared="nowhere", dataset="scenes-quick")
    lost, started = state.next_job(), state.next_job()
    assert lost is not None
    assert started is not None
    record = {"run_id": started.run_id, "method": "clip", "kind": "trial", "number": 1, "seed": 0}
    record |= {"state": "running", "params": started.params}
    storage.write_json(storage.join(started.folder, "run.json"), record)
    again = SweepState(config, name="root", prepared="nowhere", dataset="scenes-quick")
    first, second = again.next_job(), again.next_job()
    assert {job.run_id for job in (first, second) if job is not None} == {lost.run_id, started.run_id}
    assert again.num_jobs - again.num_done == 4
