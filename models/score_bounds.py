"""Lower bounds on mutual information from one square table of critic values, to MAXIMISE.

Row i holds the critic of y_i with every x_j: the diagonal is drawn from the joint distribution, the rest
stands for the product of the marginals. All are in nats. The losses of `bounds` are the negatives of those
that have the same name there.

Source: Poole et al., arXiv 1905.06922, and its published notebook; SMILE, arXiv 1910.06222; MINE, arXiv
1801.04062.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from models.bounds import NWJ, TUBA, DonskerVaradhan, Interpolated, JensenShannon
from models.pair_table import PairTable
from models.reductions import estimate


def info_nce_bound(scores: Tensor) -> Tensor:
    """InfoNCE: log K + mean log softmax of the diagonal along rows; at most log K. [K, K] -> scalar."""
    return math.log(scores.shape[0]) + PairTable.square(scores).scores.log_softmax(1).diagonal().mean()


def nwj_bound(scores: Tensor) -> Tensor:
    """Nguyen-Wainwright-Jordan: 1 + mean(positive - 1) - mean exp(negative - 1). [K, K] -> scalar."""
    return -estimate(NWJ(), PairTable.square(scores))


def tuba_bound(scores: Tensor, log_baseline: Tensor) -> Tensor:
    """Tractable unnormalised: 1 + mean(positive - a) - mean exp(negative - a).

    Args:
        scores: [K, K].
        log_baseline: a of each row, [K].
    """
    return -estimate(TUBA(), replace(PairTable.square(scores), log_baseline=log_baseline))


def interpolated_bound(scores: Tensor, log_baseline: Tensor | None = None, *, alpha_logit: float) -> Tensor:
    """Between TUBA (alpha_logit -20) and the InfoNCE end (+20); see `Interpolated`.

    Args:
        scores: [K, K].
        log_baseline: a of each row, [K]; None is 1, whose lower end is NWJ.
    """
    table = replace(PairTable.square(scores), log_baseline=log_baseline)
    return -estimate(Interpolated(alpha_logit=alpha_logit), table)


def donsker_varadhan_bound(scores: Tensor) -> Tensor:
    """Donsker-Varadhan: mean positive - log mean exp(negative). [K, K] -> scalar."""
    return -estimate(DonskerVaradhan(), PairTable.square(scores))


def js_fgan_bound(scores: Tensor) -> Tensor:
    """f-GAN's Jensen-Shannon objective: -mean softplus(-positive) - mean softplus(negative).

    A bound on a divergence, not on mutual information. [K, K] -> scalar.
    """
    return -estimate(JensenShannon(), PairTable.square(scores))


def js_bound(scores: Tensor) -> Tensor:
    """Value of NWJ with the gradient of Jensen-Shannon. [K, K] -> scalar."""
    return _with_gradient_of(js_fgan_bound(scores), value=nwj_bound(scores))


def smile_bound(scores: Tensor, *, clip: float | None) -> Tensor:
    """Donsker-Varadhan with negatives clipped to [-clip, clip], with the gradient of Jensen-Shannon.

    Args:
        scores: [K, K].
        clip: > 0; None clips nothing.
    """
    if clip is not None and not clip > 0:
        raise ValueError(f"clip must be > 0, got {clip}")
    clipped = scores
    if clip is not None:
        clipped = torch.where(PairTable.square(scores).is_positive, scores, scores.clamp(-clip, clip))
    return _with_gradient_of(js_fgan_bound(scores), value=donsker_varadhan_bound(clipped))


def mine_bound(
    scores: Tensor, log_average: Tensor | float = 0.0, *, decay: float = 0.9
) -> tuple[Tensor, Tensor]:
    """Donsker-Varadhan whose gradient divides by a moving average of the mean exponential.

    Args:
        scores: [K, K].
        log_average: log of the average so far; 0 is the release's start at 1.
        decay: share of the old average in the new one, in [0, 1).

    Returns:
        The bound and the log of the new average, without gradient, to be passed next time.

    Source: MINE. The average is kept in log space and has no floor; a release clamps it at 1e-4.
    """
    if not 0 <= decay < 1:
        raise ValueError(f"decay must be in [0, 1), got {decay}")
    positives = scores.diagonal().mean()
    log_mean = positives - donsker_varadhan_bound(scores)
    old = torch.as_tensor(log_average, dtype=scores.dtype, device=scores.device).detach()
    if decay == 0:
        return positives - log_mean, log_mean.detach()
    log_new = torch.logaddexp(math.log(decay) + old, math.log1p(-decay) + log_mean.detach())
    corrected = (log_mean - log_new).exp()
    return _with_gradient_of(positives - corrected, value=positives - log_mean), log_new


def _with_gradient_of(source: Tensor, *, value: Tensor) -> Tensor:
    return source + (value - source).detach()
