"""Random numbers that are a function of keys, not of a generator's state.

A draw depends on (seed, epoch, row, purpose) only, so a retried task, another worker count or a resume
gives the same pixels, texts and masks.
"""

from __future__ import annotations

import hashlib
from enum import IntEnum
from typing import Final

import numpy as np
from numpy.typing import NDArray

# Constants of the SplitMix64 generator (Steele, Lea and Flood 2014).
_GOLDEN: Final = np.uint64(0x9E3779B97F4A7C15)
_MIX_1: Final = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2: Final = np.uint64(0x94D049BB133111EB)


# Of all rows, or of each row: a batch can end one epoch and begin the next.
Epochs = int | NDArray[np.int64]


class Purpose(IntEnum):
    """What a draw is for; draws for different purposes are independent."""

    TEXT = 1
    CROP = 2
    TEACHER_CROP = 3
    SELECTION = 4
    # The key of whatever the model itself draws for a pair.
    MODEL = 5


def text_key(text: str) -> int:
    """A 63-bit hash of a string, the same on every machine."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def keyed_uniform(
    keys: NDArray[np.int64], *, seed: int, epoch: Epochs, purpose: Purpose, stream: int = 0, count: int = 1
) -> NDArray[np.float64]:
    """Uniform numbers in [0, 1) for each key, [B, count].

    Args:
        keys: of the rows, int64 [B].
        epoch: one for all rows, or that of each row.
        stream: separates draws for the same purpose, such as views.
    """
    state = _salted(keys, seed, epoch, int(purpose), stream)
    with np.errstate(over="ignore"):
        counters = np.arange(1, count + 1, dtype=np.uint64) * _GOLDEN
        bits = _mix(state[:, None] + counters[None, :])
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def keyed_hash(keys: NDArray[np.int64], *, seed: int, epoch: Epochs, purpose: Purpose) -> NDArray[np.int64]:
    """A 63-bit hash of each key with seed, epoch and purpose, int64 [B]."""
    return (_salted(keys, seed, epoch, int(purpose)) >> np.uint64(1)).astype(np.int64)


def _salted(keys: NDArray[np.int64], *salts: Epochs) -> NDArray[np.uint64]:
    state = keys.astype(np.uint64)
    with np.errstate(over="ignore"):  # the arithmetic is modulo 2^64 on purpose
        for salt in salts:
            state = _mix(state ^ (_as_uint64(salt) * _GOLDEN + _GOLDEN))
    return state


def _as_uint64(salt: Epochs) -> np.uint64 | NDArray[np.uint64]:
    if isinstance(salt, np.ndarray):
        return salt.astype(np.uint64)
    return np.uint64(salt & 0xFFFFFFFFFFFFFFFF)


def _mix(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    z = (z ^ (z >> np.uint64(30))) * _MIX_1
    z = (z ^ (z >> np.uint64(27))) * _MIX_2
    return z ^ (z >> np.uint64(31))
