"""The pair table: what every objective is a function of."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PairTable:
    """Scores of Q queries against C candidates.

    Attributes:
        scores: similarity / temperature, [Q, C], float32 or float64.
        positive: column of each query's own pair, int64 [Q].
        log_targets: log of the target distribution over columns, [Q, C]; None means the own pair only.
        is_valid: False where a column is no candidate for a query, [Q, C]; None means all are. The
            own pair is always valid.
    """

    scores: Tensor
    positive: Tensor
    log_targets: Tensor | None = None
    is_valid: Tensor | None = None

    @staticmethod
    def square(scores: Tensor) -> PairTable:
        """A table in which row i and column i are a pair, [B, B]."""
        if scores.ndim != 2 or scores.shape[0] != scores.shape[1]:
            raise ValueError(f"a square table is needed, got shape {tuple(scores.shape)}")
        return PairTable(scores, torch.arange(scores.shape[0], device=scores.device))

    @property
    def positive_scores(self) -> Tensor:
        """Score of each query's own pair, [Q]."""
        return self.scores.gather(1, self.positive[:, None])[:, 0]

    @property
    def is_positive(self) -> Tensor:
        """[Q, C], True at the own pair."""
        columns = torch.arange(self.scores.shape[1], device=self.scores.device)
        return columns[None, :] == self.positive[:, None]

    @property
    def is_negative(self) -> Tensor:
        """[Q, C], True at valid columns other than the own pair."""
        negative = ~self.is_positive
        return negative if self.is_valid is None else negative & self.is_valid

    def masked_scores(self) -> Tensor:
        """Scores with -inf at columns that are no candidates, [Q, C]."""
        if self.is_valid is None:
            return self.scores
        return self.scores.masked_fill(~(self.is_valid | self.is_positive), -torch.inf)
