"""Learned score of an image feature and a text feature: a small network on both, in place of the cosine."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.outputs import at_least_float32

# B local images, N texts of all workers, P regions of an image, D joint width, H width of the first layer,
# R regions of a chunk


class ConcatCritic(nn.Module):
    """f(v, u): an image feature v and a text feature u, concatenated, through two ReLU layers to a number.

    The first layer is linear in the concatenation, so W [v; u] = W_v v + W_u u: each feature is projected
    once and only sums are formed per pair. Scores are unnormalised logits; no temperature, no unit length.

    Source: Liao et al., arXiv 2103.04537 (768 + 768 - 1024 - 512 - 1); computed as above, which is the same
        function with the same parameters.
    """

    def __init__(self, width: int, *, hidden: tuple[int, int] = (1024, 512)) -> None:
        """
        Args:
            width: D, of image and text features alike.
            hidden: widths of the two hidden layers.

        Raises:
            ValueError: a width < 1.
        """
        super().__init__()
        if min(width, *hidden) < 1:
            raise ValueError(f"critic widths must be >= 1, got {width}, {hidden[0]} and {hidden[1]}")
        self.width = width
        self.first = nn.Linear(2 * width, hidden[0])
        self.second = nn.Linear(hidden[0], hidden[1])
        self.last = nn.Linear(hidden[1], 1)

    def scores(self, images_BD: Tensor, texts_ND: Tensor) -> Tensor:
        """Score of every image with every text, [B, N], float32 at least.

        Raises:
            ValueError: a feature is not [rows, width].
        """
        _check("images", images_BD, shape=("B", self.width))
        _check("texts", texts_ND, shape=("N", self.width))
        return self._from_sums(self._image_part(images_BD)[:, None] + self._text_part(texts_ND))

    def region_scores(self, regions_BPD: Tensor, texts_ND: Tensor) -> Tensor:
        """Score of every region with every text, [B, P, N], float32 at least.

        Backward keeps B * P * N hidden vectors. `max_scores` keeps B * N; `region_scores_in_chunks` none.

        Raises:
            ValueError: regions are not [B, P, width] or texts not [N, width].
        """
        _check("regions", regions_BPD, shape=("B", "P", self.width))
        _check("texts", texts_ND, shape=("N", self.width))
        return self._from_sums(self._image_part(regions_BPD)[:, :, None] + self._text_part(texts_ND))

    @torch.no_grad()
    def region_scores_in_chunks(
        self, regions_BPD: Tensor, texts_ND: Tensor, *, rows_per_chunk: int = 64
    ) -> Tensor:
        """`region_scores` without gradient, for choosing regions: [B, P, N] in bounded memory.

        Args:
            regions_BPD: [B, P, D].
            texts_ND: [N, D].
            rows_per_chunk: regions scored against all texts at once; at most rows_per_chunk * N hidden
                vectors exist at a time (64 regions, 512 texts, 1024 + 512 units: 0.2 GB in float32).

        Raises:
            ValueError: rows_per_chunk < 1, regions not [B, P, width] or texts not [N, width].
        """
        _check("regions", regions_BPD, shape=("B", "P", self.width))
        _check("texts", texts_ND, shape=("N", self.width))
        if rows_per_chunk < 1:
            raise ValueError(f"rows_per_chunk must be >= 1, got {rows_per_chunk}")
        text_part_NH = self._text_part(texts_ND)
        image_part_RH = self._image_part(regions_BPD).flatten(0, 1)
        chunks = [
            self._from_sums(part_RH[:, None] + text_part_NH)
            for part_RH in torch.split(image_part_RH, rows_per_chunk)
        ]
        return torch.cat(chunks).reshape(*regions_BPD.shape[:2], len(texts_ND))

    def max_scores(self, regions_BPD: Tensor, texts_ND: Tensor, *, rows_per_chunk: int = 64) -> Tensor:
        """Score of every text with its best region of every image, [B, N].

        Value and gradient of `region_scores(...).amax(1)` in two passes: the best regions are found without
        gradient, chunk by chunk, and only they are scored again with gradient, so backward keeps B * N
        hidden vectors in place of B * P * N. When regions tie exactly, the first takes the whole gradient,
        where `amax` would share it.

        Args and errors: as `region_scores_in_chunks`.
        """
        best_BN = self.region_scores_in_chunks(regions_BPD, texts_ND, rows_per_chunk=rows_per_chunk).argmax(1)
        rows_B1 = torch.arange(len(regions_BPD), device=regions_BPD.device)[:, None]
        # Indexing, not gather: its backward adds in a fixed order on a GPU.
        winners_BNH = self._image_part(regions_BPD)[rows_B1, best_BN]
        return self._from_sums(winners_BNH + self._text_part(texts_ND))

    def _image_part(self, features: Tensor) -> Tensor:
        return F.linear(at_least_float32(features), self.first.weight[:, : self.width])

    def _text_part(self, features: Tensor) -> Tensor:
        return F.linear(at_least_float32(features), self.first.weight[:, self.width :], self.first.bias)

    def _from_sums(self, sums: Tensor) -> Tensor:
        """Scores [...] from first-layer outputs [..., H], which are overwritten: they are the memory."""
        hidden = self.second(F.relu(sums, inplace=True))
        scores: Tensor = self.last(F.relu(hidden, inplace=True))[..., 0]
        return scores


def _check(name: str, features: Tensor, *, shape: tuple[str | int, ...]) -> None:
    if features.ndim != len(shape) or features.shape[-1] != shape[-1]:
        wanted = ", ".join(str(part) for part in shape)
        raise ValueError(f"the critic takes {name} of shape [{wanted}], got {list(features.shape)}")
