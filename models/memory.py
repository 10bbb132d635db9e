"""Candidates from earlier batches: a queue of features, and a memory of every training row.

Both are buffers, so they are in the checkpoint, and both are updated from the features of all workers
in global row order: every worker then holds the same state, on any number of workers.

B rows of this worker, N rows of all workers, K candidates, D width.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.outputs import at_least_float32
from models.pair_table import PairTable

Side = Literal["image", "text"]


class FeatureQueue(nn.Module):
    """The last `size` features, oldest overwritten first.

    Source: MoCo, arXiv 1911.05722, which starts from random rows and needs a batch that divides the
        size; here the rows not yet pushed are no candidates, and any batch fits.
    """

    rows: Tensor
    position: Tensor
    num_filled: Tensor

    def __init__(self, size: int, width: int) -> None:
        """Raises ValueError if the size or the width is < 1."""
        if min(size, width) < 1:
            raise ValueError(f"a queue needs a size and a width >= 1, got {size} and {width}")
        super().__init__()
        self.register_buffer("rows", torch.zeros(size, width))
        self.register_buffer("position", torch.zeros((), dtype=torch.int64))
        self.register_buffer("num_filled", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def push_(self, rows_ND: Tensor) -> None:
        """Append unit rows; call it with the rows of all workers, after the optimiser's step.

        Of more rows than the queue holds, the last ones stay, as if they were pushed one by one.

        Raises:
            ValueError: the width differs.
        """
        size, width = self.rows.shape
        if rows_ND.ndim != 2 or rows_ND.shape[1] != width:
            raise ValueError(f"a queue of width {width} takes [N, {width}], got {tuple(rows_ND.shape)}")
        kept = rows_ND[-size:]
        first = self.position + (len(rows_ND) - len(kept))
        places = (first + torch.arange(len(kept), device=self.rows.device)) % size
        self.rows.index_copy_(0, places, kept.to(self.rows))
        self.position.copy_((self.position + len(rows_ND)) % size)
        self.num_filled.copy_((self.num_filled + len(rows_ND)).clamp(max=size))

    def candidates(self) -> tuple[Tensor, Tensor]:
        """Rows [K, D] and whether each was ever pushed, bool [K]; no later push changes them."""
        places_K = torch.arange(len(self.rows), device=self.rows.device)
        return self.rows.clone(), places_K < self.num_filled


class MemoryBank(nn.Module):
    """A slowly moving unit feature of each modality for every training row.

    Takes 8 * num_rows * width bytes in float32.

    Source: CMC, arXiv 1906.05849, after arXiv 1805.01978. The release starts from uniform rows that are
        not of unit length; ours are.
    """

    images: Tensor
    texts: Tensor
    image_log_normaliser: Tensor
    text_log_normaliser: Tensor

    def __init__(
        self,
        num_rows: int,
        width: int,
        *,
        momentum: float = 0.5,
        normaliser_decay: float = 1.0,
        seed: int = 0,
    ) -> None:
        """
        Args:
            num_rows: of the training split.
            width: of the features.
            momentum: share of the old feature that stays, in [0, 1].
            normaliser_decay: 1 freezes the constants of binary NCE at their first estimate, as
                published; below, they follow the later ones (0.99 has been proposed, because the first
                batch alone can be far off).
            seed: of the rows; every worker needs the same.

        Raises:
            ValueError: a count < 1, momentum outside [0, 1], or normaliser_decay outside (0, 1].
        """
        if min(num_rows, width) < 1:
            raise ValueError(f"a memory needs num_rows and a width >= 1, got {num_rows} and {width}")
        if not 0.0 <= momentum <= 1.0:
            raise ValueError(f"momentum must be in [0, 1], got {momentum}")
        if not 0.0 < normaliser_decay <= 1.0:
            raise ValueError(f"normaliser_decay must be in (0, 1], got {normaliser_decay}")
        super().__init__()
        self.num_rows, self.momentum, self.normaliser_decay = num_rows, momentum, normaliser_decay
        generator = torch.Generator().manual_seed(seed)
        for side in ("images", "texts"):
            self.register_buffer(side, F.normalize(torch.randn(num_rows, width, generator=generator), dim=1))
        for side in ("image", "text"):
            self.register_buffer(f"{side}_log_normaliser", torch.full((), torch.nan))

    def draw(self, index_BK: Tensor) -> tuple[Tensor, Tensor]:
        """Image and text features of rows, each a copy of shape [..., D]."""
        return self.images[index_BK], self.texts[index_BK]

    def noise_indices(self, uniform_BK: Tensor) -> Tensor:
        """Rows from uniform numbers in [0, 1), int64 [B, K]: with replacement, own row possible, as released.

        Float32 noise of 24 bits reaches 2^24 different rows at most.
        """
        return (uniform_BK.double() * self.num_rows).long()

    @torch.no_grad()
    def update_(self, row_index_N: Tensor, images_ND: Tensor, texts_ND: Tensor) -> None:
        """memory <- unit(momentum * memory + (1 - momentum) * feature) at the rows of a global batch.

        Call it with the rows of all workers, after the optimiser's step. Of a row that occurs twice the
        last occurrence counts, mixed with the memory from before the call.

        Args:
            row_index_N: int64, in [0, num_rows).
            images_ND, texts_ND: unit features.
        """
        last_N = last_occurrence(row_index_N)
        for memory, features_ND in ((self.images, images_ND), (self.texts, texts_ND)):
            new_ND = features_ND[last_N].to(memory)
            mixed_ND = self.momentum * memory[row_index_N] + (1.0 - self.momentum) * new_ND
            # Equal rows are written with equal values, so the order of writing does not matter.
            memory[row_index_N] = F.normalize(mixed_ND, dim=1)

    @torch.no_grad()
    def log_normaliser_(self, side: Side, estimate: Tensor) -> Tensor:
        """Take in this batch's `log_normaliser` and return the constant to use, log Z, scalar.

        Args:
            side: of the queries; each direction has its own constant.
            estimate: from the rows of all workers.
        """
        stored = self.image_log_normaliser if side == "image" else self.text_log_normaliser
        decay = self.normaliser_decay
        moved = stored
        if decay < 1:
            moved = torch.logaddexp(stored + math.log(decay), estimate + math.log1p(-decay))
        stored.copy_(torch.where(stored.isnan(), estimate, moved))
        return stored.clone()


def last_occurrence(index_N: Tensor) -> Tensor:
    """Position of the last entry equal to each entry, int64 [N]."""
    ordered = index_N.sort(stable=True)
    last_in_order = torch.searchsorted(ordered.values, index_N.contiguous(), right=True) - 1
    return ordered.indices[last_in_order]


def log_normaliser(row_logsumexp_N: Tensor, *, num_columns: int, num_rows: int) -> Tensor:
    """log Z of binary NCE, Z = num_rows * mean exp(score) over all scores of a global batch; scalar.

    Args:
        row_logsumexp_N: log-sum-exp of each query's scores, of all workers.
        num_columns: scores of each query, its own included.
        num_rows: of the memory.
    """
    num_scores = len(row_logsumexp_N) * num_columns
    return row_logsumexp_N.detach().logsumexp(0) + math.log(num_rows / num_scores)


def noise_contrastive_shift(log_z: Tensor, *, num_noise: int, num_rows: int) -> Tensor:
    """The score at which data and noise are equally likely: log Z + log(K / num_rows), scalar.

    Binary NCE with P = exp(s) / Z, -log P0 / (P0 + K/n) - sum_k log (K/n) / (P_k + K/n), is
    softplus(-(s_0 - shift)) + sum_k softplus(s_k - shift).

    Source: CMC, arXiv 1906.05849. The release adds 1e-7 to both denominators.
    """
    return log_z + math.log(num_noise / num_rows)


def queue_table(
    queries_BD: Tensor,
    own_keys_BD: Tensor,
    queue_KD: Tensor,
    *,
    is_filled_K: Tensor,
    inverse_temperature: float | Tensor,
) -> PairTable:
    """Queries against their own key, column 0, and a queue.

    Args:
        queries_BD: unit.
        own_keys_BD: unit features of the queries' own pairs.
        queue_KD, is_filled_K: `FeatureQueue.candidates`.
        inverse_temperature: 1 / temperature.
    """
    queries = at_least_float32(queries_BD)
    own_B = (queries * own_keys_BD.to(queries)).sum(1)
    others_BK = queries @ queue_KD.to(queries).T
    is_valid_BC = F.pad(is_filled_K, (1, 0), value=True).expand(len(queries), -1)
    return _own_first(own_B, others_BK, inverse_temperature, is_valid=is_valid_BC)


def memory_table(
    queries_BD: Tensor,
    own_memory_BD: Tensor,
    noise_memory_BKD: Tensor,
    *,
    inverse_temperature: float | Tensor,
) -> PairTable:
    """Queries against the other modality's memory: the own row in column 0, then draws.

    Args:
        queries_BD: unit.
        own_memory_BD, noise_memory_BKD: `MemoryBank.draw` of the other modality. B * K * D numbers: at
            K = 4096 and D = 512 it takes 8 MiB a query.
        inverse_temperature: 1 / temperature.
    """
    queries = at_least_float32(queries_BD)
    own_B = (queries * own_memory_BD.to(queries)).sum(1)
    others_BK = torch.einsum("bd,bkd->bk", queries, noise_memory_BKD.to(queries))
    return _own_first(own_B, others_BK, inverse_temperature, is_valid=None)


def _own_first(
    own_B: Tensor, others_BK: Tensor, inverse_temperature: float | Tensor, *, is_valid: Tensor | None
) -> PairTable:
    scores_BC = torch.cat([own_B[:, None], others_BK], 1) * inverse_temperature
    positive_B = torch.zeros(len(own_B), dtype=torch.int64, device=own_B.device)
    return PairTable(scores_BC, positive_B, is_valid=is_valid)
