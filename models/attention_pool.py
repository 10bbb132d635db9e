"""Pooling by attention: the mean of the tokens asks which of them count.

Shape letters: B pairs, K tokens (regions or sentences), D width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.outputs import at_least_float32


def masked_mean(tokens_BKD: Tensor, is_real_BK: Tensor) -> Tensor:
    """Mean of the real tokens, [B, D]; 0 where there are none. Pads may hold anything."""
    total_BD = tokens_BKD.masked_fill(~is_real_BK[:, :, None], 0.0).sum(1)
    return total_BD / is_real_BK.sum(1, keepdim=True).clamp_min(1)


class AttentionPool(nn.Module):
    """Multi-head attention over the tokens with their mean as the only query.

    Source: LoVT, arXiv 2112.02889 (8 heads). The release divides the masked sum by the padded length, so its
    query shrinks with padding; here it is the mean of the real tokens.
    """

    def __init__(self, width: int, num_heads: int) -> None:
        """Keys, queries and values as torch's multi-head attention has them, with biases.

        Args:
            width: D of the tokens and of the pooled feature.
            num_heads: must divide the width.

        Raises:
            ValueError: num_heads < 1, or it does not divide the width.
        """
        super().__init__()
        if num_heads < 1 or width < 1 or width % num_heads:
            raise ValueError(f"num_heads must be >= 1 and divide the width {width}, got {num_heads}")
        self.attention = nn.MultiheadAttention(width, num_heads, batch_first=True)

    def forward(self, tokens_BKD: Tensor, is_real_BK: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Pool in float32 at least, also under autocast.

        Args:
            tokens_BKD: features of each pair's tokens; those at pads may hold anything.
            is_real_BK: False at pads; None means all are real.

        Returns:
            pooled [B, D], and the attention averaged over heads [B, K]: 0 at pads and 1 in sum (0 for a pair
            without a real token). It carries gradient; as the weight of a local loss it is to be detached.

        Raises:
            ValueError: shapes that do not fit.
        """
        if is_real_BK is None:
            is_real_BK = torch.ones(tokens_BKD.shape[:2], dtype=torch.bool, device=tokens_BKD.device)
        if tokens_BKD.ndim != 3 or is_real_BK.shape != tokens_BKD.shape[:2]:
            raise ValueError(
                f"need tokens [B, K, D] and is_real [B, K], got {list(tokens_BKD.shape)} "
                f"and {list(is_real_BK.shape)}"
            )
        with torch.autocast(device_type=tokens_BKD.device.type, enabled=False):
            tokens_BKD = at_least_float32(tokens_BKD).masked_fill(~is_real_BK[:, :, None], 0.0)
            query_B1D = masked_mean(tokens_BKD, is_real_BK)[:, None]
            # a softmax over nothing is nan: a pair without tokens attends to its zeros instead
            is_ignored_BK = ~is_real_BK & is_real_BK.any(1, keepdim=True)
            pooled_B1D, weights_B1K = self.attention(
                query_B1D, tokens_BKD, tokens_BKD, key_padding_mask=is_ignored_BK
            )
        return pooled_B1D[:, 0], weights_B1K[:, 0].masked_fill(~is_real_BK, 0.0)
