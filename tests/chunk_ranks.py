"""Chunked rows under data parallelism: gradients of two real gloo ranks next to one process without chunks.

`python -m tests.chunk_ranks` prints the figures as JSON; tests/test_chunks.py reads them. The ranks are
forked before anything is computed.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
import tempfile
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from models.chunks import rows_in_chunks
from models.estimators import InfoLOOB
from models.gather import Gather, ProcessGroupGather, SingleProcess, own_columns
from models.pair_table import PairTable
from models.retrieval import hopfield_retrieval

WORLD, NUM_PAIRS, WIDTH = 2, 10, 6
TIMEOUT_S = 60


class Pair(nn.Module):
    """Two linear towers, retrieval, a learned critic inside the chunk, a learned temperature."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(shape, dtype=torch.float64, generator=generator))

        self.image, self.text = parameter(WIDTH, 4), parameter(WIDTH, 4)
        self.critic = parameter(4, 4)
        self.log_inverse_temperature = nn.Parameter(torch.tensor(1.0, dtype=torch.float64))

    def forward(self, pairs: Tensor, gather: Gather, rows_per_chunk: int | None) -> Tensor:
        """Loss of all workers' pairs from this worker's, [2, B, WIDTH]."""
        image, text = F.normalize(pairs[0] @ self.image, dim=1), F.normalize(pairs[1] @ self.text, dim=1)
        all_image = gather(image)
        image, text = (
            hopfield_retrieval(state, all_image, beta=4.0, rows_per_chunk=rows_per_chunk)
            for state in (image, text)
        )
        all_text, positive = gather(text), own_columns(gather, len(image), image.device)

        def rows_of(rows: slice) -> Tensor:
            scores = self.log_inverse_temperature.exp() * image[rows] @ self.critic @ all_text.T
            return InfoLOOB().rows(PairTable(scores, positive[rows]))

        return InfoLOOB().reduce(gather(rows_in_chunks(rows_of, len(image), rows_per_chunk)))


class _LocalGather(ProcessGroupGather):
    """The negative control: other workers' rows carry no gradient."""

    def __call__(self, local: Tensor) -> Tensor:
        parts = [torch.empty_like(local) for _ in range(self.world)]
        dist.all_gather(parts, local.detach().contiguous(), group=self.group)
        parts[self.rank] = local
        return torch.cat(parts)


def _all_pairs() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, NUM_PAIRS, WIDTH, dtype=torch.float64, generator=generator)


def _gradients(model: Pair) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def _of_ranks(gather: ProcessGroupGather) -> tuple[float, Tensor]:
    model, share = Pair(), NUM_PAIRS // WORLD
    mine = _all_pairs()[:, gather.rank * share : (gather.rank + 1) * share]
    parallel = DistributedDataParallel(model)  # held until the backward, which its hooks are for
    loss = parallel(mine, gather, 2)  # chunks of 2, 2 and 1 rows
    loss.backward()
    return loss.item(), _gradients(model)


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=WORLD,
        timeout=timedelta(seconds=TIMEOUT_S),
    )
    alone = Pair()
    loss = alone(_all_pairs(), SingleProcess(), None)
    loss.backward()
    expected = _gradients(alone)
    worker_loss, found = _of_ranks(ProcessGroupGather())
    _, local = _of_ranks(_LocalGather())
    figures = {
        "num_gradients": len(expected),
        "loss": abs(loss.item() - worker_loss),
        "gradient": float((found - expected).abs().max() / expected.abs().max()),
        "local_gradient": float((local - expected).abs().max() / expected.abs().max()),
    }
    dist.destroy_process_group()
    Path(folder, f"{rank}.json").write_text(json.dumps(figures))


def main() -> None:
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        ranks = [context.Process(target=_rank, args=(rank, folder)) for rank in range(WORLD)]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join(2 * TIMEOUT_S)
            if process.exitcode != 0:
                for other in ranks:
                    other.kill()
                raise RuntimeError(f"a rank ended with exit code {process.exitcode}")
        found = [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(WORLD)]
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
