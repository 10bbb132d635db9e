"""PCL's E-step: between epochs the EMA teacher embeds the training split, and its clusters become prototypes.

One worker clusters and sends the result to the others, so that all hold the same bits whatever their number;
the features themselves may differ in the last bits when another number of workers embeds them in other
batches.
"""

from __future__ import annotations

import time
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from models.gather import Gather, ProcessGroupGather
from models.prototypes import PairClusters, Prototypes, cluster_pairs
from models.table_slots import Candidates
from pipelines.collate import BatchSettings
from pipelines.config import TrainConfig
from pipelines.embed_split import EmbedSettings, EmbedSplit, WorkerEmbed
from pipelines.feed import streams
from pipelines.keyed_random import text_key
from pipelines.port import Port, TrainPort
from pipelines.prepared import Prepared
from pipelines.stream_embed import StreamEmbed
from pipelines.train_step import Trainer


def uses_pass(train: TrainConfig, prepared: Prepared, *, has_gpu: bool) -> bool:
    """Whether a group of Train workers leaves embedding to a pass of Ray Data.

    Workers with a GPU embed faster on it than actors without one.
    """
    return streams(train.feed, prepared) and (not has_gpu or train.embed_gpus > 0)


def embedder(trainer: Trainer, prepared: Prepared, batch: BatchSettings, *, port: Port) -> EmbedSplit:
    """Who embeds the training split of a run.

    Args:
        batch: settings of the run's batches.
    """
    train, settings = trainer.train, EmbedSettings(batch, trainer.train.precision)
    # Inside a Tune trial, tasks would wait for CPUs of the trial itself; a plain process may have no Ray.
    in_group = isinstance(port, TrainPort)
    if in_group and uses_pass(train, prepared, has_gpu=trainer.device.type == "cuda"):
        return StreamEmbed(
            prepared.uri,
            settings,
            rank=port.rank,
            num_actors=train.embed_actors,
            gpus_per_actor=train.embed_gpus,
        )
    holds_split = not streams(train.feed, prepared)
    return WorkerEmbed(prepared.uri, settings, trainer.gather, holds_split=holds_split)


def refresh_prototypes(trainer: Trainer, embed: EmbedSplit, *, epoch: int) -> dict[str, Any] | None:
    """Find the prototypes of an epoch; every worker calls it, before its first step of the epoch.

    Returns:
        What to log: seconds, and by table, of each clustering, its size, its smallest cluster, and the
        lowest and highest concentration (their mean is the table's temperature). None when the epoch's
        prototypes are there already or the recipe has none.

    Raises:
        ValueError: the features are not finite or have collapsed; on the first worker.
    """
    outdated = trainer.outdated_prototypes(epoch)
    if not outdated:
        return None
    started = time.monotonic()
    teacher = trainer.teacher
    assert teacher is not None
    assert teacher.encoder is not None
    features = embed(teacher.encoder)
    for name, prototypes in outdated.items():
        if features is not None:
            table = trainer.recipe.tables[name]
            found = find_clusters(
                features,
                table.candidates,
                temperature=table.temperature.init,
                seed=trainer.seed,
                epoch=epoch,
            )
            prototypes.set_(found, epoch=epoch)
        copy_from_first_(prototypes, trainer.gather)
    tables = {name: describe(prototypes) for name, prototypes in outdated.items()}
    return {"seconds": time.monotonic() - started, "tables": tables}


def find_clusters(
    features: Tensor, candidates: Candidates, *, temperature: float, seed: int, epoch: int
) -> list[PairClusters]:
    """One clustering per entry of `num_clusters`.

    Args:
        features: unit embeddings of images and texts, [2, N, D].
        seed: of the run; with the epoch and the clustering's number it decides where k-means starts.

    Raises:
        ValueError: as `cluster_pairs`.
    """
    images, texts = features
    return [
        cluster_pairs(
            images,
            texts,
            num_clusters=count,
            temperature=temperature,
            seed=text_key(f"clusters/{seed}/{epoch}/{number}"),
        )
        for number, count in enumerate(candidates.num_clusters)
    ]


@torch.no_grad()
def copy_from_first_(prototypes: Prototypes, gather: Gather) -> None:
    """Give every worker the first one's prototypes, bit for bit."""
    if isinstance(gather, ProcessGroupGather) and gather.world > 1:
        for buffer in prototypes.buffers():
            dist.broadcast(buffer, group=gather.group, group_src=0)


def describe(prototypes: Prototypes) -> list[dict[str, Any]]:
    """Numbers of each clustering for the run record."""
    found = []
    for number, count in enumerate(prototypes.num_clusters):
        assignment = prototypes.get_buffer(f"sets.{number}.assignment")
        concentration = prototypes.get_buffer(f"sets.{number}.concentration")
        found.append(
            {
                "num_clusters": count,
                "smallest_cluster": int(torch.bincount(assignment, minlength=count).min()),
                "concentration": [float(concentration.min()), float(concentration.max())],
            }
        )
    return found
