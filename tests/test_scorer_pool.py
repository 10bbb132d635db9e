"""The pool of scorers grows while the trainer waits for it, and not beyond its limit."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from torch import Tensor

from models.outputs import PairBatch
from models.teacher import EmaTeacher, TokenScorer
from pipelines.launch import run_here
from pipelines.run_record import read_record
from tests.pipeline_fixture import small_config, small_job

pytestmark = pytest.mark.ray

GIVEN_UP_AFTER_S = 240


class SlowScorer(TokenScorer):
    """Takes as long for a batch as the pool has a single process."""

    def __init__(self, scorer: TokenScorer, folder: str) -> None:
        super().__init__(scorer.vision, scorer.projector, scorer.recipe)
        self.trainer_pid, self.folder = os.getpid(), folder

    def forward(self, batch: PairBatch) -> tuple[Tensor, Tensor]:
        if os.getpid() != self.trainer_pid:
            Path(self.folder, str(os.getpid())).touch()
            give_up = time.monotonic() + GIVEN_UP_AFTER_S
            while len(os.listdir(self.folder)) < 2:
                if time.monotonic() > give_up:
                    raise RuntimeError("the pool does not grow")
                time.sleep(0.05)
        return super().forward(batch)


@pytest.mark.parametrize("staleness", ["null", "20"])
def test_the_pool_grows_within_its_limit(
    tmp_path: Path, small_prepared: str, monkeypatch: pytest.MonkeyPatch, staleness: str
):
    plain, folder = EmaTeacher.scorer, tmp_path / "scorers"
    folder.mkdir()
    monkeypatch.setattr(EmaTeacher, "scorer", lambda teacher: SlowScorer(plain(teacher), str(folder)))
    config = small_config(
        tmp_path,
        "method=aclip",
        "train.steps=12",
        "train.min_crop_area=0.5",
        # Scored all the same, for the head that predicts the teacher; batches are far ahead of the trainer.
        "method.selection.warmup_share=0.9",
        "scoring.mode=stream",
        "scoring.min_actors=1",
        "scoring.max_actors=2",
        "scoring.cpus_per_actor=0.1",
        f"scoring.max_staleness={staleness}",
    )
    run_here(small_job(config, small_prepared, "run"))
    assert len(list(folder.iterdir())) == 2
    record = read_record(config.output, "run")
    assert record is not None
    assert record["state"] == "complete"
