"""Both embeddings of every training pair by one encoder: images whole, text 0, nothing drawn.

What clustering between epochs starts from. Here the workers embed, each its own share of the rows;
`stream_embed.py` leaves it to a pass of Ray Data.

n rows at hand, N rows of the training split, D joint width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from models.encoder import Encoder
from models.gather import Gather, ProcessGroupGather
from pipelines.collate import BatchSettings, first_texts
from pipelines.feed import load_rows
from pipelines.pair_rows import PairRows
from pipelines.prepared import Prepared
from pipelines.train_step import autocast

# Rows that pass the towers together; no gradient is kept, so many fit.
ROWS_PER_BATCH = 256


@dataclass(frozen=True)
class EmbedSettings:
    """How pairs become embeddings; the same wherever it happens.

    Attributes:
        batch: says what a text is.
        precision: `fp32` or `bf16`, of the towers.
    """

    batch: BatchSettings
    precision: str


class EmbedSplit(Protocol):
    """Embeds the training split; every worker calls it."""

    def __call__(self, encoder: Encoder) -> Tensor | None:
        """Unit image and text embeddings, [2, N, D] in the order of `row_index`, on the encoder's device;
        on rank 0 only, the other workers get None."""
        ...


@torch.no_grad()
def embed_pairs(
    encoder: Encoder, rows: PairRows, index: NDArray[np.int64], settings: EmbedSettings
) -> Tensor:
    """Unit embeddings of the images and first texts at `index`, [2, n, D] on the encoder's device."""
    device = next(encoder.parameters()).device
    found = []
    for first in range(0, len(index), ROWS_PER_BATCH):
        taken = rows.take(index[first : first + ROWS_PER_BATCH])
        pixels = torch.from_numpy(taken.images).to(device).permute(0, 3, 1, 2).float()
        ids, is_real = (texts.to(device) for texts in first_texts(taken, settings.batch))
        with autocast(device, settings.precision):
            images = encoder.embed_images(pixels)[0]
            texts = encoder.embed_texts(ids, is_real)[0]
            texts = encoder.embed_reports(texts[None], is_real[None, :, 0])[0]
        found.append(torch.stack([images, texts.to(images)]))
    return torch.cat(found, 1)


@dataclass(frozen=True)
class WorkerEmbed:
    """Each worker embeds a contiguous share of the rows on its own device.

    Attributes:
        holds_split: the split stays mapped or in memory, as in `MemoryFeed`; otherwise shards are read
            one by one.
    """

    prepared_uri: str
    settings: EmbedSettings
    gather: Gather
    holds_split: bool = True

    def __call__(self, encoder: Encoder) -> Tensor | None:
        num_rows = Prepared.open(self.prepared_uri).num_rows("train")
        size = -(-num_rows // self.gather.world)
        first, last = (min(num_rows, size * place) for place in (self.gather.rank, self.gather.rank + 1))
        # A share may be empty.
        parts = [next(encoder.parameters()).new_empty(2, 0, encoder.width)]
        parts += [embed_pairs(encoder, *piece, self.settings) for piece in self._pieces(first, last)]
        shares = self._to_first(torch.cat(parts, 1), size)
        # Only the last shares are short, so what pads them is all at the end.
        return None if shares is None else torch.cat(shares, 1)[:, :num_rows]

    def _pieces(self, first: int, last: int) -> Iterator[tuple[PairRows, NDArray[np.int64]]]:
        """Rows in memory and which of them are wanted, from position `first` to before `last`."""
        if self.holds_split:
            if first < last:
                yield load_rows(self.prepared_uri, "train"), np.arange(first, last)
            return
        prepared, start = Prepared.open(self.prepared_uri), 0
        for number, shard in enumerate(prepared.manifest["splits"]["train"]["shards"]):
            index = np.arange(max(first - start, 0), min(last - start, shard["rows"]))
            if len(index):
                yield PairRows(prepared.shard("train", number), prepared.image_size), index
            start += shard["rows"]

    def _to_first(self, share: Tensor, size: int) -> list[Tensor] | None:
        """Everybody's share on rank 0, filled up to `size` rows; None on the others."""
        if not isinstance(self.gather, ProcessGroupGather) or self.gather.world == 1:
            return [share]
        filled = torch.nn.functional.pad(share, (0, 0, 0, size - share.shape[1])).contiguous()
        is_first = self.gather.rank == 0
        shares = [torch.empty_like(filled) for _ in range(self.gather.world)] if is_first else None
        dist.gather(filled, shares, group=self.gather.group, group_dst=0)
        return shares
