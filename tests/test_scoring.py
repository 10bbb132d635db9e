"""Scoring modes: which scores are too old, what each mode trains, and what is refused. No Ray."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from models.methods.catalogue import METHODS
from models.outputs import PairBatch, ScoredTokens
from models.token_selection import kept_iou
from pipelines.config import Config
from pipelines.job import identity
from pipelines.plan import random_batch
from pipelines.score_tokens import score_batch
from pipelines.scoring import ScoringConfig, ScoringPolicy, check_scoring, ema_lags, selection_phase
from pipelines.step_meter import StepMeter
from pipelines.token_choice import choose_tokens, select_views
from pipelines.train_step import TextSpec, Trainer
from tests.pipeline_fixture import small_config

STEPS = 6
WARM = ("method.selection.warmup_share=0",)


def policy_of(
    *, decay: float = 0.996, steps: int = 1000, rows: int = 64, method: str = "aclip", **scoring: object
) -> ScoringPolicy:
    recipe = METHODS[method]
    recipe = replace(recipe, teacher=replace(recipe.teacher, decay=decay))
    return ScoringPolicy(ScoringConfig.model_validate(scoring), recipe, steps, rows)


def trainer_of(config: Config) -> Trainer:
    text = TextSpec(vocab_size=512, pad_id=0, start_id=1, end_id=3)
    return Trainer(
        config.recipe, config.model, text, config.train, seed=0, num_rows=64, scoring=config.scoring
    )


def config_of(tmp_path: Path, *overrides: str) -> Config:
    return small_config(tmp_path, "method=aclip", "train.min_crop_area=0.5", *WARM, *overrides)


def batch_for(config: Config, trainer: Trainer) -> PairBatch:
    """Random pixels whose views and teacher's crop are parts of the image."""
    batch = random_batch(config, trainer, 8)
    boxes = torch.tensor([[2.0, 4, 20, 24], [6, 0, 24, 16]])[:, None].expand(2, 8, 4)
    return replace(batch, view_boxes=boxes, teacher_boxes=torch.tensor([1.0, 0, 30, 30]).expand(8, 4))


# The note's table for the published schedule: progress, lag, a tenth of it.
@pytest.mark.parametrize(
    ("share", "lag", "budget"), [(0.1, 255, 25), (0.25, 291, 29), (0.5, 491, 49), (0.75, 1520, 152)]
)
def test_lag_and_push_interval_of_the_published_schedule(share: float, lag: int, budget: int):
    policy = policy_of(steps=89_650)
    step = round(share * 89_650)
    assert policy.lag(step) == pytest.approx(lag, rel=0.005)
    assert policy.push_interval(step) == max(1, math.floor(0.05 * policy.lag(step)))
    versions = torch.tensor([step - budget + 1, step - budget - 2])
    assert policy.is_too_old(step, versions).tolist() == [False, True]


def test_a_constant_decay_has_its_own_lag_and_a_fresh_copy_none():
    lags = ema_lags(20_000, 0.9)
    assert lags[0] == 0
    assert lags[1] == pytest.approx(0.9, rel=1e-6)
    # The cosine has hardly moved: m / (1 - m).
    assert lags[100] == pytest.approx(9, rel=1e-3)
    # Early on the teacher is as old as the run.
    assert ema_lags(89_650, 0.996)[20] == pytest.approx(20, rel=0.05)


def test_publishing_keeps_its_interval_and_always_begins():
    policy = policy_of(steps=4000, decay=0.99)
    published: list[int] = []
    for step in range(1000):
        if policy.publishes(step, last=published[-1] if published else None):
            published.append(step)
    assert published[0] == 0
    gaps = {b - a for a, b in pairwise(published) if a > 800}
    assert gaps == {policy.push_interval(900)}
    assert policy.push_interval(900) > 1


def test_lockstep_publishes_every_step_and_waits_for_its_own_version():
    policy = policy_of(max_staleness=0)
    assert all(policy.publishes(step, last=step - 1) for step in range(1, 500, 50))
    assert policy.oldest_version(7) == 7
    assert policy_of(max_staleness=3).oldest_version(7) == 4
    assert not policy_of(max_staleness=3, push_share=10).publishes(500, last=497)
    assert policy_of(max_staleness=3, push_share=10).publishes(500, last=496)


def test_rows_in_flight_are_bounded_and_fit_the_budget():
    assert policy_of(rows=64, max_rows_in_flight=320).steps_ahead(0) == 5
    late = policy_of(rows=64, steps=4000, decay=0.99, max_rows_in_flight=100_000)
    assert late.steps_ahead(2000) == max(2, math.floor(0.05 * late.lag(2000)))
    # Early scores are old at once; two batches keep both sides busy, and a batch always fits.
    assert policy_of(rows=64, steps=4000).steps_ahead(401) >= 2
    assert policy_of(rows=64, max_rows_in_flight=70).steps_ahead(999) == 1


