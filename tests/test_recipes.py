"""The contract every method of the catalogue keeps, by being listed: builds, trains each parameter, resumes.

Gradients on several workers are in tests/test_two_process.py, curves in tests/test_golden_curves.py.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from models.methods.aclip import ACLIP
from models.methods.catalogue import METHODS
from models.recipe import MethodRecipe
from pipelines.train_step import NonFiniteLossError, Trainer
from tests.pair_fixture import generator
from tests.recipe_fixture import (
    RECIPES,
    TRAIN,
    batch_of,
    float64,
    in_the_middle,
    inputs_of_a_step,
    trainer_of,
)

WITH_TEACHER = [name for name, recipe in METHODS.items() if recipe.needs_teacher]


def run(trainer: Trainer, steps: range) -> list[float]:
    return [trainer.run_step(batch_of(trainer.recipe, seed=step)).loss.item() for step in steps]


def weights(trainer: Trainer) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])


def test_names_are_the_catalogue_s_keys():
    for name, recipe in METHODS.items():
        assert recipe.name == name
        assert recipe.source
        assert recipe.evidence in ("official", "derived", "paper-unverified")


def is_common_shift(parameter_name: str, recipe: MethodRecipe) -> bool:
    """Whether a parameter only adds the same number to everything that is compared: its gradient is zero
    but for rounding. A softmax ignores it, and so does Donsker-Varadhan."""
    if parameter_name.endswith("critic.last.bias"):
        return recipe.estimator.kind == "dv"
    return parameter_name.endswith("k_proj.bias")


@pytest.mark.parametrize("name", RECIPES)
def test_every_parameter_gets_a_finite_gradient(name):
    """Without exception: data parallelism waits for each of them."""
    trainer = trainer_of(RECIPES[name], TRAIN)
    for is_first in (True, False):
        if not is_first:
            in_the_middle(trainer)
        trainer.backward(batch_of(RECIPES[name]))
        for parameter_name, parameter in trainer.model.named_parameters():
            assert parameter.requires_grad, parameter_name
            assert parameter.grad is not None, parameter_name
            assert parameter.grad.isfinite().all(), parameter_name
    size = {key: float(p.grad.abs().max()) for key, p in trainer.model.named_parameters()}
    for parameter_name, largest in size.items():
        # Float32 rounds at 1e-7: more than that is no accident.
        trained = largest > 1e-5 * max(size.values())
        assert trained or is_common_shift(parameter_name, RECIPES[name]), parameter_name


# What stops a gradient by design, and parameters on which nothing that is stopped depends: targets from
# patches; weights of attention pools; the encoder's opponent; the code book of the teacher's side; a
# threshold whose gradient is that of a line.
STOPPED = {
    "softclip": "encoder.text",
    "lovt": "objective.",
    "dim": "encoder.text",
    "maskclip": "encoder.",
    "cmimh": "objective.tables",
}


@pytest.mark.parametrize("name", RECIPES)
def test_the_gradient_is_the_slope_of_the_loss(name):
    """Along a random direction in all weights: a feature that lost its gradient on the way would show."""
    with float64():
        trainer = in_the_middle(trainer_of(RECIPES[name], TRAIN))
        inputs = inputs_of_a_step(trainer, batch_of(RECIPES[name]))
        g, step = generator(3), 1e-6
        moved = [p for key, p in trainer.model.named_parameters() if key.startswith(STOPPED.get(name, ""))]
        sizes = [parameter.detach().abs().mean().clamp(min=0.01) for parameter in moved]
        along = [size * torch.randn(p.shape, generator=g) for p, size in zip(moved, sizes, strict=True)]
        expected = sum(float((p.grad * d).sum()) for p, d in zip(moved, along, strict=True))
        losses = []
        for sign in (1, -1):
            with torch.no_grad():
                torch._foreach_add_(moved, along, alpha=sign * step)
                losses.append(trainer.model(*inputs).loss.item())
                torch._foreach_add_(moved, along, alpha=-sign * step)
    # Rounding of the two losses, 1e-16 / step; the smallest slope here is a hundredth.
    assert (losses[0] - losses[1]) / (2 * step) == pytest.approx(expected, rel=1e-6)
    assert abs(expected) > 1e-3


def saved_and_loaded(trainer: Trainer, path: Path) -> dict[str, Any]:
    torch.save(trainer.state_dict(), path / "state.pt")
    state: dict[str, Any] = torch.load(path / "state.pt", weights_only=True)
    return state


def resumed(recipe: MethodRecipe, state: dict[str, Any]) -> tuple[Tensor, list[float]]:
    """Weights and losses of the next two steps after taking over a state with other weights of its own."""
    trainer = trainer_of(recipe, TRAIN, seed=9)
    trainer.load_state_dict(state)
    losses = run(trainer, range(2, 4))
    return weights(trainer), losses


@pytest.mark.parametrize("name", RECIPES)
def test_a_resumed_run_takes_the_same_steps(name, tmp_path):
    recipe = RECIPES[name]
    trainer = in_the_middle(trainer_of(recipe, TRAIN))
    run(trainer, range(2))
    state = saved_and_loaded(trainer, tmp_path)
    losses = run(trainer, range(2, 4))
    found, found_losses = resumed(recipe, state)
    assert found_losses == losses
    assert torch.equal(found, weights(trainer))
    # Control: nothing of the state may be lost.
    fresh = trainer_of(recipe, TRAIN, seed=9).state_dict()
    for part in ("model", "optimizer", *(["teacher"] if recipe.needs_teacher else [])):
        other, _ = resumed(recipe, {**state, part: fresh[part]})
        assert not torch.equal(other, weights(trainer)), part
    for buffer in changed_buffers(trainer, state["model"], fresh["model"]):
        model = {**state["model"], buffer: fresh["model"][buffer]}
        other, _ = resumed(recipe, {**state, "model": model})
        assert not torch.equal(other, weights(trainer)), buffer


def changed_buffers(trainer: Trainer, state: dict[str, Tensor], fresh: dict[str, Tensor]) -> list[str]:
    """Everything that is remembered but not trained, and is no longer as at the start."""
    names = [f"objective.{name}" for name, _ in trainer.model.objective.named_buffers()]
    assert all(name in state for name in names)
    unequal = [name for name in names if not torch.equal(state[name], fresh[name])]
    # Constants of binary NCE are estimated by every memory and read by that estimator alone.
    is_read = trainer.recipe.estimator.kind == "sigmoid"
    return [name for name in unequal if is_read or not name.endswith("log_normaliser")]


def test_memories_are_among_the_buffers():
    """Control of the control: what the catalogue's systems with a memory would lose."""
    for name, expected in {"pcl": 19, "cmc_memory": 2, "cmc_nce": 4, "clip": 0}.items():
        trainer = in_the_middle(trainer_of(RECIPES[name], TRAIN))
        fresh = trainer_of(RECIPES[name], TRAIN, seed=9).model.state_dict()
        assert len(changed_buffers(trainer, trainer.model.state_dict(), fresh)) == expected, name


