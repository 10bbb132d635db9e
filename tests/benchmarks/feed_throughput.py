"""What an image costs on its way to the trainer: here, in other loaders, and at the least.

Run: `OMP_NUM_THREADS=1 python -m tests.benchmarks.feed_throughput [images] [rounds]` (8000 and 3 unless
given; `pip install webdataset` adds its row). All rows read the same JPEG files, 256 to 500 pixels on the
long side, and take turns within each round; the first round warms up. CPU is of the whole process tree,
Ray's daemons and dead workers included, in milliseconds per image; wall is images per second on whatever
cores there are.

- raw: libjpeg-turbo alone in two processes, the least a first epoch can cost.
- DataLoader, webdataset: two workers, Pillow decode, random resized crop (bicubic), normalised float32.
- first epoch: `prepare` by Ray tasks: texts surveyed and tokenised, files checked, decoded and resized,
  pixels written as uint8 shards with their hashes.
- mapped, streamed: a later epoch from those shards, out of memory-mapped files or through Ray Data tasks.
  What arrives is uint8; crops are cut on the trainer's device.

At last the share of its time that a trainer of the embedded scenes waits for batches, by feed.
"""

from __future__ import annotations

import io
import os
import shutil
import statistics
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import simplejpeg
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader, Dataset

from pipelines.cluster import connect, disconnect
from pipelines.collate import BatchSettings
from pipelines.config import DataConfig
from pipelines.config_tree import load_config
from pipelines.feed import Feed, MemoryFeed, load_rows, train_order
from pipelines.launch import run_here
from pipelines.prepare import prepare
from pipelines.prepare_once import ensure_prepared
from pipelines.prepared import Prepared
from pipelines.results import Store
from pipelines.stream_feed import StreamFeed
from tests.pipeline_fixture import small_job

SIDE, BATCH = 224, 64
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_MEAN, _STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@dataclass
class Loader:
    """One row of the table."""

    name: str
    # Gives how many images it loaded.
    epoch: Callable[[], int]
    cpu_ms: list[float] = field(default_factory=list)
    per_s: list[float] = field(default_factory=list)

    def run(self) -> None:
        cpu, wall = tree_cpu_s(), time.perf_counter()
        images = self.epoch()
        seconds = time.perf_counter() - wall
        self.cpu_ms.append(1000 * (tree_cpu_s() - cpu) / images)
        self.per_s.append(images / seconds)