def test_methods_without_a_guided_head_are_scored_from_the_end_of_their_warm_up():
    policy = policy_of(method="attentive", steps=100)
    assert [policy.needs_scorer(step) for step in (0, 9, 10, 99)] == [False, False, True, True]
    assert not policy.publishes(0, last=None) or policy.needs_scorer(policy.steps_ahead(0))
    assert policy.publishes(10, last=None)
    # BYOL's targets are needed from the first step on.
    assert policy_of(steps=100).needs_scorer(0)


def test_phases():
    selection = replace(METHODS["aclip"].selection, warmup_share=0.1, unmasked_share=0.2)
    phases = [selection_phase(selection, step=step, total_steps=10) for step in range(10)]
    assert phases == ["random", *["scored"] * 7, "whole", "whole"]
    assert selection_phase(METHODS["clip"].selection, step=0, total_steps=10) == "whole"
    assert selection_phase(METHODS["flip"].selection, step=9, total_steps=10) == "random"


def scored_like_the_trainer(trainer: Trainer, batch: PairBatch, *, version: int) -> PairBatch:
    """The batch as a scorer with the trainer's own weights returns it."""
    assert trainer.teacher is not None
    found = score_batch(trainer.teacher.scorer(), batch, trainer.policy, step=trainer.step, precision="fp32")
    versions = torch.full((len(batch.images),), version)
    return replace(batch, scored=replace(found, ema_version=versions))


def test_scores_from_outside_give_the_trainers_own_step(tmp_path: Path):
    config = config_of(tmp_path)
    losses = {}
    for name, version in {"sync": None, "fresh": 2, "old": 0}.items():
        trainer = trainer_of(config)
        batch = batch_for(config, trainer)
        for _ in range(2):
            trainer.run_step(batch)
        trainer.follow_teacher()
        given = batch if version is None else scored_like_the_trainer(trainer, batch, version=version)
        losses[name] = float(trainer.run_step(given).loss)
    assert losses["fresh"] == losses["sync"]
    # Negative control: rows that count as old are trained on other patches.
    assert losses["old"] != losses["sync"]


def test_old_rows_fall_back_one_by_one_and_are_counted(tmp_path: Path):
    config = config_of(tmp_path, "train.steps=1000", "method.teacher.decay=0.9")
    trainer = trainer_of(config)
    trainer.step, grid = 500, trainer.model.encoder.vision.grid
    assert 8 < trainer.policy.lag(500) < 20
    batch = batch_for(config, trainer)
    scored = scored_like_the_trainer(trainer, batch, version=500)
    assert scored.scored is not None
    assert scored.scored.kept is not None
    versions = torch.tensor([500, 499, 498, 400, 0, -1, 500, 500])
    batch = replace(batch, scored=replace(scored.scored, ema_version=versions))
    kept = choose_tokens(trainer.policy, batch, None, step=500, grid=grid, meter=trainer.meter)
    assert kept is not None
    drawn = select_views(trainer.policy, batch, None, grid=grid)
    is_old = trainer.policy.is_too_old(500, versions)
    assert is_old.tolist() == [False, False, True, True, True, True, False, False]
    assert torch.equal(kept[:, is_old], drawn[:, is_old])
    assert torch.equal(kept[:, ~is_old], scored.scored.kept.long()[:, ~is_old])
    assert not torch.equal(kept[:, is_old], scored.scored.kept.long()[:, is_old])
    found, ages = trainer.meter.take()
    assert ages == {0: 3, 1: 1, 2: 1, 100: 1, 500: 1, 501: 1}
    assert found["scoring/fallback_rows"] == 4
    assert found["scoring/fallback_share"] == 0.5
    assert found["scoring/staleness_max"] == 501
    assert "scoring/fallback_share" not in trainer.meter.take()[0]


def test_warm_up_rows_are_random_and_no_fallback(tmp_path: Path):
    config = config_of(tmp_path, "method.selection.warmup_share=0.5")
    trainer = trainer_of(config)
    batch = replace(
        batch_for(config, trainer),
        scored=ScoredTokens(ema_version=torch.full((8,), -1), features=torch.zeros(8, 10)),
    )
    grid = trainer.model.encoder.vision.grid
    kept = choose_tokens(trainer.policy, batch, None, step=0, grid=grid, meter=trainer.meter)
    assert torch.equal(kept, select_views(trainer.policy, batch, None, grid=grid))
    assert "scoring/fallback_share" not in trainer.meter.take()[0]


