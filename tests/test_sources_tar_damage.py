"""Tars that are cut off, overwritten or full of odd bytes: what can be read is kept, the rest is counted."""

from __future__ import annotations

import io
import random
import tarfile

import pytest

from pipelines.sources.open_source import open_source
from pipelines.sources.tar_members import Damage, Member, tar_members
from tests.source_fixtures import (
    data_config,
    picture,
    problems_of,
    rows_of,
    samples,
    write_tar,
    write_tars,
    written,
)


@pytest.fixture
def shards(tmp_path):
    return write_tars(tmp_path / "cc")


def test_a_tar_cut_off_anywhere_keeps_what_came_before(tmp_path):
    whole = write_tar(tmp_path / "whole.tar", samples(range(4))).read_bytes()
    expected = rows_of(data_config(f"webdataset:{tmp_path}/whole.tar"))
    path = tmp_path / "cut" / "a.tar"
    path.parent.mkdir()
    generator = random.Random(0)
    for length in [*generator.sample(range(4200, 13000), 20), 5120, 6144]:
        path.write_bytes(whole[:length])
        config = data_config(f"webdataset:{path}")
        rows = rows_of(config)
        good = [row for row in rows if not row.get("problem") and row["image"] and row["captions"]]
        keys = [row["row_id"] for row in good]
        assert keys == [row["row_id"] for row in expected[: len(keys)]]
        assert [row["image"] for row in good] == [row["image"] for row in expected[: len(keys)]]
        wrong = problems_of(rows)
        assert set(wrong.values()) <= {"truncated_member", "truncated_shard", "damaged_shard"}
        assert len(wrong) == 1
        assert any("1 of 1 tars are damaged or cut off (a)" in note for note in open_source(config).notes)


def test_a_packed_tar_cut_off_keeps_what_came_before(tmp_path):
    path = write_tar(tmp_path / "a.tgz", samples(range(40)), mode="w:gz")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    rows = rows_of(data_config(f"webdataset:{path}"))
    good = [row for row in rows if not row.get("problem")]
    assert 10 < len(good) < 30
    assert set(problems_of(rows).values()) <= {"truncated_member", "truncated_shard", "damaged_shard"}
    assert problems_of(rows)


def test_a_damaged_header_costs_one_member(tmp_path):
    path = write_tar(tmp_path / "a.tar", samples(range(4)))
    data = bytearray(path.read_bytes())
    with tarfile.open(path) as tar:
        start = tar.getmember("000000001.jpg").offset
    data[start + 20] ^= 0xFF
    path.write_bytes(data)
    rows = rows_of(data_config(f"webdataset:{path}"))
    assert problems_of(rows) == {f"a@{start}": "damaged_shard"}
    good = [row["row_id"][-1] for row in rows if not row.get("problem") and row["image"]]
    assert good == ["0", "2", "3"]
    assert [row["row_id"] for row in rows if row["image"] == b"" and not row.get("problem")] == ["000000001"]
    # The same bytes by the standard library: it ends at the damage without a word.
    with tarfile.open(path) as tar:
        assert len(tar.getmembers()) == 3


def test_a_wiped_header_is_noticed(tmp_path):
    path = write_tar(tmp_path / "a.tar", {"0.png": picture(), "0.txt": "", "1.png": picture(1), "1.txt": "x"})
    with tarfile.open(path) as tar:
        start = tar.getmember("0.txt").offset
    data = bytearray(path.read_bytes())
    data[start : start + 512] = bytes(512)
    path.write_bytes(data)
    rows = rows_of(data_config(f"webdataset:{path}"))
    assert [(row["row_id"], bool(row.get("problem"))) for row in rows] == [
        (f"a@{start}", True),
        ("0", False),
        ("1", False),
    ]


def test_every_bit_flip_ends_in_rows(tmp_path):
    """No byte of an archive is worth a crash, and rows that were not touched stay."""
    whole = write_tar(tmp_path / "a.tar", samples(range(3))).read_bytes()
    generator = random.Random(1)
    for _ in range(300):
        data = bytearray(whole)
        for _ in range(generator.choice([1, 1, 4])):
            data[generator.randrange(len(data))] ^= 1 << generator.randrange(8)
        members = list(tar_members(io.BytesIO(bytes(data)), wants=lambda name: True))
        sought = list(tar_members(io.BytesIO(bytes(data)), wants=lambda name: False, size=len(data)))
        assert [(type(found), found.name) for found in members] == [
            (type(found), found.name) for found in sought
        ]
        assert sum(isinstance(found, Member) for found in members) >= 4


def test_an_unreadable_tar_among_good_ones(shards):
    (shards / "00001.tar").write_bytes(random.Random(0).randbytes(5000))
    (shards / "00002.tar").write_bytes(b"")
    config = data_config(f"webdataset:{shards}")
    rows = rows_of(config)
    assert problems_of(rows) == {"00001@0": "damaged_shard", "00002@0": "truncated_shard"}
    assert len(rows) == 4 + 2
    assert any(
        "2 of 3 tars are damaged or cut off (00001, 00002)" in note for note in open_source(config).notes
    )


def test_tars_behind_one_another_are_one(tmp_path):
    first = write_tar(tmp_path / "a.tar", samples(range(2))).read_bytes()
    second = write_tar(tmp_path / "b.tar", samples(range(2, 4))).read_bytes()
    members = list(tar_members(io.BytesIO(first + second), wants=lambda name: False))
    assert len(members) == 12
    assert not any(isinstance(found, Damage) for found in members)


def test_texts_and_json_that_cannot_be_read(tmp_path):
    members = {}
    contents = {
        "0": (b"fine", b"{}"),
        "1": (b"caf\xe9", b"{}"),
        "2": (b"\xef\xbb\xbfwith a mark", b"{}"),
        "3": (b"", b"{not json"),
        "4": (b"", b'{"caption": {"a": 1}}'),
        "5": (b"", b'{"caption": "\\ud800"}'),
        "6": (b"", b'{"caption": "from json"}'),
        "7": (b"", b"[" * 100_000),
        "8": (b"ok", b'{"boxes": [{"x": "left"}]}'),
    }
    for key, (text, meta) in contents.items():
        members |= {f"{key}.png": picture(), f"{key}.txt": text, f"{key}.json": meta}
    rows = rows_of(data_config(f"webdataset:{write_tar(tmp_path / 'a.tar', members)}"))
    assert problems_of(rows) == {
        "1": "undecodable_text",
        "3": "undecodable_json",
        "4": "mistyped_text",
        "5": "undecodable_text",
        "7": "undecodable_json",
        "8": "invalid_box",
    }
    assert {row["row_id"]: row["captions"] for row in rows if not row.get("problem")} == {
        "0": ["fine"],
        "2": ["with a mark"],
        "6": ["from json"],
    }


def test_what_is_set_aside_carries_its_reason(tmp_path):
    path = write_tar(tmp_path / "a.tar", samples(range(4)))
    with tarfile.open(path) as tar:
        end = tar.getmember("000000003.json").offset_data + 7
    path.write_bytes(path.read_bytes()[:end])
    report = written(data_config(f"webdataset:{path}"), tmp_path / "out")
    assert report.num_rows == sum(shard["rows"] for shard in report.shards) + len(report.quarantined)
    [bad] = [row for row in report.quarantined if row["reason"] == "truncated_member"]
    assert bad["row_id"] == "000000003"
    assert bad["message"] == "'000000003.json' ends after 7 of 77 bytes"
