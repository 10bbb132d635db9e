"""Relaxation of positive pairs: reports share findings, so a pair need not be pulled together without end."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Relaxation = Literal["cap", "leaky", "cap_all"]


def relax(
    cosines_QC: Tensor, positive_Q: Tensor, *, kind: Relaxation, limit: float = 0.8, slope: float = 0.1
) -> Tensor:
    """Cosines that stop (or slow down) rising above a limit.

    The result is the table itself, for numerator and denominator alike: a limit in the numerator alone
    would leave the positive's share of the softmax as a force that pushes the pair apart.

    Args:
        cosines_QC: before division by the temperature, [Q, C].
        positive_Q: column of each query's own pair, int64 [Q].
        kind: `cap` holds positives at the limit, so that one above it has no gradient; `leaky` lets them
            rise above it with `slope`; `cap_all` caps every pair.
        limit: a cosine, in (-1, 1].
        slope: of `leaky`, in [0, 1]; 0 is `cap`.

    Returns:
        [Q, C].

    Raises:
        ValueError: another kind, a limit or a slope out of range, a positive for another number of rows.

    Source: Jang et al., arXiv 2212.07050, states the aim (a relaxed loss of positive pairs); the formulas
        are ours, and so is the fourth form, `slacken`.
    """
    _check(cosines_QC, positive_Q, kind=kind, limit=limit, slope=slope)
    # Not clamp: it gives half of the gradient, or all of it, to a value exactly at its limit.
    is_above_QC = cosines_QC >= limit
    if kind != "cap_all":
        columns_C = torch.arange(cosines_QC.shape[1], device=cosines_QC.device)
        is_above_QC = is_above_QC & (positive_Q[:, None] == columns_C)
    if kind == "leaky":
        return torch.where(is_above_QC, limit + slope * (cosines_QC - limit), cosines_QC)
    return cosines_QC.masked_fill(is_above_QC, limit)


def slacken(losses_Q: Tensor, slack: float) -> Tensor:
    """relu(loss - slack): what a query or a pair may lose for nothing, with no gradient below it.

    On the rows of one direction it is `InfoNCE.slack`. On the mean of a pair's rows in both directions, the
    form of the stored values, one direction may make up for the other.

    Args:
        losses_Q: in nats, of queries or pairs, [Q].
        slack: in nats, >= 0.

    Raises:
        ValueError: slack < 0.
    """
    if not slack >= 0:
        raise ValueError(f"slack must be >= 0, got {slack}")
    return F.relu(losses_Q - slack)


def _check(cosines_QC: Tensor, positive_Q: Tensor, *, kind: str, limit: float, slope: float) -> None:
    if kind not in ("cap", "leaky", "cap_all"):
        raise ValueError(f"relaxation must be cap, leaky or cap_all, got {kind}")
    if not -1 < limit <= 1:
        raise ValueError(f"limit is a cosine and must be in (-1, 1], got {limit}")
    if not 0 <= slope <= 1:
        raise ValueError(f"slope must be in [0, 1], got {slope}")
    if positive_Q.shape != cosines_QC.shape[:1]:
        raise ValueError(
            f"positive columns must have shape [{cosines_QC.shape[0]}], got {list(positive_Q.shape)}"
        )
