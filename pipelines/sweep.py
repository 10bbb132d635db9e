"""A sweep: equal tuning budget per method on Ray Tune, fresh seeds for the best, one ranked table."""

from __future__ import annotations

import functools
from datetime import UTC, datetime
from typing import Any

from ray import tune
from rich.console import Console

from pipelines import storage
from pipelines.check_data import check_data
from pipelines.config import Config
from pipelines.config_tree import validate_tree
from pipelines.prepare_once import dataset_name
from pipelines.prepared import Prepared
from pipelines.progress import SweepProgress
from pipelines.resources import driver_resources, gpus_per_worker, refuse_local_root, runs_at_once
from pipelines.run_record import RECORD_FILE
from pipelines.scoring import check_scoring
from pipelines.spaces import method_tree, space_of
from pipelines.sweep_state import SweepMismatchError, SweepState, sweep_identity
from pipelines.tune_bridge import QueueSearcher, QueueStopper, drive_train_run, train_in_actor

SWEEP_FILE = "sweep.json"


class SweepFailedError(ValueError):
    """Nothing of a sweep works; its runs say why."""


def run_sweep(config: Config, prepared_uri: str, *, console: Console) -> None:
    """Carry out what is missing of the sweep at `config.output`; nothing when it is complete.

    Raises:
        ValueError: a bad space, or data the sweep cannot use or be judged on.
        SweepMismatchError: the output belongs to another sweep.
        SweepFailedError: the first runs, or all there are, failed.
    """
    refuse_local_root(config.output)
    prepared = Prepared.open(prepared_uri)
    check_data(config, prepared)
    name = config.output.partition("?")[0].rstrip("/").rpartition("/")[2]
    write_sweep_file(config, prepared, name=name)
    state = SweepState(config, name=name, prepared=prepared_uri, dataset=dataset_name(config))
    remaining = state.num_jobs - state.num_done
    if remaining <= 0:
        console.print(f"All {state.num_jobs} runs of '{name}' are done already.", highlight=False)
        return
    progress = SweepProgress(
        console,
        methods=list(config.sweep.methods),
        num_jobs=state.num_jobs,
        num_done=state.num_done,
        steps=config.train.steps,
        num_trials=config.sweep.num_trials,
    )
    progress.add_restored(state.records)
    searcher = QueueSearcher(state, on_event=progress.on_event)
    with progress:
        _tuner(config, prepared, searcher, num_samples=remaining).fit()
    _conclude(state, searcher, console)


def _conclude(state: SweepState, searcher: QueueSearcher, console: Console) -> None:
    """Say what is left of a sweep that was interrupted.

    Raises:
        SweepFailedError: nothing of it works.
    """
    worked = any(record["state"] in ("complete", "pruned") for record in state.records.values())
    if searcher.gave_up or (searcher.errors and not worked):
        raise SweepFailedError(
            f"{len(searcher.errors)} runs of '{state.name}' all failed and the sweep was ended; start it in "
            "another output with what they ask for:\n  " + "\n  ".join(searcher.errors)
        )
    left = state.num_jobs - state.num_done
    if left:
        console.print(
            f"Interrupted: {left} of {state.num_jobs} runs are left; the same command continues.",
            highlight=False,
        )


def check_sweep(config: Config) -> None:
    """Refuse a bad method or search space, or an output that holds something else, before anything starts.

    Raises:
        ValueError: naming method, path and value.
        SweepMismatchError: the output belongs to another sweep or to single runs.
    """
    for method in config.sweep.methods:
        space_of(config, method)
        check_scoring(validate_tree(method_tree(config, method)))
    _sweep_there(config)


def _sweep_there(config: Config) -> dict[str, Any]:
    """What `sweep.json` at the output says; empty when there is none."""
    uri = storage.join(config.output, SWEEP_FILE)
    if storage.exists(uri):
        found: dict[str, Any] = storage.read_json(uri)
        if found["identity"] != sweep_identity(config):
            raise SweepMismatchError(
                f"'{config.output}' holds a sweep with another configuration; name another output "
                "(output=runs/NAME) or repeat the settings it was started with"
            )
        return found
    if storage.list_files(storage.join(config.output, "runs"), suffix=RECORD_FILE):
        raise SweepMismatchError(
            f"'{config.output}' holds single runs, no sweep; name another output (output=runs/NAME)"
        )
    return {}


def write_sweep_file(config: Config, prepared: Prepared, *, name: str) -> None:
    """Describe the sweep at its root, or check that the one described there is the same.

    Raises:
        SweepMismatchError: the output holds a sweep with another configuration or other data.
    """
    found = _sweep_there(config)
    data_sha = prepared.manifest["data_sha"]
    if found and found["data_sha"] != data_sha:
        raise SweepMismatchError(
            f"'{config.output}' holds a sweep on other data; name another output (output=runs/NAME)"
        )
    storage.write_json(
        storage.join(config.output, SWEEP_FILE),
        {
            "schema_version": 1,
            "name": name,
            "identity": sweep_identity(config),
            "methods": list(dict.fromkeys([*found.get("methods", []), *config.sweep.methods])),
            "main_metric": config.evaluation.main_metric,
            "select_on": config.evaluation.select_on,
            "report_on": config.evaluation.report_on,
            "num_trials": config.sweep.num_trials,
            "seeds": config.sweep.seeds,
            "config": config.tree(),
            "created": found.get("created", datetime.now(UTC).isoformat(timespec="seconds")),
            "dataset": dataset_name(config),
            "data_sha": data_sha,
            "quarantine": prepared.manifest["quarantine"],
            "prepared": prepared.uri,
        },
    )


def is_nested(config: Config) -> bool:
    """Whether a trial needs a worker group of its own instead of training inside its actor."""
    return config.train.num_workers > 1


def _tuner(config: Config, prepared: Prepared, searcher: QueueSearcher, *, num_samples: int) -> tune.Tuner:
    train = drive_train_run if is_nested(config) else train_in_actor
    resources: dict[str, float] = (
        driver_resources()
        if is_nested(config)
        else {"CPU": config.train.cpus_per_worker, "GPU": gpus_per_worker(config)}
    )
    filesystem, path = storage.filesystem(storage.join(config.output, "ray"))
    return tune.Tuner(
        tune.with_resources(functools.partial(train, root=config.output), resources),
        tune_config=tune.TuneConfig(
            search_alg=searcher,
            num_samples=num_samples,
            max_concurrent_trials=runs_at_once(config, prepared),
            # A fresh actor per trial would cost its imports, more than a small trial takes.
            reuse_actors=not is_nested(config),
        ),
        run_config=tune.RunConfig(
            # Each session is its own experiment to Tune; what is done is read from the run records.
            name=datetime.now(UTC).strftime("tune-%Y%m%dT%H%M%S"),
            storage_path=path,
            storage_filesystem=filesystem,
            stop=QueueStopper(searcher),
            failure_config=tune.FailureConfig(max_failures=config.train.max_failures),
            verbose=0,
        ),
    )
