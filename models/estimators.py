"""Estimators of mutual information on a pair table, as losses in nats to minimise.

Each estimator is split in two so that it is exact on any number of workers: `rows` reduces the local
rows of a table to a few numbers per row, `reduce` makes the loss out of the rows of all workers. Only
the small row values are gathered between the two, and neither asks how many workers there are.

Objectives are unscaled means over queries, so weights are comparable across methods; factors to the
authors' losses are stated where they differ.

Losses of a softmax over candidates are here; those that weigh pairs against pairs are in `bounds`, the
bounds of a score table to maximise in `score_bounds` (names end in `_bound`). All can be imported from here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from models.bounds import (
    EXP_ESTIMATORS,
    NWJ,
    TUBA,
    DonskerVaradhan,
    Interpolated,
    JensenShannon,
    SigmoidPairs,
    smallest_safe_temperature,
)
from models.pair_table import PairTable
from models.reductions import Estimator, checked, estimate, weighted_mean
from models.relaxation import relax, slacken
from models.score_bounds import (
    donsker_varadhan_bound,
    info_nce_bound,
    interpolated_bound,
    js_bound,
    js_fgan_bound,
    mine_bound,
    nwj_bound,
    smile_bound,
    tuba_bound,
)
from models.targets import kl_rows, symmetric_kl_rows

__all__ = [
    "EXP_ESTIMATORS",
    "NWJ",
    "TUBA",
    "DonskerVaradhan",
    "Estimator",
    "InfoLOOB",
    "InfoNCE",
    "Interpolated",
    "JensenShannon",
    "RelationKL",
    "SigmoidPairs",
    "SoftKL",
    "donsker_varadhan",
    "donsker_varadhan_bound",
    "estimate",
    "info_loob",
    "info_nce",
    "info_nce_bound",
    "interpolated_bound",
    "jensen_shannon",
    "js_bound",
    "js_fgan_bound",
    "mine_bound",
    "nwj_bound",
    "relax",
    "slacken",
    "smallest_safe_temperature",
    "smile_bound",
    "symmetric",
    "tuba_bound",
]


@dataclass(frozen=True, kw_only=True)
class InfoNCE:
    """Cross-entropy of the candidates' softmax (InfoNCE; the CLIP loss takes both directions).

    With soft targets the loss is their cross-entropy, whose gradient is that of the divergence.

    Attributes:
        slack: nats a query may lose for nothing, relu(row - slack); a relaxation of positive pairs.

    Source: CLIP, arXiv 2103.00020; CPC, arXiv 1807.03748. Slack: ours, after the aim of arXiv 2212.07050.
    """

    kind: Literal["ce"] = "ce"
    slack: float = 0.0

    def __post_init__(self) -> None:
        if not self.slack >= 0:
            raise ValueError(f"slack must be >= 0, got {self.slack}")

    def rows(self, table: PairTable) -> Tensor:
        table = checked(table)
        log_normaliser = table.masked_scores().logsumexp(1)
        if table.log_targets is None:
            expected = table.positive_scores
        else:
            expected = (table.log_targets.exp() * table.scores).sum(1)
        rows = log_normaliser - expected
        return (slacken(rows, self.slack) if self.slack else rows)[:, None]

    def reduce(self, rows: Tensor, weights: Tensor | None = None) -> Tensor:
        return weighted_mean(rows[:, 0], weights)


@dataclass(frozen=True, kw_only=True)
class SoftKL:
    """Divergence of the candidates' softmax p from soft targets y, KL(y || p), or its symmetric mean.

    Source: SoftCLIP, arXiv 2303.17561 (form of the divergence not stated there; both offered).
    """

    kind: Literal["kl"] = "kl"
    direction: Literal["forward", "symmetric"] = "forward"

    def rows(self, table: PairTable) -> Tensor:
        table = checked(table)
        if table.log_targets is None:
            raise ValueError("estimator 'kl' needs soft targets; set targets.kind=soft or use estimator 'ce'")
        return _divergence(self.direction, table.log_targets, table.masked_scores())

    def reduce(self, rows: Tensor, weights: Tensor | None = None) -> Tensor:
        return weighted_mean(rows[:, 0], weights)


@dataclass(frozen=True, kw_only=True)
class RelationKL:
    """Divergence among the negatives only: both distributions without the own pair, renormalised.

    Its gradient on the negatives sums to zero: it re-ranks them and never moves the positive.
    Source: SoftCLIP, arXiv 2303.17561 (disentangled negatives).
    """

    kind: Literal["relation_kl"] = "relation_kl"
    direction: Literal["forward", "symmetric"] = "forward"

    def rows(self, table: PairTable) -> Tensor:
        table = checked(table)
        if table.log_targets is None:
            raise ValueError("estimator 'relation_kl' needs soft targets; set targets.kind=soft")
        takes_part, is_counted = _negatives_or_all(table)
        log_targets = table.log_targets.masked_fill(~is_counted[:, None], 0.0)
        log_q = log_targets.masked_fill(~takes_part, -torch.inf).log_softmax(1)
        scores = table.scores.masked_fill(~takes_part, -torch.inf)
        rows = _divergence(self.direction, log_q, scores)[:, 0]
        return torch.stack([rows * is_counted, is_counted.to(rows)], 1)

    def reduce(self, rows: Tensor, weights: Tensor | None = None) -> Tensor:
        return weighted_mean(rows[:, 0], weights, rows[:, 1])


def _divergence(direction: str, log_targets: Tensor, scores: Tensor) -> Tensor:
    """Divergence per row, [Q, 1], between targets and the softmax of scores."""
    rows = kl_rows if direction == "forward" else symmetric_kl_rows
    return rows(log_targets, scores)[:, None]


def _negatives_or_all(table: PairTable) -> tuple[Tensor, Tensor]:
    """Columns to sum over [Q, C], and the rows that count [Q].

    A row whose candidates are all excluded has no negatives. It leaves the mean; until then it sums over
    every column, so that neither its value nor its gradient is infinite.
    """
    is_counted = table.is_negative.any(1)
    return table.is_negative | ~is_counted[:, None], is_counted


@dataclass(frozen=True, kw_only=True)
class InfoLOOB:
    """InfoLOOB: InfoNCE with the positive left out of its own denominator.

    Source: CLOOB, arXiv 2110.11316. The authors' code sums both directions and multiplies by the
    temperature: their loss is 2 * temperature times the mean of our two directions.
    """

    kind: Literal["loob"] = "loob"

    def rows(self, table: PairTable) -> Tensor:
        table = checked(table)
        # Masked, not subtracted: exp(lse) - exp(positive) loses every digit once the positive dominates.
        takes_part, is_counted = _negatives_or_all(table)
        rows = table.scores.masked_fill(~takes_part, -torch.inf).logsumexp(1) - table.positive_scores
        return torch.stack([rows * is_counted, is_counted.to(rows)], 1)

    def reduce(self, rows: Tensor, weights: Tensor | None = None) -> Tensor:
        return weighted_mean(rows[:, 0], weights, rows[:, 1])


def info_nce(logits: Tensor) -> Tensor:
    """InfoNCE of a square table, rows as queries.

    Args:
        logits: similarity / temperature, [B, B]; row i and column i are a pair.

    Returns:
        Scalar in nats; log(B) when all similarities are equal.

    Raises:
        ValueError: B < 2, which leaves no negatives.
    """
    return _estimate(InfoNCE(), logits)


def info_loob(logits: Tensor) -> Tensor:
    """InfoLOOB of a square table, rows as queries; see `InfoLOOB`.

    Returns:
        Scalar in nats; log(B - 1) when all similarities are equal.

    Raises:
        ValueError: B < 2, which leaves no negatives.
    """
    return _estimate(InfoLOOB(), logits)


def jensen_shannon(logits: Tensor) -> Tensor:
    """Jensen-Shannon loss of a square table; 2 log 2 when all scores are 0. See `JensenShannon`."""
    return _estimate(JensenShannon(), logits)


def donsker_varadhan(logits: Tensor) -> Tensor:
    """Donsker-Varadhan loss of a square table; 0 when all scores are equal. See `DonskerVaradhan`."""
    return _estimate(DonskerVaradhan(), logits)


def symmetric(estimator: Estimator, logits: Tensor) -> Tensor:
    """Mean of an estimator over both directions of a square table, e.g. the CLIP loss for InfoNCE."""
    return 0.5 * (_estimate(estimator, logits) + _estimate(estimator, logits.T))


def _estimate(estimator: Estimator, logits: Tensor) -> Tensor:
    return estimate(estimator, PairTable.square(logits))
