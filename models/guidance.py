"""Intra-modal similarity tables that soften targets: from embeddings, tags or patch tokens.

Every table is [Q, C]: local query rows against the candidates of the global batch, and a candidate's
similarity to itself is 1.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

# Q queries, C candidates, L labels, B images, P patches, K chosen patches, D width


def self_similarity(query_QD: Tensor, candidate_CD: Tensor) -> Tensor:
    """Cosine of every query with every candidate, [Q, C]."""
    return F.normalize(query_QD, dim=-1) @ F.normalize(candidate_CD, dim=-1).T


def centred(guidance_QD: Tensor, candidate_CD: Tensor) -> Tensor:
    """Guidance minus the mean of the global batch's, [Q, D], unit length.

    For images that are all alike (chest radiographs start at cosines of .8 to .9): without it the targets
    are near uniform.
    """
    return F.normalize(guidance_QD - candidate_CD.mean(dim=0), dim=-1)


def tag_cosine(query_QL: Tensor, candidate_CL: Tensor, positive_Q: Tensor) -> Tensor:
    """Cosine of multi-hot tags, [Q, C].

    Args:
        query_QL: tags of the query rows, 0 or 1 (or TF-IDF weights >= 0).
        candidate_CL: tags of all candidates.
        positive_Q: column of each query's own row; a row without tags is 1 there and 0 elsewhere.

    Source: own substitute for SoftCLIP's detector tags (arXiv 2303.17561).
    """
    table_QC = self_similarity(query_QL, candidate_CL)
    return table_QC.scatter(1, positive_Q[:, None], 1.0)


def tag_jaccard(query_QL: Tensor, candidate_CL: Tensor) -> Tensor:
    """Shared tags over all tags, [Q, C]; two rows without tags have 1.

    So all "no finding" pairs count as alike, which chest data usually wants.

    Args:
        query_QL: tags of the query rows, 0 or 1, floating point.
        candidate_CL: tags of all candidates.

    Source: own substitute for SoftCLIP's detector tags (arXiv 2303.17561).
    """
    shared_QC = query_QL @ candidate_CL.T
    union_QC = query_QL.sum(dim=1)[:, None] + candidate_CL.sum(dim=1)[None, :] - shared_QC
    return torch.where(union_QC > 0, shared_QC / union_QC.clamp(min=1), 1.0)


def top_patches(scores_BP: Tensor, count: int) -> Tensor:
    """Indices [B, K] of the `count` highest scores, ascending; ties go to the lower index.

    Raises:
        ValueError: count outside [1, P].
    """
    if not 1 <= count <= scores_BP.shape[1]:
        raise ValueError(f"count must be in [1, {scores_BP.shape[1]}], got {count}")
    order = scores_BP.argsort(dim=1, descending=True, stable=True)
    return order[:, :count].sort(dim=1).values


def _chosen_tokens(tokens_BPD: Tensor, chosen_BK: Tensor) -> Tensor:
    return tokens_BPD.gather(1, chosen_BK[:, :, None].expand(-1, -1, tokens_BPD.shape[2]))


def mean_unit_tokens(tokens_BKD: Tensor) -> Tensor:
    """Unit mean of unit tokens, [B, K, D] -> [B, D]."""
    return F.normalize(F.normalize(tokens_BKD, dim=-1).mean(dim=1), dim=-1)


def mean_patch_guidance(tokens_BPD: Tensor, chosen_BK: Tensor) -> Tensor:
    """Unit mean of the chosen unit tokens, [B, D]: a stand-in for region features.

    Args:
        tokens_BPD: patch tokens after the EMA tower.
        chosen_BK: indices, e.g. `top_patches` of the teacher's scores.

    Source: own substitute for SoftCLIP's detector regions (arXiv 2303.17561).
    """
    return mean_unit_tokens(_chosen_tokens(tokens_BPD, chosen_BK))


def weighted_patch_guidance(tokens_BPD: Tensor, scores_BP: Tensor, chosen_BK: Tensor) -> Tensor:
    """As `mean_patch_guidance`, each chosen token weighted by its score, [B, D]."""
    weights_BK = scores_BP.gather(1, chosen_BK)
    tokens_BKD = F.normalize(_chosen_tokens(tokens_BPD, chosen_BK), dim=-1)
    return F.normalize((weights_BK[:, :, None] * tokens_BKD).sum(dim=1), dim=-1)


def late_patch_guidance(tokens_BPD: Tensor, chosen_BK: Tensor) -> Tensor:
    """The chosen tokens at unit length, [B, K, D], for `late_similarity`."""
    return F.normalize(_chosen_tokens(tokens_BPD, chosen_BK), dim=-1)


def late_similarity(query_QKD: Tensor, candidate_CKD: Tensor) -> Tensor:
    """Token-set similarity, [Q, C]: mean over tokens of the best match, averaged over both directions.

    Costs Q * C * K^2 dot products; for small batches.

    Args:
        query_QKD: chosen tokens of the query rows, unit length.
        candidate_CKD: chosen tokens of all candidates, unit length.
    """
    table_QCKK = torch.einsum("qkd,cld->qckl", query_QKD, candidate_CKD)
    return 0.5 * (table_QCKK.amax(dim=3).mean(dim=2) + table_QCKK.amax(dim=2).mean(dim=2))


def hashed_words(token_ids: Tensor, is_real_token: Tensor, *, num_buckets: int = 512) -> Tensor:
    """Unit bag-of-words vectors of fixed width whatever the vocabulary, [B, num_buckets].

    A stand-in for detector tags: a word is present or not. The first and last real token (start, end)
    are in every text and are left out; a text without a word is a zero row, like nothing.

    Args:
        token_ids: int64 [B, T], padded on the right.
        is_real_token: bool [B, T].
    """
    inner = is_real_token.clone()
    inner[:, 0] = False
    inner[torch.arange(len(inner), device=inner.device), is_real_token.sum(1) - 1] = False
    # An odd multiplier spreads neighbouring ids of a vocabulary over the buckets.
    buckets = (token_ids * 2654435761 % 2**32) * num_buckets >> 32
    counts = torch.zeros(len(token_ids), num_buckets, device=token_ids.device)
    counts.scatter_add_(1, buckets, inner.to(counts))
    return F.normalize((counts > 0).to(counts), dim=1)
