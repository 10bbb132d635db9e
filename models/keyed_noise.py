"""Uniform noise that is a function of row keys, computed where the batch is.

A draw depends on the key alone, not on a generator's state, so another number of workers, a retried
step or a resume draws the same numbers.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Final

import torch
from torch import Tensor

# Constants of the SplitMix64 generator (Steele, Lea and Flood 2014), as signed 64-bit integers.
_GOLDEN: Final = 0x9E3779B97F4A7C15 - (1 << 64)
_MIX_1: Final = 0xBF58476D1CE4E5B9 - (1 << 64)
_MIX_2: Final = 0x94D049BB133111EB - (1 << 64)


class Draw(IntEnum):
    """What a draw is for; draws for different purposes are independent."""

    ROLL = 1
    MEMORY = 2
    PROTOTYPES = 3
    MASKED_TOKENS = 4
    PRIOR = 5
    DIRECTIONS = 6
    MASKED_PATCHES = 7


def keyed_uniform(keys_B: Tensor, purpose: Draw, count: int) -> Tensor:
    """Uniform numbers in [0, 1) for each key, float32 [B, count].

    Args:
        keys_B: int64; equal keys give equal numbers.
        purpose: separates draws for different uses.
        count: numbers per key.
    """
    counters = torch.arange(1, count + 1, device=keys_B.device) * _GOLDEN
    salt = _mix(torch.tensor(int(purpose), device=keys_B.device))
    state = _mix(keys_B ^ salt)
    bits = _mix(state[:, None] + counters)
    # 24 bits fill a float32 without rounding up to 1.
    return _shifted(bits, 40).to(torch.float32) * 2.0**-24


def _shifted(z: Tensor, places: int) -> Tensor:
    """Right shift that fills with zeros; the integers are signed and torch's own shift copies the sign."""
    return (z >> places) & ((1 << (64 - places)) - 1)


def _mix(z: Tensor) -> Tensor:
    # Multiplication wraps modulo 2^64 on purpose.
    z = (z ^ _shifted(z, 30)) * _MIX_1
    z = (z ^ _shifted(z, 27)) * _MIX_2
    return z ^ _shifted(z, 31)
