"""Tars as a source: names, grouping, mapping, and archives that are damaged."""

from __future__ import annotations

import gzip
import io
import random
import tarfile

import pytest

from pipelines.sources.open_source import open_source, source_identity
from pipelines.sources.shard_names import expand
from pipelines.sources.tar_members import Damage, Member, tar_members
from tests.source_fixtures import data_config, picture, problems_of, rows_of, samples, write_tar, written


@pytest.fixture
def shards(tmp_path):
    """Three tars as img2dataset writes them, and what lies beside them there."""
    folder = tmp_path / "cc"
    for shard in range(3):
        write_tar(folder / f"{shard:05d}.tar", samples(range(10 * shard, 10 * shard + 4)))
        (folder / f"{shard:05d}_stats.json").write_text("{}")
        (folder / f"{shard:05d}.parquet").write_bytes(b"PAR1")
    return folder


@pytest.mark.parametrize(
    ("spec", "names"),
    [
        ("a.tar", ["a.tar"]),
        ("x/{08..11}.tar", ["x/08.tar", "x/09.tar", "x/10.tar", "x/11.tar"]),
        ("{9..11}", ["9", "10", "11"]),
        ("{a,b}-{0..1}", ["a-0", "a-1", "b-0", "b-1"]),
        ("a/{0..1}::b/0", ["a/0", "a/1", "b/0"]),
        ("s3://b/{0..1}.tar?scheme=http", ["s3://b/0.tar?scheme=http", "s3://b/1.tar?scheme=http"]),
    ],
)
def test_lists_of_shards(spec, names):
    assert expand(spec) == names


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("{0..3", "brace without its partner"),
        ("{{0..3}}", "brace without its partner"),
        ("{3..0}", "must run upwards"),
        ("{a..b}", "must be a range like"),
        ("{a,}", "must be a range like"),
        ("a::", "nothing between two ::"),
        ("{0..99999999}", "more than 1000000 names"),
        ("{000..999}{000..999}{0..9}", "stands for 10000000 names"),
    ],
)
def test_wrong_lists_of_shards_are_refused(spec, message):
    with pytest.raises(ValueError, match=message):
        expand(spec)


def test_what_img2dataset_writes_is_read_unchanged(shards):
    rows = rows_of(data_config(f"webdataset:{shards}"))
    assert [row["row_id"] for row in rows] == [f"{10 * s + i:09d}" for s in range(3) for i in range(4)]
    assert rows[5]["image"] == picture(11, format="JPEG")
    assert rows[5]["captions"] == ["caption 11"]
    assert {row["source"] for row in rows} == {"cc"}
    assert problems_of(rows) == {}


def test_braces_lists_and_folders_name_the_same_tars(shards):
    everything = rows_of(data_config(f"webdataset:{shards}"))
    for spec in (f"{shards}/{{00000..00002}}.tar", f"{shards}/00000.tar::{shards}/{{00001,00002}}.tar"):
        assert rows_of(data_config(f"webdataset:{spec}")) == everything
    as_uri = f"webdataset:file://{shards}/{{00000..00002}}.tar"
    assert rows_of(data_config(as_uri)) == everything


def test_absent_tars_are_noted(shards):
    source = open_source(data_config(f"webdataset:{shards}/{{00000..00004}}.tar"))
    assert sum(len(t) for piece in source.pieces() for t in source.read(piece)) == 12
    [note] = [note for note in source.notes if "not there" in note]
    assert note.startswith(f"2 of 5 tars are not there ({shards}/00003.tar, ")


def test_members_are_mapped_by_ending_and_json_path(tmp_path):
    box = {"label": "a", "x": 0, "y": 0.25, "w": 0.5, "h": 0.5}
    tar = write_tar(
        tmp_path / "a.tar",
        {
            "dir.x/0.left.png": picture(1),
            "dir.x/0.right.png": picture(2),
            "dir.x/0.meta.json": {"text": {"de": "ein Bild", "a.b": ["x", None, 3]}, "uid": 7, "set": "val"},
            "dir.x/0.labels.json": ["red", "round"],
            "dir.x/0.cls": "4\n",
            "dir.x/0.boxes.json": [box],
        },
    )
    columns = {
        "image": "front.png;right.png",
        "caption": "nothing;meta.json.text.de",
        "captions": "meta.json.text.a.b",
        "id": "meta.json.uid",
        "split": "meta.json.set",
        "source": "cls",
    }
    [row] = rows_of(data_config(f"webdataset:{tar}", columns=columns))
    assert row["image"] == picture(2)
    assert (row["row_id"], row["split"], row["source"]) == ("7", "selection", "4")
    assert row["captions"] == ["x", "3", "ein Bild"]
    assert (row["labels"], row["class_name"], row["boxes"]) == (["red", "round"], "4", [box])


def test_a_class_is_put_into_words(tmp_path):
    tar = write_tar(tmp_path / "a.tar", {"0.png": picture(), "0.cls": "cat"})
    [row] = rows_of(data_config(f"webdataset:{tar}", caption_template="a drawing of a {}"))
    assert row["captions"] == ["a drawing of a cat"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"columns": {"caption": "caption.txt"}},
            "none of the first 3 samples has data.columns.caption=caption.txt; sample '000000000' has: jpg, "
            "json, txt; keys of its json: caption, key, status, width",
        ),
        ({"columns": {"caption": "json.text"}}, "data.columns.caption=json.text"),
        ({"columns": {"image": "jp2"}}, "has data.columns.image=jp2"),
        ({"columns": {"group": "json.patient"}}, "data.columns.group=json.patient"),
        ({"columns": {"caption": None, "captions": None}}, "data.columns.caption=null"),
        ({"where": {"json.lang": ["de"]}}, "data.where.json.lang"),
        ({"split": "dev"}, "data.split must be one of"),
    ],
)
def test_what_no_sample_has_is_refused(tmp_path, settings, message):
    tar = write_tar(tmp_path / "a.tar", samples(range(3)))
    with pytest.raises(ValueError, match=message):
        open_source(data_config(f"webdataset:{tar}", **settings))


