"""What the estimators of a pair table share: their protocol, and exact weighted means over its rows.

N rows of all workers, Q rows of this worker.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from models.pair_table import PairTable


class Estimator(Protocol):
    """What a recipe's estimator slot must offer."""

    def rows(self, table: PairTable) -> Tensor:
        """Values per query, [Q, K]."""
        ...

    def reduce(self, rows: Tensor, weights: Tensor | None = None) -> Tensor:
        """Loss from the rows of every worker, [N, K] -> scalar; weights [N], None means all 1.

        A row of weight 0 has no say, whatever its values; with no weight at all the loss is 0.
        """
        ...


def estimate(estimator: Estimator, table: PairTable) -> Tensor:
    """Loss of one table that holds every row, scalar."""
    return estimator.reduce(estimator.rows(table), table.row_weights)


def checked(table: PairTable) -> PairTable:
    """The table once it is known to have negatives; rows that do not count get harmless scores.

    Raises:
        ValueError: fewer than 2 candidates.
    """
    if table.scores.shape[1] < 2:
        raise ValueError(
            f"a contrastive table needs at least 2 candidates, got {table.scores.shape[1]}; "
            "raise the global batch size"
        )
    return table.quiet()


def weighted_mean(values_N: Tensor, weights_N: Tensor | None, counts_N: Tensor | None = None) -> Tensor:
    """sum(w v) / sum(w n), the mean of values that are sums over n entries each (n = 1 unless given).

    Not a number when rows count but none has an entry; 0 when no row counts.
    """
    if counts_N is None:
        counts_N = torch.ones_like(values_N)
    if weights_N is None:
        return values_N.sum() / counts_N.sum()
    # A product with 0 would let an infinite value of an idle row through.
    kept_N = values_N.masked_fill(weights_N == 0, 0.0)
    return _zero_if_idle((weights_N * kept_N).sum() / _total(weights_N, counts_N), weights_N)


def log_mean_exp(log_sums_N: Tensor, counts_N: Tensor, weights_N: Tensor | None) -> Tensor:
    """log [sum(w e^l) / sum(w n)], of rows that hold the log of a sum of n entries each.

    Never leaves log space, so it is finite wherever the scores are; 0 when no row counts.
    """
    if weights_N is None:
        return log_sums_N.logsumexp(0) - counts_N.sum().log()
    is_idle_N = weights_N == 0
    is_all_idle = is_idle_N.all()
    log_weights_N = (
        weights_N.masked_fill(is_idle_N, 1.0).log().masked_fill(is_idle_N & ~is_all_idle, -torch.inf)
    )
    kept_N = log_sums_N.masked_fill(is_idle_N, 0.0)
    return _zero_if_idle((kept_N + log_weights_N).logsumexp(0) - _total(weights_N, counts_N).log(), weights_N)


def _total(weights_N: Tensor, counts_N: Tensor) -> Tensor:
    """sum(w n), 1 when no row counts."""
    is_idle_N = weights_N == 0
    total = (weights_N * counts_N.masked_fill(is_idle_N, 0.0)).sum()
    return total.masked_fill(is_idle_N.all(), 1.0)


def _zero_if_idle(value: Tensor, weights_N: Tensor) -> Tensor:
    return value.masked_fill((weights_N == 0).all(), 0.0)


def mean_exp(log_sums_N: Tensor, counts_N: Tensor, weights_N: Tensor | None) -> Tensor:
    """sum(w e^l) / sum(w n), see `log_mean_exp`; infinite only when the mean itself is beyond the type."""
    mean = log_mean_exp(log_sums_N, counts_N, weights_N).exp()
    return mean if weights_N is None else _zero_if_idle(mean, weights_N)
