"""Chunked rows: values and gradients of whole tables, loops, what is kept in memory, refusals."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from models.chunked_losses import chunked_cloob, chunked_info_loob, chunked_info_nce
from models.chunks import rows_in_chunks, rows_per_chunk
from models.estimators import InfoLOOB, InfoNCE, SoftKL, symmetric
from models.pair_table import PairTable
from models.retrieval import hopfield_retrieval
from tests.oracles.contrastive import LoopTable, loop_ce, loop_cloob, loop_loob

N, D, M = 11, 5, 13  # local rows, width, candidates: no chunk size divides 11
CHUNKS = [1, 3, 4, 11, 50]
# float64 rounding of sums in another order
ROUNDING = {"rtol": 1e-12, "atol": 1e-13}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def unit(*shape: int, seed: int = 0) -> Tensor:
    return F.normalize(draw(*shape, seed=seed), dim=-1)


def scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def with_gradients(loss_of: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    """Loss and the gradient of every input."""
    leaves = [value.detach().clone().requires_grad_() for value in inputs]
    loss = loss_of(*leaves)
    loss.backward()
    assert all(leaf.grad is not None for leaf in leaves)
    return [loss.detach(), *(leaf.grad for leaf in leaves)]


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, **ROUNDING)


def table_loss(estimator: Any, kind: str, chunk: int | None) -> Callable[..., Tensor]:
    """A loss over local rows against more candidates; masks and targets are made in the chunk."""
    groups = torch.arange(M) // 3
    positive = torch.arange(N) + 1

    def loss_of(queries: Tensor, candidates: Tensor, inverse_temperature: Tensor) -> Tensor:
        def rows_of(rows: slice) -> Tensor:
            own = positive[rows]
            is_valid = log_targets = None
            if kind != "plain":
                is_valid = groups[own][:, None] != groups[None, :]
                is_valid = is_valid.scatter(1, own[:, None], True)
            if kind == "targets":
                guidance = (3 * candidates[own] @ candidates.T).masked_fill(~is_valid, -torch.inf)
                log_targets = guidance.log_softmax(1)
            scores = inverse_temperature * queries[rows] @ candidates.T
            return estimator.rows(PairTable(scores, own, log_targets, is_valid))

        return estimator.reduce(rows_in_chunks(rows_of, N, chunk))

    return loss_of


@pytest.mark.parametrize(
    ("estimator", "kind"),
    [
        (InfoNCE(), "plain"),
        (InfoNCE(), "masked"),
        (InfoLOOB(), "plain"),
        (InfoLOOB(), "masked"),
        (SoftKL(), "targets"),
    ],
)
@pytest.mark.parametrize("chunk", CHUNKS)
def test_rows_of_chunks_are_the_rows_of_the_whole_table(estimator, kind, chunk):
    inputs = (unit(N, D), unit(M, D, seed=1), scalar(20.0))
    expected = with_gradients(table_loss(estimator, kind, None), *inputs)
    assert_same(with_gradients(table_loss(estimator, kind, chunk), *inputs), expected)
    assert all(gradient.abs().max() > 1e-3 for gradient in expected)
    other = with_gradients(table_loss(estimator, kind, chunk), unit(N, D, seed=2), *inputs[1:])
    assert not any(torch.allclose(a, b) for a, b in zip(other, expected, strict=True))


def test_masks_change_the_rows():
    inputs = (unit(N, D), unit(M, D, seed=1), scalar(20.0))
    plain, masked = (with_gradients(table_loss(InfoLOOB(), kind, 3), *inputs) for kind in ("plain", "masked"))
    assert not any(torch.allclose(a, b) for a, b in zip(plain, masked, strict=True))


LOSSES = [(chunked_info_nce, loop_ce), (chunked_info_loob, loop_loob)]


@pytest.mark.parametrize(("loss_of", "loop"), LOSSES)
@pytest.mark.parametrize("chunk", [None, 4])
def test_losses_equal_the_loop(loss_of, loop, chunk):
    image, text = unit(N, D), unit(N, D, seed=1)
    own = list(range(N))
    rows = [
        *loop(LoopTable(20.0 * image @ text.T, own)),
        *loop(LoopTable(20.0 * text @ image.T, own)),
    ]
    found = loss_of(image, text, inverse_temperature=20.0, rows_per_chunk=chunk)
    assert found.item() == pytest.approx(sum(rows) / len(rows), rel=1e-12)
    other = loss_of(image, text.flip(0), inverse_temperature=20.0, rows_per_chunk=chunk)
    assert other.item() != pytest.approx(found.item(), rel=1e-3)


@pytest.mark.parametrize("chunk", [None, 4])
def test_cloob_equals_the_loop(chunk):
    image, text = unit(N, D), unit(N, D, seed=1)
    tables = loop_cloob(image, text, beta=8.0, inverse_temperature=20.0)
    rows = [
        row
        for table in tables
        for row in loop_loob(LoopTable(torch.tensor(table, dtype=torch.float64), list(range(N))))
    ]
    found = chunked_cloob(image, text, beta=8.0, inverse_temperature=20.0, rows_per_chunk=chunk)
    assert found.item() == pytest.approx(sum(rows) / len(rows), rel=1e-12)
    swapped = chunked_cloob(text, image, beta=8.0, inverse_temperature=20.0, rows_per_chunk=chunk)
    torch.testing.assert_close(swapped, found, **ROUNDING)
    softer = chunked_cloob(image, text, beta=7.0, inverse_temperature=20.0, rows_per_chunk=chunk)
    assert softer.item() != pytest.approx(found.item(), rel=1e-3)


def cloob(image: Tensor, text: Tensor, inverse_temperature: Tensor, beta: Tensor, chunk: int | None):
    return chunked_cloob(
        image, text, beta=beta, inverse_temperature=inverse_temperature, rows_per_chunk=chunk
    )


@pytest.mark.parametrize("chunk", CHUNKS)
def test_losses_in_chunks_have_the_gradients_of_whole_tables(chunk):
    image, text, inverse_temperature = unit(N, D), unit(N, D, seed=1), scalar(20.0)
    for loss_of, _ in LOSSES:
        whole, chunked = (
            with_gradients(
                lambda x, y, s, f=loss_of, c=size: f(x, y, inverse_temperature=s, rows_per_chunk=c),
                image,
                text,
                inverse_temperature,
            )
            for size in (None, chunk)
        )
        assert_same(chunked, whole)
    whole, chunked = (
        with_gradients(lambda *x, c=size: cloob(*x, c), image, text, inverse_temperature, scalar(8.0))
        for size in (None, chunk)
    )
    assert_same(chunked, whole)
    assert all(gradient.abs().max() > 1e-3 for gradient in whole)


def test_losses_are_those_of_the_square_table():
    image, text = unit(N, D), unit(N, D, seed=1)
    logits = 20.0 * image @ text.T
    for loss_of, estimator in ((chunked_info_nce, InfoNCE()), (chunked_info_loob, InfoLOOB())):
        found = loss_of(image, text, inverse_temperature=20.0, rows_per_chunk=3)
        torch.testing.assert_close(found, symmetric(estimator, logits), **ROUNDING)


def test_gradients_pass_gradcheck():
    inputs = [leaf.requires_grad_() for leaf in (unit(4, 3), unit(4, 3, seed=1), scalar(3.0), scalar(2.0))]
    assert torch.autograd.gradcheck(lambda *x: cloob(*x, 3), inputs)


def test_a_module_in_the_chunk_gets_its_gradient_and_runs_twice_per_chunk():
    critic = torch.nn.Linear(D, 2, dtype=torch.float64)
    rows = unit(N, D)
    seen = []

    def rows_of(part: slice) -> Tensor:
        seen.append((part.start, part.stop))
        return critic(rows[part]).square()

    rows_in_chunks(rows_of, N, 4).sum().backward()
    found = critic.weight.grad.clone()
    critic.zero_grad()
    critic(rows).square().sum().backward()
    torch.testing.assert_close(found, critic.weight.grad, **ROUNDING)
    assert sorted(seen) == [(0, 4)] * 2 + [(4, 8)] * 2 + [(8, 11)] * 2


def test_without_gradients_nothing_runs_twice():
    seen = []

    def rows_of(part: slice) -> Tensor:
        seen.append(part.start)
        return torch.arange(part.start, part.stop)

    with torch.no_grad():
        assert rows_in_chunks(rows_of, N, 4).tolist() == list(range(N))
    assert seen == [0, 4, 8]


@pytest.mark.parametrize("loss_of", [chunked_info_nce, chunked_info_loob])
def test_half_precision_features_are_compared_in_float32_even_under_autocast(loss_of):
    image, text = (unit(N, D, seed=seed).bfloat16().requires_grad_() for seed in (0, 1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = loss_of(image, text, inverse_temperature=20.0, rows_per_chunk=4)
    loss.backward()
    assert loss.dtype == torch.float32
    wide = loss_of(image.float(), text.float(), inverse_temperature=20.0, rows_per_chunk=None)
    torch.testing.assert_close(loss, wide)
    assert image.grad.dtype == torch.bfloat16
    assert image.grad.isfinite().all()


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation returns while the mode is on."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, Tensor):
                self.elements = max(self.elements, value.numel())
        return result


def footprint(loss_of: Callable[..., Tensor], num_pairs: int) -> tuple[int, int]:
    """Largest tensor saved for the backward and largest ever made, in elements."""
    saved = []

    def pack(value: Tensor) -> Tensor:
        saved.append(value.numel())
        return value

    image, text = (unit(num_pairs, D, seed=seed).requires_grad_() for seed in (0, 1))
    with LargestTensor() as largest:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
            loss = loss_of(image, text)
        loss.backward()
    return max(saved), largest.elements


@pytest.mark.parametrize("name", ["ce", "loob", "cloob"])
def test_no_chunk_is_kept_and_no_table_is_ever_whole(name):
    chunk = 3

    def loss_with(size: int | None) -> Callable[[Tensor, Tensor], Tensor]:
        def loss_of(image: Tensor, text: Tensor) -> Tensor:
            if name == "cloob":
                return cloob(image, text, scalar(20.0), scalar(8.0), size)
            plain = chunked_info_nce if name == "ce" else chunked_info_loob
            return plain(image, text, inverse_temperature=20.0, rows_per_chunk=size)

        return loss_of

    for num_pairs in (40, 80):
        saved, largest = footprint(loss_with(chunk), num_pairs)
        assert saved <= num_pairs * D  # features
        assert largest <= num_pairs * max(D, chunk)  # features or one piece of the table
        saved, largest = footprint(loss_with(None), num_pairs)
        assert saved == largest == num_pairs**2


def test_two_workers_have_the_gradient_of_one_process_without_chunks():
    done = subprocess.run(
        [sys.executable, "-m", "tests.chunk_ranks"],
        cwd=Path(__file__).parents[1],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    for rank in json.loads(done.stdout):
        assert rank["num_gradients"] == 65
        assert rank["loss"] < 1e-12
        assert rank["gradient"] < 1e-12
        assert rank["local_gradient"] > 1e-2  # the control; the loss does not show it


@pytest.mark.parametrize(
    ("num_rows", "num_columns", "expected"),
    [
        (4096, 4096, None),
        (4096, 4097, 2048),
        (16384, 16384, 1024),
        (32768, 32768, 512),
        (4096, 32768, 512),
        (100, 2**25, 1),
        (10, 4, None),
    ],
)
def test_chunks_hold_at_most_the_limit(num_rows, num_columns, expected):
    found = rows_per_chunk(num_rows, num_columns)
    assert found == expected
    assert found is None or found == 1 or found * num_columns <= 2**24


def test_chunks_are_as_equal_as_they_can_be():
    assert rows_per_chunk(10, 10, limit_elements=90) == 5
    assert rows_per_chunk(10, 10, limit_elements=40) == 4
    assert rows_per_chunk(10, 10, limit_elements=100) is None


X, Y = unit(4, 3), unit(4, 3, seed=1)
SCALE = {"inverse_temperature": 1.0, "rows_per_chunk": 2}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: rows_in_chunks(lambda rows: X[rows], 0, 2), "num_rows must be >= 1, got 0"),
        (lambda: rows_in_chunks(lambda rows: X[rows], 4, 0), "rows_per_chunk must be >= 1 or None, got 0"),
        (
            lambda: rows_in_chunks(lambda rows: X, 8, 2),
            r"rows 0 to 2 must give 2 values, got shape \(4, 3\)",
        ),
        (lambda: rows_in_chunks(lambda rows: X.sum(), 4, None), r"must give 4 values, got shape \(\)"),
        (lambda: rows_per_chunk(0, 4), "num_rows must be >= 1, got 0"),
        (lambda: rows_per_chunk(4, 0), "num_columns must be >= 1, got 0"),
        (lambda: rows_per_chunk(4, 4, limit_elements=0), "limit_elements must be >= 1, got 0"),
        (lambda: chunked_info_nce(X, Y[:3], **SCALE), r"\[N, D\], got \(4, 3\) and \(3, 3\)"),
        (lambda: chunked_info_nce(X[0], Y[0], **SCALE), r"\[N, D\], got \(3,\) and \(3,\)"),
        (lambda: chunked_info_loob(X[:1], Y[:1], **SCALE), "at least 2 candidates, got 1"),
        (lambda: chunked_cloob(X, Y[:3], beta=8.0, **SCALE), r"\[N, D\], got \(4, 3\) and \(3, 3\)"),
        (lambda: chunked_cloob(X, Y, beta=0.0, **SCALE), "beta must be > 0, got 0.0"),
        (lambda: hopfield_retrieval(X, Y, beta=1.0, rows_per_chunk=-1), "must be >= 1 or None, got -1"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()
