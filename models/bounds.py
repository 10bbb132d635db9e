"""Estimators that weigh positive against negative pairs over a whole table: the variational bounds on
mutual information, Jensen-Shannon, and the sigmoid loss. As losses in nats to minimise.

A row keeps sums over its own pairs and their number, so that the means run over the pairs of every
worker; means of per-worker means would be other, more biased, objectives. Exponentials stay in log space
until the last step: a loss that float32 can hold is never lost to an intermediate that it cannot.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from models.pair_table import PairTable
from models.reductions import checked, log_mean_exp, mean_exp, weighted_mean

# Q queries, C candidates

# Estimators whose loss holds the exponential of a score, which nothing else in it bounds. `interp` is none
# of them: its baseline of a row contains the very scores it divides.
EXP_ESTIMATORS = frozenset({"nwj", "tuba"})
# exp(80) is 5.5e34; float32 ends at 3.4e38, which leaves the gradient room for the factor 1 / temperature.
_LARGEST_SCORE = 80.0
# sigmoid(-60) is 9e-27: further out one of the two ends is all there is, and 1 / alpha leaves float32.
_LARGEST_ALPHA_LOGIT = 60.0


def smallest_safe_temperature(kind: str) -> float:
    """Temperature below which an estimator can leave float32 on cosines, by its `kind`; 0 when none can.

    Loss and gradients are finite down to it. Below about 1 / 40 the squared norm of the gradient is not,
    should a negative pair have cosine 1: clipping by norm then takes nothing of that step.
    """
    return 1.0 / _LARGEST_SCORE if kind in EXP_ESTIMATORS else 0.0


@dataclass(frozen=True, kw_only=True)
class JensenShannon:
    """Jensen-Shannon bound: mean softplus(-positive) + mean softplus(negative).

    The constant 2 log 2 of the Deep InfoMax code is left out.
    Source: Deep InfoMax, arXiv 1808.06670; CLIP-Lite, arXiv 2112.07133.
    """

    kind: Literal["jsd"] = "jsd"

    def rows(self, table: PairTable) -> Tensor:
        table = checked(table)
        num_negatives = table.is_negative.sum(1)
        repelled = _repelled(table)
        return torch.stack([softplus(-table.positive_scores), repelled, num_negatives.to(repelled)], 1)

    def reduce(self, rows: Tensor, weights: Tensor | None = None) -> Tensor:
        attracted, repelled, count = rows.unbind(1)
        return weighted_mean(attracted, weights) + weighted_mean(repelled, weights, count)


@dataclass(frozen=True, kw_only=True)
class SigmoidPairs:
    """Every pair a yes-or-no question: mean over queries of softplus(-positive) + sum softplus(negative).

    SigLIP's loss when scores carry its bias. With scores shifted by -log(Z K / n) it is the binary
    noise-contrastive loss of CMC: K drawn candidates, n rows in memory, Z the normalising constant.
    The CMC release adds 1e-7 to both denominators: a shift of -log(Z (K / n + 1e-7)) and a constant. Both
    directions of a square table have the same value.
    Source: SigLIP, arXiv 2303.15343; CMC, arXiv 1906.05849.
    """

    kind: Literal["sigmoid"] = "sigmoid"

    def rows(self, table: PairTable) -> Tensor:
        table = checked(table)
        return (softplus(-table.positive_scores) + _repelled(table))[:, None]

    def reduce(self, rows: Tensor, weights: Tensor | None = None) -> Tensor:
        return weighted_mean(rows[:, 0], weights)


@dataclass(frozen=True, kw_only=True)
class DonskerVaradhan:
    """Donsker-Varadhan bound: log mean exp(negative) - mean positive, over the whole table.

    The released "infonce" of local mutual information is this loss plus log(number of negatives), with
    the same gradient. Not a bound at a finite batch.
    Source: Deep InfoMax, arXiv 1808.06670; Liao et al., arXiv 2103.04537.
    """

    kind: Literal["dv"] = "dv"

    def rows(self, table: PairTable) -> Tensor:
        table = checked(table)
        marginal, num_negatives = _log_sum_of_negatives(table)
        return torch.stack([table.positive_scores, marginal, num_negatives], 1)

    def reduce(self, rows: Tensor, weights: Tensor | None = None) -> Tensor:
        positive, marginal, count = rows.unbind(1)
        return log_mean_exp(marginal, count, weights) - weighted_mean(positive, weights)


@dataclass(frozen=True, kw_only=True)
class NWJ:
    """Nguyen-Wainwright-Jordan bound: mean exp(negative - 1) - mean positive.

    Source: Poole et al., arXiv 1905.06922 (after arXiv 0809.0853); the negative of its bound.
    """

    kind: Literal["nwj"] = "nwj"

    def rows(self, table: PairTable) -> Tensor:
        table = checked(table)
        return _against_baseline(table, torch.ones_like(table.positive_scores))

    def reduce(self, rows: Tensor, weights: Tensor | None = None) -> Tensor:
        return _reduce_exponential(rows, weights)


@dataclass(frozen=True, kw_only=True)
class TUBA:
    """Tractable unnormalised bound: mean exp(negative - a) - 1 - mean(positive - a), a of each query.

    A baseline of 1 is NWJ. A baseline far below the scores overflows like a small temperature.
    Source: Poole et al., arXiv 1905.06922; the negative of its bound.
    """

    kind: Literal["tuba"] = "tuba"

    def rows(self, table: PairTable) -> Tensor:
        table = checked(table)
        if table.log_baseline is None:
            raise ValueError(
                "estimator 'tuba' needs a log-baseline per query; give one or use estimator 'nwj'"
            )
        return _against_baseline(table, table.log_baseline)

    def reduce(self, rows: Tensor, weights: Tensor | None = None) -> Tensor:
        return _reduce_exponential(rows, weights)


@dataclass(frozen=True, kw_only=True)
class Interpolated:
    """Bound between TUBA and InfoNCE, trading variance for bias.

    Each query's baseline is log(alpha m + (1 - alpha) exp(a)), where m is the mean of exp over its
    candidates without one column: without each negative in turn next to the positive, without the
    positive next to the negatives. No queries but the own one enter. Rows with fewer candidates weigh as
    much as others in the first mean; a row without negatives leaves it.

    Attributes:
        alpha_logit: logit of alpha; -20 is TUBA (NWJ without a log-baseline, which then is 1), +20 the
            end of low variance, bounded as InfoNCE is. The released notebook says the opposite.

    Source: Poole et al., arXiv 1905.06922; the negative of its bound.
    """

    kind: Literal["interp"] = "interp"
    alpha_logit: float = -2.0

    def __post_init__(self) -> None:
        if not abs(self.alpha_logit) <= _LARGEST_ALPHA_LOGIT:
            raise ValueError(
                f"alpha_logit must be between -{_LARGEST_ALPHA_LOGIT:g} and {_LARGEST_ALPHA_LOGIT:g}, "
                f"got {self.alpha_logit}"
            )

    def rows(self, table: PairTable) -> Tensor:
        table = checked(table)
        negative = table.is_negative
        marginal, num_negatives = _log_sum_of_negatives(table)
        num_left = num_negatives.clamp(min=1)
        baseline = torch.ones_like(marginal) if table.log_baseline is None else table.log_baseline
        own_baseline = self._mix(marginal - num_left.log(), baseline)
        without = _log_sum_without_each(table.masked_scores()) - num_left.log()[:, None]
        baselines_QC = self._mix(without, baseline[:, None]).masked_fill(~negative, 0.0)
        is_counted = num_negatives > 0
        joint = 1.0 + table.positive_scores - baselines_QC.sum(1) / num_left
        return torch.stack(
            [joint * is_counted, is_counted.to(joint), marginal - own_baseline, num_negatives], 1
        )

    def reduce(self, rows: Tensor, weights: Tensor | None = None) -> Tensor:
        joint, is_counted, marginal, count = rows.unbind(1)
        return mean_exp(marginal, count, weights) - weighted_mean(joint, weights, is_counted)

    def _mix(self, log_mean: Tensor, log_baseline: Tensor) -> Tensor:
        """log(alpha exp(log_mean) + (1 - alpha) exp(log_baseline))."""
        log_alpha = -math.log1p(math.exp(-self.alpha_logit))
        log_rest = -math.log1p(math.exp(self.alpha_logit))
        return torch.logaddexp(log_alpha + log_mean, log_rest + log_baseline)


def softplus(scores: Tensor) -> Tensor:
    """log(1 + exp(score)) of any shape, finite and exact for every score, as is its gradient."""
    # Not -log(sigmoid(-x)), infinite in float32 from about 104; not torch's softplus, which is x from 20 on.
    return -F.logsigmoid(-scores)


def _repelled(table: PairTable) -> Tensor:
    """Sum of softplus over each query's negatives, [Q]."""
    return softplus(table.scores).masked_fill(~table.is_negative, 0.0).sum(1)


