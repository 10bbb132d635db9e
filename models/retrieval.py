"""Retrieval from a modern Hopfield network: one attention step over the stored batch.

Q states, M stored patterns, D width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from models.chunks import rows_in_chunks


def hopfield_retrieval(
    state: Tensor, stored: Tensor, *, beta: float | Tensor, rows_per_chunk: int | None = None
) -> Tensor:
    """Replace each state by the average of the stored patterns it resembles, and renormalise.

    Args:
        state: unit rows, [Q, D].
        stored: unit rows that are keys and values at once, [M, D]; the global batch, the query's own
            embedding included.
        beta: inverse temperature of the association, > 0. Its effect depends on M: the query's own
            share is about e^beta / (e^beta + M - 1).
        rows_per_chunk: states to associate at once, so that memory is linear in M; None holds the whole
            [Q, M] association.

    Returns:
        Unit rows, [Q, D]. Gradients flow through states and stored patterns.

    Raises:
        ValueError: beta <= 0, where every retrieval is the same mean vector and nothing is learnt;
            rows_per_chunk < 1.

    Source: CLOOB, arXiv 2110.11316, one update step without projections; the renormalisation is in the
        authors' code.
    """
    if not isinstance(beta, Tensor) and beta <= 0:
        raise ValueError(f"beta must be > 0, got {beta}")

    def retrieved(rows: slice) -> Tensor:
        association_QM = torch.softmax(beta * state[rows] @ stored.T, dim=1)
        return F.normalize(association_QM @ stored, dim=1)

    return rows_in_chunks(retrieved, len(state), rows_per_chunk)


def effective_patterns(
    state: Tensor, stored: Tensor, *, beta: float, rows_per_chunk: int | None = None
) -> Tensor:
    """Number of stored patterns a retrieval averages: exp of the association's mean entropy, scalar.

    1 means the query retrieves itself, M that it retrieves the mean of everything. To be logged
    whenever the global batch changes, since beta means something else then. `rows_per_chunk` as for
    `hopfield_retrieval`.
    """

    def entropies(rows: slice) -> Tensor:
        association_QM = torch.softmax(beta * state[rows] @ stored.T, dim=1)
        entropy_Q: Tensor = torch.special.entr(association_QM).sum(1)
        return entropy_Q

    return rows_in_chunks(entropies, len(state), rows_per_chunk).mean().exp()
