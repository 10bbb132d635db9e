"""Deep InfoMax's local-global losses, and the Jensen-Shannon loss with one negative per positive.

An image's locals (regions, words) are scored against the globals of every pair. As everywhere, rows are
local values per pair, gathered and then reduced, so the loss is that of the global batch.

Shape letters: B local pairs, N pairs of all workers, U width, L locals of a pair, M globals of a pair.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from models.gather import Gather, SingleProcess
from models.outputs import at_least_float32

Measure = Literal["gan", "jsd", "x2", "kl", "rkl", "h2", "w1"]
MEASURES: tuple[str, ...] = get_args(Measure)


def local_global_scores(locals_BUL: Tensor, globals_NUM: Tensor) -> Tensor:
    """Dot product of every local of this worker's pairs with every global, [B, N, L, M], no temperature.

    Raises:
        ValueError: an input is not of rank 3, or the widths differ.
    """
    if locals_BUL.ndim != 3 or globals_NUM.ndim != 3 or locals_BUL.shape[1] != globals_NUM.shape[1]:
        raise ValueError(
            "locals [B, U, L] and globals [N, U, M] of one width U are needed, "
            f"got {list(locals_BUL.shape)} and {list(globals_NUM.shape)}"
        )
    return torch.einsum("bul,num->bnlm", at_least_float32(locals_BUL), at_least_float32(globals_NUM))


def as_queries(scores_BNLM: Tensor, own_B: Tensor) -> tuple[Tensor, Tensor]:
    """Scores [B * L * M, N] and own columns [B * L * M] of a pair table whose queries are locals.

    With it any estimator of pair tables takes local-global scores; "jsd" is that estimator minus 2 log 2.
    """
    B, N, L, M = scores_BNLM.shape
    scores = scores_BNLM.permute(0, 2, 3, 1).reshape(B * L * M, N)
    return scores, own_B.repeat_interleave(L * M)


def positive_terms(scores: Tensor, measure: Measure) -> Tensor:
    """What each score of a true pair adds to a divergence's bound, to be maximised; any shape.

    Raises:
        ValueError: an unknown measure.
    """
    match measure:
        case "gan":
            return -F.softplus(-scores)
        case "jsd":
            return math.log(2.0) - F.softplus(-scores)
        case "x2":
            return scores.square()
        case "kl":
            return scores
        case "rkl":
            return -torch.exp(-scores)
        case "h2":
            return -torch.expm1(-scores)
        case "w1":
            return scores
    raise ValueError(f"measure must be one of {', '.join(MEASURES)}, got {measure!r}")


def negative_terms(scores: Tensor, measure: Measure) -> Tensor:
    """What each score of a false pair takes from a divergence's bound, to be minimised; any shape.

    Raises:
        ValueError: an unknown measure.
    """
    match measure:
        case "gan":
            return F.softplus(scores)  # = softplus(-s) + s
        case "jsd":
            return F.softplus(scores) - math.log(2.0)
        case "x2":
            return -0.5 * (scores.abs() + 1.0).square()
        case "kl":
            return torch.exp(scores - 1.0)
        case "rkl":
            return scores - 1.0
        case "h2":
            return torch.expm1(scores)
        case "w1":
            return scores
    raise ValueError(f"measure must be one of {', '.join(MEASURES)}, got {measure!r}")


def divergence_rows(
    scores_BNLM: Tensor, own_B: Tensor, *, measure: Measure, is_valid_BN: Tensor | None = None
) -> Tensor:
    """Local values of `f_divergence`, [B, 3]: positive mean, sum over negatives, number of negatives.

    Args:
        scores_BNLM: of `local_global_scores`.
        own_B: index among N of each pair itself.
        measure: see `f_divergence`.
        is_valid_BN: False where a pair is no negative of another (same study); None means all are.

    Raises:
        ValueError: N < 2, or an unknown measure.
    """
    is_negative_BN = _is_negative(scores_BNLM, own_B, is_valid_BN)
    positive_B = positive_terms(_own(scores_BNLM, own_B), measure).mean((1, 2))
    # Filled before the exponentials too: inf * 0 in their backward would not be a number.
    kept = scores_BNLM.masked_fill(~is_negative_BN[:, :, None, None], 0.0)
    negative_BN = negative_terms(kept, measure).mean((2, 3)).masked_fill(~is_negative_BN, 0.0)
    return torch.stack([positive_B, negative_BN.sum(1), is_negative_BN.sum(1).to(positive_B)], 1)


def reduce_divergence(rows_N3: Tensor, weights_N: Tensor | None = None) -> Tensor:
    """Loss from the rows of all workers: mean negative term minus mean positive term.

    Args:
        rows_N3: of `divergence_rows`.
        weights_N: weight of each pair's locals; None counts all once.
    """
    positive, negative, count = rows_N3.unbind(1)
    weights = torch.ones_like(positive) if weights_N is None else weights_N.to(positive)
    return (weights * negative).sum() / (weights * count).sum() - (weights * positive).sum() / weights.sum()


def f_divergence(locals_BUL: Tensor, globals_BUM: Tensor, *, measure: Measure = "jsd") -> Tensor:
    """Negated bound of an f-divergence between true and false local-global pairs, in one process.

    Args:
        locals_BUL: L features of each pair, [B, U, L].
        globals_BUM: M features of each pair, [B, U, M].
        measure: gan, jsd, x2 (Pearson chi squared), kl, rkl (reverse), h2 (squared Hellinger) or w1.
            kl, rkl and h2 take exponentials of the scores: in float32 they overflow beyond 88. w1 is a
            distance only for scores of bounded slope. x2 is the release's and no bound: any large score, of
            a true or a false pair, lowers it without end.

    Returns:
        Scalar to minimise; jsd is 0 and gan 2 log 2 when all scores are 0.

    Raises:
        ValueError: B < 2, shapes that do not agree, or an unknown measure.

    Source: Deep InfoMax, arXiv 1808.06670, after f-GAN, arXiv 1606.00709. The code's "DV" fails for every
        shape and is not here: use the pair table's estimator on `as_queries`.
    """
    scores = local_global_scores(locals_BUL, globals_BUM)
    return reduce_divergence(divergence_rows(scores, _all(scores), measure=measure))


def local_info_nce_rows(
    scores_BNLM: Tensor,
    own_B: Tensor,
    *,
    gather: Gather,
    is_valid_BN: Tensor | None = None,
    own_image_score: float | None = None,
) -> Tensor:
    """Local values of `local_info_nce`, [B]; their mean over all workers is the loss.

    A global needs the locals of all other images. They stay where they are: each worker sums its own
    images' part of every global's normaliser, and N * M numbers per image are gathered.

    Args:
        scores_BNLM: of `local_global_scores`.
        own_B: index among N of each pair itself.
        gather: collects the parts of the normalisers, with gradient.
        is_valid_BN: False where a pair is no negative of another, in both directions; None means all are.
        own_image_score: see `local_info_nce`.

    Raises:
        ValueError: N < 2.
    """
    is_negative_BN = _is_negative(scores_BNLM, own_B, is_valid_BN)
    # The lowest number, not -inf: a global whose candidates are all excluded must keep a zero gradient.
    lowest = torch.finfo(scores_BNLM.dtype).min
    parts_BNM = scores_BNLM.logsumexp(2).masked_fill(~is_negative_BN[:, :, None], lowest)
    normaliser_BM = gather(parts_BNM)[:, own_B].logsumexp(0)
    if own_image_score is not None:
        own_part = math.log(scores_BNLM.shape[2]) + own_image_score
        normaliser_BM = torch.logaddexp(normaliser_BM, torch.full_like(normaliser_BM, own_part))
    return F.softplus(normaliser_BM[:, None, :] - _own(scores_BNLM, own_B)).mean((1, 2))


def local_info_nce(
    locals_BUL: Tensor, globals_BUM: Tensor, *, own_image_score: float | None = None
) -> Tensor:
    """InfoNCE of each local with its pair's globals against the locals of all other pairs, in one process.

    Args:
        locals_BUL: L features of each pair, [B, U, L].
        globals_BUM: M features of each pair, [B, U, M].
        own_image_score: None leaves the pair's own locals out of the negatives; a number counts each of them,
            the positive once more included, with that score. The release does the latter with -10.

    Returns:
        Scalar in nats; log(1 + (B - 1) L) when all scores are equal.

    Raises:
        ValueError: B < 2, or shapes that do not agree.

    Source: Deep InfoMax, arXiv 1808.06670.
    """
    scores = local_global_scores(locals_BUL, globals_BUM)
    rows = local_info_nce_rows(scores, _all(scores), gather=SingleProcess(), own_image_score=own_image_score)
    return rows.mean()


def one_negative_jsd_rows(positive_scores: Tensor, negative_scores: Tensor) -> Tensor:
    """softplus(-positive) + softplus(negative) of each pair and its one negative, [B] each -> [B].

    Raises:
        ValueError: the shapes differ.
    """
    if positive_scores.shape != negative_scores.shape:
        raise ValueError(
            "each positive score needs one negative score, "
            f"got shapes {list(positive_scores.shape)} and {list(negative_scores.shape)}"
        )
    # softplus, not log(sigmoid): the latter is -inf in float32 from a score of about 104.
    return F.softplus(-at_least_float32(positive_scores)) + F.softplus(at_least_float32(negative_scores))


def one_negative_jsd(positive_scores: Tensor, negative_scores: Tensor) -> Tensor:
    """Jensen-Shannon loss with one negative per positive.

    Args:
        positive_scores: logits of true pairs, [B].
        negative_scores: logits of as many false pairs, [B].

    Returns:
        Scalar in nats; 2 log 2 when all scores are 0.

    Raises:
        ValueError: the shapes differ.

    Source: CLIP-Lite, arXiv 2112.07133, whose negative is the next text of the batch, or with hard negatives
        (x, x') and (t, t'): pairs (x, t), (x', t') against (x, t') and (x', the next t). The code weighs this
        with 0.9 beside 0.1 of a prior term that has the wrong sign; see `models/prior.py`.
    """
    return one_negative_jsd_rows(positive_scores, negative_scores).mean()


def _all(scores_BNLM: Tensor) -> Tensor:
    return torch.arange(len(scores_BNLM), device=scores_BNLM.device)


def _own(scores_BNLM: Tensor, own_B: Tensor) -> Tensor:
    """Scores within the own pair, [B, L, M]."""
    return scores_BNLM[_all(scores_BNLM), own_B]


def _is_negative(scores_BNLM: Tensor, own_B: Tensor, is_valid_BN: Tensor | None) -> Tensor:
    N = scores_BNLM.shape[1]
    if N < 2:
        raise ValueError(f"local-global losses need a global batch of at least 2 pairs, got {N}")
    is_negative_BN = torch.arange(N, device=own_B.device) != own_B[:, None]
    return is_negative_BN if is_valid_BN is None else is_negative_BN & is_valid_BN
