"""Rows of a large table in pieces, so that the table is never whole in memory.

A loss over [Q, C] tables keeps a few of them for its backward, so memory grows with the square of the
global batch. What leaves a table is a few numbers per row: here they are computed for some rows at a
time and the piece of the table is computed once more in the backward instead of being kept. That costs
one more product beside the three of forward and backward; memory becomes linear in C.

Q rows of this worker, C columns, K numbers per row.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def rows_per_chunk(num_rows: int, num_columns: int, *, limit_elements: int = 2**24) -> int | None:
    """How many rows of a [num_rows, num_columns] table to hold at once.

    Args:
        num_rows: rows of this worker, > 0.
        num_columns: numbers per row, > 0: candidates of all workers, times patches where a row holds them.
        limit_elements: largest piece; the default is 64 MiB in float32, of which a chunk holds a few. From
            32 MiB on glibc maps blocks one by one; before its version 2.38 it hardly reuses smaller ones.

    Returns:
        Rows per chunk, chunks as equal as whole rows allow; None when the whole table is within the limit.

    Raises:
        ValueError: a count or the limit below 1.
    """
    for name, count in (
        ("num_rows", num_rows),
        ("num_columns", num_columns),
        ("limit_elements", limit_elements),
    ):
        if count < 1:
            raise ValueError(f"{name} must be >= 1, got {count}")
    if num_rows * num_columns <= limit_elements:
        return None
    num_chunks = math.ceil(num_rows / max(1, limit_elements // num_columns))
    return math.ceil(num_rows / num_chunks)


def rows_in_chunks(rows_of: Callable[[slice], Tensor], num_rows: int, rows_per_chunk: int | None) -> Tensor:
    """All rows of a table of which only some exist at a time.

    Args:
        rows_of: takes a slice of rows and returns their values, [q, K] or [q]. It builds everything of
            the size of the table itself (scores, masks, targets) from what it closes over; gradients flow
            to all of that. It runs twice, so it must neither draw random numbers nor call a collective:
            gather before and close over the result.
        num_rows: Q, > 0.
        rows_per_chunk: None computes all rows at once and keeps what their backward needs.

    Returns:
        [Q, K] or [Q]; but for rounding the same for every chunk size, and so are the gradients.

    Raises:
        ValueError: a count below 1, or values whose number is not that of the slice.
    """
    if num_rows < 1:
        raise ValueError(f"num_rows must be >= 1, got {num_rows}")
    if rows_per_chunk is None:
        return _checked(rows_of, slice(0, num_rows))
    if rows_per_chunk < 1:
        raise ValueError(f"rows_per_chunk must be >= 1 or None, got {rows_per_chunk}")
    pieces = (
        slice(start, min(start + rows_per_chunk, num_rows)) for start in range(0, num_rows, rows_per_chunk)
    )
    if not torch.is_grad_enabled():
        return torch.cat([_checked(rows_of, rows) for rows in pieces])
    # The form that is not re-entrant: the other loses the gradient of what is closed over, and counts
    # a parameter of several chunks as ready several times, which data parallelism refuses.
    return torch.cat(
        [
            checkpoint(_checked, rows_of, rows, use_reentrant=False, preserve_rng_state=False)
            for rows in pieces
        ]
    )


def _checked(rows_of: Callable[[slice], Tensor], rows: slice) -> Tensor:
    values = rows_of(rows)
    expected = rows.stop - rows.start
    if values.ndim == 0 or len(values) != expected:
        raise ValueError(
            f"rows {rows.start} to {rows.stop} must give {expected} values, got shape {tuple(values.shape)}"
        )
    return values
