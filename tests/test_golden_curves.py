"""Every method's first ten steps against the kept curve."""

from __future__ import annotations

import json

import pytest

from models.methods.catalogue import METHODS
from tests.golden_curves import FILE, NUM_STEPS, curve


@pytest.mark.parametrize("method", METHODS)
def test_ten_steps_follow_the_kept_curve(method):
    kept = json.loads(FILE.read_text())[method]
    assert len(kept) == NUM_STEPS
    # float64: other machines differ by the order of sums alone, which ten steps of Adam amplify.
    assert curve(method) == pytest.approx(kept, rel=1e-6)
    # Control: a learning rate one per cent higher does not pass.
    assert curve(method, lr=1.01e-3) != pytest.approx(kept, rel=1e-6)


def test_the_kept_curves_are_those_of_the_catalogue():
    assert json.loads(FILE.read_text()).keys() == METHODS.keys()
