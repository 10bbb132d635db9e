"""Tars as a source: names, grouping, mapping, and archives that are damaged."""

from __future__ import annotations

import gzip
import io
import tarfile

import pytest

from pipelines.sources.open_source import open_source, source_identity
from pipelines.sources.shard_names import expand
from tests.source_fixtures import data_config, picture, problems_of, rows_of, samples, write_tar, write_tars


@pytest.fixture
def shards(tmp_path):
    return write_tars(tmp_path / "cc")


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


def test_the_number_of_rows_is_estimated(tmp_path):
    members = {}
    for number in range(200):
        members |= {f"{number}.jpg": bytes(5000), f"{number}.txt": "x"}
    [piece] = open_source(data_config(f"webdataset:{write_tar(tmp_path / 'a.tar', members)}")).pieces()
    assert 180 <= piece.likely_rows <= 210
    assert piece.num_rows > 1000


def test_an_empty_gzip_is_no_sample(tmp_path):
    (tmp_path / "a.tgz").write_bytes(gzip.compress(b""))
    with pytest.raises(ValueError, match="no whole sample in the 1 tars"):
        open_source(data_config(f"webdataset:{tmp_path}"))
