"""A report as a bag of sentences: scores of an image with each become one score.

Shape letters: B local images, N reports of all workers, M sentences.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from models.outputs import at_least_float32


def pool_sentences(
    scores_BNM: Tensor,
    is_sentence_NM: Tensor,
    *,
    kind: Literal["mean", "sum", "max", "lse"],
    sharpness: float = 1.0,
) -> Tensor:
    """One score per image and report from the scores of the report's sentences.

    Args:
        scores_BNM: scores of images with sentences, pads included.
        is_sentence_NM: False at padding, bool; every report has a sentence. A pad changes no value and
            gets a gradient of exactly 0, whatever it holds.
        kind: `mean`, `sum`, `max`, or `lse`, log-mean-exp over the report's own sentences.
        sharpness: > 0, of `lse` alone; towards 0 it is the mean, towards infinity the maximum.

    Returns:
        [B, N].

    Raises:
        ValueError: another kind, sharpness <= 0, or a mask of another shape.

    Source: Wang et al., arXiv 2212.05561. `sum` grows with the number of sentences; saying each of them
        twice changes none of the others.
    """
    if is_sentence_NM.shape != scores_BNM.shape[1:]:
        raise ValueError(
            f"is_sentence must be [N, M] = {tuple(scores_BNM.shape[1:])}, got {tuple(is_sentence_NM.shape)}"
        )
    if not sharpness > 0:
        raise ValueError(f"sharpness must be > 0, got {sharpness}")
    scores_BNM = at_least_float32(scores_BNM)
    count_N = is_sentence_NM.sum(1).to(scores_BNM.dtype)
    if kind in ("mean", "sum"):
        total_BN = scores_BNM.masked_fill(~is_sentence_NM, 0.0).sum(2)
        return total_BN / count_N if kind == "mean" else total_BN
    scores_BNM = scores_BNM.masked_fill(~is_sentence_NM, -torch.inf)
    if kind == "max":
        return scores_BNM.amax(2)
    if kind == "lse":
        return ((sharpness * scores_BNM).logsumexp(2) - count_N.log()) / sharpness
    raise ValueError(f"kind must be mean, sum, max or lse, got {kind}")
