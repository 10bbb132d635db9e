"""LoVT's cross-attention between the regions of an image and the sentences of its report.

Shape letters: B pairs, P regions, M sentences, D width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.heads import Norm
from models.outputs import at_least_float32


@dataclass(frozen=True)
class CrossAttended:
    """What each side found in the other.

    Attributes:
        regions_at_sentences: the regions each sentence attended to, projected and normalised, [B, M, D].
        sentences_at_regions: the sentences each region attended to, [B, P, D].
        over_regions: attention of each sentence, [B, M, P]; rows sum to 1, those of pads are 0.
        over_sentences: attention of each region, [B, P, M]; rows sum to 1, columns of pads are 0.
    """

    regions_at_sentences: Tensor
    sentences_at_regions: Tensor
    over_regions: Tensor
    over_sentences: Tensor


def symmetric_attention(scores_BPM: Tensor, is_sentence_BM: Tensor) -> tuple[Tensor, Tensor]:
    """Both softmaxes of one score table.

    Args:
        scores_BPM: score of every region with every sentence.
        is_sentence_BM: False at pads, which nobody attends to and which attend to nothing.

    Returns:
        Attention of the regions over the sentences [B, P, M] and of the sentences over the regions
        [B, M, P]. Of a pair without any sentence both are 0.
    """
    takes_part_BM = is_sentence_BM | ~is_sentence_BM.any(1, keepdim=True)  # a softmax over nothing is nan
    over_sentences_BPM = scores_BPM.masked_fill(~takes_part_BM[:, None], -torch.inf).softmax(2)
    over_regions_BMP = scores_BPM.transpose(1, 2).softmax(2)
    return (
        over_sentences_BPM.masked_fill(~is_sentence_BM[:, None], 0.0),
        over_regions_BMP.masked_fill(~is_sentence_BM[:, :, None], 0.0),
    )


class SymmetricCrossAttention(nn.Module):
    """One attention read in both directions: key, value and output projections are shared by both sides.

    scores = K(z_region) K(z_sentence)^T / sqrt(D), attended = norm(O(softmax(scores) V(z of the other side)))

    Source: LoVT, arXiv 2112.02889. The release normalises with BatchNorm; LayerNorm is the default here,
    because batch statistics depend on the rows of one worker. There a pad's output is the norm of the output
    bias, not 0, and counts in the statistics of the real sentences: with norm="layer" pads are 0 and change
    nothing, norm="batch" repeats the release.
    """

    def __init__(self, width: int, *, norm: Norm = "layer") -> None:
        """Projections start as in the release: normal weights of variance 1 / D, zero biases.

        Args:
            width: D of both sides.
            norm: of the attended features, one for both directions: "layer", or "batch" for parity with
                the release (statistics over all positions of one direction and this worker).

        Raises:
            ValueError: width < 1 or an unknown norm.
        """
        super().__init__()
        if width < 1:
            raise ValueError(f"width must be >= 1, got {width}")
        if norm not in ("layer", "batch"):
            raise ValueError(f"norm must be 'layer' or 'batch', got {norm!r}")
        self.key, self.value, self.output = (nn.Linear(width, width) for _ in range(3))
        for projection in (self.key, self.value, self.output):
            nn.init.normal_(projection.weight, std=1.0 / math.sqrt(width))
            nn.init.zeros_(projection.bias)
        self.norm = nn.LayerNorm(width) if norm == "layer" else nn.BatchNorm1d(width)

    def forward(self, regions_BPD: Tensor, sentences_BMD: Tensor, is_sentence_BM: Tensor) -> CrossAttended:
        """Attend in both directions, in float32 at least, also under autocast.

        Args:
            regions_BPD: region features of each image.
            sentences_BMD: sentence features of its report; those at pads may hold anything.
            is_sentence_BM: False at pads.

        Raises:
            ValueError: shapes that do not fit.
        """
        _check_shapes(regions_BPD, sentences_BMD, is_sentence_BM)
        with torch.autocast(device_type=regions_BPD.device.type, enabled=False):
            regions_BPD = at_least_float32(regions_BPD)
            is_pad_BM1 = ~is_sentence_BM[:, :, None]
            sentences_BMD = at_least_float32(sentences_BMD).masked_fill(is_pad_BM1, 0.0)
            scores_BPM = self.key(regions_BPD) @ self.key(sentences_BMD).transpose(1, 2)
            over_sentences_BPM, over_regions_BMP = symmetric_attention(
                scores_BPM / math.sqrt(regions_BPD.shape[2]), is_sentence_BM
            )
            sentences_at_regions_BPD = self._project(over_sentences_BPM @ self.value(sentences_BMD))
            regions_at_sentences_BMD = self._project(over_regions_BMP @ self.value(regions_BPD))
        if isinstance(self.norm, nn.LayerNorm):
            regions_at_sentences_BMD = regions_at_sentences_BMD.masked_fill(is_pad_BM1, 0.0)
        return CrossAttended(
            regions_at_sentences=regions_at_sentences_BMD,
            sentences_at_regions=sentences_at_regions_BPD,
            over_regions=over_regions_BMP,
            over_sentences=over_sentences_BPM,
        )

    def _project(self, attended: Tensor) -> Tensor:
        # BatchNorm1d counts positions as rows only when they are rows
        projected: Tensor = self.norm(self.output(attended).flatten(0, 1))
        return projected.view_as(attended)


def _check_shapes(regions_BPD: Tensor, sentences_BMD: Tensor, is_sentence_BM: Tensor) -> None:
    fits = (
        regions_BPD.ndim == sentences_BMD.ndim == 3
        and regions_BPD.shape[0] == sentences_BMD.shape[0]
        and regions_BPD.shape[2] == sentences_BMD.shape[2]
    )
    if not fits:
        raise ValueError(
            f"need regions [B, P, D] and sentences [B, M, D], got {list(regions_BPD.shape)} "
            f"and {list(sentences_BMD.shape)}"
        )
    if is_sentence_BM.shape != sentences_BMD.shape[:2]:
        raise ValueError(
            f"is_sentence must have shape {list(sentences_BMD.shape[:2])}, got {list(is_sentence_BM.shape)}"
        )
