"""Runs: the same curve for the same seed and any number of workers, resume, results, refusals."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipelines import storage
from pipelines.checkpoint import CheckpointError
from pipelines.job import identity
from pipelines.launch import run_here, run_in_train
from pipelines.port import LocalPort
from pipelines.pretrain import run_job
from pipelines.results import Store
from pipelines.train_step import NonFiniteLossError
from tests.pipeline_fixture import small_config, small_job

pytestmark = pytest.mark.ray


def losses(root: str, run_id: str) -> list[float]:
    return [line["loss"] for line in Store(root).curve(run_id) if "loss" in line]


def train(tmp_path: Path, prepared: str, name: str, *overrides: str) -> list[float]:
    config = small_config(tmp_path, f"output={tmp_path / name}", *overrides)
    run_here(small_job(config, prepared, "run"))
    return losses(config.output, "run")


def test_same_seed_gives_the_same_curve_and_another_seed_another(tmp_path: Path, small_prepared: str):
    first = train(tmp_path, small_prepared, "first", "method=aclip")
    again = train(tmp_path, small_prepared, "again", "method=aclip")
    other = train(tmp_path, small_prepared, "other", "method=aclip", "seed=1")
    assert len(first) == 6
    assert again == first
    assert other != first


def test_two_ray_train_workers_follow_the_curve_of_one(tmp_path: Path, small_prepared: str):
    curves = {}
    for workers in (1, 2):
        overrides = ("method=tier", f"train.num_workers={workers}", f"output={tmp_path / str(workers)}")
        config = small_config(tmp_path, *overrides)
        run_in_train(small_job(config, small_prepared, "run"))
        curves[workers] = losses(config.output, "run")
    assert curves[2] == pytest.approx(curves[1], rel=1e-4)
    # Control: the curves of another seed are apart by much more than that.
    other = train(tmp_path, small_prepared, "other", "method=tier", "seed=1")
    assert other != pytest.approx(curves[1], rel=1e-3)


class Killed(BaseException):
    """Stands for a signal: nothing in the run may catch it."""


class KillingPort(LocalPort):
    def __init__(self, at_step: int) -> None:
        self.at_step = at_step

    def report(self, metrics):
        if metrics["step"] == self.at_step:
            raise Killed


def test_killed_run_resumes_to_the_uninterrupted_curve(tmp_path: Path, small_prepared: str):
    whole = train(tmp_path, small_prepared, "whole", "method=aclip")
    config = small_config(tmp_path, "method=aclip", f"output={tmp_path / 'killed'}")
    job = small_job(config, small_prepared, "run")
    with pytest.raises(Killed):
        run_job(job, KillingPort(at_step=4))
    assert storage.read_json(storage.join(job.folder, "run.json"))["state"] == "running"
    run_here(job)
    assert losses(config.output, "run") == pytest.approx(whole, rel=1e-6)
    record = storage.read_json(storage.join(job.folder, "run.json"))
    assert (record["state"], record["steps"], record["attempts"]) == ("complete", 6, 2)


def test_resume_with_another_configuration_is_refused(tmp_path: Path, small_prepared: str):
    config = small_config(tmp_path)
    with pytest.raises(Killed):
        run_job(small_job(config, small_prepared, "run"), KillingPort(at_step=2))
    changed = small_config(tmp_path, "train.lr=0.01")
    assert identity(changed.tree()) != identity(config.tree())
    with pytest.raises(CheckpointError, match="another configuration"):
        run_here(small_job(changed, small_prepared, "run"))


def test_workers_and_log_settings_do_not_change_a_runs_identity(tmp_path: Path):
    config = small_config(tmp_path)
    moved = small_config(tmp_path, "output=/elsewhere", "train.num_workers=2", "train.log_every=3")
    assert identity(moved.tree()) == identity(config.tree())


def test_run_publishes_every_task_with_both_keep_rules(tmp_path: Path, small_prepared: str):
    config = small_config(tmp_path, "method=aclip")
    run_here(small_job(config, small_prepared, "run"))
    store = Store(config.output)
    tasks = {(r["task"], r["clipfleet"]["keep_rule"]) for r in store.results()}
    zero_shot = {"zeroshot_classification", "zeroshot_multi_label", "zeroshot_retrieval"}
    assert tasks == {(task, rule) for task in zero_shot for rule in ("all", "kept")} | {
        ("pointing_game", "all")
    }
    for result in store.results():
        assert result["clipfleet"]["split"] == result["clipfleet"]["report_on"] == "test"
        assert result["clipfleet"]["select_on"] == "selection"
    samples = store.samples("run")
    assert samples is not None
    assert len(samples) == 2
    # 16 patches, keep ratio 0.5: int(16 * 0.5) + 1.
    assert [sum(kept) for kept in samples["is_kept"].to_pylist()] == [9, 9]


def test_a_run_without_sample_images_completes(tmp_path: Path, small_prepared: str):
    config = small_config(tmp_path, "evaluation.num_samples=0")
    run_here(small_job(config, small_prepared, "run"))
    store = Store(config.output)
    assert store.runs()[0]["state"] == "complete"
    assert store.samples("run") is None


def test_divergence_fails_the_run_with_step_method_and_terms(tmp_path: Path, small_prepared: str):
    config = small_config(tmp_path, "train.lr=1e30", "train.max_grad_norm=null", "train.warmup_steps=0")
    job = small_job(config, small_prepared, "run")
    with pytest.raises(NonFiniteLossError, match=r"step \d+ of method 'clip'.*main="):
        run_here(job)
    record = storage.read_json(storage.join(job.folder, "run.json"))
    assert record["state"] == "failed"
    assert "NonFiniteLossError" in record["error"]


def test_trials_keep_no_weights(tmp_path: Path, small_prepared: str):
    config = small_config(tmp_path)
    run_here(small_job(config, small_prepared, "kept"))
    run_here(small_job(config, small_prepared, "trial", kind="trial"))
    folder = storage.join(config.output, "runs")
    assert storage.list_files(storage.join(folder, "kept", "checkpoints"), suffix=".pt")
    assert not storage.list_files(storage.join(folder, "trial", "checkpoints"))


def test_batch_larger_than_the_data_is_refused(tmp_path: Path, small_prepared: str):
    config = small_config(tmp_path, "train.batch_size=512")
    with pytest.raises(ValueError, match=r"train\.batch_size=512 exceeds the 192 training rows"):
        run_here(small_job(config, small_prepared, "run"))