def tree_cpu_s() -> float:
    """CPU seconds of this process, its descendants, and those of them that have ended."""
    parents, ticks = {}, {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except (FileNotFoundError, ProcessLookupError):
                continue
            parents[int(entry.name)] = int(fields[1])
            # User and system time, of the process and of the children it has waited for.
            ticks[int(entry.name)] = sum(int(value) for value in fields[11:15])
    ours, todo = {os.getpid()}, [os.getpid()]
    while todo:
        parent = todo.pop()
        found = {pid for pid, of in parents.items() if of == parent} - ours
        ours |= found
        todo += found
    return sum(ticks.get(pid, 0) for pid in ours) / _TICKS_PER_S


def make_jpegs(num: int) -> list[bytes]:
    """Soft shapes with a little grain: about 30 KiB each, as photographs of this size have."""
    generator = np.random.default_rng(0)
    files = []
    for _ in range(num):
        long = int(generator.integers(256, 501))
        width, height = generator.permutation([long, int(long * generator.uniform(0.66, 1))]).tolist()
        coarse = generator.integers(0, 256, (height // 24, width // 24, 3), dtype=np.uint8)
        soft = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))
        grain = generator.normal(0, 4, (height, width, 1))
        file = io.BytesIO()
        picture = Image.fromarray((soft + grain).clip(0, 255).astype(np.uint8))
        picture.save(file, "JPEG", quality=int(generator.integers(82, 93)))
        files.append(file.getvalue())
    return files


def usual_transform(data: bytes) -> torch.Tensor:
    """Random resized crop of at least half the area, normalised float32 [3, S, S]."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    area = np.random.uniform(0.5, 1) * image.width * image.height
    ratio = np.exp(np.random.uniform(np.log(3 / 4), np.log(4 / 3)))
    width = min(image.width, int((area * ratio) ** 0.5))
    height = min(image.height, int((area / ratio) ** 0.5))
    left, top = np.random.randint(image.width - width + 1), np.random.randint(image.height - height + 1)
    box = (left, top, left + width, top + height)
    pixels = np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BICUBIC, box=box))
    planes = torch.from_numpy(pixels.transpose(2, 0, 1).astype(np.float32) / 255)
    return (planes - torch.tensor(_MEAN)[:, None, None]) / torch.tensor(_STD)[:, None, None]


class Files(Dataset[torch.Tensor]):
    """JPEG files of a folder, as everybody's first data set reads them."""

    def __init__(self, folder: Path) -> None:
        self._paths = sorted(folder.glob("*.jpg"))

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> torch.Tensor:
        return usual_transform(self._paths[index].read_bytes())


def write_inputs(folder: Path, jpegs: list[bytes]) -> None:
    """The same files three times: a folder, tars, Parquet."""
    (folder / "files").mkdir()
    captions = [f"picture number {number}" for number in range(len(jpegs))]
    for number, data in enumerate(jpegs):
        (folder / "files" / f"{number:06d}.jpg").write_bytes(data)
    for shard, first in enumerate(range(0, len(jpegs), 500)):
        with tarfile.open(folder / f"{shard:03d}.tar", "w") as tar:
            for number in range(first, min(first + 500, len(jpegs))):
                info = tarfile.TarInfo(f"{number:06d}.jpg")
                info.size = len(jpegs[number])
                tar.addfile(info, io.BytesIO(jpegs[number]))
    ids = [f"row{number}" for number in range(len(jpegs))]
    table = pa.table({"id": ids, "image": jpegs, "caption": captions, "split": ["train"] * len(jpegs)})
    pq.write_table(table, folder / "pairs.parquet", row_group_size=500)


def decode_all(paths: list[Path]) -> int:
    """Decode and forget."""
    for path in paths:
        simplejpeg.decode_jpeg(path.read_bytes())
    return len(paths)


def count_images(batches: Iterator[Any]) -> int:
    return sum(len(batch) for batch in batches)


def our_loaders(folder: Path, num_images: int) -> list[Loader]:
    numbers = iter(range(1000))
    config = DataConfig(
        source=f"parquet:{folder}/pairs.parquet", image_size=SIDE, rows_per_shard=500, vocab_size=600
    )

    def first_epoch() -> int:
        number = next(numbers)
        if number > 1:
            # Only the first is kept, for the later epochs.
            shutil.rmtree(folder / f"prepared-{number - 1}")
        manifest = prepare(config, str(folder / f"prepared-{number}"))
        return int(manifest["splits"]["train"]["rows"])

    first_epoch()
    prepared = Prepared.open(str(folder / "prepared-0"))
    order = train_order(prepared, batch_size=BATCH, seed=0)
    settings = BatchSettings(0, "caption", num_views=1, min_crop_area=0.5, num_patches=196, max_tokens=77)
    feeds: dict[str, Feed] = {
        "mapped": MemoryFeed(load_rows(prepared.uri, "train"), order, settings),
        "streamed": StreamFeed(prepared.uri, order, settings),
    }

    def later_epochs(feed: Feed) -> int:
        # Enough that the start of a stream, paid once a run, does not count for much.
        return sum(len(batch.images) for batch in feed.batches(0, 4 * num_images // BATCH))

    loaders = [Loader("clipfleet, first epoch", first_epoch)]
    return loaders + [
        Loader(f"clipfleet, later, {name}", lambda feed=feed: later_epochs(feed))
        for name, feed in feeds.items()
    ]


def other_loaders(folder: Path) -> list[Loader]:
    torch_loader = DataLoader(
        Files(folder / "files"), batch_size=BATCH, shuffle=True, num_workers=2, persistent_workers=True
    )
    paths = sorted((folder / "files").glob("*.jpg"))
    halves = [paths[::2], paths[1::2]]
    # As busy as the others: two processes on one core slow each other down.
    pool = ProcessPoolExecutor(2, mp_context=get_context("fork"))
    loaders = [
        Loader("raw JPEG decode", lambda: sum(pool.map(decode_all, halves))),
        Loader("torch DataLoader", lambda: count_images(iter(torch_loader))),
    ]
    try:
        import webdataset
    except ImportError:
        return loaders
    tars = sorted(str(path) for path in folder.glob("*.tar"))
    samples = webdataset.WebDataset(tars, shardshuffle=len(tars), empty_check=False).shuffle(500)
    batches = samples.to_tuple("jpg").map_tuple(usual_transform).batched(BATCH)
    web_loader = webdataset.WebLoader(batches, batch_size=None, num_workers=2, persistent_workers=True)
    return [
        *loaders,
        Loader("webdataset", lambda: sum(len(batch[0]) for batch in web_loader)),
    ]


def wait_shares(folder: Path) -> dict[str, float]:
    """Share of its time a trainer of the quick scenes waits for batches, by feed."""
    shares = {}
    for feed in ("memory", "stream"):
        places = [f"output={folder / feed}", f"prepared={folder / 'scenes'}"]
        config = load_config([], [*places, "train.steps=200", f"train.feed={feed}"])
        job = small_job(config, ensure_prepared(config), "run")
        job.write()
        run_here(job)
        lines = [line for line in Store(config.output).curve("run") if "diagnostics" in line]
        # The first line holds the start of the stream.
        shares[feed] = statistics.mean(line["diagnostics"]["feed/wait_share"] for line in lines[1:])
    return shares


def main(num_images: int, rounds: int) -> None:
    torch.set_num_threads(1)
    console = Console(width=100)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        jpegs = make_jpegs(num_images)
        write_inputs(folder, jpegs)
        console.print(f"{num_images} files, mean {sum(map(len, jpegs)) / num_images / 1024:.0f} KiB")
        loaders = other_loaders(folder)
        # Worker processes of the others must not inherit what Ray has open.
        for loader in loaders:
            loader.run()
        connect(num_cpus=2)
        ours = our_loaders(folder, num_images)
        for number in range(rounds + 1):
            for loader in [*loaders, *ours]:
                loader.run()
                if number == 0:
                    loader.cpu_ms.clear()
                    loader.per_s.clear()
        _print([*loaders, *ours], console)
        console.print({f"wait share, {k}": f"{v:.1%}" for k, v in wait_shares(folder).items()})
        disconnect()


def _print(loaders: list[Loader], console: Console) -> None:
    rounds = len(loaders[0].cpu_ms)
    table = Table(box=None, title=f"{SIDE} pixels, batches of {BATCH}, medians of {rounds} rounds")
    for heading in ("", "CPU ms/image", "x raw", "images/s"):
        table.add_column(heading, justify="right" if heading else "left")
    raw = loaders[0]
    for loader in loaders:
        ratios = [a / b for a, b in zip(loader.cpu_ms, raw.cpu_ms, strict=True)]
        table.add_row(
            loader.name,
            f"{statistics.median(loader.cpu_ms):.3f}",
            f"{statistics.median(ratios):.2f}",
            f"{statistics.median(loader.per_s):,.0f}",
        )
    console.print(table)


if __name__ == "__main__":
    main(
        int(sys.argv[1]) if len(sys.argv) > 1 else 8000,
        int(sys.argv[2]) if len(sys.argv) > 2 else 3,
    )
