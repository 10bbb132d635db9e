"""Noise on the device as a function of row keys: against unbounded integers, uniform, unrelated draws."""

import itertools
import math

import pytest
import torch

from models.keyed_noise import Draw, keyed_uniform

_MASK = (1 << 64) - 1
KEYS = torch.randint(-(1 << 63), (1 << 63) - 1, (4096,), generator=torch.Generator().manual_seed(0))


def splitmix(z: int) -> int:
    """The finaliser of SplitMix64 in unbounded integers."""
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


def plain_uniform(key: int, purpose: int, count: int) -> list[float]:
    state = splitmix((key & _MASK) ^ splitmix(purpose))
    counters = [(i * 0x9E3779B97F4A7C15) & _MASK for i in range(1, count + 1)]
    return [(splitmix((state + counter) & _MASK) >> 40) / (1 << 24) for counter in counters]


@pytest.mark.parametrize("purpose", Draw)
def test_against_unbounded_integers(purpose):
    keys = torch.cat([KEYS[:50], torch.tensor([0, 1, -1, (1 << 63) - 1, -(1 << 63)])])
    found = keyed_uniform(keys, purpose, 5)
    assert found.dtype == torch.float32
    assert found.tolist() == [plain_uniform(key, int(purpose), 5) for key in keys.tolist()]
    assert found.tolist() != [plain_uniform(key + 1, int(purpose), 5) for key in keys.tolist()]


def test_a_key_has_its_numbers_in_any_company_and_of_any_count():
    whole = keyed_uniform(KEYS, Draw.ROLL, 7)
    assert torch.equal(keyed_uniform(KEYS[100:103], Draw.ROLL, 7), whole[100:103])
    order = torch.randperm(len(KEYS), generator=torch.Generator().manual_seed(1))
    assert torch.equal(keyed_uniform(KEYS[order], Draw.ROLL, 7), whole[order])
    assert torch.equal(keyed_uniform(KEYS, Draw.ROLL, 3), whole[:, :3])
    assert keyed_uniform(KEYS[:0], Draw.ROLL, 3).shape == (0, 3)


def test_no_generator_is_touched_and_none_decides():
    torch.manual_seed(3)
    first = keyed_uniform(KEYS[:9], Draw.MEMORY, 4)
    state = torch.get_rng_state()
    torch.manual_seed(4)
    assert torch.equal(keyed_uniform(KEYS[:9], Draw.MEMORY, 4), first)
    torch.manual_seed(3)
    assert torch.equal(torch.get_rng_state(), state)


def test_uniform_in_the_unit_interval():
    found = keyed_uniform(torch.arange(4096), Draw.MEMORY, 16).flatten().double()
    assert 0 <= found.min() < 1e-3
    assert 1 - 1e-3 < found.max() < 1
    # one standard deviation of the mean of n numbers is sqrt(1 / 12 n)
    assert abs(found.mean() - 0.5) < 4 * math.sqrt(1 / 12 / len(found))
    counts = torch.histc(found, 64, 0, 1)
    expected = len(found) / 64
    # chi-squared with 63 degrees of freedom: mean 63, standard deviation 11
    assert ((counts - expected) ** 2 / expected).sum() < 63 + 5 * 11


def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    return torch.corrcoef(torch.stack([a.flatten().double(), b.flatten().double()]))[0, 1].item()


@pytest.mark.parametrize(("one", "other"), list(itertools.combinations(Draw, 2)))
def test_purposes_are_unrelated(one, other):
    # 4096 * 4 pairs: one standard deviation of their correlation is .008
    keys = torch.arange(4096)
    assert abs(correlation(keyed_uniform(keys, one, 4), keyed_uniform(keys, other, 4))) < 0.04


def test_neighbouring_keys_and_numbers_are_unrelated():
    found = keyed_uniform(torch.arange(4097), Draw.PRIOR, 5)
    assert abs(correlation(found[1:], found[:-1])) < 0.04
    assert abs(correlation(found[:, 1:], found[:, :-1])) < 0.04
    assert correlation(found, found) == pytest.approx(1.0)


def test_every_purpose_has_a_number_of_its_own():
    assert len({int(purpose) for purpose in Draw}) == len(Draw)
    assert min(Draw) > 0
