"""Soft targets for rows of a pair table, in log space, and the guidance that softens them.

A row is one query of this worker, a column one candidate of the global batch; `positive_Q` names each
row's own column, so a worker holds any slice of rows and gets the numbers of the whole table.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

# Q query rows, C candidate columns


def _check_rows(table_QC: Tensor, positive_Q: Tensor) -> None:
    if table_QC.shape[1] < 2:
        raise ValueError(f"soft targets need at least 2 candidates, got {table_QC.shape[1]}")
    if positive_Q.shape != table_QC.shape[:1]:
        raise ValueError(
            f"positive columns must have shape [{table_QC.shape[0]}], got {list(positive_Q.shape)}"
        )


def _check_temperature(temperature: float | Tensor) -> None:
    if isinstance(temperature, float | int) and not temperature > 0:
        raise ValueError(f"temperature must be > 0, got {temperature}")


def is_positive(table_QC: Tensor, positive_Q: Tensor) -> Tensor:
    """Boolean [Q, C], True at each row's own column."""
    columns_C = torch.arange(table_QC.shape[1], device=table_QC.device)
    return positive_Q[:, None] == columns_C


def soft_log_targets(
    similarities_QC: Tensor,
    positive_Q: Tensor,
    *,
    temperature: float | Tensor,
    mixing: float,
    is_valid: Tensor | None = None,
) -> Tensor:
    """log y with y = (1 - mixing) * one-hot + mixing * softmax(similarities / temperature).

    Args:
        similarities_QC: intra-modal similarities of the rows to all candidates, own column included.
        positive_Q: own column of each row, int64 [Q].
        temperature: of the similarities, > 0; a separate one from the logits' (sharing a learned
            temperature near 0.01 makes y one-hot to 15 digits).
        mixing: beta in [0, 1]; 0 is one-hot, 1 pure similarity.
        is_valid: [Q, C], False at columns that are no candidates and get no target; None means all.

    Returns:
        log-targets [Q, C], -inf where a target is 0; rows sum to 1 after exp. Gradient flows into the
        similarities: detach for SoftCLIP.

    Raises:
        ValueError: fewer than 2 candidates, temperature <= 0 or mixing outside [0, 1].

    Source: SoftCLIP, arXiv 2303.17561; its coefficients are not published.
    """
    _check_rows(similarities_QC, positive_Q)
    _check_temperature(temperature)
    if not 0.0 <= mixing <= 1.0:
        raise ValueError(f"mixing must be in [0, 1], got {mixing}")
    own_QC = is_positive(similarities_QC, positive_Q)
    if mixing == 0.0:
        return similarities_QC.new_zeros(similarities_QC.shape).masked_fill(~own_QC, -torch.inf)
    logits_QC = similarities_QC / temperature
    if is_valid is not None:
        logits_QC = logits_QC.masked_fill(~(is_valid | own_QC), -torch.inf)
    log_similar_QC = logits_QC.log_softmax(dim=1) + math.log(mixing)
    if mixing == 1.0:
        return log_similar_QC
    hard = log_similar_QC.new_tensor(math.log1p(-mixing))
    return torch.where(own_QC, torch.logaddexp(log_similar_QC, hard), log_similar_QC)


def negative_log_targets(
    similarities_QC: Tensor, positive_Q: Tensor, *, temperature: float | Tensor
) -> Tensor:
    """log q*: softmax of the similarities over the negatives alone, -inf at the positive, [Q, C].

    Arguments and errors as `soft_log_targets`. Source: SoftCLIP's disentangled negatives, arXiv 2303.17561.
    """
    _check_rows(similarities_QC, positive_Q)
    _check_temperature(temperature)
    own_QC = is_positive(similarities_QC, positive_Q)
    return (similarities_QC / temperature).masked_fill(own_QC, -torch.inf).log_softmax(dim=1)


def smoothed_log_targets_over_negatives(table_QC: Tensor, positive_Q: Tensor, *, smoothing: float) -> Tensor:
    """log-targets [Q, C] of 1 - smoothing at the positive and smoothing / (C - 1) at each negative.

    Raises:
        ValueError: fewer than 2 candidates or smoothing outside [0, 1).

    Source: PyramidCLIP, arXiv 2204.14095, the convention of SoftCLIP's authors.
    """
    return _smoothed(table_QC, positive_Q, smoothing=smoothing, num_shares=table_QC.shape[1] - 1, own_share=0)


def smoothed_log_targets_over_all(table_QC: Tensor, positive_Q: Tensor, *, smoothing: float) -> Tensor:
    """log-targets [Q, C] of 1 - smoothing + smoothing / C at the positive and smoothing / C elsewhere.

    Raises:
        ValueError: fewer than 2 candidates or smoothing outside [0, 1).

    Source: the convention of torch's cross-entropy.
    """
    return _smoothed(table_QC, positive_Q, smoothing=smoothing, num_shares=table_QC.shape[1], own_share=1)


def _smoothed(
    table_QC: Tensor, positive_Q: Tensor, *, smoothing: float, num_shares: int, own_share: int
) -> Tensor:
    _check_rows(table_QC, positive_Q)
    if not 0.0 <= smoothing < 1.0:
        raise ValueError(f"label smoothing must be in [0, 1), got {smoothing}")
    share = smoothing / num_shares
    log_share = math.log(share) if share > 0 else -math.inf
    own = math.log(1.0 - smoothing + own_share * share)
    filled = torch.full_like(table_QC, log_share, requires_grad=False)
    return filled.masked_fill(is_positive(table_QC, positive_Q), own)


