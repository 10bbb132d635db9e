"""PCL's E-step: what is embedded, that every worker holds the same prototypes, when it runs, and resumes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from torch import Tensor

from models.encoder import Encoder
from models.gather import SingleProcess
from models.table_slots import Candidates
from pipelines import embed_split, storage
from pipelines.check_data import check_data
from pipelines.checkpoint import latest_place, load_checkpoint, save_checkpoint
from pipelines.config_tree import load_config
from pipelines.embed_split import WorkerEmbed
from pipelines.job import identity
from pipelines.launch import run_here, run_in_train
from pipelines.port import LocalPort, TrainPort, TunePort
from pipelines.prepared import Prepared
from pipelines.pretrain import run_job
from pipelines.prototype_step import embedder, find_clusters, refresh_prototypes, uses_pass
from pipelines.results import read_curve
from pipelines.stream_embed import StreamEmbed
from tests.pipeline_fixture import small_config, small_job
from tests.prepared_fixture import IMAGE_SIZE, prepared_table, write_prepared
from tests.prototype_ranks import (
    BATCH,
    NUM_ROWS,
    SETTINGS,
    SHARD_ROWS,
    TRAIN,
    Found,
    build_trainer,
    prototypes_of,
)


@pytest.fixture(scope="module")
def uri(tmp_path_factory) -> str:
    return write_prepared(tmp_path_factory.mktemp("prepared"), shard_rows=SHARD_ROWS)


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    """A teacher's towers."""
    teacher = build_trainer().teacher
    assert teacher is not None
    assert teacher.encoder is not None
    return teacher.encoder


def in_this_process(uri: str, encoder: Encoder, settings=SETTINGS, *, holds_split: bool = True) -> Tensor:
    found = WorkerEmbed(uri, settings, SingleProcess(), holds_split=holds_split)(encoder)
    assert found is not None
    return found


# What is embedded


def loop_embeds(encoder: Encoder, texts: Callable[[dict[str, Any]], list[int]]) -> Tensor:
    """Row by row, image and text alone."""
    found = []
    for row in prepared_table(NUM_ROWS).to_pylist():
        pixels = np.frombuffer(row["image"], np.uint8).reshape(IMAGE_SIZE, IMAGE_SIZE, 3)
        image = torch.tensor(pixels).permute(2, 0, 1)[None].float()
        ids = torch.tensor([texts(row)])
        with torch.no_grad():
            text = encoder.embed_texts(ids, torch.ones_like(ids, dtype=torch.bool))[0]
            found.append(torch.stack([encoder.embed_images(image)[0], text]))
    return torch.cat(found, 1)


def test_every_row_is_embedded_whole_with_its_first_caption(uri, encoder):
    expected = loop_embeds(encoder, lambda row: row["caption_tokens"][0])
    found = in_this_process(uri, encoder)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert (found.roll(1, 1) - expected).abs().amax((1, 2)).min() > 1e-2
    other = loop_embeds(encoder, lambda row: row["caption_tokens"][1])
    assert (found - other)[1].abs().max() > 1e-2


def test_reports_give_their_first_sentences(uri, encoder):
    settings = replace(SETTINGS, batch=replace(BATCH, text="sentence", sentences_per_text=2, num_texts=3))

    def first(row: dict[str, Any]) -> list[int]:
        if not row["sentence_tokens"]:
            return row["caption_tokens"][0]
        return [1, *(token for sentence in row["sentence_tokens"] for token in sentence[1:-1]), 2]

    found = in_this_process(uri, encoder, settings)
    torch.testing.assert_close(found, loop_embeds(encoder, first), atol=1e-5, rtol=0)
    assert (found - in_this_process(uri, encoder))[1].abs().max() > 1e-2


def test_neither_shards_nor_batches_matter(uri, encoder, monkeypatch):
    whole = in_this_process(uri, encoder)
    torch.testing.assert_close(in_this_process(uri, encoder, holds_split=False), whole, atol=1e-5, rtol=0)
    monkeypatch.setattr(embed_split, "ROWS_PER_BATCH", 7)
    torch.testing.assert_close(in_this_process(uri, encoder), whole, atol=1e-5, rtol=0)


@ray.remote
class Occupant:
    """Takes CPUs and does nothing."""

    def ready(self) -> bool:
        return True


@pytest.mark.ray
def test_a_pass_of_ray_data_embeds_the_same_and_needs_no_free_cpu(ray_session, uri, encoder):
    occupant = Occupant.options(num_cpus=ray.cluster_resources()["CPU"]).remote()
    assert ray.get(occupant.ready.remote(), timeout=60)
    try:
        streamed = StreamEmbed(uri, SETTINGS, rank=0)(encoder)
    finally:
        ray.kill(occupant)
    here = in_this_process(uri, encoder)
    torch.testing.assert_close(streamed, here, atol=1e-5, rtol=0)
    candidates = Candidates(kind="prototypes", num_clusters=(4, 9))
    both = [find_clusters(f, candidates, temperature=0.2, seed=0, epoch=1) for f in (streamed, here)]
    for one, other in zip(*both, strict=True):
        assert torch.equal(one.assignment, other.assignment)
    # The other workers wait for what this one sends.
    assert StreamEmbed(uri, SETTINGS, rank=1)(encoder) is None