def _log_sum_of_negatives(table: PairTable) -> tuple[Tensor, Tensor]:
    """log sum exp over each query's negatives and their number, both [Q]."""
    negative = table.is_negative
    marginal = table.scores.masked_fill(~negative, -torch.inf).logsumexp(1)
    return marginal, negative.sum(1).to(marginal)


def _against_baseline(table: PairTable, log_baseline_Q: Tensor) -> Tensor:
    """Rows of the unnormalised bounds: the joint term, the log of the marginal sum and its count, [Q, 3]."""
    # Subtracted before the sum: float32 keeps five decimals of a score of 100, and of its log-sum.
    above = replace(table, scores=table.scores - log_baseline_Q[:, None])
    marginal, num_negatives = _log_sum_of_negatives(above)
    return torch.stack([1.0 + above.positive_scores, marginal, num_negatives], 1)


def _reduce_exponential(rows: Tensor, weights: Tensor | None) -> Tensor:
    joint, marginal, count = rows.unbind(1)
    return mean_exp(marginal, count, weights) - weighted_mean(joint, weights)


def _log_sum_without_each(scores_QC: Tensor) -> Tensor:
    """log sum exp of each row without column c, for every c, [Q, C]; -inf marks columns that take no part.

    The largest column is left out by masking. Any other holds at most half of the sum, so taking it away
    by subtraction loses no digits, and needs no [Q, C, C].
    """
    largest_Q1 = scores_QC.argmax(1, keepdim=True)
    is_largest_QC = torch.zeros_like(scores_QC, dtype=torch.bool).scatter(1, largest_Q1, True)
    rest_Q1 = scores_QC.masked_fill(is_largest_QC, -torch.inf).logsumexp(1, keepdim=True)
    log_sum_Q1 = scores_QC.logsumexp(1, keepdim=True)
    share_QC = (scores_QC - log_sum_Q1).exp().masked_fill(is_largest_QC, 0.0)
    return torch.where(is_largest_QC, rest_Q1, log_sum_Q1 + torch.log1p(-share_QC))
