"""An image as a bag of regions: region-text scores become one score per text.

Everything is local to an image, so a worker pools its own images against the texts of all workers. A text
is whatever is contrasted: a sampled sentence, or all sentences of all reports one after another, in which
case `sentence_pooling.pool_sentences` makes one number per report afterwards. Pools that mix the regions'
vectors before they score are in `attended_pooling`.

Every pool takes `is_region`, bool [B, P], False at padding: a pad changes no value and gets a gradient of
exactly 0, whatever it holds. None means that all are regions. Each image needs at least one.

Shape letters: B local images, P regions, N texts of all workers, X whatever follows the regions.
"""

from __future__ import annotations

import math
from typing import Final, Literal

import torch
from torch import Tensor

from models.outputs import at_least_float32

# Below it exp is 0 beside 1 in float64 too, so that log(softplus(z)) is z.
_LOG_SOFTPLUS_IS_LINEAR: Final = -40.0
# Below it the series of log(expm1(s)) - log(s) is exact to float64; above it nothing cancels.
_SMALL_SUM: Final = 1e-2


def pool_max(scores_BPN: Tensor, *, is_region: Tensor | None = None) -> Tensor:
    """Score of the best region for each text, [B, P, N] -> [B, N].

    Ties share the gradient, so the order of regions never matters.
    Source: Liao et al., arXiv 2103.04537; Wang et al., arXiv 2212.05561.
    """
    return mask_regions(scores_BPN, is_region, -torch.inf).amax(1)


def pool_mean(scores_BPN: Tensor, *, is_region: Tensor | None = None) -> Tensor:
    """Mean score over regions, [B, P, N] -> [B, N]. Source: Wang et al., arXiv 2212.05561."""
    scores_BPN = mask_regions(scores_BPN, is_region, 0.0)
    return scores_BPN.sum(1) / _num_regions(scores_BPN, is_region)


def pool_lse(scores_BPN: Tensor, sharpness: float, *, is_region: Tensor | None = None) -> Tensor:
    """Log-mean-exp of the region scores, [B, P, N] -> [B, N].

    Args:
        scores_BPN: region-text scores.
        sharpness: > 0; towards 0 the pool is the mean, towards infinity the maximum. The number of regions
            is divided out, so scores of different grids compare.
        is_region: see the module.

    Raises:
        ValueError: sharpness <= 0, or a mask of another shape.

    Source: Wang et al., arXiv 2212.05561; the constant is ours, the paper's value is not known to us.
    """
    require_positive("sharpness", sharpness)
    scores_BPN = mask_regions(scores_BPN, is_region, -torch.inf)
    log_regions = _num_regions(scores_BPN, is_region).log()
    return ((sharpness * scores_BPN).logsumexp(1) - log_regions) / sharpness


def noisy_or(logits_BPN: Tensor, *, is_region: Tensor | None = None) -> Tensor:
    """Log-odds that at least one region shows what the text says, regions being independent.

    Args:
        logits_BPN: log-odds of each region, similarity / temperature + bias; `neutral_noisy_or_bias` is
            where the bias should start.
        is_region: see the module.

    Returns:
        log(expm1(s)) with s = sum over regions of softplus(logit), [B, N]. A logit already: it is divided
        by no temperature. Finite, with finite gradients, for any number of regions and any finite logit.

    Raises:
        ValueError: a mask of another shape.

    Source: noisy-or of Wang et al., arXiv 2212.05561, 1 - prod(1 - sigmoid(z)). That product is 0 in
        float32 from some hundred regions on; its log is -s.
    """
    logits_BPN = mask_regions(logits_BPN, is_region, -torch.inf)
    zero = logits_BPN.new_zeros(())
    sum_BN = torch.logaddexp(logits_BPN, zero).sum(1)
    large_BN = sum_BN.clamp(min=_SMALL_SUM)
    of_large_BN = large_BN + (-torch.expm1(-large_BN)).log()
    # A small sum may be 0 in floating point while its log is -200: it is summed in the log domain.
    curved_BPN = torch.logaddexp(logits_BPN.clamp(min=_LOG_SOFTPLUS_IS_LINEAR), zero).log()
    is_linear = logits_BPN < _LOG_SOFTPLUS_IS_LINEAR
    log_sum_BN = torch.where(is_linear, logits_BPN, curved_BPN).logsumexp(1)
    small_BN = sum_BN.clamp(max=_SMALL_SUM)
    of_small_BN = log_sum_BN + small_BN / 2 + small_BN.square() / 24 - small_BN.pow(4) / 2880
    return torch.where(sum_BN < _SMALL_SUM, of_small_BN, of_large_BN)


