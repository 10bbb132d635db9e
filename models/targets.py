"""Targets for rows of a pair table, in log space, and the KL losses that use them.

A row is one query of this worker, a column one candidate of the global batch; `positive_Q` names each
row's own column, so a worker holds any slice of rows and gets the numbers of the whole table.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

# Q query rows, C candidate columns, P regions of a grid


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


def soft_targets(
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


def negative_targets(similarities_QC: Tensor, positive_Q: Tensor, *, temperature: float | Tensor) -> Tensor:
    """log q*: softmax of the similarities over the negatives alone, -inf at the positive, [Q, C].

    Arguments and errors as `soft_targets`. Source: SoftCLIP's disentangled negatives, arXiv 2303.17561.
    """
    _check_rows(similarities_QC, positive_Q)
    _check_temperature(temperature)
    own_QC = is_positive(similarities_QC, positive_Q)
    return (similarities_QC / temperature).masked_fill(own_QC, -torch.inf).log_softmax(dim=1)


def smoothed_over_negatives(table_QC: Tensor, positive_Q: Tensor, *, smoothing: float) -> Tensor:
    """log-targets [Q, C] of 1 - smoothing at the positive and smoothing / (C - 1) at each negative.

    Raises:
        ValueError: fewer than 2 candidates or smoothing outside [0, 1).

    Source: PyramidCLIP, arXiv 2204.14095, the convention of SoftCLIP's authors.
    """
    return _smoothed(table_QC, positive_Q, smoothing=smoothing, num_shares=table_QC.shape[1] - 1, own_share=0)


def smoothed_over_all(table_QC: Tensor, positive_Q: Tensor, *, smoothing: float) -> Tensor:
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


def same_group_log_targets(keys_Q: Tensor, keys_C: Tensor, positive_Q: Tensor) -> Tensor:
    """log-targets [Q, C] spread evenly over the candidates of the row's group: several positives.

    Args:
        keys_Q: group (study) of each row, integers.
        keys_C: group of each candidate.
        positive_Q: own column of each row, int64; a target whatever its key says.

    Returns:
        -log(size of the group) at its members and -inf elsewhere, float32; one-hot where nobody shares the
        key. The cross-entropy of such a row cannot fall below the log of its group's size.

    Raises:
        ValueError: positive_Q is not of the shape of keys_Q.

    Source: supervised contrastive learning, arXiv 2004.11362 (mean over positives outside the log), with the
        own pair among the positives.
    """
    if positive_Q.shape != keys_Q.shape:
        raise ValueError(
            f"positive columns must have shape {list(keys_Q.shape)}, got {list(positive_Q.shape)}"
        )
    is_member_QC = keys_Q[:, None] == keys_C
    is_member_QC = is_member_QC | is_positive(is_member_QC, positive_Q)
    zeros_QC = torch.zeros(is_member_QC.shape, device=is_member_QC.device)
    return zeros_QC.masked_fill(~is_member_QC, -torch.inf).log_softmax(dim=1)


def spatial_log_targets(
    grid: tuple[int, int], *, relative_threshold: float = 0.5, sharpness: float = 1.0
) -> Tensor:
    """log-targets [P, P] that a region shares with the regions near it.

    P_nk proportional to exp(-sharpness * d_nk) where d_nk <= relative_threshold, else 0; rows sum to 1. d is
    the distance on the grid in units of its diagonal, sqrt(rows^2 + columns^2).

    Args:
        grid: rows and columns; regions are row-major.
        relative_threshold: >= 0, the bound included; 0 is one-hot.
        sharpness: >= 0; 0 is uniform within the threshold.

    Returns:
        float64, -inf beyond the threshold.

    Raises:
        ValueError: an empty grid, or a negative threshold or sharpness.

    Source: LoVT, arXiv 2112.02889 (.5 and 1). The release measures in float32, which leaves pairs exactly at
        the threshold to rounding (14 x 14: 7 rows and 7 columns apart); here squares of whole numbers decide.
    """
    num_rows, num_columns = grid
    if num_rows < 1 or num_columns < 1:
        raise ValueError(f"a grid needs at least one row and one column, got {grid}")
    if not relative_threshold >= 0.0:
        raise ValueError(f"relative_threshold must be >= 0, got {relative_threshold}")
    if not sharpness >= 0.0:
        raise ValueError(f"sharpness must be >= 0, got {sharpness}")
    at_P = torch.arange(num_rows * num_columns)
    row_P, column_P = at_P // num_columns, at_P % num_columns
    squared_PP = (row_P[:, None] - row_P) ** 2 + (column_P[:, None] - column_P) ** 2
    diagonal_squared = num_rows**2 + num_columns**2
    distance_PP = (squared_PP.double() / diagonal_squared).sqrt()
    is_far_PP = squared_PP > relative_threshold**2 * diagonal_squared
    return (-sharpness * distance_PP).masked_fill(is_far_PP, -torch.inf).log_softmax(dim=1)


def mean_off_diagonal_mass(
    similarities_QC: Tensor, positive_Q: Tensor, *, temperature: float | Tensor
) -> Tensor:
    """Mean share of softmax(similarities / temperature) that is not on the own column, scalar in [0, 1).

    Log it: it decides how soft the targets are, and it changes with the global batch.
    """
    log_q_QC = (similarities_QC / temperature).log_softmax(dim=1)
    return 1.0 - log_q_QC.gather(1, positive_Q[:, None]).exp().mean()


def temperature_from_off_diagonal_mass(mass: float, *, num_candidates: int, typical_cosine: float) -> float:
    """Temperature at which constant off-diagonal cosines give the wanted off-diagonal mass.

    tau = (1 - c) / ln((N - 1)(1 - mass) / mass)

    Args:
        mass: wanted share of the softmax off the diagonal, in (0, (N - 1) / N).
        num_candidates: N of the global batch; another batch size needs another temperature.
        typical_cosine: c, off-diagonal cosine, < 1.

    Raises:
        ValueError: mass out of its range, N < 2, or c >= 1.
    """
    if num_candidates < 2:
        raise ValueError(f"num_candidates must be >= 2, got {num_candidates}")
    if not typical_cosine < 1.0:
        raise ValueError(f"typical_cosine must be < 1, got {typical_cosine}")
    _check_mass(mass, num_candidates)
    odds = (1.0 - mass) / mass
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
    mass: float,
    low: float = 1e-4,
    high: float = 1e3,
    num_halvings: int = 40,
) -> Tensor:
    """Temperature at which this table has the wanted mean off-diagonal mass; scalar, detached.

    Give it the table of the global batch (all rows), or workers will disagree on the temperature.

    Args:
        similarities_QC: similarities, none larger than that of the row with itself.
        positive_Q: own column of each row.
        mass: wanted mean share off the own column, in (0, (C - 1) / C).
        low: lowest temperature tried; the answer when duplicates hold more than the mass at any temperature.
        high: highest temperature tried.
        num_halvings: of the bracket in log temperature; 40 leave a relative error of 1e-11.

    Raises:
        ValueError: fewer than 2 candidates, mass out of its range, or an empty bracket.
    """
    _check_rows(similarities_QC, positive_Q)
    _check_mass(mass, similarities_QC.shape[1])
    if not 0.0 < low < high:
        raise ValueError(f"need 0 < low < high, got low={low} and high={high}")
    # own share = 1 / sum exp(gap / temperature), and every gap is <= 0: monotone in the temperature
    gaps_QC = similarities_QC - similarities_QC.gather(1, positive_Q[:, None])
    below, above = gaps_QC.new_tensor(math.log(low)), gaps_QC.new_tensor(math.log(high))
    for _ in range(num_halvings):
        middle = 0.5 * (below + above)
        own_share = (gaps_QC / middle.exp()).exp().sum(dim=1).reciprocal().mean()
        is_too_soft = 1.0 - own_share > mass
        below, above = torch.where(is_too_soft, below, middle), torch.where(is_too_soft, middle, above)
    return (0.5 * (below + above)).exp()


def _log_probabilities(logits_QC: Tensor, valid_QC: Tensor | None) -> Tensor:
    if valid_QC is None:
        return logits_QC.log_softmax(dim=1)
    return logits_QC.masked_fill(~valid_QC, -torch.inf).log_softmax(dim=1)


def _kl(log_a_QC: Tensor, log_b_QC: Tensor) -> Tensor:
    # entries with a = 0 add nothing; filling before the product keeps 0 * inf out of value and gradient
    is_zero_QC = log_a_QC == -torch.inf
    log_a, log_b = log_a_QC.masked_fill(is_zero_QC, 0.0), log_b_QC.masked_fill(is_zero_QC, 0.0)
    return (log_a.exp() * (log_a - log_b)).masked_fill(is_zero_QC, 0.0).sum(dim=1)


def kl_rows(log_targets_QC: Tensor, logits_QC: Tensor, valid_QC: Tensor | None = None) -> Tensor:
    """KL(y || softmax(logits)) of each row, [Q], nats.

    Args:
        log_targets_QC: log y, -inf where y is 0 (there must be no target on an invalid column).
        logits_QC: similarity / temperature.
        valid_QC: True at columns that take part; None means all. Leave-one-out: all but the positive.
    """
    return _kl(log_targets_QC, _log_probabilities(logits_QC, valid_QC))


def symmetric_kl_rows(log_targets_QC: Tensor, logits_QC: Tensor, valid_QC: Tensor | None = None) -> Tensor:
    """Half of KL(y || p) + KL(p || y) of each row, [Q], nats.

    Arguments as `kl_rows`. A valid column with target 0 makes it infinite: one-hot targets cannot use it.
    """
    log_p_QC = _log_probabilities(logits_QC, valid_QC)
    return 0.5 * (_kl(log_targets_QC, log_p_QC) + _kl(log_p_QC, log_targets_QC))


def cross_entropy_rows(log_targets_QC: Tensor, logits_QC: Tensor) -> Tensor:
    """-sum y log softmax(logits) of each row, [Q], nats; the label-smoothed InfoNCE rows."""
    log_p_QC = F.log_softmax(logits_QC, dim=1)
    is_zero_QC = log_targets_QC == -torch.inf
    return -(log_targets_QC.exp() * log_p_QC).masked_fill(is_zero_QC, 0.0).sum(dim=1)
