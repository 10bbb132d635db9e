"""One Optuna study per method, rebuilt from run records: the records are what is true.

Trial states are written here: complete only at full length, pruned with the last value, failed with the
reason. (A study driven through Ray's own adapter books stopped trials as complete.)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.storages import BaseStorage, InMemoryStorage, JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import Trial, TrialState

from pipelines import storage
from pipelines.config import PrunerConfig

_STATES = {"complete": TrialState.COMPLETE, "pruned": TrialState.PRUNED, "failed": TrialState.FAIL}
_JOURNAL = "studies.journal"


class MethodStudy:
    """The tuning of one method: values asked for, intermediate values, final states."""

    def __init__(
        self,
        method: str,
        distributions: Mapping[str, BaseDistribution],
        *,
        default_params: Mapping[str, Any],
        pruner: PrunerConfig,
        seed: int,
        optuna_storage: BaseStorage,
    ) -> None:
        self.method = method
        self._distributions = dict(distributions)
        self._default = dict(default_params)
        self._trials: dict[int, Trial] = {}
        self._study = optuna.create_study(
            study_name=method,
            storage=optuna_storage,
            direction="maximize",
            sampler=optuna.samplers.TPESampler(seed=seed, multivariate=True, n_startup_trials=5),
            pruner=_pruner(pruner),
        )

    def add_finished(self, record: Mapping[str, Any], values: Mapping[int, float]) -> None:
        """Take over a trial that an earlier session finished.

        Args:
            record: its run record.
            values: selection values by step.
        """
        final = values[max(values)] if values else None
        state = _STATES[record["state"]]
        if final is None:
            state = TrialState.FAIL
        self._study.add_trial(
            optuna.trial.create_trial(
                state=state,
                params={name: record["params"][name] for name in self._distributions},
                distributions=self._distributions,
                value=final if state is not TrialState.FAIL else None,
                intermediate_values=dict(values),
                user_attrs={"run_id": record["run_id"]},
            )
        )

    def ask(self, number: int) -> dict[str, Any]:
        """Values for trial `number`; the first trial takes the untuned defaults."""
        if number == 0 and self._in_domain(self._default):
            self._study.enqueue_trial(self._default)
        return self._start(number)

    def ask_again(self, number: int, params: Mapping[str, Any], values: Mapping[int, float]) -> None:
        """Take up an interrupted trial with the values it had."""
        self._study.enqueue_trial(dict(params))
        self._start(number)
        for step, value in sorted(values.items()):
            self._trials[number].report(value, step)

    def _start(self, number: int) -> dict[str, Any]:
        trial = self._study.ask(self._distributions)
        trial.set_user_attr("number", number)
        self._trials[number] = trial
        return dict(trial.params)

    def should_stop(self, number: int, step: int, value: float) -> bool:
        """Book an intermediate value; True when the trial is not worth continuing."""
        trial = self._trials[number]
        trial.report(value, step)
        return bool(trial.should_prune())

    def finish(self, number: int, state: str, value: float | None) -> None:
        """Book the final state."""
        trial = self._trials.pop(number)
        known = value is not None and math.isfinite(value)
        booked = _STATES[state] if known else TrialState.FAIL
        # A pruned trial's value is its last intermediate one, which the study has.
        self._study.tell(trial, value if booked is TrialState.COMPLETE else None, state=booked)

    def best_params(self) -> dict[str, Any]:
        """Values of the best trial that ran to the end; the defaults when none did."""
        complete = [t for t in self._study.get_trials(deepcopy=False) if t.state is TrialState.COMPLETE]
        if not complete:
            return dict(self._default)
        # The earlier of equals, so that a repeat chooses the same.
        best = max(complete, key=lambda t: (t.value, -t.number))
        return dict(best.params)

    def _in_domain(self, params: Mapping[str, Any]) -> bool:
        return all(
            domain._contains(domain.to_internal_repr(params[name]))
            for name, domain in self._distributions.items()
        )


def open_storage(root: str, names: Sequence[str]) -> BaseStorage:
    """Storage for a session's studies: a journal file beside local results, memory for an object store.

    The journal is for looking at with Optuna's tools while and after the sweep runs; it is written
    anew from the run records in each session.
    """
    if "://" in root:
        return InMemoryStorage()
    place = storage.join(root, _JOURNAL)
    storage.write_bytes(place, b"")
    return JournalStorage(JournalFileBackend(storage.filesystem(place)[1]))


def _pruner(config: PrunerConfig) -> optuna.pruners.BasePruner:
    if config.kind == "none":
        return optuna.pruners.NopPruner()
    return optuna.pruners.MedianPruner(n_startup_trials=config.startup_trials)
