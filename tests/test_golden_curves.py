"""Every method's first ten steps against the kept curve."""

from __future__ import annotations

import json
from itertools import combinations

import pytest

from models.methods.catalogue import METHODS
from tests.golden_curves import FILE, NUM_STEPS, curve


@pytest.fixture(scope="module")
def kept() -> dict[str, list[float]]:
    found: dict[str, list[float]] = json.loads(FILE.read_text())
    return found


@pytest.mark.parametrize("method", METHODS)
def test_ten_steps_follow_the_kept_curve(kept, method):
    assert len(kept[method]) == NUM_STEPS
    # float64: other machines differ by the order of sums alone, which ten steps of Adam amplify.
    assert curve(method) == pytest.approx(kept[method], rel=1e-6)
    # Control: a learning rate one per cent higher does not pass, three steps are enough to see it.
    assert curve(method, lr=1.01e-3, num_steps=3) != pytest.approx(kept[method][:3], rel=1e-6)


def test_the_kept_curves_are_those_of_the_catalogue(kept):
    assert kept.keys() == METHODS.keys()


def test_no_two_methods_are_the_same(kept):
    """A part that a recipe names and nothing reads would leave it another's curve."""
    same = {
        (one, other)
        for one, other in combinations(kept, 2)
        if kept[one] == pytest.approx(kept[other], rel=1e-9)
    }
    assert same == set()