def test_nothing_there_is_refused(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        open_source(data_config(f"webdataset:{tmp_path / 'none'}"))
    with pytest.raises(ValueError, match=r"no \*.tar or \*.tar.gz or \*.tgz file below"):
        open_source(data_config(f"webdataset:{tmp_path}"))
    with pytest.raises(ValueError, match=r"matches no tar; the first looked for is '.*/0.tar'"):
        open_source(data_config(f"webdataset:{tmp_path}/{{0..3}}.tar"))
    (tmp_path / "0.tar").write_text("no tar at all")
    with pytest.raises(ValueError, match="no whole sample in the 1 tars"):
        open_source(data_config(f"webdataset:{tmp_path}"))


def test_keys_that_repeat_get_the_name_of_their_tar(tmp_path):
    for name in ("a", "b"):
        write_tar(tmp_path / f"{name}.tar", samples(range(2)))
    config = data_config(f"webdataset:{tmp_path}")
    ids = [row["row_id"] for row in rows_of(config)]
    assert ids == ["a/000000000", "a/000000001", "b/000000000", "b/000000001"]
    assert "keys repeat from tar to tar: row ids are <tar>/<key>" in open_source(config).notes
    made = rows_of(data_config(f"webdataset:{tmp_path}", columns={"id": None}))
    assert [row["row_id"] for row in made] == [f"{tar}:{n:09d}" for tar in "ab" for n in range(2)]


def test_names_of_tars_say_the_split(tmp_path):
    for number, split in enumerate(("train", "val", "test")):
        write_tar(tmp_path / split / f"{number}.tar", samples([number]))
    rows = rows_of(data_config(f"webdataset:{tmp_path}"))
    assert {row["row_id"][-1]: row["split"] for row in rows} == {"0": "train", "1": "selection", "2": "test"}
    fixed = rows_of(data_config(f"webdataset:{tmp_path}", split="val"))
    assert {row["split"] for row in fixed} == {"selection"}
    write_tar(tmp_path / "more.tar", samples(range(10, 110)))
    hashed = rows_of(data_config(f"webdataset:{tmp_path}", columns={"split": None}))
    assert {row["split"] for row in hashed} == {"train", "selection", "test"}
    # One tar without the word, and names decide nothing.
    assert rows_of(data_config(f"webdataset:{tmp_path}")) == hashed


def test_where_looks_into_the_json(tmp_path):
    members = samples(range(4))
    members["000000002.json"]["status"] = "failed"
    tar = write_tar(tmp_path / "a.tar", members)
    rows = rows_of(data_config(f"webdataset:{tar}", where={"json.status": ["success"]}))
    assert [row["row_id"][-1] for row in rows] == ["0", "1", "3"]


def test_identity_follows_the_files(shards):
    config = data_config(f"webdataset:{shards}")
    before = source_identity(config)
    assert source_identity(config) == before
    write_tar(shards / "00001.tar", samples(range(10, 15)))
    assert source_identity(config) != before


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_folders_and_links(tmp_path, format):
    key = "folder/" + "ä" * 120
    with tarfile.open(tmp_path / "a.tar", "w", format=format) as tar:
        folder = tarfile.TarInfo("folder")
        folder.type = tarfile.DIRTYPE
        link = tarfile.TarInfo("folder/x.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "y.jpg"
        for info in (folder, link):
            tar.addfile(info)
        for name, data in ((f"./{key[:45]}.png", picture()), (f"{key[:45]}.txt", b"words"), (".hidden", b"")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        if format != tarfile.USTAR_FORMAT:
            info = tarfile.TarInfo(f"{key}.txt")
            info.size = 1
            tar.addfile(info, io.BytesIO(b"x"))
    rows = rows_of(data_config(f"webdataset:{tmp_path / 'a.tar'}"))
    assert [row["row_id"] for row in rows] == [key[:45], key][: len(rows)]
    assert len(rows) == (1 if format == tarfile.USTAR_FORMAT else 2)
    assert rows[0]["captions"] == ["words"]


def test_packed_tars_are_read(tmp_path):
    write_tar(tmp_path / "a.tar.gz", samples(range(3)), mode="w:gz")
    write_tar(tmp_path / "plain" / "a.tar", samples(range(3)))
    packed = rows_of(data_config(f"webdataset:{tmp_path}/a.tar.gz"))
    plain = rows_of(data_config(f"webdataset:{tmp_path}/plain/a.tar"))
    assert [{**row, "source": ""} for row in packed] == [{**row, "source": ""} for row in plain]


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


def test_repeats_and_unsorted_members_are_left_to_prepare(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, data in (
            ("0.png", picture()),
            ("0.png", picture(1)),
            ("0.txt", b"x"),
            ("1.png", b""),
            ("0.txt", b"y"),
        ):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    rows = rows_of(data_config(f"webdataset:{tmp_path / 'a.tar'}"))
    assert [(row["row_id"], row["captions"]) for row in rows] == [
        ("0", []),
        ("0", ["x"]),
        ("1", []),
        ("0", ["y"]),
    ]


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


def test_an_empty_gzip_is_no_sample(tmp_path):
    (tmp_path / "a.tgz").write_bytes(gzip.compress(b""))
    with pytest.raises(ValueError, match="no whole sample in the 1 tars"):
        open_source(data_config(f"webdataset:{tmp_path}"))
