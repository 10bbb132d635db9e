"""Scorers in the Ray Data stream and scores beside the data, through whole runs."""

from __future__ import annotations

import io
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import ray
import torch
from rich.console import Console
from torch import Tensor

from models.gather import SingleProcess
from models.outputs import PairBatch
from models.teacher import EmaTeacher, TokenScorer
from pipelines import storage
from pipelines.checkpoint import find_checkpoint, load_checkpoint
from pipelines.config import Config
from pipelines.launch import run_here
from pipelines.prepared import MANIFEST, Prepared
from pipelines.pretrain import build_trainer
from pipelines.results import Store
from pipelines.score_shards import image_scores
from pipelines.shard_file import pack_shard, read_shard
from pipelines.stages import prepare_stage
from pipelines.stages_score import score_stage, scored_place
from pipelines.weight_board import ScoringError, open_board
from tests.pipeline_fixture import small_config, small_job

pytestmark = pytest.mark.ray

QUIET = Console(file=io.StringIO())
# Twelve steps cross two epochs of 192 rows; scores count from the third on.
RUN = (
    "method=aclip",
    "train.steps=12",
    "train.evaluate_every=4",
    "train.checkpoint_every=12",
    "train.min_crop_area=0.5",
    "method.selection.warmup_share=0.15",
)
LOCKSTEP = (
    "scoring.mode=stream",
    "scoring.max_staleness=0",
    "scoring.max_rows_in_flight=96",
    # A wait for ever is to be an error here, and soon.
    "scoring.timeout_s=120",
)


def run_of(tmp_path: Path, prepared: str, name: str, *overrides: str) -> tuple[Config, list[dict[str, Any]]]:
    config = small_config(tmp_path, f"output={tmp_path / name}", *RUN, *overrides)
    job = small_job(config, prepared, "run")
    job.write()
    run_here(job)
    return config, [line for line in Store(config.output).curve("run") if "loss" in line]


def losses(lines: list[dict[str, Any]]) -> list[float]:
    return [line["loss"] for line in lines]


def diagnostic(lines: list[dict[str, Any]], name: str) -> list[float]:
    return [line["diagnostics"][name] for line in lines if name in line["diagnostics"]]


class DyingScorer(TokenScorer):
    """Kills its process once, in the middle of a batch, wherever it is not the trainer's."""

    def __init__(self, scorer: TokenScorer, grave: str) -> None:
        super().__init__(scorer.vision, scorer.projector, scorer.recipe)
        self.trainer_pid, self.grave, self.calls = os.getpid(), grave, 0

    def forward(self, batch: PairBatch) -> tuple[Tensor, Tensor]:
        self.calls += 1
        if self.calls == 5 and os.getpid() != self.trainer_pid and not os.path.exists(self.grave):
            Path(self.grave).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(batch)


@pytest.fixture(scope="module")
def sync_run(
    small_prepared: str, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Config, list[dict[str, Any]]]:
    return run_of(tmp_path_factory.mktemp("sync"), small_prepared, "sync")


def test_lockstep_equals_sync_bit_for_bit(tmp_path: Path, small_prepared: str, sync_run: Any):
    assert_equals_sync(*run_of(tmp_path, small_prepared, "lockstep", *LOCKSTEP), sync_run)


def test_a_killed_scorer_loses_nothing(
    tmp_path: Path, small_prepared: str, sync_run: Any, monkeypatch: pytest.MonkeyPatch
):
    plain, grave = EmaTeacher.scorer, str(tmp_path / "died")
    monkeypatch.setattr(EmaTeacher, "scorer", lambda teacher: DyingScorer(plain(teacher), grave))
    found = run_of(tmp_path, small_prepared, "lockstep", *LOCKSTEP)
    assert os.path.exists(grave)
    assert_equals_sync(*found, sync_run)


