"""Tables within one sample: its local features against what its other modality says at the same positions.

Shape letters: B pairs of this worker, K positions (regions or sentences) of a sample, D width; a table has
Q = B * K rows, sample by sample, and C = K columns.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from models.outputs import at_least_float32
from models.pair_table import PairTable


def within_sample_tables(
    features_BKD: Tensor,
    attended_BKD: Tensor,
    *,
    inverse_temperature: float | Tensor,
    row_weights_BK: Tensor | None,
    is_real_BK: Tensor | None = None,
    log_targets_KK: Tensor | None = None,
) -> tuple[PairTable, PairTable]:
    """Cosines of each sample's features with its own attended features, in both directions.

    An estimator that averages its rows with the table's weights gives LoVT's local term exactly, with factor
    1: row weights sum to 1 over a sample, so their mean is sum over n with w_n, averaged over samples; gather
    rows and weights, then reduce. A sample with one real position counts as a sample whose loss is 0. LoVT
    weighs each of its four local terms (two modalities, two directions) by .375.

    Args:
        features_BKD: local features, not normalised; those at pads may hold anything.
        attended_BKD: what cross-attention found in the other modality at each position.
        inverse_temperature: of the cosines (1 / .3 in LoVT).
        row_weights_BK: >= 0, importance of each position; scaled to sum 1 over a sample's real positions and
            detached. None means equal weights. A sample whose weights are all 0 does not count.
        is_real_BK: False at pads, which are no candidates and whose rows have weight 0; None means all real.
        log_targets_KK: log of the target distribution of each position over positions, [K, K], or [B, K, K]
            where samples keep different positions; the own position must have some. With `is_real_BK` the
            pads' share goes to the other targets of the row. None means the own position.

    Returns:
        Tables features -> attended and attended -> features, each [B * K, K], float32 at least.

    Raises:
        ValueError: shapes that do not fit.

    Source: LoVT, arXiv 2112.02889.
    """
    _check_shapes(features_BKD, attended_BKD, row_weights_BK, is_real_BK, log_targets_KK)
    num_samples, num_positions = features_BKD.shape[:2]
    scores_BKK = _cosines(features_BKD, attended_BKD, is_real_BK) * inverse_temperature
    positive_Q = torch.arange(num_positions, device=features_BKD.device).repeat(num_samples)
    is_valid_QK = None
    if is_real_BK is not None:
        is_valid_QK = is_real_BK[:, None].expand_as(scores_BKK).flatten(0, 1)
    log_targets_QK = None
    if log_targets_KK is not None:
        log_targets_BKK = log_targets_KK.to(scores_BKK).expand_as(scores_BKK)
        log_targets_QK = _without_pads(log_targets_BKK, is_real_BK).flatten(0, 1)
    row_weights_Q = _weights_per_sample(scores_BKK, row_weights_BK, is_real_BK).flatten()
    to_attended, to_features = (
        PairTable(
            scores=scores.flatten(0, 1),
            positive=positive_Q,
            log_targets=log_targets_QK,
            is_valid=is_valid_QK,
            row_weights=row_weights_Q,
        )
        for scores in (scores_BKK, scores_BKK.transpose(1, 2))
    )
    return to_attended, to_features


def _cosines(features_BKD: Tensor, attended_BKD: Tensor, is_real_BK: Tensor | None) -> Tensor:
    def unit(rows_BKD: Tensor) -> Tensor:
        rows_BKD = at_least_float32(rows_BKD)
        if is_real_BK is not None:  # filled before anything is computed: a pad gets no gradient, nan or not
            rows_BKD = rows_BKD.masked_fill(~is_real_BK[:, :, None], 0.0)
        return F.normalize(rows_BKD, dim=2)

    return unit(features_BKD) @ unit(attended_BKD).transpose(1, 2)


def _without_pads(log_targets_BKK: Tensor, is_real_BK: Tensor | None) -> Tensor:
    """Targets moved off the pads; a pad's own row is one-hot, so that it stays finite."""
    if is_real_BK is None:
        return log_targets_BKK
    takes_part_BKK = is_real_BK[:, None] & is_real_BK[:, :, None]
    is_own_pad_BKK = torch.diag_embed(~is_real_BK)
    kept_BKK = log_targets_BKK.masked_fill(~takes_part_BKK, -torch.inf).masked_fill(is_own_pad_BKK, 0.0)
    return kept_BKK.log_softmax(2)


def _weights_per_sample(
    scores_BKK: Tensor, row_weights_BK: Tensor | None, is_real_BK: Tensor | None
) -> Tensor:
    if row_weights_BK is None:
        weights_BK = scores_BKK.new_ones(scores_BKK.shape[:2])
    else:
        weights_BK = row_weights_BK.detach().to(scores_BKK)
    if is_real_BK is not None:
        weights_BK = weights_BK.masked_fill(~is_real_BK, 0.0)
    return weights_BK / weights_BK.sum(1, keepdim=True).clamp_min(torch.finfo(weights_BK.dtype).tiny)


def _check_shapes(
    features_BKD: Tensor,
    attended_BKD: Tensor,
    row_weights_BK: Tensor | None,
    is_real_BK: Tensor | None,
    log_targets_KK: Tensor | None,
) -> None:
    if features_BKD.ndim != 3 or features_BKD.shape != attended_BKD.shape:
        raise ValueError(
            f"features and attended must both be [B, K, D], got {list(features_BKD.shape)} "
            f"and {list(attended_BKD.shape)}"
        )
    positions = features_BKD.shape[:2]
    for name, value in (("row_weights", row_weights_BK), ("is_real", is_real_BK)):
        if value is not None and value.shape != positions:
            raise ValueError(f"{name} must have shape {list(positions)}, got {list(value.shape)}")
    square = (positions[1], positions[1])
    if log_targets_KK is not None and log_targets_KK.shape not in (square, (positions[0], *square)):
        raise ValueError(
            f"log_targets must have shape {list(square)} or one such table per sample, "
            f"got {list(log_targets_KK.shape)}"
        )
