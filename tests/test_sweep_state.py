"""The queue of a sweep, without Ray: order, budgets, resume from records, early stopping."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipelines.config import Config
from pipelines.job import Job, start_record
from pipelines.studies import MethodStudy, open_storage
from pipelines.sweep_state import SweepState, sweep_identity
from tests.pipeline_fixture import small_config


def sweep_config(folder: Path, *overrides: str) -> Config:
    return small_config(
        folder,
        "sweep.methods=[clip,cloob]",
        "sweep.num_trials=3",
        "sweep.seeds=[5,6]",
        "sweep.num_default_seeds=1",
        *overrides,
    )


def open_state(config: Config) -> SweepState:
    return SweepState(config, name="test", prepared="nowhere", dataset="scenes")


def play(job: Job, value: float, *, until: int = 6, finish: bool = True) -> None:
    """Leave the record that a run would leave."""
    record = start_record(job)
    for step in range(2, until + 1, 2):
        record.log({"step": step, "loss": 1.0, "seconds": 0.5 * step})
        record.log({"step": step, "selection": {"metric": "acc1", "value": value}})
    record.flush()
    if finish:
        selection = {"metric": "acc1", "value": value, "step": until}
        record.finish("complete", seconds=3.0, steps=until, samples_seen=until, selection=selection)


def run_all(state: SweepState, value_of) -> list[Job]:
    jobs = []
    while not state.is_exhausted:
        job = state.next_job()
        assert job is not None
        jobs.append(job)
        play(job, value_of(job))
        state.on_end(job.run_id, "complete")
    return jobs


def test_methods_have_equal_budgets_and_the_best_is_rerun_with_fresh_seeds(tmp_path: Path):
    state = open_state(sweep_config(tmp_path))
    values = {"clip-t001": 0.9, "cloob-t002": 0.8}
    jobs = run_all(state, lambda job: values.get(job.run_id, 0.1))
    assert len(jobs) == state.num_jobs == state.num_done == 12
    for method in ("clip", "cloob"):
        own = [job for job in jobs if job.config.method.name == method]
        assert [job.number for job in own if job.kind == "trial"] == [0, 1, 2]
        assert [job.tree["seed"] for job in own if job.kind == "best"] == [5, 6]
        assert [job.tree["seed"] for job in own if job.kind == "default"] == [5]
    by_id = {job.run_id: job for job in jobs}
    best = [job for job in jobs if job.kind == "best"]
    assert {tuple(job.params.items()) for job in best if job.config.method.name == "clip"} == {
        tuple(by_id["clip-t001"].params.items())
    }
    assert all(job.params == by_id["cloob-t002"].params for job in best if job.config.method.name == "cloob")


def test_first_trial_takes_the_untuned_defaults(tmp_path: Path):
    state = open_state(sweep_config(tmp_path))
    first = state.next_job()
    assert first is not None
    assert first.params == {"method.temperature.init": 0.07}


def test_a_new_session_repeats_nothing_and_continues_what_was_interrupted(tmp_path: Path):
    config = sweep_config(tmp_path)
    state = open_state(config)
    done = [state.next_job() for _ in range(3)]
    for job in done:
        play(job, 0.5)
        state.on_end(job.run_id, "complete")
    interrupted = state.next_job()
    play(interrupted, 0.4, until=2, finish=False)

    again = open_state(config)
    assert again.num_done == 3
    resumed = again.next_job()
    assert (resumed.run_id, resumed.params) == (interrupted.run_id, interrupted.params)
    play(resumed, 0.6)
    again.on_end(resumed.run_id, "complete")
    rest = run_all(again, lambda job: 0.2)
    assert not {job.run_id for job in rest} & {job.run_id for job in [*done, interrupted]}
    assert again.num_done == again.num_jobs
    assert open_state(config).next_job() is None


def test_trials_below_the_median_are_pruned_in_record_and_study(tmp_path: Path):
    config = sweep_config(tmp_path, "sweep.methods=[clip]", "sweep.pruner.startup_trials=1")
    state = open_state(config)
    good = state.next_job()
    assert not state.should_stop(good.run_id, 2, 0.9)
    play(good, 0.9)
    state.on_end(good.run_id, "complete")
    poor = state.next_job()
    assert state.should_stop(poor.run_id, 2, 0.1)
    play(poor, 0.1, until=2, finish=False)
    record = state.on_end(poor.run_id, "pruned")
    assert (record["state"], record["steps"], record["selection"]["value"]) == ("pruned", 2, 0.1)
    third = state.next_job()
    assert not state.should_stop(third.run_id, 2, 0.95)
    # A pruned trial is never the best, and a final run is never pruned.
    play(third, 0.95)
    state.on_end(third.run_id, "complete")
    final = next(job for job in iter(state.next_job, None) if job.kind == "best")
    assert final.params == third.params
    assert not state.should_stop(final.run_id, 2, 0.0)


def test_a_dead_trial_is_booked_as_failed_with_its_reason(tmp_path: Path):
    state = open_state(sweep_config(tmp_path, "sweep.methods=[clip]"))
    job = state.next_job()
    record = state.on_end(job.run_id, "failed", error="out of memory")
    assert (record["state"], record["error"]) == ("failed", "out of memory")
    jobs = run_all(state, lambda job: 0.3)
    assert len([j for j in jobs if j.kind == "trial"]) == 2


def test_budgets_may_grow_but_not_what_was_searched(tmp_path: Path):
    base = sweep_identity(sweep_config(tmp_path))
    assert sweep_identity(sweep_config(tmp_path, "sweep.num_trials=9", "sweep.seeds=[1]")) == base
    assert sweep_identity(sweep_config(tmp_path, "train.lr=0.01")) != base
    assert sweep_identity(sweep_config(tmp_path, "sweep.seed=3")) != base


def test_user_settings_below_method_hold_for_every_method(tmp_path: Path):
    config = sweep_config(tmp_path, "method.regularisers.token_entropy.token_over_patches=0.2")
    state = open_state(config)
    jobs = [state.next_job(), state.next_job()]
    assert [job.config.method.name for job in jobs] == ["clip", "cloob"]
    assert all(job.config.method.regularisers.token_entropy.token_over_patches == 0.2 for job in jobs)


def test_space_path_that_does_not_exist_is_refused_with_the_nearest(tmp_path: Path):
    config = sweep_config(tmp_path, "sweep.space={method.transform.bta: {uniform: [1, 2]}}")
    with pytest.raises(ValueError, match=r"space of 'clip', method\.transform\.bta.*did you mean 'beta'"):
        open_state(config)


def test_study_remembers_pruned_values_for_the_sampler(tmp_path: Path):
    import optuna

    config = sweep_config(tmp_path, "sweep.methods=[clip]")
    state = open_state(config)
    job = state.next_job()
    state.should_stop(job.run_id, 2, 0.2)
    play(job, 0.2, until=2, finish=False)
    state.on_end(job.run_id, "pruned")
    storage = open_storage("s3://unused", [])
    study = MethodStudy(
        "clip",
        {"method.temperature.init": optuna.distributions.FloatDistribution(0.02, 0.5, log=True)},
        default_params={"method.temperature.init": 0.07},
        pruner=config.sweep.pruner,
        seed=0,
        optuna_storage=storage,
    )
    study.add_finished(state.records[job.run_id], {2: 0.2})
    (trial,) = optuna.load_study(study_name="clip", storage=storage).trials
    assert (trial.state.name, trial.intermediate_values) == ("PRUNED", {2: 0.2})
