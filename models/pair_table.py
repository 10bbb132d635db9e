"""The pair table: what every objective is a function of."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

# Q queries, C candidates, E extra candidates


@dataclass(frozen=True)
class PairTable:
    """Scores of Q queries against C candidates.

    Attributes:
        scores: similarity / temperature, [Q, C], float32 or float64.
        positive: column of each query's own pair, int64 [Q].
        log_targets: log of the target distribution over columns, [Q, C]; None means the own pair only.
        is_valid: False where a column is no candidate for a query, [Q, C]; None means all are. The
            own pair is always valid.
        row_weights: share of each query in every mean, >= 0, type of the scores, [Q]; a row of weight 0
            does not count. None means all 1.
        log_baseline: each query's log-baseline a in nats, [Q]; tuba needs it and interp can use it.
    """

    scores: Tensor
    positive: Tensor
    log_targets: Tensor | None = None
    is_valid: Tensor | None = None
    row_weights: Tensor | None = None
    log_baseline: Tensor | None = None

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

    def with_columns(self, scores_QE: Tensor, is_valid_QE: Tensor | None = None) -> PairTable:
        """The table with further negatives behind its own columns (same modality, queue, memory).

        Args:
            scores_QE: scores of every query against the extra candidates, [Q, E].
            is_valid_QE: False where an extra column is no candidate for a query; None means all are.

        Returns:
            [Q, C + E]; positives keep their columns, and soft targets give the extra ones nothing, which
            makes a symmetric divergence infinite.

        Raises:
            ValueError: another number of queries, or a mask of another shape than the scores.
        """
        num_queries = self.scores.shape[0]
        if scores_QE.ndim != 2 or scores_QE.shape[0] != num_queries:
            raise ValueError(f"extra columns must have shape [{num_queries}, E], got {list(scores_QE.shape)}")
        if is_valid_QE is not None and is_valid_QE.shape != scores_QE.shape:
            raise ValueError(
                f"is_valid of extra columns must have shape {list(scores_QE.shape)}, "
                f"got {list(is_valid_QE.shape)}"
            )
        is_valid, log_targets = self.is_valid, self.log_targets
        if is_valid is not None or is_valid_QE is not None:
            parts = [(is_valid, self.scores), (is_valid_QE, scores_QE)]
            is_valid = torch.cat(
                [
                    torch.ones_like(scores, dtype=torch.bool) if mask is None else mask
                    for mask, scores in parts
                ],
                1,
            )
        if log_targets is not None:
            log_targets = torch.cat([log_targets, torch.full_like(scores_QE, -torch.inf)], 1)
        scores = torch.cat([self.scores, scores_QE], 1)
        return replace(self, scores=scores, log_targets=log_targets, is_valid=is_valid)

    def slice(self, rows: slice) -> PairTable:
        """Some of the queries, all of the columns."""
        parts = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{name: part[rows] for name, part in parts.items() if part is not None})

    def quiet(self) -> PairTable:
        """The table with rows of weight 0 made harmless: no value in them is infinite or has a gradient."""
        if self.row_weights is None:
            return self
        is_idle = self.row_weights == 0
        idle_rows = is_idle[:, None]
        return replace(
            self,
            scores=self.scores.masked_fill(idle_rows, 0.0),
            log_targets=None if self.log_targets is None else self.log_targets.masked_fill(idle_rows, 0.0),
            is_valid=None if self.is_valid is None else self.is_valid | idle_rows,
            log_baseline=None if self.log_baseline is None else self.log_baseline.masked_fill(is_idle, 0.0),
        )
