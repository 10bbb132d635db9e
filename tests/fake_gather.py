"""Several workers in one process: a thread each, and a gather that keeps one graph over all of them.

Gathered tensors are concatenated as they are, so a loss of one worker reaches the leaves of every worker,
and the mean of all workers' losses has the gradient that data parallelism would average.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from threading import Barrier
from typing import TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")

_TIMEOUT_S = 60.0


@dataclass
class _Meeting:
    """Where workers leave what the others take."""

    world: int
    parts: dict[int, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.barrier = Barrier(self.world, timeout=_TIMEOUT_S)


@dataclass(frozen=True)
class ThreadGather:
    """The gather of one of several workers; as strict about shapes and types as a process group."""

    rank: int
    world: int
    meeting: _Meeting

    def __call__(self, local: Tensor) -> Tensor:
        self.meeting.parts[self.rank] = local
        self.meeting.barrier.wait()
        parts = [self.meeting.parts[rank] for rank in range(self.world)]
        self.meeting.barrier.wait()
        assert len({(part.shape, part.dtype) for part in parts}) == 1, "workers gather different things"
        return torch.cat(parts)


def run_workers(world: int, work: Callable[[ThreadGather], Result]) -> list[Result]:
    """What `work` returns on every worker, in rank order."""
    meeting = _Meeting(world)

    def run(rank: int) -> Result:
        is_done = False
        try:
            result = work(ThreadGather(rank, world, meeting))
            is_done = True
        finally:
            if not is_done:
                meeting.barrier.abort()  # the others must not wait for this one
        return result

    with ThreadPoolExecutor(world) as pool:
        return list(pool.map(run, range(world)))
