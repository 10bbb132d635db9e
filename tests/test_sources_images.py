"""Images that lie in files of their own, and Parquet files that are damaged."""

from __future__ import annotations

import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import pipelines.sources.image_files
from pipelines.sources.image_files import ImageFiles
from pipelines.sources.open_source import open_source
from pipelines.sources.parquet import rows_per_table
from tests.source_fixtures import data_config, picture, problems_of, rows_of, written


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "data" / "images"
    folder.mkdir(parents=True)
    for number in range(6):
        (folder / f"{number}.png").write_bytes(picture(number))
    return folder


def save(path, names, **columns):
    table = pa.table({"id": [f"r{i}" for i in range(len(names))], "image": names, **columns})
    table = table.append_column("caption", pa.array([f"text {i}" for i in range(len(names))]))
    pq.write_table(table, path, row_group_size=2)
    return path


def test_names_are_taken_from_the_folder_of_their_file(images):
    root = images.parent
    (root / "part").mkdir()
    names = ["../images/0.png", str(images / "1.png"), f"file://{images}/2.png", "../images/none.png", None]
    save(root / "part" / "a.parquet", names)
    rows = rows_of(data_config(f"parquet:{root}"))
    assert [row["image"] for row in rows] == [picture(0), picture(1), picture(2), b"", b""]
    assert problems_of(rows) == {"r3": "missing_image"}
    assert [row["group_id"] for row in rows] == names
    assert any("images lie in files" in note for note in open_source(data_config(f"parquet:{root}")).notes)


def test_image_root_is_another_folder(images, tmp_path):
    path = save(tmp_path / "a.parquet", ["3.png", "4.png"])
    for root in (str(images), f"file://{images}"):
        rows = rows_of(data_config(f"parquet:{path}", image_root=root))
        assert [row["image"] for row in rows] == [picture(3), picture(4)]
    with pytest.raises(ValueError, match=r"none of the first 2 images can be read: no file '.*/3.png'"):
        open_source(data_config(f"parquet:{path}"))


def test_a_group_that_is_named_stays(images):
    path = save(images.parent / "a.parquet", ["images/1.png", "images/2.png"], group=["p", None])
    assert [row["group_id"] for row in rows_of(data_config(f"parquet:{path}"))] == ["p", None]


def test_structs_hold_bytes_or_a_name(images):
    values = [
        {"bytes": picture(9), "path": "images/0.png"},
        {"bytes": None, "path": "images/1.png"},
        {"bytes": None, "path": "images/none.png"},
        {"bytes": None, "path": None},
        None,
    ]
    rows = rows_of(data_config(f"parquet:{save(images.parent / 'a.parquet', values)}"))
    assert [row["image"] for row in rows] == [picture(9), picture(1), b"", b"", b""]
    assert problems_of(rows) == {"r2": "missing_image"}


def test_what_is_no_readable_file(images, monkeypatch):
    monkeypatch.setattr(pipelines.sources.image_files, "MAX_IMAGE_BYTES", 500)
    (images / "large.png").write_bytes(bytes(501))
    (images / "folder.png").mkdir()
    names = ["0.png", "large.png", "folder.png", "0.png/x", "zero\0byte", "http://x/y.png", "ssh://x/y", ""]
    data, wrong = ImageFiles(str(images)).read(names)
    assert data == [picture(0), *[b""] * 7]
    assert [found and found["reason"] for found in wrong] == [
        None,
        "image_too_large",
        "missing_image",
        "missing_image",
        "unreadable_image",
        "missing_image",
        "missing_image",
        None,
    ]


def test_text_that_is_not_utf8_is_counted(tmp_path):
    words = pa.array([b"fine", b"caf\xe9", b"also fine"])
    text = pa.Array.from_buffers(pa.string(), 3, words.buffers())
    table = pa.table({"id": ["a", "b", "c"], "image": [picture(i) for i in range(3)], "caption": text})
    pq.write_table(table, tmp_path / "a.parquet")
    rows = rows_of(data_config(f"parquet:{tmp_path / 'a.parquet'}"))
    assert problems_of(rows) == {"b": "undecodable_text"}
    assert [row["captions"] for row in rows] == [["fine"], [], ["also fine"]]


@pytest.mark.parametrize("columns", [{}, {"id": None}])
@pytest.mark.parametrize("column", ["image", "caption"])
def test_a_damaged_row_group_is_counted_row_by_row(tmp_path, column, columns):
    noise = random.Random(0)
    table = pa.table(
        {
            "id": [f"r{i}" for i in range(6)],
            "image": [noise.randbytes(2000) for _ in range(6)],
            "caption": [noise.randbytes(40).hex() for _ in range(6)],
        }
    )
    path = tmp_path / "a.parquet"
    pq.write_table(table, path, row_group_size=2, compression="zstd", use_dictionary=False)
    part = pq.read_metadata(path).row_group(1).column(table.column_names.index(column))
    data = bytearray(path.read_bytes())
    for place in range(part.data_page_offset + 30, part.data_page_offset + part.total_compressed_size - 20):
        data[place] ^= 0x5A
    path.write_bytes(data)
    config = data_config(f"parquet:{path}", columns=columns)
    rows = rows_of(config)
    assert len(rows) == 6
    assert set(problems_of(rows).values()) == {"unreadable_shard"}
    assert [bool(row.get("problem")) for row in rows] == [False, False, True, True, False, False]
    named = column == "image" and not columns
    assert list(problems_of(rows)) == (["r2", "r3"] if named else ["a:000000002", "a:000000003"])
    report = written(config, tmp_path / "out")
    assert [row["reason"] for row in report.quarantined].count("unreadable_shard") == 2


def test_large_rows_are_read_few_at_a_time():
    assert rows_per_table(40 * 2_000_000, num_rows=40) == 33
    assert rows_per_table(3_000, num_rows=40) == 256
    assert rows_per_table(1 << 40, num_rows=3) == 1
