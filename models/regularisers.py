"""Penalties on the embeddings themselves: token entropies, spread, alignment of two distributions."""

import math
from dataclasses import dataclass, fields
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from models.keyed_noise import Draw, keyed_uniform
from models.outputs import at_least_float32

_SPREAD: Final = 0x9E3779B97F4A7C15 - (1 << 64)

# B pairs, N pairs of all workers, T words, P patches, D width, L directions


def matched_similarities(words_BTD: Tensor, patches_BPD: Tensor) -> Tensor:
    """Cosine of every word with every patch of its own pair, [B, T, P].

    Args:
        words_BTD: word features [B, T, D], any length.
        patches_BPD: patch features [B, P, D], any length.

    Raises:
        ValueError: batch or width of the two disagree.
    """
    if words_BTD.shape[0] != patches_BPD.shape[0] or words_BTD.shape[-1] != patches_BPD.shape[-1]:
        raise ValueError(
            f"words {tuple(words_BTD.shape)} and patches {tuple(patches_BPD.shape)} "
            "must agree in pairs and width"
        )
    words, patches = F.normalize(words_BTD, dim=-1), F.normalize(patches_BPD, dim=-1)
    return torch.einsum("btd,bpd->btp", words, patches)


@dataclass(frozen=True)
class EntropyMeans:
    """Means over a whole batch, scalars in nats; the normalised ones are in units of ln(count)."""

    over_patches: Tensor
    over_tokens: Tensor
    normalised_over_patches: Tensor
    normalised_over_tokens: Tensor


@dataclass(frozen=True)
class TokenEntropies:
    """Entropy sums and counts of each pair, [B] each, so that means over several workers stay exact.

    Attributes:
        over_patches: sum over real words of the entropy of the word's distribution over patches, nats.
        over_tokens: sum over kept patches of the entropy of the patch's distribution over words, nats.
        normalised_over_patches: the first divided by ln(number of kept patches).
        normalised_over_tokens: the second divided by ln(number of real words).
        num_tokens: real words (0 where the pair has no kept patch).
        num_patches: kept patches (0 where the pair has no real word).
    """

    over_patches: Tensor
    over_tokens: Tensor
    normalised_over_patches: Tensor
    normalised_over_tokens: Tensor
    num_tokens: Tensor
    num_patches: Tensor

    def as_tensor(self) -> Tensor:
        """[B, 6], one row per pair, ready for one gather."""
        # not astuple: it deep-copies, which a tensor with a graph refuses
        return torch.stack([getattr(self, f.name) for f in fields(self)], dim=1)

    @classmethod
    def from_tensor(cls, sums_and_counts_B6: Tensor) -> "TokenEntropies":
        """Inverse of `as_tensor`, also for rows gathered from several workers."""
        return cls(*sums_and_counts_B6.unbind(dim=1))

    def reduce(self) -> EntropyMeans:
        """Means over every word, respectively patch, of the batch: a long text weighs more."""
        num_tokens, num_patches = self.num_tokens.sum().clamp(min=1), self.num_patches.sum().clamp(min=1)
        return EntropyMeans(
            over_patches=self.over_patches.sum() / num_tokens,
            over_tokens=self.over_tokens.sum() / num_patches,
            normalised_over_patches=self.normalised_over_patches.sum() / num_tokens,
            normalised_over_tokens=self.normalised_over_tokens.sum() / num_patches,
        )

    def reduce_by_pair(self) -> EntropyMeans:
        """Means of the pairs' own means: every pair with words and patches weighs the same."""
        num_tokens, num_patches = self.num_tokens.clamp(min=1), self.num_patches.clamp(min=1)
        num_pairs = (self.num_tokens > 0).sum().clamp(min=1)
        return EntropyMeans(
            over_patches=(self.over_patches / num_tokens).sum() / num_pairs,
            over_tokens=(self.over_tokens / num_patches).sum() / num_pairs,
            normalised_over_patches=(self.normalised_over_patches / num_tokens).sum() / num_pairs,
            normalised_over_tokens=(self.normalised_over_tokens / num_patches).sum() / num_pairs,
        )


