"""An image as a bag of regions whose vectors are mixed before they are scored against a text.

Regions and texts may have any length: cosines take their directions, mixtures take them as they are. Attended
vectors, one per image and text, are never made: their lengths come from the regions' Gram matrix, which is
exact. Pads as in `region_pooling`.

Shape letters: B local images, P regions, N texts of all workers, T words of a text, D joint width.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Final, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from models.outputs import at_least_float32
from models.region_pooling import best_region, mask_regions, require_positive

# Floor of a squared length: representable in float32, and far below any length that means something.
_SHORTEST_SQUARED: Final = 1e-24


def global_mean_pool(regions_BPD: Tensor, texts_ND: Tensor, *, is_region: Tensor | None = None) -> Tensor:
    """Cosine of the mean region with each text, [B, N].

    Regions are averaged as they are, so a longer one counts for more. Source: the global pool of ConVIRT,
    arXiv 2010.00747, and BioViL, arXiv 2204.09817.
    """
    regions_BPD = mask_regions(regions_BPD, is_region, 0.0)
    # The mean's length leaves the cosine, so the sum does.
    return F.normalize(regions_BPD.sum(1), dim=1) @ _unit(texts_ND).T


def attention_pool(
    regions_BPD: Tensor, texts_ND: Tensor, *, temperature: float, is_region: Tensor | None = None
) -> Tensor:
    """Cosine of each text with the regions it attends to.

    Args:
        regions_BPD: region vectors of any length; the attended vector mixes them as they are. Unit ones
            count by their attention alone.
        texts_ND: text vectors of any length.
        temperature: > 0, of the attention: a = softmax over regions of cos(region, text) / temperature.
        is_region: see the module.

    Returns:
        cos(sum_p a_p region_p, text), [B, N].

    Raises:
        ValueError: temperature <= 0, or a mask of another shape.

    Source: Wang et al., arXiv 2212.05561, with the softmax over regions only, so that the score does not
        depend on the other texts.
    """
    require_positive("temperature", temperature)
    regions_BPD = mask_regions(regions_BPD, is_region, 0.0)
    dots_BPN = regions_BPD @ _unit(texts_ND).T
    lengths_BP1 = regions_BPD.norm(dim=2, keepdim=True).clamp(min=_SHORTEST_SQUARED**0.5)
    cosines_BPN = dots_BPN / lengths_BP1
    attention_BPN = mask_regions(cosines_BPN / temperature, is_region, -torch.inf).softmax(1)
    gram_BPP = regions_BPD @ regions_BPD.mT
    squared_BN = (attention_BPN * (gram_BPP @ attention_BPN)).sum(1)
    return _bounded_cosine((attention_BPN * dots_BPN).sum(1), squared_BN)


def non_local_pool(
    regions_BPD: Tensor, texts_ND: Tensor, projection_DD: Tensor, *, is_region: Tensor | None = None
) -> Tensor:
    """Cosine of each text with what its best region attends to among all regions of the image.

    Args:
        regions_BPD, texts_ND: vectors of any length; regions are mixed as they are.
        projection_DD: A; region k attends to region n with softmax_n(<A x_k, A x_n> / sqrt(D)).
        is_region: see the module.

    Returns:
        [B, N]. The choice of the best region, by cosine, carries no gradient.

    Raises:
        ValueError: a mask of another shape.

    Source: our reading of "NL" in Wang et al., arXiv 2212.05561, whose equation we could not check.
        Only P vectors per image can be attended to, so [B, P, N] is the largest tensor.
    """
    regions_BPD = mask_regions(regions_BPD, is_region, 0.0)
    unit_texts_ND = _unit(texts_ND)
    with torch.no_grad():
        critical_BN = best_region(F.normalize(regions_BPD, dim=2) @ unit_texts_ND.T, is_region=is_region)
    projected_BPD = regions_BPD @ projection_DD.T
    affinity_BPP = projected_BPD @ projected_BPD.mT / math.sqrt(projection_DD.shape[0])
    # Symmetric, so column k is what region k attends to. Columns of pads are computed but never chosen.
    attention_BPP = mask_regions(affinity_BPP, is_region, -torch.inf).softmax(1)
    cosines_BPN = F.normalize(attention_BPP.mT @ regions_BPD, dim=2) @ unit_texts_ND.T
    return cosines_BPN.gather(1, critical_BN[:, None])[:, 0]


def gloria_attention(
    regions_BPD: Tensor, words_NTD: Tensor, is_word_NT: Tensor, *, region_sharpness: float = 4.0
) -> Tensor:
    """What each word looks at: softmax over words of <region, word>, then over regions.

    Args:
        regions_BPD, words_NTD: vectors as projected, not normalised: their lengths sharpen the softmax.
        is_word_NT: False at padding, bool; pads are in neither softmax. Every text has a word.
        region_sharpness: factor before the softmax over regions.

    Returns:
        [B, N, T, P]; rows sum to 1. The row of a pad means nothing.

    Raises:
        ValueError: a mask of another shape.

    Source: GLoRIA (Huang et al., ICCV 2021), as released.
    """
    words_NTD = _mask_words(words_NTD, is_word_NT)
    dots_BNTP = torch.einsum("bpd,ntd->bntp", at_least_float32(regions_BPD), words_NTD)
    return _attention(dots_BNTP, is_word_NT, region_sharpness)


def gloria_scores(
    regions_BPD: Tensor,
    words_NTD: Tensor,
    is_word_NT: Tensor,
    *,
    region_sharpness: float = 4.0,
    word_sharpness: float = 5.0,
    aggregation: Literal["sum", "mean"] = "sum",
    texts_per_chunk: int | None = None,
) -> Tensor:
    """GLoRIA's local score of every image with every text, before its factor 10.

    Args:
        regions_BPD, words_NTD, is_word_NT, region_sharpness: see `gloria_attention`.
        word_sharpness: factor of a word's cosine with what it attends to.
        aggregation: `sum` is log-sum-exp over words, `mean` log-mean-exp.
        texts_per_chunk: texts whose attention [B, chunk, T, P] is held at a time; the backward pass
            computes it again. None holds all.

    Returns:
        [B, N], word_sharpness times a cosine, plus up to log(T) for `sum`.

    Raises:
        ValueError: a sharpness <= 0, another aggregation, a mask of another shape, or an empty chunk.

    Source: GLoRIA (Huang et al., ICCV 2021), as released: 10 * score, cross-entropy in both directions,
        each with weight 1. The first softmax makes the score depend on the caption's length in both
        aggregations; `attention_pool` has no such softmax. Every word counts from the first on and none is
        left out at test time, unlike in the released evaluation.
    """
    for name, value in (("region_sharpness", region_sharpness), ("word_sharpness", word_sharpness)):
        require_positive(name, value)
    if aggregation not in ("sum", "mean"):
        raise ValueError(f"aggregation must be sum or mean, got {aggregation}")
    if texts_per_chunk is not None and texts_per_chunk < 1:
        raise ValueError(f"texts_per_chunk must be >= 1, got {texts_per_chunk}")
    regions_BPD, words_NTD = at_least_float32(regions_BPD), _mask_words(words_NTD, is_word_NT)
    cosines = partial(_attended_cosines, region_sharpness=region_sharpness)
    if texts_per_chunk is None:
        cosines_BNT = cosines(regions_BPD, words_NTD, is_word_NT)
    else:
        starts = range(0, len(words_NTD), texts_per_chunk)
        chunks = [slice(start, start + texts_per_chunk) for start in starts]
        # No randomness inside, so no state to restore.
        again = partial(checkpoint, cosines, use_reentrant=False, preserve_rng_state=False)
        cosines_BNT = torch.cat([again(regions_BPD, words_NTD[c], is_word_NT[c]) for c in chunks], 1)
    scores_BN = (word_sharpness * cosines_BNT).masked_fill(~is_word_NT, -torch.inf).logsumexp(2)
    return scores_BN if aggregation == "sum" else scores_BN - is_word_NT.sum(1).to(scores_BN.dtype).log()


def _bounded_cosine(dots: Tensor, squared_lengths: Tensor) -> Tensor:
    """Cosine of vectors with unit vectors, from dot products and squared lengths of one shape.

    A squared length out of a Gram matrix loses its digits when the vectors nearly cancel; it is never
    below the squared dot product, so the cosine stays within [-1, 1]. Of a zero vector it is 0.
    """
    floor = dots.square().clamp(min=_SHORTEST_SQUARED)
    return dots * torch.maximum(squared_lengths, floor).rsqrt()


def _unit(vectors: Tensor) -> Tensor:
    return F.normalize(at_least_float32(vectors), dim=-1)


def _attended_cosines(
    regions_BPD: Tensor, words_NTD: Tensor, is_word_NT: Tensor, *, region_sharpness: float
) -> Tensor:
    """Cosine of every word with the regions it attends to, [B, N, T]; 0 at pads."""
    dots_BNTP = torch.einsum("bpd,ntd->bntp", regions_BPD, words_NTD)
    attention_BNTP = _attention(dots_BNTP, is_word_NT, region_sharpness)
    gram_BPP = regions_BPD @ regions_BPD.mT
    # All words of all texts as rows of one product per image: broadcast, the Gram matrix would be copied
    # for every text.
    mixed_BNTP = (attention_BNTP.flatten(1, 2) @ gram_BPP).view_as(attention_BNTP)
    squared_BNT = (attention_BNTP * mixed_BNTP).sum(3)
    lengths_NT = words_NTD.norm(dim=2).clamp(min=_SHORTEST_SQUARED**0.5)
    return _bounded_cosine((attention_BNTP * dots_BNTP).sum(3) / lengths_NT, squared_BNT)


def _attention(dots_BNTP: Tensor, is_word_NT: Tensor, region_sharpness: float) -> Tensor:
    over_words_BNTP = dots_BNTP.masked_fill(~is_word_NT[:, :, None], -torch.inf).softmax(2)
    return (region_sharpness * over_words_BNTP).softmax(3)


def _mask_words(words_NTD: Tensor, is_word_NT: Tensor) -> Tensor:
    if is_word_NT.shape != words_NTD.shape[:2]:
        raise ValueError(
            f"is_word must be [N, T] = {tuple(words_NTD.shape[:2])}, got {tuple(is_word_NT.shape)}"
        )
    return at_least_float32(words_NTD).masked_fill(~is_word_NT[:, :, None], 0.0)
