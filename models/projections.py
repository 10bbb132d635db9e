"""Non-linear projections of tower features into the joint space, before they are brought to unit length.

Both act on the last dimension, so pooled features and regions take the same module. B rows, D joint width.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn


class MLPProjection(nn.Module):
    """Linear, ReLU, linear, with an optional LayerNorm before the ReLU.

    Source: ConVIRT, arXiv 2010.00747, with `norm="none"` (512 units, 512 out). `norm="layer"` is the shape of
        BioViL's, arXiv 2204.09817 (128, 128), which has BatchNorm on the image side and GELU then LayerNorm
        on the text side; here both sides take LayerNorm then ReLU, which no batch statistics enter.
    """

    def __init__(
        self, width: int, *, out: int, hidden: int | None = None, norm: Literal["none", "layer"] = "none"
    ) -> None:
        """
        Args:
            width: of the tower's features.
            out: width of the joint space.
            hidden: width between the two layers; None takes `out`.
            norm: "none", or "layer" for a LayerNorm of the hidden features.

        Raises:
            ValueError: a width < 1 or an unknown norm.
        """
        super().__init__()
        hidden = out if hidden is None else hidden
        if min(width, hidden, out) < 1:
            raise ValueError(f"projection widths must be >= 1, got {width}, {hidden} and {out}")
        if norm not in ("none", "layer"):
            raise ValueError(f"the norm of an MLP projection must be 'none' or 'layer', got {norm!r}")
        self.out_width = out
        self.first = nn.Linear(width, hidden)
        self.norm = nn.LayerNorm(hidden) if norm == "layer" else nn.Identity()
        self.second = nn.Linear(hidden, out)

    def forward(self, features: Tensor) -> Tensor:
        """[..., width] -> [..., out]."""
        projected: Tensor = self.second(self.norm(self.first(features)).relu())
        return projected


class MIBlock(nn.Module):
    """Deep InfoMax's fully connected block: LayerNorm(W2 relu(norm(W1 x)) + shortcut(x)).

    The shortcut starts as a noisy copy of its input: ones on the diagonal, U(-0.01, 0.01) elsewhere.

    Source: Deep InfoMax, arXiv 1808.06670, as CLIP-Lite, arXiv 2112.07133, uses it (2048 units). Deep InfoMax
        leaves the last LayerNorm off in this version of the block; the inner norm of both is BatchNorm.
    """

    def __init__(self, width: int, *, units: int, norm: Literal["layer", "batch"] = "layer") -> None:
        """
        Args:
            width: of the features.
            units: width of both inner layers and of the result, >= width.
            norm: inner normalisation: "layer", or "batch" as published. BatchNorm sees only this worker's
                rows, so gradients depend on the number of workers, and it refuses a single row.

        Raises:
            ValueError: width < 1, units < width, or an unknown norm.
        """
        super().__init__()
        if width < 1:
            raise ValueError(f"the width of an MI block must be >= 1, got {width}")
        if units < width:
            raise ValueError(
                f"an MI block copies its input through the shortcut and needs units >= width, "
                f"got units={units} and width={width}"
            )
        if norm not in ("layer", "batch"):
            raise ValueError(f"the norm of an MI block must be 'layer' or 'batch', got {norm!r}")
        self.out_width = units
        self.first = nn.Linear(width, units, bias=False)
        self.norm = nn.LayerNorm(units) if norm == "layer" else nn.BatchNorm1d(units)
        self.second = nn.Linear(units, units)
        self.shortcut = nn.Linear(width, units)
        self.out_norm = nn.LayerNorm(units)
        with torch.no_grad():
            self.shortcut.weight.uniform_(-0.01, 0.01).fill_diagonal_(1.0)

    def forward(self, features: Tensor) -> Tensor:
        """[..., width] -> [..., units]."""
        rows_BD = features.reshape(-1, features.shape[-1])  # BatchNorm wants features in the second dimension
        hidden = self.second(self.norm(self.first(rows_BD)).relu())
        out: Tensor = self.out_norm(hidden + self.shortcut(rows_BD))
        return out.reshape(*features.shape[:-1], self.out_width)
