"""Where a run happens: in this process, or in a group of Ray Train workers."""

from __future__ import annotations

from typing import Any

from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
from ray.train.torch import TorchConfig, TorchTrainer
from ray.tune.integration.ray_train import TuneReportCallback

from pipelines import storage
from pipelines.job import Job, identity, noted_failure
from pipelines.port import LocalPort, TrainPort
from pipelines.prepared import Prepared
from pipelines.resources import gpus_per_worker, refuse_local_root, runs_at_once
from pipelines.run_record import read_record


class RunFailedError(ValueError):
    """A run ended as failed; the message is its record's."""


# Start-up is retried this often before a cluster that is too small becomes an error.
_START_ATTEMPTS = 5


def run_here(job: Job) -> None:
    """Train in this process, without Ray.

    Raises:
        ValueError: the data or the configuration cannot be used.
        NonFiniteLossError: training diverged.
    """
    from pipelines.pretrain import run_job

    run_job(job, LocalPort())


def run_in_train(job: Job, *, inside_tune: bool = False) -> None:
    """Train in a group of Ray Train workers; worker failures resume from the run's checkpoint.

    Args:
        inside_tune: pass the workers' reports on to the Tune trial this is called in.

    Raises:
        ValueError: the run's location is on one machine's disk and the workers are on several, or the cluster
            is too small for the run.
        RunFailedError: the data or the configuration cannot be used, training diverged, or workers died more
            often than train.max_failures allows.
    """
    refuse_local_root(job.root)
    runs_at_once(job.config, Prepared.open(job.prepared))
    try:
        _trainer(job, inside_tune=inside_tune).fit()
    except TrainingFailedError as error:
        reason = recorded_failure(job) or noted_failure(job.root, job.run_id) or str(error)
        raise RunFailedError(f"run '{job.run_id}' failed: {reason}") from error
    if recorded := recorded_failure(job):
        raise RunFailedError(f"run '{job.run_id}' failed: {recorded}")


def recorded_failure(job: Job) -> str | None:
    """The error of a run whose record says that trying again is of no use."""
    record = read_record(job.root, job.run_id) or {}
    return str(record["error"]) if record.get("state") == "failed" else None


def _trainer(job: Job, *, inside_tune: bool) -> TorchTrainer:
    config = job.config
    uses_gpu = gpus_per_worker(config) > 0
    filesystem, path = storage.filesystem(storage.join(job.root, "ray"))
    return TorchTrainer(
        _train_worker,
        train_loop_config={"job": job.as_dict()},
        torch_config=TorchConfig(backend="nccl" if uses_gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=config.train.num_workers,
            use_gpu=uses_gpu,
            resources_per_worker={"CPU": config.train.cpus_per_worker, **({"GPU": 1} if uses_gpu else {})},
        ),
        run_config=RunConfig(
            # The same name would silently resume: only the same configuration may.
            name=f"{job.run_id}-{identity(job.tree)}",
            storage_path=path,
            storage_filesystem=filesystem,
            callbacks=[TuneReportCallback()] if inside_tune else [],
            failure_config=FailureConfig(
                max_failures=config.train.max_failures, controller_failure_limit=_START_ATTEMPTS
            ),
        ),
    )


def _train_worker(loop_config: dict[str, Any]) -> None:
    from pipelines.pretrain import run_job

    job = Job(**loop_config["job"])
    # Train restarts a group whatever it died of; an error that is in the record would come again.
    if recorded_failure(job) is None:
        run_job(job, TrainPort())
