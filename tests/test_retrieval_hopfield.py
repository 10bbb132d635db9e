"""Hopfield retrieval: released values and gradients, loop, chunks, limits in beta, refusals."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.retrieval import effective_patterns, hopfield_retrieval
from tests.golden_files import GOLDEN, assert_golden, leaf, tensors
from tests.oracles.contrastive import loop_hopfield

CASES = sorted(path.stem for path in GOLDEN.glob("hopfield_*.npz"))


def unit(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(shape, dtype=torch.float64, generator=generator), dim=-1)


def test_every_copied_case_is_used():
    assert len(CASES) == 3


@pytest.mark.parametrize("chunk", [None, 3])
@pytest.mark.parametrize("name", CASES)
def test_retrieval_equals_the_release(name, chunk):
    golden = tensors(name)
    stored_raw, state_raw = leaf(golden["stored_raw"]), leaf(golden["state_raw"])
    stored, state = F.normalize(stored_raw, dim=1), F.normalize(state_raw, dim=1)
    beta = leaf(golden["beta"])
    retrieved = hopfield_retrieval(state, stored, beta=beta, rows_per_chunk=chunk)
    assert_golden(retrieved, golden["retrieved_unit"])
    assert_golden(F.normalize(golden["assoc"] @ stored, dim=1), golden["retrieved_unit"])
    (retrieved * golden["W"]).sum().backward()
    assert_golden(stored_raw.grad, golden["g_stored_raw"])
    assert_golden(state_raw.grad, golden["g_state_raw"])
    assert_golden(beta.grad, golden["g_beta"])
    softer = hopfield_retrieval(state, stored, beta=golden["beta"] / 2)
    assert (softer - golden["retrieved_unit"]).abs().max() > 1e-3


@pytest.mark.parametrize("beta", [0.5, 8.0, 60.0])
def test_retrieval_equals_the_loop(beta):
    state, stored = unit(3, 4), unit(5, 4, seed=1)
    expected = torch.tensor(loop_hopfield(state, stored, beta=beta), dtype=torch.float64)
    torch.testing.assert_close(hopfield_retrieval(state, stored, beta=beta), expected)
    assert not torch.allclose(hopfield_retrieval(state, stored, beta=beta + 1), expected)


def test_retrieved_patterns_have_unit_length():
    lengths = hopfield_retrieval(unit(3, 4), unit(5, 4, seed=1), beta=2.0).norm(dim=1)
    torch.testing.assert_close(lengths, torch.ones(3, dtype=torch.float64))


def test_large_beta_retrieves_the_nearest_pattern_and_small_beta_the_mean():
    state, stored = unit(3, 4), unit(5, 4, seed=1)
    nearest = stored[(state @ stored.T).argmax(1)]
    torch.testing.assert_close(hopfield_retrieval(state, stored, beta=1e4), nearest)
    mean = F.normalize(stored.mean(0), dim=0).expand(3, -1)
    torch.testing.assert_close(hopfield_retrieval(state, stored, beta=1e-9), mean)


def test_the_order_of_stored_patterns_is_irrelevant():
    state, stored = unit(3, 4), unit(5, 4, seed=1)
    whole = hopfield_retrieval(state, stored, beta=8.0)
    torch.testing.assert_close(hopfield_retrieval(state, stored[[4, 2, 0, 1, 3]], beta=8.0), whole)
    assert not torch.allclose(hopfield_retrieval(state, stored[:4], beta=8.0), whole)


@pytest.mark.parametrize("chunk", [1, 2, 3, 9])
def test_chunks_change_neither_retrieval_nor_diagnostics(chunk):
    state, stored = unit(3, 4), unit(5, 4, seed=1)
    whole = hopfield_retrieval(state, stored, beta=8.0)
    torch.testing.assert_close(hopfield_retrieval(state, stored, beta=8.0, rows_per_chunk=chunk), whole)
    found = effective_patterns(state, stored, beta=8.0, rows_per_chunk=chunk)
    torch.testing.assert_close(found, effective_patterns(state, stored, beta=8.0))
    assert not torch.allclose(found, effective_patterns(state, stored, beta=7.0))


def test_gradients_pass_gradcheck():
    beta = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    inputs = (leaf(unit(3, 4)), leaf(unit(5, 4, seed=1)), beta)
    assert torch.autograd.gradcheck(lambda q, m, b: hopfield_retrieval(q, m, beta=b), inputs)


@pytest.mark.parametrize(("beta", "num_stored"), [(2.0, 6), (8.0, 6), (8.0, 3)])
def test_effective_patterns_of_orthonormal_patterns_have_the_closed_value(beta, num_stored):
    stored = torch.eye(num_stored, dtype=torch.float64)
    own = math.exp(beta) / (math.exp(beta) + num_stored - 1)
    other = (1 - own) / (num_stored - 1)
    entropy = -own * math.log(own) - (num_stored - 1) * other * math.log(other)
    found = effective_patterns(stored, stored, beta=beta).item()
    assert found == pytest.approx(math.exp(entropy))


def test_effective_patterns_run_from_all_to_one():
    rows = unit(6, 4)
    assert effective_patterns(rows, rows, beta=1e-9).item() == pytest.approx(6.0)
    assert effective_patterns(rows, rows, beta=1e4).item() == pytest.approx(1.0)


@pytest.mark.parametrize("beta", [0.0, -1.0, 0])
def test_refuses_beta_that_learns_nothing(beta):
    with pytest.raises(ValueError, match=f"beta must be > 0, got {beta}"):
        hopfield_retrieval(unit(3, 4), unit(3, 4), beta=beta)