def assert_equals_sync(config: Config, lines: list[dict[str, Any]], sync_run: Any) -> None:
    _, expected = sync_run
    # Losses, every term and every diagnostic of every step: kept sets and BYOL's targets are in them.
    assert losses(lines) == losses(expected)
    assert [line["terms"] for line in lines] == [line["terms"] for line in expected]
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert set(diagnostic(lines, "scoring/staleness_max")) == {0.0}
    assert set(diagnostic(lines, "scoring/fallback_rows")) == {0.0}
    assert diagnostic(lines, "scoring/iou_with_sync") == [1.0, 1.0, 1.0]
    assert max(diagnostic(lines, "feed/rows_in_flight")) <= 96
    weights = [load_checkpoint(find_checkpoint(c.output))["trainer"] for c in (config, sync_run[0])]
    for part in ("model", "teacher"):
        ours, theirs = weights[0][part], weights[1][part]
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_scorer_that_finds_no_place_is_an_error_and_not_a_wait(
    tmp_path: Path, small_prepared: str, monkeypatch: pytest.MonkeyPatch
):
    context = ray.data.DataContext.get_current()
    monkeypatch.setattr(context, "execution_no_progress_timeout_s", 4)
    # Both batches may be built at once: nothing but the scorer is waited for.
    overrides = ("train.steps=2", "scoring.node_labels.role=nowhere", "scoring.timeout_s=2")
    with pytest.raises(ScoringError, match=r"step 0 does not come, .* no node has room for a scorer"):
        run_of(tmp_path, small_prepared, "nowhere", *LOCKSTEP, *overrides)


def test_late_weights_are_counted_and_change_the_run(tmp_path: Path, small_prepared: str, sync_run: Any):
    """Control of the test above: published every third step, and nothing old may be used."""
    late = ("scoring.mode=stream", "scoring.push_share=0.5", "scoring.staleness_share=0")
    _, lines = run_of(tmp_path, small_prepared, "late", *late)
    _, expected = sync_run
    # The warm-up draws at random in both; only BYOL's target is older.
    assert losses(lines) != losses(expected)
    assert losses(lines)[0] == losses(expected)[0]
    assert sum(diagnostic(lines, "scoring/fallback_rows")) > 0
    assert max(diagnostic(lines, "scoring/staleness_max")) > 0
    shares = diagnostic(lines, "scoring/fallback_share")
    # Scores count from step 2 on, and every row of a step is as old as the others.
    assert len(shares) == 10
    assert set(shares) <= {0.0, 1.0}
    assert min(diagnostic(lines, "scoring/utilisation")) > 0


def test_a_board_gives_what_was_published_last_and_lets_no_one_wait_for_ever(ray_session: None):
    board = open_board("run", SingleProcess(), timeout_s=0.2)
    with pytest.raises(ScoringError, match=r"the teacher of step 0 or later, .* is none"):
        board.newest(known=-1, at_least=0)
    board.result(board.publish(3, {"weight": np.arange(5.0)}))
    version, weights = board.newest(known=-1, at_least=0)
    assert version == 3
    assert weights is not None
    assert weights["weight"].tolist() == [0, 1, 2, 3, 4]
    assert board.newest(known=3, at_least=3) == (3, None)
    with pytest.raises(ScoringError, match=r"step 4 or later, the newest published within .*=0.2 is 3"):
        board.newest(known=3, at_least=4)
    assert board.result(board.ask(0, 0, until=2)) == 0
    board.wait_for_room(0, 1)
    assert board.result(board.ask(0, 0, until=2)) == 2
    with pytest.raises(ScoringError, match="worker 0 did not come near step 2 within"):
        board.wait_for_room(0, 2)


def test_a_board_that_is_gone_is_an_error_and_not_a_wait(ray_session: None):
    board = open_board("run", SingleProcess(), timeout_s=5)
    ray.kill(board.actor)
    with pytest.raises(ScoringError, match="the weight board is gone"):
        board.newest(known=-1, at_least=0)