# Clustering


def clustered(seed: int, noise: float = 0.05) -> Tensor:
    """Embeddings of 60 pairs around 6 far points, [2, 60, 8]."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.eye(8)[torch.arange(60) % 6].expand(2, -1, -1)
    return torch.nn.functional.normalize(centres + noise * torch.randn(2, 60, 8, generator=generator), dim=2)


def test_clusters_survive_the_rounding_of_another_batch_split():
    features = clustered(0)
    rounded = features + 1e-6 * torch.randn(features.shape, generator=torch.Generator().manual_seed(1))
    candidates = Candidates(kind="prototypes", num_clusters=(6, 3))
    one, other = (find_clusters(f, candidates, temperature=0.2, seed=0, epoch=1) for f in (features, rounded))
    assert [len(found.concentration) for found in one] == [6, 3]
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a.assignment, b.assignment)
        torch.testing.assert_close(a.image_centroids, b.image_centroids, atol=1e-5, rtol=0)
    same = one[0].assignment[:, None] == one[0].assignment[None, :]
    assert torch.equal(same, torch.arange(60)[:, None] % 6 == torch.arange(60)[None, :] % 6)


def test_every_run_epoch_and_clustering_starts_elsewhere():
    features = clustered(0, noise=1.0)
    twice = Candidates(kind="prototypes", num_clusters=(6, 6))

    def assignments(seed: int, epoch: int) -> list[Tensor]:
        found = find_clusters(features, twice, temperature=0.2, seed=seed, epoch=epoch)
        return [clusters.assignment for clusters in found]

    base, *others = [*assignments(0, 1), *assignments(0, 2), *assignments(1, 1)]
    assert not any(torch.equal(base, other) for other in others)
    assert torch.equal(base, assignments(0, 1)[0])


def test_a_step_reports_what_it_found():
    trainer = build_trainer()
    features = torch.nn.functional.normalize(
        torch.randn(2, NUM_ROWS, 8, generator=torch.Generator().manual_seed(0)), dim=2
    )
    assert refresh_prototypes(trainer, lambda _: features, epoch=0) is None
    assert not prototypes_of(trainer).is_ready
    found = refresh_prototypes(trainer, lambda _: features, epoch=1)
    assert found is not None
    assert found["seconds"] >= 0
    first, second = found["tables"]["prototypes"]
    assert (first["num_clusters"], second["num_clusters"]) == (4, 9)
    sizes = torch.bincount(prototypes_of(trainer).get_buffer("sets.0.assignment"))
    assert first["smallest_cluster"] == sizes.min() <= NUM_ROWS // 4
    phi = prototypes_of(trainer).get_buffer("sets.0.concentration")
    assert first["concentration"] == [phi.min(), phi.max()]
    assert phi.mean() == pytest.approx(0.2)
    # The epoch's prototypes are there; the next epoch's are not.
    assert refresh_prototypes(trainer, lambda _: features, epoch=1) is None
    assert trainer.outdated_prototypes(2).keys() == {"prototypes"}


def test_two_workers_hold_the_same_prototypes_and_those_of_one_process():
    done = subprocess.run(
        [sys.executable, "-m", "tests.prototype_ranks"],
        cwd=Path(__file__).parents[1],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    first, second = (Found(**rank) for rank in json.loads(done.stdout))
    assert first.digest == second.digest
    for rank in (first, second):
        assert rank.same_assignment
        # float64 rounding of towers that see other batches
        assert rank.difference < 1e-12
        assert rank.loss == pytest.approx(rank.single_loss, rel=1e-12)
    # The control: without the copy the second worker has none.
    assert (first.epoch_without_copy, second.epoch_without_copy) == (1, -1)


# Who embeds


def test_who_embeds(uri):
    trainer, prepared = build_trainer(), Prepared.open(uri)
    worker = object.__new__(TrainPort)
    worker.rank, worker.world = 1, 2

    def chosen(feed: str, port: LocalPort | TrainPort | TunePort) -> WorkerEmbed | StreamEmbed:
        trainer.train = TRAIN.model_copy(update={"feed": feed, "embed_actors": 3})
        return embedder(trainer, prepared, BATCH, port=port)

    assert chosen("memory", worker) == WorkerEmbed(uri, SETTINGS, SingleProcess(), holds_split=True)
    for port in (LocalPort(), TunePort()):
        assert chosen("stream", port) == WorkerEmbed(uri, SETTINGS, SingleProcess(), holds_split=False)
    assert chosen("stream", worker) == StreamEmbed(uri, SETTINGS, rank=1, num_actors=3)


def test_workers_with_gpus_embed_on_them_unless_actors_have_some(uri):
    prepared, streaming = Prepared.open(uri), TRAIN.model_copy(update={"feed": "stream"})
    assert uses_pass(streaming, prepared, has_gpu=False)
    assert not uses_pass(streaming, prepared, has_gpu=True)
    assert uses_pass(streaming.model_copy(update={"embed_gpus": 0.25}), prepared, has_gpu=True)
    assert not uses_pass(TRAIN, prepared, has_gpu=False)


def test_more_prototypes_than_rows_are_refused_before_anything_starts(uri):
    few = "method.extra_tables.prototypes.candidates.num_clusters=[8, 66]"
    config = load_config([], ["method=pcl", few])
    with pytest.raises(
        ValueError,
        match=r"method\.extra_tables\.prototypes\.candidates\.num_clusters=\[8, 66\]: there can be no more "
        r"prototypes than the 65 training rows; lower the largest",
    ):
        check_data(config, Prepared.open(uri))


# A run of 6 steps an epoch

PCL_RUN = (
    "method=pcl",
    "method.extra_tables.prototypes.candidates.num_clusters=[4, 8]",
    # Fast enough for an epoch's prototypes to differ from another's.
    "method.teacher.decay=0.5",
    "train.steps=14",
    "train.lr=0.003",
)


def pcl_job(folder: Path, prepared: str, *overrides: str):
    """A trial: it ends without an evaluation on the report split."""
    config = small_config(folder, *PCL_RUN, *overrides)
    return small_job(config, prepared, "run", kind="trial")


def curve(job) -> list[dict[str, Any]]:
    return [line for line in read_curve(job.root, job.run_id) if "loss" in line]


def losses(job) -> list[float]:
    return [line["loss"] for line in curve(job)]


@pytest.fixture(scope="module")
def uninterrupted(small_prepared, tmp_path_factory) -> list[float]:
    job = pcl_job(tmp_path_factory.mktemp("whole"), small_prepared)
    run_here(job)
    return losses(job)


@pytest.mark.ray
@pytest.mark.parametrize(("first_epoch", "steps"), [(0, [1, 7, 13]), (2, [13])])
def test_prototypes_are_found_before_an_epochs_first_step(tmp_path, small_prepared, first_epoch, steps):
    first = f"method.extra_tables.prototypes.candidates.first_epoch={first_epoch}"
    job = pcl_job(tmp_path, small_prepared, first, "train.log_every=14")
    run_here(job)
    lines = [line for line in curve(job) if "prototypes" in line]
    assert [line["step"] for line in lines] == steps
    assert [line["epoch"] for line in lines] == [(step - 1) // 6 for step in steps]
    assert [entry["num_clusters"] for entry in lines[0]["prototypes"]["tables"]["prototypes"]] == [4, 8]
    is_used = {line["step"]: line["terms"]["prototypes"] > 0 for line in curve(job)}
    assert is_used == {step: step >= steps[0] for step in sorted({1, 14, *steps})}


class Killed(BaseException):
    """Stands for a signal: nothing in the run may catch it."""


class KillingPort(LocalPort):
    def __init__(self, at_step: int) -> None:
        self.at_step = at_step

    def report(self, metrics):
        if metrics["step"] == self.at_step:
            raise Killed


def killed_run(folder: Path, prepared: str, at_step: int):
    job = pcl_job(folder, prepared)
    with pytest.raises(Killed):
        run_job(job, KillingPort(at_step))
    return job


@pytest.mark.ray
@pytest.mark.parametrize("at_step", [6, 8])
def test_a_killed_run_resumes_to_the_uninterrupted_curve(tmp_path, small_prepared, uninterrupted, at_step):
    job = killed_run(tmp_path, small_prepared, at_step)
    run_here(job)
    assert losses(job) == pytest.approx(uninterrupted, rel=1e-6)
    # Found once for each epoch, whichever attempt it was.
    assert [line["step"] for line in curve(job) if "prototypes" in line] == [7, 13]


@pytest.mark.ray
def test_prototypes_of_another_moment_change_the_curve(tmp_path, small_prepared, uninterrupted):
    """The control: a checkpoint in the middle of epoch 1 that does not know whose prototypes it holds."""
    job = killed_run(tmp_path, small_prepared, 8)
    place = latest_place(job.checkpoints)
    assert place is not None
    state = load_checkpoint(place)
    state["trainer"]["model"]["objective.tables.prototypes.memory.epoch"].fill_(0)
    storage.delete_folder(place)
    save_checkpoint(job.checkpoints, state, identity=identity(job.tree))
    run_here(job)
    assert [line["step"] for line in curve(job) if "prototypes" in line] == [7, 9, 13]
    assert losses(job)[:8] == pytest.approx(uninterrupted[:8], rel=1e-6)
    assert losses(job)[8] != pytest.approx(uninterrupted[8], rel=1e-4)


@pytest.mark.ray
def test_two_ray_train_workers_follow_the_curve_of_one_process(tmp_path, small_prepared, uninterrupted):
    job = pcl_job(tmp_path, small_prepared, "train.num_workers=2")
    run_in_train(job)
    assert losses(job) == pytest.approx(uninterrupted, rel=1e-4)
    assert [line["step"] for line in curve(job) if "prototypes" in line] == [7, 13]
