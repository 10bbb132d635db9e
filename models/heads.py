"""Auxiliary heads on the vision feature: SimCLR between views, BYOL against the EMA teacher."""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# B rows of this worker, N rows of all workers, D width

Norm = Literal["layer", "batch"]


def mlp_head(widths: Sequence[int], *, norm: Norm = "layer", bias: bool = True) -> nn.Sequential:
    """Linear layers with normalisation and ReLU between them, none after the last.

    Args:
        widths: input, hidden ..., output width; at least an input and an output.
        norm: "layer", or "batch" as published. BatchNorm sees only this worker's rows, so gradients depend
            on the number of workers, and it refuses a single row.
        bias: whether the linear layers have one.

    Raises:
        ValueError: fewer than two widths, a width < 1, or an unknown norm.
    """
    if len(widths) < 2 or min(widths) < 1:
        raise ValueError(f"a head needs an input and an output width, all >= 1, got {list(widths)}")
    if norm not in ("layer", "batch"):
        raise ValueError(f"norm must be 'layer' or 'batch', got {norm!r}")
    layers: list[nn.Module] = []
    for width_in, width_out in zip(widths[:-2], widths[1:-1], strict=True):
        normalise = nn.LayerNorm(width_out) if norm == "layer" else nn.BatchNorm1d(width_out)
        layers += [nn.Linear(width_in, width_out, bias=bias), normalise, nn.ReLU()]
    layers.append(nn.Linear(widths[-2], widths[-1], bias=bias))
    return nn.Sequential(*layers)


def simclr_projector(width: int, hidden_width: int, out_width: int, *, norm: Norm = "layer") -> nn.Sequential:
    """Three linear layers with biases. SLIP, arXiv 2112.12750: 768-4096-4096-256, BatchNorm."""
    return mlp_head([width, hidden_width, hidden_width, out_width], norm=norm)


def byol_projector(width: int, hidden_width: int, out_width: int, *, norm: Norm = "layer") -> nn.Sequential:
    """Two linear layers without biases. A-CLIP, arXiv 2212.08653: 768-4096-256, BatchNorm."""
    return mlp_head([width, hidden_width, out_width], norm=norm, bias=False)


def byol_predictor(width: int, hidden_width: int, *, norm: Norm = "layer") -> nn.Sequential:
    """Two linear layers without biases back to `width`. A-CLIP, arXiv 2212.08653: 256-4096-256."""
    return mlp_head([width, hidden_width, width], norm=norm, bias=False)


def simclr_loss(
    a_BD: Tensor,
    b_BD: Tensor,
    *,
    temperature: float = 0.1,
    all_a_ND: Tensor | None = None,
    all_b_ND: Tensor | None = None,
    row_offset: int = 0,
) -> Tensor:
    """SimCLR between two views: each row finds its other view among all rows of both views but itself.

    The mean over workers of the local losses is the loss of the global batch, and with a gather that
    carries gradients so is the gradient.

    Args:
        a_BD: projections of view 1 on this worker; brought to unit length here.
        b_BD: projections of view 2. Passing `a_BD` twice is what A-CLIP's release does (a weak uniformity
            penalty on view 1); the paper means two views.
        temperature: of the cosines, > 0.
        all_a_ND: projections of view 1 of all workers; None means `a_BD`.
        all_b_ND: projections of view 2 of all workers; None means `b_BD`.
        row_offset: row of `all_a_ND` and `all_b_ND` at which this worker's rows start.

    Returns:
        Scalar in nats, mean over local rows and both views; log(2N - 1) when all projections are equal.

    Raises:
        ValueError: temperature <= 0, shapes that do not fit, or a global batch of one pair.

    Source: SimCLR, arXiv 2002.05709, as in SLIP, arXiv 2112.12750.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be > 0, got {temperature}")
    all_a, all_b = a_BD if all_a_ND is None else all_a_ND, b_BD if all_b_ND is None else all_b_ND
    if a_BD.shape != b_BD.shape or all_a.shape != all_b.shape:
        raise ValueError(f"views must have equal shapes, got {tuple(a_BD.shape)} and {tuple(b_BD.shape)}")
    if len(all_a) < 2:
        raise ValueError(f"SimCLR needs a global batch of at least 2 pairs, got {len(all_a)}")
    if not 0 <= row_offset <= len(all_a) - len(a_BD):
        raise ValueError(f"rows {row_offset}..{row_offset + len(a_BD) - 1} lie outside {len(all_a)} rows")
    a, b, all_a, all_b = (F.normalize(x, dim=1) for x in (a_BD, b_BD, all_a, all_b))
    own_B = torch.arange(len(a), device=a.device) + row_offset
    rows_a = _simclr_rows(a, all_same=all_a, all_other=all_b, own_B=own_B, temperature=temperature)
    rows_b = _simclr_rows(b, all_same=all_b, all_other=all_a, own_B=own_B, temperature=temperature)
    return 0.5 * (rows_a + rows_b).mean()


def _simclr_rows(
    anchor: Tensor, *, all_same: Tensor, all_other: Tensor, own_B: Tensor, temperature: float
) -> Tensor:
    to_other_BN = anchor @ all_other.T / temperature
    to_same_BN = (anchor @ all_same.T / temperature).scatter(1, own_B[:, None], -torch.inf)
    return F.cross_entropy(torch.cat([to_other_BN, to_same_BN], dim=1), own_B, reduction="none")


def byol_rows(prediction_BD: Tensor, target_BD: Tensor) -> Tensor:
    """2 - 2 cos of each row, [B], 0 to 4; gradient flows into both sides.

    Raises:
        ValueError: the shapes differ.
    """
    if prediction_BD.shape != target_BD.shape:
        raise ValueError(
            f"prediction {tuple(prediction_BD.shape)} and target {tuple(target_BD.shape)} must have equal shapes"
        )
    prediction, target = F.normalize(prediction_BD, dim=-1), F.normalize(target_BD, dim=-1)
    return 2.0 - 2.0 * (prediction * target).sum(dim=-1)


def byol_loss(prediction_BD: Tensor, target_BD: Tensor) -> Tensor:
    """BYOL: mean of 2 - 2 cos between the predictor's output and the teacher's projection.

    Args:
        prediction_BD: predictor(projector(feature)) of every view, views stacked.
        target_BD: the teacher's projection for the same rows; no gradient flows into it.

    Returns:
        Scalar in [0, 4].

    Raises:
        ValueError: the shapes differ.

    Source: BYOL, arXiv 2006.07733; in A-CLIP, arXiv 2212.08653, one teacher crop is the target of all views.
    """
    return byol_rows(prediction_BD, target_BD.detach()).mean()