def neutral_noisy_or_bias(num_regions: int) -> float:
    """Bias at which a bag of regions with similarity 0 has probability 1/2, log(2^(1/P) - 1).

    Without it a bag of 49 undecided regions has probability 1 - 2^-49 and learns nothing.

    Raises:
        ValueError: num_regions < 1.
    """
    if num_regions < 1:
        raise ValueError(f"num_regions must be >= 1, got {num_regions}")
    return math.log(math.expm1(math.log(2) / num_regions))


def best_region(scores_BPN: Tensor, *, is_region: Tensor | None = None) -> Tensor:
    """Index of the region with the highest score for each text, int64 [B, P, N] -> [B, N]."""
    return mask_regions(scores_BPN, is_region, -torch.inf).argmax(1)


def select_regions(
    scores_BPN: Tensor,
    positive_B: Tensor,
    *,
    rule: Literal["select", "pmi"],
    is_region: Tensor | None = None,
) -> Tensor:
    """Scores of one region per image, chosen with the image's own text and kept for all texts.

    Args:
        scores_BPN: region scores of local images against the texts of all workers.
        positive_B: column of each image's own text, int64.
        rule: `select` takes the highest own score; `pmi` the highest own score minus log-sum-exp over all
            texts, so a region that fits every text does not win.
        is_region: see the module.

    Returns:
        [B, N]. The choice carries no gradient.

    Raises:
        ValueError: another rule, or a mask of another shape.

    Source: Liao et al., arXiv 2103.04537, as its figure's caption reads; no code is released. An ablation:
        at test time every prompt takes its best region, as `pool_max` does in training.
    """
    evidence_BPN = at_least_float32(scores_BPN.detach())
    if rule == "pmi":
        evidence_BPN = evidence_BPN - evidence_BPN.logsumexp(2, keepdim=True)
    elif rule != "select":
        raise ValueError(f"rule must be select or pmi, got {rule}")
    own_BP1 = evidence_BPN.take_along_dim(positive_B[:, None, None], dim=2)
    chosen_B1 = best_region(own_BP1, is_region=is_region)
    return at_least_float32(scores_BPN).take_along_dim(chosen_B1[:, :, None], dim=1)[:, 0]


def mask_regions(values_BPX: Tensor, is_region: Tensor | None, fill: float) -> Tensor:
    """Values in float32 at least, [B, P, X], with `fill` where the mask [B, P] is False.

    Raises:
        ValueError: a mask of another shape.
    """
    values_BPX = at_least_float32(values_BPX)
    if is_region is None:
        return values_BPX
    if is_region.shape != values_BPX.shape[:2]:
        raise ValueError(
            f"is_region must be [B, P] = {tuple(values_BPX.shape[:2])}, got {tuple(is_region.shape)}"
        )
    return values_BPX.masked_fill(~is_region[:, :, None], fill)


def _num_regions(values_BPX: Tensor, is_region: Tensor | None) -> Tensor:
    """Regions of each image, [B, 1], or of all images, []."""
    if is_region is None:
        return values_BPX.new_tensor(values_BPX.shape[1])
    return is_region.sum(1, keepdim=True).to(values_BPX.dtype)


def require_positive(name: str, value: float) -> None:
    """ValueError naming the setting unless its value is above 0."""
    if not value > 0:
        raise ValueError(f"{name} must be > 0, got {value}")
