"""Where a run happens: in this process, or in a group of Ray Train workers."""

from __future__ import annotations

from typing import Any

import ray
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.tune.integration.ray_train import TuneReportCallback

from pipelines import storage
from pipelines.cluster import DRIVER_RESOURCE
from pipelines.job import Job, identity
from pipelines.port import LocalPort, TrainPort

# Start-up is retried this often before a cluster that is too small becomes an error.
_START_ATTEMPTS = 5


def run_here(job: Job) -> None:
    """Train in this process, without Ray."""
    from pipelines.pretrain import run_job

    run_job(job, LocalPort())


def run_in_train(job: Job, *, inside_tune: bool = False) -> None:
    """Train in a group of Ray Train workers; worker failures resume from the run's checkpoint.

    Args:
        inside_tune: pass the workers' reports on to the Tune trial this is called in.

    Raises:
        ValueError: the run's location is on one machine's disk and the workers are on several.
        ray.train.TrainingFailedError: the run failed more often than train.max_failures allows.
    """
    config = job.config
    refuse_local_root(job.root)
    uses_gpu = config.train.device == "cuda" or (
        config.train.device == "auto" and ray.cluster_resources().get("GPU", 0) >= config.train.num_workers
    )
    filesystem, path = storage.filesystem(storage.join(job.root, "ray"))
    TorchTrainer(
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
    ).fit()


def driver_resources() -> dict[str, float]:
    """What a trial asks for that only drives a Train run: no CPU, so workers never wait for drivers."""
    return {DRIVER_RESOURCE: 1}


def refuse_local_root(root: str) -> None:
    """A run on several machines needs a location all of them see.

    Raises:
        ValueError: `root` is a local path and the cluster has more than one live node.
    """
    nodes = [node for node in ray.nodes() if node["Alive"]]
    if "://" not in root and len(nodes) > 1:
        raise ValueError(
            f"output '{root}' is a local path, but the cluster has {len(nodes)} nodes that would each write "
            "their own; name an s3:// location or a mounted share as file:///..."
        )


def _train_worker(loop_config: dict[str, Any]) -> None:
    from pipelines.pretrain import run_job

    run_job(Job(**loop_config["job"]), TrainPort())