def test_random_and_none_replace_the_selection_and_are_recorded(tmp_path: Path):
    sync, drawn, whole = (config_of(tmp_path, f"scoring.mode={mode}") for mode in ("sync", "random", "none"))
    assert sync.recipe == sync.method
    assert (drawn.recipe.selection.kind, whole.recipe.selection.kind) == ("random", "none")
    assert drawn.method.selection.kind == "attentive"
    assert drawn.tree()["scoring"]["mode"] == "random"
    assert len({identity(config.tree()) for config in (sync, drawn, whole)}) == 3
    losses = []
    for config in (sync, drawn, whole):
        trainer = trainer_of(config)
        losses.append(float(trainer.run_step(batch_for(config, trainer)).loss))
    assert len(set(losses)) == 3


def test_pool_and_timeouts_are_no_part_of_a_runs_identity(tmp_path: Path):
    plain = config_of(tmp_path, "scoring.mode=stream")
    moved = config_of(tmp_path, "scoring.mode=stream", "scoring.max_actors=4", "scoring.gpus_per_actor=0.25")
    older = config_of(tmp_path, "scoring.mode=stream", "scoring.staleness_share=0.2")
    assert identity(plain.tree()) == identity(moved.tree())
    assert identity(plain.tree()) != identity(older.tree())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["method=clip", "scoring.mode=stream"], r"'clip' has selection\.kind=none\. Use scoring\.mode=sync"),
        (["method=flip", "scoring.mode=random"], r"'flip' has selection\.kind=tokens"),
        (["method=clip", "scoring.mode=offline", "scoring.scored_data=x"], "scoring.mode=offline is for"),
        (
            ["method=pcl", "method.selection.kind=attentive", "scoring.mode=stream"],
            "'pcl' fills a memory or clusters",
        ),
        (
            ["method=maskclip", "method.selection.kind=attentive", "scoring.mode=stream"],
            r"heads\.masked_distillation of 'maskclip' predicts every patch",
        ),
        (["method=aclip", "scoring.mode=stream", "train.feed=memory"], "set train.feed=stream or auto"),
        (
            ["method=aclip", "scoring.mode=stream", "scoring.max_rows_in_flight=31"],
            "max_rows_in_flight=31 holds not one batch of 32 rows",
        ),
    ],
)
def test_refusals(tmp_path: Path, overrides: list[str], message: str):
    with pytest.raises(ValueError, match=message):
        check_scoring(small_config(tmp_path, *overrides))


@pytest.mark.parametrize("method", ["clip", "flip", "pcl", "aclip"])
def test_every_method_may_be_scored_in_the_trainer_or_not_at_all(tmp_path: Path, method: str):
    for mode in ("sync", "none"):
        check_scoring(small_config(tmp_path, f"method={method}", f"scoring.mode={mode}"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "offline"}, "write them with `clipfleet score RUN --output PLACE`"),
        ({"min_actors": 3, "max_actors": 2}, "max_actors must be at least min_actors=3, got 2"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, object], message: str):
    with pytest.raises(ValidationError, match=message):
        ScoringConfig.model_validate(settings)


def test_overlap_of_kept_sets():
    a, b = torch.tensor([[0, 1, 2, 3], [0, 1, 2, 3]]), torch.tensor([[0, 1, 2, 3], [2, 3, 4, 5]])
    assert kept_iou(a, b, 9).tolist() == pytest.approx([1, 2 / 6])


def test_overlap_with_the_trainers_own_scores(tmp_path: Path):
    config = config_of(tmp_path)
    trainer = trainer_of(config)
    batch = batch_for(config, trainer)
    assert trainer.overlap_with_own_scores(batch) is None
    scored = scored_like_the_trainer(trainer, batch, version=0)
    assert trainer.overlap_with_own_scores(scored) == 1
    assert scored.scored is not None
    other = replace(scored.scored, kept=select_views(trainer.policy, batch, None, grid=4).to(torch.int16))
    assert trainer.overlap_with_own_scores(replace(batch, scored=other)) < 0.9


def test_meter_shares():
    meter = StepMeter()
    meter.add_wait(1.0)
    meter.add_step(2.5)
    meter.add_publishing(0.5)
    meter.add_scored(0.25, actors=2)
    meter.add_in_flight(64)
    meter.add_in_flight(32)
    meter.add_overlap(0.75)
    found, ages = meter.take()
    assert ages == {}
    assert found["feed/wait_share"] == 0.25
    assert found["scoring/publish_share"] == 0.125
    assert found["feed/rows_in_flight"] == 64
    assert found["scoring/iou_with_sync"] == 0.75
    assert found["scoring/utilisation"] > 0
    assert np.isfinite(list(found.values())).all()
    assert meter.take() == ({"feed/wait_share": 0.0}, {})