@pytest.mark.parametrize("name", RECIPES)
def test_the_seed_decides_the_first_steps(name):
    first, again, other = (
        run(in_the_middle(trainer_of(RECIPES[name], TRAIN, seed=s)), range(2)) for s in (0, 0, 1)
    )
    assert first == again
    assert first != other


# One of each kind of loss, score, pool, candidates and features. Others differ from one of these in the
# choice of patches or by a component that is silent here. Not: `pcl`, whose targets are a queue of a teacher
# that hardly moves in so few steps; `mil_noisy_or` and `mil_attention`, whose scores are not the cosines
# read here.
LEARNT = (
    *("clip", "siglip", "tier", "cloob", "clip_loob", "clip_hopfield", "aclip", "flip", "slip", "maskclip"),
    *("softclip", "local_mi", "local_mi_critic", "mil_max", "mil_lse", "mil_non_local", "gloria", "dim"),
    *("convirt", "clip_lite", "relaxed", "lovt", "biovil", "cmc_graph", "cmc_memory", "cmc_nce"),
    *("bound_nwj", "bound_dv", "bound_interpolated", "bound_js"),
)
MOST_STEPS = 120


@pytest.mark.parametrize("name", LEARNT)
def test_eight_pairs_are_learnt_by_heart(name):
    """A falling loss proves nothing: every pair must find its partner first, both ways."""
    trainer = trainer_of(METHODS[name], TRAIN.model_copy(update={"steps": MOST_STEPS}))
    own, kept = torch.arange(8), [None]
    batch = replace(batch_of(METHODS[name]), row_index=own)
    # Seen with the tokens it trains on: given all of them it retrieves worse.
    trainer.model.register_forward_pre_hook(lambda _, inputs: kept.append(inputs[1]))

    def num_matched() -> int:
        with torch.no_grad():
            outputs = trainer.model.encoder(batch, kept[-1])
        similarities = outputs.image_embeds[0] @ outputs.report_embeds.T
        return int(((similarities.argmax(0) == own) & (similarities.argmax(1) == own)).sum())

    assert num_matched() < 4
    for step in range(MOST_STEPS):
        # What is drawn by row (negatives, noise, masked words) is another in each epoch.
        trainer.run_step(replace(batch, draw_keys=batch.draw_keys + step))
        if step % 5 == 4 and num_matched() == 8:
            return
    raise AssertionError(f"only {num_matched()} of 8 pairs are matched after {MOST_STEPS} steps")