@pytest.fixture(scope="module")
def scored(sync_run: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    place = str(tmp_path_factory.mktemp("scored") / "data")
    score_stage(sync_run[0].output, place, QUIET)
    return place


def test_offline_scores_are_those_of_the_runs_teacher(sync_run: Any, small_prepared: str, scored: str):
    config, before, after = sync_run[0], Prepared.open(small_prepared), Prepared.open(scored)
    trainer = build_trainer(config, before)
    untrained = trainer.teacher.scorer()
    images = before.images("train")
    first = image_scores(untrained, images, precision="fp32")
    trainer.load_state_dict(load_checkpoint(find_checkpoint(config.output))["trainer"])
    for split in ("train", "selection", "test"):
        table = after.table(split)
        assert table.drop_columns(["token_scores"]).equals(before.table(split))
        expected = image_scores(trainer.teacher.scorer(), before.images(split), precision="fp32")
        assert np.array_equal(np.array(table["token_scores"].to_pylist(), np.float32), expected)
    assert not np.allclose(first, image_scores(trainer.teacher.scorer(), images, precision="fp32"))
    about = after.manifest["token_scores"]
    assert (about["run_id"], about["step"], about["scorer"]) == ("run", 12, "teacher")
    assert after.manifest["data_sha"] == before.manifest["data_sha"]


def test_scoring_continues_where_it_was_killed(sync_run: Any, small_prepared: str, scored: str, tmp_path):
    """Two shards are there, the manifest is not: only the others are written."""
    place = str(tmp_path / "again")
    shards = [name for name in storage.list_files(scored) if name.startswith("shards/")][:2]
    for name in ("scoring.json", *shards):
        storage.write_bytes(storage.join(place, name), storage.read_bytes(storage.join(scored, name)))
    times = [os.stat(storage.join(place, shard)).st_mtime_ns for shard in shards]
    score_stage(sync_run[0].output, place, QUIET)
    assert [os.stat(storage.join(place, shard)).st_mtime_ns for shard in shards] == times
    assert storage.read_json(storage.join(place, MANIFEST)) == storage.read_json(
        storage.join(scored, MANIFEST)
    )
    with pytest.raises(storage.AlreadyExistsError, match="is complete; name another output"):
        score_stage(sync_run[0].output, place, QUIET)
    os.remove(storage.join(place, MANIFEST))
    begun = storage.join(place, "scoring.json")
    storage.write_json(begun, {**storage.read_json(begun), "checkpoint_sha256": "of another run"})
    with pytest.raises(ValueError, match="unfinished scores of other weights or data"):
        score_stage(sync_run[0].output, place, QUIET)


def test_offline_runs_keep_what_the_scores_say(
    tmp_path: Path, small_prepared: str, sync_run: Any, scored: str, monkeypatch: pytest.MonkeyPatch
):
    offline = ("scoring.mode=offline", f"scoring.scored_data={scored}", "train.steps=4")
    overrides = (*offline, "method=attentive", "method.selection.warmup_share=0")
    config = small_config(tmp_path, *RUN[1:], *overrides)
    # The configuration's own data settings decide whether the scores belong to it.
    connected: list[Any] = []
    monkeypatch.setattr("pipelines.cluster.connect", lambda **settings: connected.append(settings))
    assert scored_place(config) == prepare_stage(config, QUIET, dry_run=True) == scored
    assert connected == []
    # Whoever trains next expects Ray to be there.
    assert prepare_stage(config, QUIET, dry_run=False) == scored
    assert connected == [{"address": None}]
    losses_of = {}
    for name, changed in {"scored": scored, "shuffled": _shuffled(scored, tmp_path / "shuffled")}.items():
        run_here(small_job(config, changed, name))
        losses_of[name] = losses([x for x in Store(config.output).curve(name) if "loss" in x])
    assert len(losses_of["scored"]) == 4
    assert losses_of["scored"] != losses_of["shuffled"]


def test_data_without_scores_or_of_another_source_is_refused(
    tmp_path: Path, small_prepared: str, scored: str
):
    def refused(*overrides: str) -> None:
        scored_place(small_config(tmp_path, "method=aclip", "scoring.mode=offline", *overrides))

    with pytest.raises(ValueError, match=f"'{small_prepared}' holds no scores"):
        refused(f"scoring.scored_data={small_prepared}")
    with pytest.raises(ValueError, match="no prepared data at"):
        refused(f"scoring.scored_data={tmp_path / 'nowhere'}")
    with pytest.raises(ValueError, match=r"with other settings than data\.source=scenes:quick has"):
        refused(f"scoring.scored_data={scored}", "data.seed=1")


def _shuffled(scored: str, folder: Path) -> str:
    """The same data with every image's scores in reverse."""
    place = str(folder)
    for name in storage.list_files(scored):
        target = storage.join(place, name)
        if not name.startswith("shards/"):
            storage.write_bytes(target, storage.read_bytes(storage.join(scored, name)))
            continue
        table = read_shard(storage.join(scored, name))
        index = table.column_names.index("token_scores")
        field = table.field(index)
        reverse = [scores[::-1] for scores in table["token_scores"].to_pylist()]
        reversed_ = table.set_column(index, field, pa.array(reverse, field.type))
        storage.write_bytes(target, pack_shard(reversed_))
    return place
