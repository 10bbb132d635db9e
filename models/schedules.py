"""Learning-rate and EMA schedules as plain functions of the step."""

import math


def _check_span(step: int, *, total_steps: int, warmup_steps: int) -> None:
    if total_steps < 1:
        raise ValueError(f"total_steps must be >= 1, got {total_steps}")
    if not 0 <= warmup_steps <= total_steps:
        raise ValueError(f"warmup_steps must be in [0, total_steps={total_steps}], got {warmup_steps}")
    if step < 0:
        raise ValueError(f"step must be >= 0, got {step}")


def _progress(step: int, *, total_steps: int, warmup_steps: int) -> float:
    """Share of the part after warm-up that lies behind `step`, 0 to 1."""
    if step >= total_steps:
        return 1.0
    return (step - warmup_steps) / (total_steps - warmup_steps)


def cosine_with_warmup(
    step: int, *, total_steps: int, warmup_steps: int, base: float, final: float = 0.0
) -> float:
    """Linear warm-up from 0, then half a cosine from `base` to `final`.

    Args:
        step: optimiser step whose value is wanted, from 0; the value at step 0 is 0 when there is a warm-up.
        total_steps: steps of the run; later steps stay at `final`.
        warmup_steps: steps of the linear rise.
        base: value at the end of the warm-up.
        final: value at `total_steps`.

    Raises:
        ValueError: negative step, no steps, or a warm-up longer than the run.

    Source: CLOOB, arXiv 2110.11316, released scheduler (its `final` is 0).
    """
    _check_span(step, total_steps=total_steps, warmup_steps=warmup_steps)
    if step < warmup_steps:
        return base * step / warmup_steps
    q = _progress(step, total_steps=total_steps, warmup_steps=warmup_steps)
    return final + (base - final) * 0.5 * (1.0 + math.cos(math.pi * q))


def cosine_with_restarts(
    step: int, *, total_steps: int, warmup_steps: int, base: float, cycles: int
) -> float:
    """Linear warm-up from 0, then `cycles` half cosines that each fall from `base` to 0.

    Args:
        step: optimiser step whose value is wanted, from 0.
        total_steps: steps of the run; from here on the value is 0.
        warmup_steps: steps of the linear rise.
        base: value at the start of each cycle.
        cycles: number of cycles, >= 1.

    Raises:
        ValueError: as `cosine_with_warmup`, or cycles < 1.

    Source: CLOOB, arXiv 2110.11316, released scheduler (10 cycles on Conceptual Captions).
    """
    _check_span(step, total_steps=total_steps, warmup_steps=warmup_steps)
    if cycles < 1:
        raise ValueError(f"cycles must be >= 1, got {cycles}")
    if step < warmup_steps:
        return base * step / warmup_steps
    q = _progress(step, total_steps=total_steps, warmup_steps=warmup_steps)
    if q >= 1.0:
        return 0.0
    return base * 0.5 * (1.0 + math.cos(math.pi * ((cycles * q) % 1.0)))


def cosine_scheduler(
    step: int,
    *,
    total_steps: int,
    base: float,
    final: float,
    warmup_steps: int = 0,
    warmup_start: float = 0.0,
) -> float:
    """A-CLIP's schedule: warm-up with both ends included, then a cosine that stops one step before `final`.

    Args:
        step: step whose value is wanted, from 0.
        total_steps: steps of the run; from here on the value is `final`.
        base: value at the last warm-up step and again at the first step after it.
        final: limit of the cosine; step total_steps - 1 is still short of it.
        warmup_steps: steps of the linear rise.
        warmup_start: value at step 0 when there is a warm-up.

    Raises:
        ValueError: as `cosine_with_warmup`.

    Source: A-CLIP, arXiv 2212.08653, released code; the same generator makes its learning rate and its
        EMA decay.
    """
    _check_span(step, total_steps=total_steps, warmup_steps=warmup_steps)
    if step < warmup_steps:
        return warmup_start + (base - warmup_start) * step / max(warmup_steps - 1, 1)
    q = _progress(step, total_steps=total_steps, warmup_steps=warmup_steps)
    return final + 0.5 * (base - final) * (1.0 + math.cos(math.pi * q))


def ema_decay(step: int, total_steps: int, base: float = 0.996) -> float:
    """Share of the old teacher kept at `step`: a cosine from `base` towards 1.

    Args:
        step: optimiser step, from 0.
        total_steps: steps of the run; decay is 1 (a frozen teacher) only from there on.
        base: decay at step 0, in [0, 1]. A-CLIP uses 0.996 for 89,650 steps; a short run wants about
            1 - 1 / (0.05 * total_steps), because the teacher's lag is set by `base`, not by the length.

    Raises:
        ValueError: base outside [0, 1], or as `cosine_with_warmup`.

    Source: A-CLIP, arXiv 2212.08653.
    """
    if not 0.0 <= base <= 1.0:
        raise ValueError(f"EMA decay must be in [0, 1], got {base}")
    return cosine_scheduler(step, total_steps=total_steps, base=base, final=1.0)


def ema_lag(previous_lag: float, decay: float) -> float:
    """Mean age in steps of the weights inside the teacher, after one update: decay * (previous_lag + 1).

    Args:
        previous_lag: lag before the update; 0 for a fresh copy.
        decay: decay of the update, in [0, 1]. A constant decay m tends to m / (1 - m).

    Raises:
        ValueError: decay outside [0, 1].
    """
    if not 0.0 <= decay <= 1.0:
        raise ValueError(f"EMA decay must be in [0, 1], got {decay}")
    return decay * (previous_lag + 1.0)
