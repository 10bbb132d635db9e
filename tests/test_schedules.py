"""Schedules: released values, ends, monotony, refusals."""

import math
from functools import partial
from itertools import pairwise

import pytest

from models.schedules import (
    cosine_scheduler,
    cosine_with_restarts,
    cosine_with_warmup,
    ema_decay,
    ema_lag,
)
from tests.golden_files import load

CLOOB = {"total_steps": 200, "warmup_steps": 20, "base": 1e-3}
STEPS_PER_EPOCH, TOTAL = 3586, 25 * 3586


def largest_error(function, steps, stored):
    return max(abs(function(int(step)) - value) for step, value in zip(steps, stored, strict=True))


def test_cosine_with_warmup_equals_the_cloob_release():
    stored = load("schedule_cosine_and_restarts")["cosine"]
    assert largest_error(lambda t: cosine_with_warmup(t, **CLOOB), range(201), stored) < 1e-15
    # negative control: a run one step longer
    assert (
        largest_error(lambda t: cosine_with_warmup(t, **CLOOB | {"total_steps": 201}), range(201), stored)
        > 1e-6
    )


def test_cosine_with_restarts_equals_the_cloob_release():
    stored = load("schedule_cosine_and_restarts")["restarts"]
    assert largest_error(lambda t: cosine_with_restarts(t, cycles=10, **CLOOB), range(201), stored) < 1e-15
    assert largest_error(lambda t: cosine_with_restarts(t, cycles=9, **CLOOB), range(201), stored) > 1e-4


def test_momentum_equals_the_aclip_release():
    stored = load("aclip_schedules")
    assert int(stored["total"]) == TOTAL
    momentum = partial(ema_decay, total_steps=TOTAL, base=0.996)
    assert largest_error(momentum, stored["iters"], stored["momentum"]) < 1e-15
    assert largest_error(lambda t: ema_decay(t, 10, 0.996), range(10), stored["small_momentum_2x5"]) < 1e-15
    assert largest_error(lambda t: ema_decay(t, 10, 0.99), range(10), stored["small_momentum_2x5"]) > 1e-3


@pytest.mark.parametrize(("key", "base"), [("lr_aclip", 5e-4), ("lr_slip", 3e-3)])
def test_learning_rate_equals_the_aclip_release(key, base):
    stored = load("aclip_schedules")
    settings = {"total_steps": TOTAL, "base": base, "final": 1e-5, "warmup_start": 1e-6}
    rate = partial(cosine_scheduler, warmup_steps=STEPS_PER_EPOCH, **settings)
    assert largest_error(rate, stored["iters"], stored[key]) < 1e-15
    other = partial(cosine_scheduler, warmup_steps=STEPS_PER_EPOCH + 1, **settings)
    assert largest_error(other, stored["iters"], stored[key]) > 1e-9


def test_short_learning_rate_equals_the_aclip_release():
    stored = load("aclip_schedules")["small_lr_3x4_w1"]
    settings = {"total_steps": 12, "base": 5e-4, "final": 1e-5, "warmup_steps": 4, "warmup_start": 1e-6}
    assert largest_error(lambda t: cosine_scheduler(t, **settings), range(12), stored) < 1e-15


def test_values_past_the_end_stay_at_the_final_value():
    assert cosine_with_warmup(500, **CLOOB, final=1e-5) == 1e-5
    assert cosine_with_restarts(500, cycles=3, **CLOOB) == 0.0
    assert ema_decay(10, 10, 0.9) == 1.0
    assert ema_decay(9, 10, 0.9) < 1.0


def test_cosine_never_rises_after_the_warm_up():
    values = [cosine_with_warmup(t, **CLOOB) for t in range(20, 230)]
    assert values[0] == CLOOB["base"]
    assert all(later <= earlier for earlier, later in pairwise(values))


@pytest.mark.parametrize("schedule", [cosine_with_warmup, cosine_scheduler])
def test_a_run_that_is_all_warm_up_is_legal(schedule):
    settings = {"total_steps": 4, "warmup_steps": 4, "base": 1.0, "final": 0.0}
    assert schedule(0, **settings) == 0.0
    assert schedule(4, **settings) == 0.0


def test_lag_of_a_constant_decay_tends_to_its_closed_form():
    lag = 0.0
    for _ in range(2000):
        lag = ema_lag(lag, 0.98)
    assert lag == pytest.approx(0.98 / 0.02, rel=1e-12)


def test_lag_is_the_mean_age_of_the_weights():
    decays = [0.9, 0.95, 0.97, 0.99]
    lag, age_weights = 0.0, [1.0]
    for decay in decays:
        lag = ema_lag(lag, decay)
        # share of each snapshot, youngest first; the copy made at the start counts as the oldest
        age_weights = [1 - decay] + [share * decay for share in age_weights]
    assert math.isclose(lag, sum(age * share for age, share in enumerate(age_weights)), rel_tol=1e-12)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: cosine_with_warmup(0, total_steps=0, warmup_steps=0, base=1),
            "total_steps must be >= 1, got 0",
        ),
        (
            lambda: cosine_with_warmup(0, total_steps=5, warmup_steps=6, base=1),
            r"in \[0, total_steps=5\], got 6",
        ),
        (lambda: cosine_with_warmup(-1, total_steps=5, warmup_steps=1, base=1), "step must be >= 0, got -1"),
        (lambda: cosine_with_restarts(0, cycles=0, **CLOOB), "cycles must be >= 1, got 0"),
        (lambda: ema_decay(0, 10, 1.5), r"in \[0, 1\], got 1.5"),
        (lambda: ema_lag(0, -0.1), r"in \[0, 1\], got -0.1"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()
