"""Small real files in the layouts that sources read, and what a source makes of them."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from ray import cloudpickle

from pipelines.config import ColumnMap, DataConfig
from pipelines.shards import PieceReport, ShardSettings, ShardWriter
from pipelines.sources.open_source import open_source
from pipelines.tokenizer import train_tokenizer

Members = Mapping[str, bytes | str | dict[str, Any] | list[Any]]


def picture(number: int = 0, *, size: tuple[int, int] = (8, 6), format: str = "PNG") -> bytes:
    """An encoded image; another number gives other pixels."""
    generator = np.random.default_rng(number)
    pixels = generator.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format=format)
    return file.getvalue()


def write_tar(path: Path, members: Members, *, mode: str = "w") -> Path:
    """A tar of members by name; what is no bytes is written as text or JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as tar:
        for name, content in members.items():
            data = content if isinstance(content, bytes) else _encoded(content)
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def _encoded(content: str | dict[str, Any] | list[Any]) -> bytes:
    return (content if isinstance(content, str) else json.dumps(content)).encode()


def samples(numbers: Sequence[int]) -> dict[str, Any]:
    """Members as img2dataset writes them: an image, its caption, and what is known of it."""
    members: dict[str, Any] = {}
    for number in numbers:
        key = f"{number:09d}"
        members[f"{key}.jpg"] = picture(number, format="JPEG")
        members[f"{key}.json"] = {"caption": f"caption {number}", "key": key, "status": "success", "width": 8}
        members[f"{key}.txt"] = f"caption {number}"
    return members


def data_config(source: str, **settings: Any) -> DataConfig:
    columns = ColumnMap(**settings.pop("columns", {}))
    return DataConfig(source=source, columns=columns, **settings)


def rows_of(config: DataConfig) -> list[dict[str, Any]]:
    """Every row of a source as tasks get it, after checking that a pass without images yields the same."""
    source = cloudpickle.loads(cloudpickle.dumps(open_source(config)))
    found: list[dict[str, Any]] = []
    for piece in source.pieces():
        rows = [row for table in source.read(piece) for row in table.to_pylist()]
        texts = [row for table in source.read(piece, with_images=False) for row in table.to_pylist()]
        assert [row["row_id"] for row in texts] == [row["row_id"] for row in rows]
        assert [(row["captions"], row["split"]) for row in texts] == [
            (row["captions"], row["split"]) for row in rows
        ]
        assert len(rows) <= piece.num_rows
        assert all("image" not in row for row in texts)
        found += rows
    return found


def problems_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Reason by id, of the rows a source knows something against."""
    return {row["row_id"]: row["problem"]["reason"] for row in rows if row.get("problem")}


def written(config: DataConfig, folder: Path) -> PieceReport:
    """What becomes of the rows of a source when its first piece is written to shards."""
    source = open_source(config)
    tokenizer = train_tokenizer({"a": 1}, vocab_size=300, max_tokens=16)
    settings = ShardSettings(str(folder), 16, config.rows_per_shard, 16, tokenizer.to_bytes())
    writer = ShardWriter(settings, piece=0, first_shard=0)
    for table in source.read(source.pieces()[0]):
        writer.add(table.to_pylist(), duplicates=frozenset())
    return writer.close()


def write_tars(folder: Path) -> Path:
    """Three tars as img2dataset writes them, and what lies beside them there."""
    for shard in range(3):
        write_tar(folder / f"{shard:05d}.tar", samples(range(10 * shard, 10 * shard + 4)))
        (folder / f"{shard:05d}_stats.json").write_text("{}")
        (folder / f"{shard:05d}.parquet").write_bytes(b"PAR1")
    return folder
