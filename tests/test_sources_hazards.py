"""Images as they come: odd, damaged and hostile ones arrive unchanged from every kind of source."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.source_fixtures import data_config, picture, rows_of, write_tar, written
from tests.test_sources_hugging_face import IMAGE, STRING, saved

GREY = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)


def encoded(image: Image.Image, format: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format=format, **options)
    return file.getvalue()


def bomb() -> bytes:
    """A PNG of some hundred bytes that says it has 40,000 x 40,000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 40_000, 40_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def upside_down() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 3
    return encoded(Image.new("RGB", (8, 8), "red"), "JPEG", exif=exif)


def frames() -> bytes:
    pages = [Image.new("P", (8, 8), colour) for colour in range(3)]
    return encoded(pages[0], "GIF", save_all=True, append_images=pages[1:])


IMAGES: dict[str, bytes] = {
    "grey16": encoded(Image.fromarray(GREY), "PNG"),
    "cmyk": encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG"),
    "palette": encoded(Image.new("P", (8, 8), 3), "PNG", transparency=0),
    "one bit": encoded(Image.new("1", (8, 8), 1), "PNG"),
    "animated": frames(),
    "exif": upside_down(),
    "webp": encoded(Image.new("RGBA", (8, 8), (0, 0, 255, 128)), "WEBP"),
    "large": picture(size=(640, 480)),
}
REJECTED: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "missing_image"),
    "text": (b"no image", "undecodable_image"),
    "cut": (picture(size=(64, 64))[:-2000], "undecodable_image"),
    "bomb": (bomb(), "image_too_large"),
    "float": (encoded(Image.fromarray(np.zeros((8, 8), np.float32)), "TIFF"), "unsupported_image_mode"),
}
BYTES = {**IMAGES, **{name: data for name, (data, _) in REJECTED.items()}}


def as_parquet(root: Path) -> str:
    table = pa.table({"id": list(BYTES), "image": list(BYTES.values()), "caption": list(BYTES)})
    pq.write_table(table, root / "a.parquet")
    return f"parquet:{root}/a.parquet"


def as_tar(root: Path) -> str:
    members: dict[str, bytes | str] = {}
    for name, data in BYTES.items():
        members |= {f"{name}.jpg": data, f"{name}.txt": name}
    return f"webdataset:{write_tar(root / 'a.tar', members)}"


def as_csv(root: Path) -> str:
    for name, data in BYTES.items():
        (root / name).write_bytes(data)
    lines = "".join(f"{name},{name},{name}\n" for name in BYTES)
    (root / "a.csv").write_text("id,image,caption\n" + lines)
    return f"csv:{root}/a.csv"


def as_hugging_face(root: Path) -> str:
    images = [{"bytes": data, "path": None} for data in BYTES.values()]
    table = pa.table({"id": list(BYTES), "image": images, "text": list(BYTES)})
    return f"hf:{saved(root / 'set', table, {'image': IMAGE, 'text': STRING})}"


@pytest.mark.parametrize("place", [as_parquet, as_tar, as_csv, as_hugging_face])
def test_bytes_and_ids_arrive_and_what_cannot_be_used_has_a_reason(tmp_path, place: Callable[[Path], str]):
    config = data_config(place(tmp_path), max_quarantined_share=1.0)
    rows = rows_of(config)
    assert {row["row_id"]: row["image"] for row in rows} == BYTES
    assert {row["row_id"]: row["captions"] for row in rows} == {name: [name] for name in BYTES}
    report = written(config, tmp_path / "out")
    assert {row["row_id"]: row["reason"] for row in report.quarantined} == {
        name: reason for name, (_, reason) in REJECTED.items()
    }
    assert sum(shard["rows"] for shard in report.shards) == len(IMAGES)