def mean_off_diagonal_mass(
    similarities_QC: Tensor, positive_Q: Tensor, *, temperature: float | Tensor
) -> Tensor:
    """Mean share of softmax(similarities / temperature) that is not on the own column, scalar in [0, 1).

    Log it: it decides how soft the targets are, and it changes with the global batch.
    """
    log_q_QC = (similarities_QC / temperature).log_softmax(dim=1)
    return 1.0 - log_q_QC.gather(1, positive_Q[:, None]).exp().mean()


def temperature_from_off_diagonal_mass(
    off_diagonal_mass: float, *, num_candidates: int, typical_cosine: float
) -> float:
    """Temperature at which constant off-diagonal cosines give the wanted off-diagonal mass.

    tau = (1 - c) / ln((N - 1)(1 - mass) / mass)

    Args:
        off_diagonal_mass: wanted share of the softmax off the diagonal, in (0, (N - 1) / N).
        num_candidates: N of the global batch; another batch size needs another temperature.
        typical_cosine: c, off-diagonal cosine, < 1.

    Raises:
        ValueError: mass out of its range, N < 2, or c >= 1.
    """
    if num_candidates < 2:
        raise ValueError(f"num_candidates must be >= 2, got {num_candidates}")
    if not typical_cosine < 1.0:
        raise ValueError(f"typical_cosine must be < 1, got {typical_cosine}")
    _check_mass(off_diagonal_mass, num_candidates)
    odds = (1.0 - off_diagonal_mass) / off_diagonal_mass
    return (1.0 - typical_cosine) / math.log((num_candidates - 1) * odds)


def _check_mass(mass: float, num_candidates: int) -> None:
    ceiling = (num_candidates - 1) / num_candidates
    if not 0.0 < mass < ceiling:
        raise ValueError(
            f"off-diagonal mass must be in (0, {ceiling:.4g}) for {num_candidates} candidates, got {mass}"
        )


@torch.no_grad()
def bisect_temperature(
    similarities_QC: Tensor,
    positive_Q: Tensor,
    *,
    off_diagonal_mass: float,
    low: float = 1e-4,
    high: float = 1e3,
    num_halvings: int = 40,
) -> Tensor:
    """Temperature at which this table has the wanted mean off-diagonal mass; scalar, detached.

    Give it the table of the global batch (all rows), or workers will disagree on the temperature.

    Args:
        similarities_QC: similarities, none larger than that of the row with itself.
        positive_Q: own column of each row.
        off_diagonal_mass: wanted mean share off the own column, in (0, (C - 1) / C).
        low: lowest temperature tried; the answer when duplicates hold more than the mass at any temperature.
        high: highest temperature tried.
        num_halvings: of the bracket in log temperature; 40 leave a relative error of 1e-11.

    Raises:
        ValueError: fewer than 2 candidates, mass out of its range, or an empty bracket.
    """
    _check_rows(similarities_QC, positive_Q)
    _check_mass(off_diagonal_mass, similarities_QC.shape[1])
    if not 0.0 < low < high:
        raise ValueError(f"need 0 < low < high, got low={low} and high={high}")
    # own share = 1 / sum exp(gap / temperature), and every gap is <= 0: monotone in the temperature
    gaps_QC = similarities_QC - similarities_QC.gather(1, positive_Q[:, None])
    below, above = gaps_QC.new_tensor(math.log(low)), gaps_QC.new_tensor(math.log(high))
    for _ in range(num_halvings):
        middle = 0.5 * (below + above)
        own_share = (gaps_QC / middle.exp()).exp().sum(dim=1).reciprocal().mean()
        is_too_soft = 1.0 - own_share > off_diagonal_mass
        below, above = torch.where(is_too_soft, below, middle), torch.where(is_too_soft, middle, above)
    return (0.5 * (below + above)).exp()


def spread_temperature(guidance_ND: Tensor, *, off_diagonal_mass: float) -> Tensor:
    """`bisect_temperature` of the self-similarity of the global batch's unit guidance rows, [N, D].

    Raises:
        ValueError: N < 2 or mass outside (0, (N - 1) / N).
    """
    rows_N = torch.arange(len(guidance_ND), device=guidance_ND.device)
    return bisect_temperature(guidance_ND @ guidance_ND.T, rows_N, off_diagonal_mass=off_diagonal_mass)


def mean_unit_tokens(tokens_BKD: Tensor) -> Tensor:
    """Unit mean of unit tokens, [B, K, D] -> [B, D]: a stand-in for SoftCLIP's region features."""
    return F.normalize(F.normalize(tokens_BKD, dim=-1).mean(dim=1), dim=-1)


def hashed_words(token_ids_BT: Tensor, is_real_token_BT: Tensor, *, num_buckets: int = 1024) -> Tensor:
    """Unit multi-hot rows of hashed token ids: a stand-in for SoftCLIP's tag features.

    The first and the last real token (start and end) are left out: every text has them. Texts without a
    word share one bucket of their own, so they are alike.

    Args:
        token_ids_BT: int64 [B, T], start token first.
        is_real_token_BT: False at padding, bool [B, T].
        num_buckets: of the hash.

    Returns:
        float32 [B, num_buckets + 1].
    """
    order_BT = is_real_token_BT.cumsum(dim=1)
    is_word_BT = is_real_token_BT & (order_BT > 1) & (order_BT < order_BT[:, -1:])
    # Knuth's multiplicative hash: neighbouring ids of a BPE vocabulary land far apart
    buckets_BT = (token_ids_BT * 2654435761 % 2**32) * num_buckets >> 32
    dropped = num_buckets + 1
    hot = torch.zeros(len(token_ids_BT), num_buckets + 2, device=token_ids_BT.device)
    hot = hot.scatter(1, buckets_BT.masked_fill(~is_word_BT, dropped), 1.0)
    hot[:, num_buckets] = (~is_word_BT.any(dim=1)).to(hot.dtype)
    return F.normalize(hot[:, :dropped], dim=1)
