"""Real gloo processes: the gradient of every method is that of one process, and so are its first steps."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from models.methods.catalogue import METHODS
from tests.pair_fixture import make_batch, rows_of
from tests.two_process import CASES, NUM_CURVE_STEPS, NUM_PAIRS, ON_FOUR, RUN_TIMEOUT_S, Parity

RUNS = [(name, 2) for name in CASES] + [(name, 4) for name in ON_FOUR]
# float64 rounding, amplified by two transformer layers; a wrong factor is an error of order one
GRADIENT_TOLERANCE, CURVE_TOLERANCE = 1e-11, 1e-9


@pytest.fixture(scope="module")
def parities(tmp_path_factory) -> dict[tuple[str, int], Parity]:
    """All methods on all processes, measured by one command."""
    out = tmp_path_factory.mktemp("parity") / "parity.json"
    done = subprocess.run(
        [sys.executable, "-m", "tests.two_process", "--out", str(out)],
        cwd=Path(__file__).parents[1],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=2 * RUN_TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = [Parity(**entry) for entry in json.loads(out.read_text())]
    return {(parity.method, parity.world): parity for parity in found}


def test_workers_pad_to_different_lengths():
    for world in (2, 4):
        size = NUM_PAIRS // world
        shares = [rows_of(make_batch(), slice(r * size, (r + 1) * size)) for r in range(world)]
        assert len({share.token_ids.shape[1] for share in shares}) == world


def test_the_catalogue_is_covered():
    assert METHODS.keys() <= CASES.keys()


@pytest.mark.parametrize(("method", "world"), RUNS)
def test_gradient_equals_one_process(parities, method, world):
    parity = parities[method, world]
    assert parity.gradient < GRADIENT_TOLERANCE, parity.describe()
    assert parity.worker_loss == pytest.approx(parity.loss, rel=1e-13), parity.describe()


@pytest.mark.parametrize(("method", "world"), RUNS)
def test_a_plain_gather_fails(parities, method, world):
    """The control; the loss does not show it."""
    parity = parities[method, world]
    assert parity.plain_gradient > 1e-2, parity.describe()
    assert parity.plain_curve[0] == pytest.approx(parity.loss, rel=1e-13), parity.describe()


@pytest.mark.parametrize(("method", "world"), RUNS)
def test_first_steps_equal_one_process(parities, method, world):
    parity = parities[method, world]
    assert len(parity.curve) == NUM_CURVE_STEPS
    assert parity.curve_difference < CURVE_TOLERANCE, parity.describe()
    assert parity.plain_curve_difference > 1e-4, parity.describe()


def test_methods_differ_where_their_parts_do(parities):
    """The token selection is really the teacher's, and excluded candidates are really out."""
    losses = {name: parities[name, 2].loss for name in CASES}
    assert len({round(losses[name], 6) for name in ("aclip", "aclip_random", "aclip_high")}) == 3
    assert abs(losses["cloob"] - losses["cloob_same_group"]) > 1e-3
    assert abs(losses["local_mi_dv"] - losses["local_mi_dv_same_text"]) > 1e-3