def test_building_a_trainer_leaves_the_global_generator_alone():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    trainer_of(METHODS["clip"], TRAIN, seed=5)
    assert torch.equal(torch.rand(1), expected)


def test_the_teacher_is_trusted_only_after_the_warm_up():
    """With the same weights and noise, attentive selection starts as random selection and leaves it later."""
    attentive = replace(ACLIP, selection=replace(ACLIP.selection, warmup_share=3 / TRAIN.steps))
    at_random = replace(attentive, selection=replace(attentive.selection, kind="random"))
    guided, drawn = (run(trainer_of(recipe, TRAIN), range(5)) for recipe in (attentive, at_random))
    assert guided[:3] == drawn[:3]
    assert guided[3] != drawn[3]


def test_the_last_steps_see_every_patch():
    """FLIP's unmasked tuning: from there on its loss is CLIP's."""
    flip = replace(RECIPES["flip"], selection=replace(RECIPES["flip"].selection, unmasked_share=0.5))
    trainer, clip = trainer_of(flip, TRAIN), trainer_of(RECIPES["clip"], TRAIN)
    for step, sees_all in ((TRAIN.steps // 2 - 1, False), (TRAIN.steps // 2, True)):
        trainer.step = step
        losses = [t.backward(batch_of(flip)).loss.item() for t in (trainer, clip)]
        assert (losses[0] == losses[1]) is sees_all


@pytest.mark.parametrize("name", WITH_TEACHER)
def test_the_teacher_follows_slowly_and_takes_no_gradient(name):
    trainer = trainer_of(RECIPES[name], TRAIN)
    teacher = trainer.teacher
    assert teacher is not None
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    before = {key: parameter.clone() for key, parameter in teacher.vision.named_parameters()}
    run(trainer, range(3))
    now, online = (dict(m.named_parameters()) for m in (teacher.vision, trainer.model.encoder.vision))
    for key, old in before.items():
        if not key.endswith("k_proj.bias"):
            assert 0 < (now[key] - old).abs().max() < (online[key] - old).abs().max(), key


# The message reads a tensor that still has its graph; drop this line when it is detached there.
@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad")
def test_a_loss_that_is_no_number_names_step_method_and_terms():
    trainer = trainer_of(METHODS["tier"], TRAIN)
    with torch.no_grad():
        trainer.model.encoder.text_projection.weight.fill_(torch.nan)
    with pytest.raises(NonFiniteLossError, match=r"step 0 of method 'tier': loss nan.*main=nan.*token_over"):
        trainer.run_step(batch_of(METHODS["tier"]))