def token_entropies(
    similarities_BTP: Tensor,
    *,
    temperature: float = 1.0,
    is_real_token: Tensor | None = None,
    is_kept_patch: Tensor | None = None,
    eps: float = 1e-7,
) -> TokenEntropies:
    """TIER's two entropies of the word-patch similarities of matched pairs.

    Args:
        similarities_BTP: cosines [B, T, P] (`matched_similarities`).
        temperature: divides the cosines, > 0. 1 is the release; there the entropy can fall only about
            12 % below ln(49).
        is_real_token: [B, T], False at padding. None counts every position, as the release does.
        is_kept_patch: [B, P], False at patches without a feature. None counts all.
        eps: added to each probability that counts; 1e-7 is the release.

    Returns:
        per-pair sums and counts; `.reduce()` gives the means. Both entropies are to be minimised.

    Raises:
        ValueError: temperature <= 0, or a mask of another shape.

    Source: TIER, arXiv 2212.06710. Its release counts padding as words, in the word softmax and in the
        means; masked positions here leave both and get zero gradient.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be > 0, got {temperature}")
    B, T, P = similarities_BTP.shape
    is_real_BT = _mask_or_all(is_real_token, (B, T), "is_real_token", similarities_BTP)
    is_kept_BP = _mask_or_all(is_kept_patch, (B, P), "is_kept_patch", similarities_BTP)
    counts_BTP = is_real_BT[:, :, None] & is_kept_BP[:, None, :]
    logits_BTP = (similarities_BTP / temperature).masked_fill(~counts_BTP, _lowest(similarities_BTP))
    over_patches_B = _entropy(logits_BTP.softmax(dim=2), counts_BTP, eps).sum(dim=(1, 2))
    over_tokens_B = _entropy(logits_BTP.softmax(dim=1), counts_BTP, eps).sum(dim=(1, 2))
    num_tokens_B, num_patches_B = is_real_BT.sum(dim=1), is_kept_BP.sum(dim=1)
    has_both_B = (num_tokens_B > 0) & (num_patches_B > 0)
    return TokenEntropies(
        over_patches=over_patches_B,
        over_tokens=over_tokens_B,
        normalised_over_patches=_in_units_of_log(over_patches_B, num_patches_B),
        normalised_over_tokens=_in_units_of_log(over_tokens_B, num_tokens_B),
        num_tokens=(num_tokens_B * has_both_B).to(similarities_BTP.dtype),
        num_patches=(num_patches_B * has_both_B).to(similarities_BTP.dtype),
    )


def _mask_or_all(mask: Tensor | None, shape: tuple[int, int], name: str, like: Tensor) -> Tensor:
    if mask is None:
        return torch.ones(shape, dtype=torch.bool, device=like.device)
    if mask.shape != shape:
        raise ValueError(f"{name} must have shape {list(shape)}, got {list(mask.shape)}")
    return mask.bool()


def _lowest(like: Tensor) -> float:
    # finite, not -inf: a row without any counted entry must stay a number with zero gradient
    return torch.finfo(like.dtype).min


def _entropy(probabilities: Tensor, counts: Tensor, eps: float) -> Tensor:
    q = probabilities + eps
    return -(q * q.log()).masked_fill(~counts, 0.0)


def _in_units_of_log(entropy_B: Tensor, count_B: Tensor) -> Tensor:
    # one choice has entropy 0 and ln(1) = 0: call that 0, not 0/0
    return torch.where(count_B > 1, entropy_B / count_B.clamp(min=2).to(entropy_B.dtype).log(), 0.0)


def uniformity(embeds_BD: Tensor, *, scale: float = 2.0) -> Tensor:
    """log of the mean of exp(-scale * squared distance) over all pairs of unit embeddings.

    Args:
        embeds_BD: unit embeddings [B, D] of the whole batch.
        scale: > 0.

    Returns:
        scalar; 0 when all embeddings are equal, lower when they spread. Averages over workers are not
        exact: give it the gathered batch.

    Raises:
        ValueError: B < 2 or scale <= 0.

    Source: Wang and Isola, arXiv 2005.10242.
    """
    if embeds_BD.shape[0] < 2:
        raise ValueError(f"uniformity needs B >= 2 embeddings, got {embeds_BD.shape[0]}")
    if not scale > 0:
        raise ValueError(f"scale must be > 0, got {scale}")
    squared = torch.pdist(embeds_BD).square()
    return torch.logsumexp(-scale * squared, dim=0) - math.log(squared.numel())


def projection_directions(
    seed: int | Tensor, *, step: int, num_directions: int, width: int, device: torch.device | None = None
) -> Tensor:
    """Random unit vectors for `sliced_wasserstein`, float32 [L, D]: the same on every worker.

    Args:
        seed: a number, or an int64 scalar on the device, such as a sum of the global batch's keys.
        step: directions are new at each.
        num_directions: L, >= 1.
        width: D, >= 1.
        device: where a number's directions are made.

    Raises:
        ValueError: fewer than 1 direction, or width < 1.
    """
    if min(num_directions, width) < 1:
        raise ValueError(f"num_directions and width must be >= 1, got {num_directions} and {width}")
    # the odd factor spreads the seeds over all 64 bits; the product wraps on purpose
    key = torch.as_tensor(seed, dtype=torch.int64, device=device) * _SPREAD + step
    uniform = keyed_uniform(key.view(1), Draw.DIRECTIONS, 2 * num_directions * width)
    radius_LD, angle_LD = uniform.view(2, num_directions, width)
    # Box and Muller's normal draws, whose direction is uniform on the sphere. 1 - u lies in (0, 1].
    normal_LD = (-2 * (1 - radius_LD).log()).sqrt() * (2 * math.pi * angle_LD).cos()
    return F.normalize(normal_LD, dim=1)


def sliced_wasserstein(a_ND: Tensor, b_ND: Tensor, directions_LD: Tensor) -> Tensor:
    """Mean squared difference of sorted projections of two batches: how far their distributions lie apart.

    Args:
        a_ND: one modality's embeddings, [N, D], of the whole batch: gather them, since the order of a
            share of the rows is not that of the whole.
        b_ND: the other's; which row belongs to which does not matter.
        directions_LD: unit rows, [L, D] (`projection_directions`); 50 to 200 are usual.

    Returns:
        Scalar >= 0, in squared units of the embeddings; its expectation over directions is the squared
        sliced 2-Wasserstein distance. 0 when the batches hold the same rows in any order.

    Raises:
        ValueError: shapes that do not fit.

    Source: sliced Wasserstein alignment of views in CoCoNet, arXiv 2209.07811; plain linear slices, not
        its generalised ones.
    """
    if a_ND.shape != b_ND.shape or directions_LD.shape[1:] != a_ND.shape[1:]:
        raise ValueError(
            f"batches must be [N, D] alike and directions [L, D], got {list(a_ND.shape)}, "
            f"{list(b_ND.shape)} and {list(directions_LD.shape)}"
        )
    a, b = at_least_float32(a_ND), at_least_float32(b_ND)
    directions = directions_LD.to(a.dtype)
    sorted_a, sorted_b = ((x @ directions.T).sort(dim=0, stable=True).values for x in (a, b))
    return (sorted_a - sorted_b).square().mean()


def disagreement(a_ND: Tensor, b_ND: Tensor) -> Tensor:
    """Mean squared cosine of two representations of the same rows, scalar in [0, 1].

    Minimised, it keeps them from telling the same; 0 when every row's two vectors are orthogonal. A mean
    over rows: equal shares of several workers average exactly.

    Raises:
        ValueError: the shapes differ.

    Source: disagreement term of MVMI-FT, arXiv 2105.06715.
    """
    if a_ND.shape != b_ND.shape:
        raise ValueError(
            f"representations must be [N, D] alike, got {list(a_ND.shape)} and {list(b_ND.shape)}"
        )
    a, b = (F.normalize(at_least_float32(x), dim=1) for x in (a_ND, b_ND))
    return (a * b).sum(1).square().mean()
