"""Keyed random numbers: functions of their keys, uniform, unrelated between purposes."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from pipelines.keyed_random import Purpose, keyed_hash, keyed_uniform, text_key

KEYS = np.array([text_key(f"row{i}") for i in range(4096)])
BASE = {"seed": 3, "epoch": 5, "purpose": Purpose.CROP, "stream": 0}
_MASK = (1 << 64) - 1


def splitmix(z: int) -> int:
    """The finaliser of SplitMix64 in unbounded integers."""
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


def test_first_number_of_the_published_generator():
    """SplitMix64 started at 0 gives 0xE220A8397B1DCDAF first (the reference implementation's output)."""
    assert splitmix(0x9E3779B97F4A7C15) == 0xE220A8397B1DCDAF


def test_against_unbounded_integers():
    golden = 0x9E3779B97F4A7C15
    found = keyed_uniform(KEYS[:5], **BASE, count=3)
    for row, key in enumerate(KEYS[:5].tolist()):
        state = key
        for salt in (3, 5, int(Purpose.CROP), 0):
            state = splitmix(state ^ ((salt * golden + golden) & _MASK))
        for column in range(3):
            bits = splitmix((state + (column + 1) * golden) & _MASK)
            assert found[row, column] == (bits >> 11) / 2**53


def test_hashes_against_unbounded_integers():
    golden = 0x9E3779B97F4A7C15
    found = keyed_hash(KEYS[:5], seed=3, epoch=5, purpose=Purpose.MODEL)
    for key, hashed in zip(KEYS[:5].tolist(), found.tolist(), strict=True):
        state = key
        for salt in (3, 5, int(Purpose.MODEL)):
            state = splitmix(state ^ ((salt * golden + golden) & _MASK))
        assert hashed == state >> 1


def test_hashes_depend_on_every_key():
    base = {"seed": 3, "epoch": 5, "purpose": Purpose.MODEL}
    first = keyed_hash(KEYS, **base)
    assert first.min() >= 0
    assert len(set(first.tolist())) == len(KEYS)
    for change in ({"seed": 4}, {"epoch": 6}, {"purpose": Purpose.TEXT}):
        assert not (keyed_hash(KEYS, **base | change) == first).any()


def test_a_key_has_its_numbers_in_any_company():
    together = keyed_uniform(KEYS, **BASE, count=4)
    order = np.random.default_rng(0).permutation(len(KEYS))
    np.testing.assert_array_equal(keyed_uniform(KEYS[order], **BASE, count=4), together[order])
    np.testing.assert_array_equal(keyed_uniform(KEYS[7:8], **BASE, count=4), together[7:8])


def test_asking_for_more_numbers_changes_none():
    few, many = keyed_uniform(KEYS, **BASE, count=2), keyed_uniform(KEYS, **BASE, count=9)
    np.testing.assert_array_equal(many[:, :2], few)


def test_uniform_in_the_unit_interval():
    draws = keyed_uniform(KEYS, **BASE, count=16)
    assert draws.shape == (4096, 16)
    assert draws.min() >= 0
    assert draws.max() < 1
    # 16 bins of 65,536 draws: chi-square with 15 degrees of freedom; 44 is its 0.9999 quantile.
    counts = np.histogram(draws, bins=16, range=(0, 1))[0]
    expected = draws.size / 16
    assert ((counts - expected) ** 2 / expected).sum() < 44


# Every pair of these must be unrelated; the last two differ in which of two settings has the 5.
SETTINGS = [
    BASE,
    {**BASE, "seed": 4},
    {**BASE, "epoch": 6},
    {**BASE, "purpose": Purpose.TEXT},
    {**BASE, "stream": 1},
    {**BASE, "seed": 5, "epoch": 3},
    {**BASE, "epoch": int(Purpose.CROP), "purpose": 5},
]


@pytest.mark.parametrize(("one", "other"), list(itertools.combinations(range(len(SETTINGS)), 2)))
def test_other_settings_give_unrelated_numbers(one, other):
    first, second = (keyed_uniform(KEYS, **SETTINGS[i])[:, 0] for i in (one, other))
    # Of 4096 pairs a correlation beyond 5 / sqrt(4096) has probability 6e-7.
    assert abs(np.corrcoef(first, second)[0, 1]) < 5 / 64
    assert (first == second).sum() == 0


def test_neighbouring_keys_are_unrelated():
    draws = keyed_uniform(np.arange(4096), **BASE)[:, 0]
    assert abs(np.corrcoef(draws[:-1], draws[1:])[0, 1]) < 5 / 64


def test_negative_seeds_work():
    assert not np.array_equal(keyed_uniform(KEYS, **{**BASE, "seed": -1}), keyed_uniform(KEYS, **BASE))


def test_text_keys_are_stable_positive_and_distinct():
    # blake2b of "row0", halved: the same on any machine and in any process, unlike hash().
    assert text_key("row0") == 2225422836913162487
    assert len(set(KEYS.tolist())) == len(KEYS)
    assert KEYS.min() >= 0
    assert text_key("ä") != text_key("a")
