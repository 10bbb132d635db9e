"""All-gather that carries exact gradients.

Every rank computes the same global loss from gathered values, and data parallelism averages the
parameter gradients over ranks. For that average to equal the gradient of one process on the whole
batch, the backward of a gather must sum what every rank sent back for a row (a gather that stops the
gradient gives 1/W of it, one that keeps only the local copy gives a wrong direction).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor


class Gather(Protocol):
    """Collects a per-worker tensor from every worker, in rank order."""

    @property
    def rank(self) -> int: ...

    @property
    def world(self) -> int: ...

    def __call__(self, local: Tensor) -> Tensor:
        """[b, ...] of this worker -> [W * b, ...]; b must be the same on all workers."""
        ...


@dataclass(frozen=True)
class SingleProcess:
    """The gather of one worker: nothing to collect."""

    rank: int = 0
    world: int = 1

    def __call__(self, local: Tensor) -> Tensor:
        return local


@dataclass(frozen=True)
class ProcessGroupGather:
    """Gathers over a torch.distributed process group; see the module docstring."""

    group: dist.ProcessGroup | None = None

    @property
    def rank(self) -> int:
        return dist.get_rank(self.group)

    @property
    def world(self) -> int:
        return dist.get_world_size(self.group)

    def __call__(self, local: Tensor) -> Tensor:
        if self.world == 1:
            return local
        if local.dtype == torch.bool:  # gloo gathers no truth values
            return self(local.to(torch.uint8)).bool()
        gathered: Tensor = _AllGather.apply(local.contiguous(), self.group)  # type: ignore[no-untyped-call]
        return gathered


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, local: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.group = group
        ctx.rows = local.shape[0]
        parts = [torch.empty_like(local) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, local, group=group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        total = gradient.contiguous().clone()
        dist.all_reduce(total, group=ctx.group)
        start = dist.get_rank(ctx.group) * ctx.rows
        return total[start : start + ctx.rows], None


def own_columns(gather: Gather, num_rows: int, device: torch.device) -> Tensor:
    """Column of each local row's own pair in a gathered table, int64 [num_rows]."""
    return torch.arange(num_rows, device=device) + gather.rank * num_rows
