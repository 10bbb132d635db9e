"""Between Ray Tune and the sweep's queue: Tune places and restarts trials, the queue decides.

One search algorithm hands out the jobs of all methods, trials and final runs alike, so there is no
barrier between them and the actors are reused throughout.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ray import tune
from ray.tune.search import Searcher

from pipelines.job import Job, noted_failure
from pipelines.launch import RunFailedError, recorded_failure, run_in_train
from pipelines.port import TunePort
from pipelines.sweep_state import SweepState

Listener = Callable[[str, Job, dict[str, Any]], None]


# When this many runs have ended and every one of them failed, the sweep ends.
_FAILURES_TO_GIVE_UP = 4


class QueueSearcher(Searcher):
    """Jobs of the queue as Tune suggestions; a suggestion is a run id, the job lies in the run's folder."""

    def __init__(self, state: SweepState, *, on_event: Listener | None = None) -> None:
        super().__init__(metric="value", mode="max")
        self._state = state
        self._on_event: Listener = on_event or (lambda event, job, details: None)
        self._run_of: dict[str, str] = {}
        self._stopped: set[str] = set()
        self._num_ended = 0
        self._errors: list[str] = []

    @property
    def gave_up(self) -> bool:
        """True when the first runs failed one and all: the rest would too."""
        return self._num_ended == len(self._errors) >= _FAILURES_TO_GIVE_UP

    @property
    def errors(self) -> list[str]:
        """Reasons of the runs that failed in this session."""
        return self._errors

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        if self._state.is_exhausted or self.gave_up:
            return str(Searcher.FINISHED)
        job = self._state.next_job()
        if job is None:
            return None
        job.write()
        self._run_of[trial_id] = job.run_id
        self._on_event("start", job, {})
        return {"run_id": job.run_id}

    def should_stop(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Book a trial's report; True ends it early."""
        run_id = self._run_of.get(trial_id)
        if run_id is None or "step" not in result:
            return False
        self._on_event("report", self._state.running(run_id), result)
        stops = self._state.should_stop(run_id, result["step"], result.get("value"))
        if stops:
            self._stopped.add(trial_id)
        return stops

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        run_id = self._run_of.pop(trial_id, None)
        if run_id is None:
            return
        job = self._state.running(run_id)
        if error:
            state = "failed"
            reason = (
                noted_failure(job.root, run_id)
                or "its process died more often than train.max_failures allows"
            )
        else:
            state, reason = "pruned" if trial_id in self._stopped else "complete", None
        record = dict(self._state.on_end(run_id, state, error=reason))
        self._num_ended += 1
        if record["state"] == "failed":
            self._errors.append(f"{run_id}: {record['error']}")
        self._on_event("end", job, record)

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        return  # reports are booked where they can stop the trial

    # The run records are the state of a sweep; Tune's own snapshots carry none of it.
    def save(self, checkpoint_path: str) -> None:
        return

    def restore(self, checkpoint_path: str) -> None:
        return

    def get_state(self) -> dict[str, Any]:
        return {}

    def __getstate__(self) -> dict[str, Any]:
        return {}


class QueueStopper(tune.Stopper):
    """Stops what the queue's pruner stops."""

    def __init__(self, searcher: QueueSearcher) -> None:
        self._searcher = searcher

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return self._searcher.should_stop(trial_id, result)

    def stop_all(self) -> bool:
        return self._searcher.gave_up


def train_in_actor(config: dict[str, Any], *, root: str) -> None:
    """Tune function: train one job inside the trial's actor."""
    from pipelines.pretrain import run_job
    from pipelines.train_step import NonFiniteLossError

    try:
        run_job(Job.read(root, config["run_id"]), TunePort())
    except (NonFiniteLossError, ValueError):
        # The reason is in the run's record. It would come again, so the trial ends instead of being retried.
        return


def drive_train_run(config: dict[str, Any], *, root: str) -> None:
    """Tune function: drive a Ray Train run of several workers and pass on what it reports."""
    job = Job.read(root, config["run_id"])
    try:
        run_in_train(job, inside_tune=True)
    except RunFailedError:
        # As in `train_in_actor`: only what may pass another time is left to Tune to retry.
        if recorded_failure(job) is None:
            raise
