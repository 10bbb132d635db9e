"""What a run takes of a cluster, and what a cluster cannot give, found out before anything waits for it."""

from __future__ import annotations

import math

import ray

from pipelines.cluster import DRIVER_RESOURCE
from pipelines.config import Config
from pipelines.feed import streams
from pipelines.prepared import Prepared
from pipelines.prototype_step import uses_pass
from pipelines.stream_feed import CPUS_PER_TASK


def runs_at_once(config: Config, prepared: Prepared) -> int:
    """Runs of this configuration that fit the cluster together, at most `sweep.max_concurrent`.

    A run that streams needs CPUs beside its workers: if those take all, the tasks that feed them never
    start and nothing says so.

    Raises:
        ValueError: not even one run fits.
    """
    train, total = config.train, ray.cluster_resources()
    cpus = train.cpus_per_worker * train.num_workers
    if streams(config.train.feed, prepared) or config.scoring.mode == "stream":
        cpus += CPUS_PER_TASK * train.num_workers
    scoring = config.scoring
    scorers = scoring.min_actors * train.num_workers if scoring.mode == "stream" else 0
    cpus += scoring.cpus_per_actor * scorers
    fits = math.floor(total.get("CPU", 0) / cpus)
    gpus = gpus_per_worker(config) * train.num_workers + embedding_gpus(config, prepared)
    gpus += scoring.gpus_per_actor * scorers
    if gpus:
        fits = min(fits, math.floor(total.get("GPU", 0) / gpus))
    if fits < 1:
        raise ValueError(
            f"one run needs {cpus:g} CPUs ({train.num_workers} workers of {train.cpus_per_worker:g}, and the "
            f"tasks and scorers that feed them) and {gpus:g} GPUs, the cluster has {total.get('CPU', 0):g} "
            f"CPUs and {total.get('GPU', 0):g} GPUs; lower train.num_workers, train.cpus_per_worker, "
            "train.embed_gpus or what scoring asks for each actor"
        )
    return min(fits, config.sweep.max_concurrent or fits)


def gpus_per_worker(config: Config) -> int:
    """1 when workers train on GPUs: asked for, or there is one for each worker of a run."""
    if config.train.device == "auto":
        return int(ray.cluster_resources().get("GPU", 0) >= config.train.num_workers)
    return int(config.train.device == "cuda")


def embedding_gpus(config: Config, prepared: Prepared) -> float:
    """GPUs beside the workers' for the actors that embed the training split between epochs."""
    tables = config.method.tables.values()
    has_prototypes = any(table.candidates.kind == "prototypes" for table in tables)
    if not has_prototypes or not uses_pass(config.train, prepared, has_gpu=gpus_per_worker(config) > 0):
        return 0.0
    return config.train.embed_actors * config.train.embed_gpus


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
