"""Peak memory and time of a loss and its gradient with whole tables and in chunks.

Run: `OMP_NUM_THREADS=1 python -m tests.benchmarks.table_memory [--sizes 4096 16384 32768]`, on Linux. Every
point is a fresh process; float32, d = 512. Memory is the growth of the peak resident set from just before
the forward, so it includes the gradients of the features (2 N d x 4 bytes) and not the features. A whole
table is one per direction, as in training; where its memory, extrapolated from the size before, would not
fit the machine it is left out. `gradient difference` is that of the two gradients, largest entry over
largest entry; at the smallest size both are also compared with float64.

A piece of a table has 2^23 elements, 32 MiB: from there on glibc maps blocks one by one. Before its version
2.38 smaller ones are carved out of a heap that does not reuse them, which alone costs up to eight times the
memory in use (`MALLOC_MMAP_THRESHOLD_=1048576` in the environment shows what is in use).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from models.chunked_losses import chunked_cloob, chunked_info_loob, chunked_info_nce
from models.chunks import rows_per_chunk

LOSSES = ("ce", "loob", "cloob")
PIECE_ELEMENTS = 2**23
WIDTH, INVERSE_TEMPERATURE, BETA = 512, 30.0, 8.0
# Whole tables of both directions and what their backward adds, for the first size, where nothing is known.
TABLES_OF_FIRST_SIZE = 16
SHARE_OF_FREE_MEMORY = 0.75


@dataclass(frozen=True)
class Point:
    """One process to run; `rows` per chunk, None for whole tables."""

    loss: str
    num_pairs: int
    rows: int | None
    dtype: str = "float32"


@dataclass(frozen=True)
class Figures:
    wall_s: float
    cpu_s: float
    growth_mib: float
    loss: float


def features(num_pairs: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Unit images, and texts that resemble them."""
    generator = torch.Generator().manual_seed(0)
    image, noise = torch.randn(2, num_pairs, WIDTH, generator=generator)
    # float64 gets the very numbers of float32, so that what differs is the arithmetic
    return F.normalize(image, dim=1).to(dtype), F.normalize(image + 2 * noise, dim=1).to(dtype)


def loss_of(point: Point, image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    if point.loss == "cloob":
        return chunked_cloob(image, text, beta=BETA, inverse_temperature=scale, rows_per_chunk=point.rows)
    plain = {"ce": chunked_info_nce, "loob": chunked_info_loob}[point.loss]
    return plain(image, text, inverse_temperature=scale, rows_per_chunk=point.rows)


def gradients(point: Point) -> tuple[Figures, list[Tensor]]:
    """Forward and backward of one point in this process."""
    inputs = [*features(point.num_pairs, getattr(torch, point.dtype))]
    inputs.append(torch.tensor(INVERSE_TEMPERATURE, dtype=inputs[0].dtype))
    for value in inputs:
        value.requires_grad_()
    before = _memory_mib("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is resident now
    wall, cpu = time.perf_counter(), time.process_time()
    loss = loss_of(point, *inputs)
    loss.backward()  # type: ignore[no-untyped-call]
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    figures = Figures(wall, cpu, _memory_mib("VmHWM") - before, loss.item())
    return figures, [value.grad for value in inputs if value.grad is not None]


def _memory_mib(key: str, file: str = "/proc/self/status") -> float:
    line = next(line for line in Path(file).read_text().splitlines() if line.startswith(f"{key}:"))
    return int(line.split()[1]) / 1024


def run_point(point: Point, folder: Path) -> tuple[Figures, list[Tensor]]:
    """The same in a process of its own."""
    out = folder / "gradients.pt"
    done = subprocess.run(
        [sys.executable, "-m", __spec__.name, "--point", json.dumps(asdict(point)), "--out", str(out)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(f"{point} ended with exit code {done.returncode}: {done.stderr[-2000:]}")
    found = torch.load(out)
    out.unlink()
    return Figures(**json.loads(done.stdout)), found


def difference(found: list[Tensor], expected: list[Tensor]) -> float:
    return max(
        float((a.double() - b.double()).abs().max() / b.double().abs().max())
        for a, b in zip(found, expected, strict=True)
    )


def measure_loss(loss: str, sizes: list[int], table: Table, folder: Path) -> str:
    """Adds the rows of one loss to the table; returns how far both are from float64 at the first size."""
    from_float64 = f"{loss}: not compared with float64"
    known: tuple[int, float] | None = None
    for num_pairs in sizes:
        whole: list[Tensor] | None = None
        needed_mib = _needed_mib(num_pairs, known)
        if needed_mib < SHARE_OF_FREE_MEMORY * _memory_mib("MemAvailable", "/proc/meminfo"):
            figures, whole = run_point(Point(loss, num_pairs, None), folder)
            known = (num_pairs, figures.growth_mib)
            table.add_row(loss, str(num_pairs), "whole", *_cells(figures), "")
        else:
            table.add_row(loss, str(num_pairs), "left out", f"~{needed_mib:,.0f}", "", "", "")
        rows = rows_per_chunk(num_pairs, num_pairs, limit_elements=PIECE_ELEMENTS)
        if rows is None:
            continue  # one piece: nothing to compare
        figures, chunked = run_point(Point(loss, num_pairs, rows), folder)
        apart = "" if whole is None else f"{difference(chunked, whole):.1e}"
        table.add_row(loss, str(num_pairs), f"{rows} rows", *_cells(figures), apart)
        if whole is not None and num_pairs == sizes[0]:
            _, exact = run_point(Point(loss, num_pairs, None, "float64"), folder)
            from_float64 = (
                f"{loss} at N = {num_pairs}, gradient difference from float64: "
                f"whole {difference(whole, exact):.1e}, chunks {difference(chunked, exact):.1e}"
            )
    return from_float64


def _needed_mib(num_pairs: int, known: tuple[int, float] | None) -> float:
    """Memory of whole tables, from that of a smaller size where there is one."""
    if known is None:
        return TABLES_OF_FIRST_SIZE * num_pairs**2 * 4 / 2**20
    return known[1] * (num_pairs / known[0]) ** 2


def _cells(figures: Figures) -> tuple[str, str, str]:
    return f"{figures.growth_mib:,.0f}", f"{figures.wall_s:.1f}", f"{figures.cpu_s:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[4096, 16384, 32768])
    parser.add_argument("--point", help="measure this point alone, as JSON")
    parser.add_argument("--out", help="where a point's gradients go")
    arguments = parser.parse_args()
    if arguments.point:
        point = Point(**json.loads(arguments.point))
        gradients(Point(point.loss, 64, point.rows, point.dtype))  # kernels and libraries are loaded
        figures, found = gradients(point)
        torch.save(found, arguments.out)
        print(json.dumps(asdict(figures)))
        return
    table = Table(title=f"loss and gradient, d = {WIDTH}, float32", box=None)
    for heading in ("loss", "N", "at once", "peak MiB", "wall s", "CPU s", "gradient difference"):
        table.add_column(heading, justify="left" if heading == "loss" else "right")
    with tempfile.TemporaryDirectory() as folder:
        notes = [measure_loss(loss, arguments.sizes, table, Path(folder)) for loss in LOSSES]
    Console().print(table)
    print(*notes, sep="\n")


if __name__ == "__main__":
    main()
