"""Auxiliary heads on the vision feature: SimCLR between views, BYOL against the EMA teacher."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.gather import Gather, SingleProcess, own_columns

# B rows of this worker, N rows of all workers, D width

Norm = Literal["layer", "batch"]


class Projector(nn.Sequential):
    """Linear layers with normalisation and ReLU between them, none after the last."""

    def __init__(
        self,
        width: int,
        *,
        hidden: int,
        out: int,
        num_layers: int = 2,
        norm: Norm = "layer",
        bias: bool = False,
    ) -> None:
        """Two layers without biases are BYOL's projector in A-CLIP, arXiv 2212.08653 (768-4096-256).

        Args:
            width: of the input.
            hidden: width of all inner layers.
            out: width of the output.
            num_layers: linear layers, >= 2.
            norm: "layer", or "batch" as published. BatchNorm sees only this worker's rows, so gradients
                depend on the number of workers, and it refuses a single row.
            bias: whether the linear layers have one.

        Raises:
            ValueError: a width < 1, fewer than two layers, or an unknown norm.
        """
        if min(width, hidden, out) < 1:
            raise ValueError(f"head widths must be >= 1, got {width}, {hidden} and {out}")
        if num_layers < 2:
            raise ValueError(f"a head needs num_layers >= 2, got {num_layers}")
        if norm not in ("layer", "batch"):
            raise ValueError(f"norm must be 'layer' or 'batch', got {norm!r}")
        layers: list[nn.Module] = []
        for number in range(num_layers - 1):
            normalise = nn.LayerNorm(hidden) if norm == "layer" else nn.BatchNorm1d(hidden)
            layers += [nn.Linear(hidden if number else width, hidden, bias=bias), normalise, nn.ReLU()]
        super().__init__(*layers, nn.Linear(hidden, out, bias=bias))


class SimCLRProjector(Projector):
    """Three layers with biases, as in SLIP, arXiv 2112.12750 (768-4096-4096-256)."""

    def __init__(self, width: int, *, hidden: int, out: int, norm: Norm = "layer") -> None:
        super().__init__(width, hidden=hidden, out=out, num_layers=3, norm=norm, bias=True)


class Predictor(Projector):
    """BYOL's predictor: two layers without biases back to the input width (256-4096-256)."""

    def __init__(self, width: int, *, hidden: int, norm: Norm = "layer") -> None:
        super().__init__(width, hidden=hidden, out=width, norm=norm)


def simclr_rows(a_BD: Tensor, b_BD: Tensor, *, gather: Gather, temperature: float = 0.1) -> Tensor:
    """SimCLR between two views: each row finds its other view among all rows of both views but itself.

    Args:
        a_BD: projections of view 1 on this worker; brought to unit length here.
        b_BD: projections of view 2. Passing `a_BD` twice is what A-CLIP's release does (a weak uniformity
            penalty on view 1); the paper means two views.
        gather: collects the other workers' rows; every worker must hold B rows.
        temperature: of the cosines, > 0.

    Returns:
        [B] in nats, mean over both views; log(2N - 1) when all projections are equal. The mean over the
        rows of all workers is the loss of the global batch.

    Raises:
        ValueError: temperature <= 0, views of different shapes, or a global batch of one pair.

    Source: SimCLR, arXiv 2002.05709, as in SLIP, arXiv 2112.12750.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be > 0, got {temperature}")
    if a_BD.shape != b_BD.shape:
        raise ValueError(f"views must have equal shapes, got {tuple(a_BD.shape)} and {tuple(b_BD.shape)}")
    if len(a_BD) * gather.world < 2:
        raise ValueError(f"SimCLR needs a global batch of at least 2 pairs, got {len(a_BD)}")
    a, b = F.normalize(a_BD, dim=1), F.normalize(b_BD, dim=1)
    all_a, all_b = gather(a), gather(b)
    own_B = own_columns(gather, len(a), a.device)
    rows_a = _one_view_rows(a, all_same=all_a, all_other=all_b, own_B=own_B, temperature=temperature)
    rows_b = _one_view_rows(b, all_same=all_b, all_other=all_a, own_B=own_B, temperature=temperature)
    return 0.5 * (rows_a + rows_b)


def simclr_loss(a_BD: Tensor, b_BD: Tensor, *, temperature: float = 0.1) -> Tensor:
    """Mean of `simclr_rows` in one process, scalar in nats."""
    return simclr_rows(a_BD, b_BD, gather=SingleProcess(), temperature=temperature).mean()


def _one_view_rows(
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
            f"prediction and target must have equal shapes, got {tuple(prediction_BD.shape)} "
            f"and {tuple(target_BD.shape)}"
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
