"""Real gloo processes: gradients, first steps and state of every method are those of one process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from models.methods.catalogue import METHODS
from tests.pair_fixture import rows_of
from tests.two_process import (
    CASES,
    FROM_NOTHING,
    NUM_CURVE_STEPS,
    NUM_PAIRS,
    RUN_TIMEOUT_S,
    WORLDS,
    Parity,
    whole_batches,
)

RUNS = [(name, world) for world in WORLDS for name in CASES]
WITH_MEMORY = {"cmc_memory", "cmc_nce", "pcl", "cmc_nce_from_nothing", "pcl_from_nothing"}
# float64 rounding, amplified by two transformer layers; a wrong factor is an error of order one
GRADIENT_TOLERANCE, CURVE_TOLERANCE, STATE_TOLERANCE = 1e-11, 1e-9, 1e-10


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
        timeout=(1 + len(WORLDS)) * RUN_TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = [Parity(**entry) for entry in json.loads(out.read_text())]
    return {(parity.method, parity.world): parity for parity in found}


@pytest.mark.parametrize("world", WORLDS)
def test_workers_hold_different_batches(world):
    """Texts padded to different lengths, and of two texts one worker's pairs have none and another's all."""
    size, whole = NUM_PAIRS // world, whole_batches("cmc_graph")(0)
    shares = [rows_of(whole, slice(r * size, (r + 1) * size)) for r in range(world)]
    assert len({share.token_ids.shape[2] for share in shares}) == world
    assert {tuple(share.is_text[1].tolist()) for share in shares} == {(False,) * size, (True,) * size}
    # A row that two workers hold at once.
    assert shares[0].row_index[0] == shares[-1].row_index[-1]


def test_the_catalogue_is_covered():
    assert METHODS.keys() <= CASES.keys()
    assert WORLDS == (2, 4)


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
    # A case's one step from nothing has gone wrong before: only then the loss differs too.
    if method not in FROM_NOTHING:
        assert parity.plain_loss == pytest.approx(parity.loss, rel=1e-13), parity.describe()


@pytest.mark.parametrize(("method", "world"), RUNS)
def test_first_steps_equal_one_process(parities, method, world):
    parity = parities[method, world]
    assert len(parity.curve) == NUM_CURVE_STEPS
    assert parity.curve_difference < CURVE_TOLERANCE, parity.describe()
    # Control: other batches.
    assert parity.other_curve_difference > 1e-4, parity.describe()


@pytest.mark.parametrize(("method", "world"), RUNS)
def test_what_is_remembered_equals_one_process(parities, method, world):
    """Queues, memories, prototypes and constants; and all ranks hold the same weights, bit for bit."""
    parity = parities[method, world]
    assert len(parity.digest) == world
    assert len(set(parity.digest)) == 1
    assert parity.state < STATE_TOLERANCE, parity.describe()
    # Control: other batches leave other memories.
    assert (parity.other_state > 1e-3) is (method in WITH_MEMORY), parity.describe()


def test_methods_differ_where_their_parts_do(parities):
    """The token selection is really the teacher's, and excluded candidates are really out."""
    losses = {name: parities[name, 2].loss for name in CASES}
    assert len({round(losses[name], 6) for name in ("aclip", "aclip_random", "aclip_high")}) == 3
    for one, other in (
        ("cloob", "cloob_same_group"),
        ("local_mi_dv", "local_mi_dv_same_text"),
        ("clip", "clip_both"),
        ("clip", "clip_to_groups"),
        ("mil_lse", "mil_lse_of_max"),
        ("relaxed", "relaxed_leaky"),
        ("relaxed", "relaxed_all"),
    ):
        assert abs(losses[one] - losses[other]) > 1e-3, (one, other)
