"""CSV files as a source: layouts, records that are damaged, and where tasks begin."""

from __future__ import annotations

import csv
import gzip
import io

import pytest

import pipelines.sources.csv_table
from pipelines.sources.csv_records import csv_records
from pipelines.sources.open_source import open_source, source_identity
from tests.source_fixtures import data_config, picture, problems_of, rows_of, written


@pytest.fixture
def save(tmp_path):
    """Writes records beside ten pictures."""
    (tmp_path / "images").mkdir()
    for number in range(10):
        (tmp_path / "images" / f"{number}.png").write_bytes(picture(number))

    def save(records: list[list[str]], *, name="pairs.csv", delimiter=",") -> str:
        text = io.StringIO()
        csv.writer(text, delimiter=delimiter).writerows(records)
        data = text.getvalue().encode()
        (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
        return str(tmp_path / name)

    return save


def pairs(num_rows: int) -> list[list[str]]:
    names = ["filepath", "title"]
    return [names, *([f"images/{i % 10}.png", f'caption, "{i}"\nsecond line'] for i in range(num_rows))]


@pytest.mark.parametrize(
    ("name", "delimiter"), [("a.csv", ","), ("a.tsv", "\t"), ("a.csv.gz", ","), ("a.txt.gz", "\t")]
)
def test_the_columns_of_open_clip_are_known(save, name, delimiter):
    rows = rows_of(data_config(f"csv:{save(pairs(5), name=name, delimiter=delimiter)}"))
    assert [row["row_id"] for row in rows] == [f"a:{i:09d}" for i in range(5)]
    assert rows[3]["captions"] == ['caption, "3"\nsecond line']
    assert rows[3]["image"] == picture(3)
    assert rows[3]["group_id"] == "images/3.png"
    assert rows[3]["source"] == "a"


@pytest.mark.parametrize("name", ["a.csv", "a.csv.gz"])
@pytest.mark.parametrize("rows_per_shard", [1, 4, 100])
def test_tasks_begin_anywhere(save, name, rows_per_shard):
    uri = save(pairs(23), name=name)
    everything = rows_of(data_config(f"csv:{uri}", rows_per_shard=1000))
    config = data_config(f"csv:{uri}", rows_per_shard=rows_per_shard)
    assert rows_of(config) == everything
    sizes = [piece.num_rows for piece in open_source(config).pieces()]
    assert sizes == {1: [1] * 23, 4: [4] * 5 + [3], 100: [23]}[rows_per_shard]


def test_a_packed_file_is_unpacked_by_few_tasks(save, monkeypatch):
    monkeypatch.setattr(pipelines.sources.csv_table, "_MAX_PACKED_PIECES", 3)
    uri = save(pairs(10), name="a.csv.gz")
    config = data_config(f"csv:{uri}", rows_per_shard=2)
    assert [piece.num_rows for piece in open_source(config).pieces()] == [4, 4, 2]
    assert len(rows_of(config)) == 10


def test_captions_of_one_image_share_a_split(save):
    rows = rows_of(data_config(f"csv:{save(pairs(60))}"))
    splits: dict[str, set[str]] = {}
    for row in rows:
        splits.setdefault(row["group_id"], set()).add(row["split"])
    assert len(splits) == 10
    assert all(len(found) == 1 for found in splits.values())


def test_every_column_can_be_mapped(save, tmp_path):
    records = [
        ["\ufeffkey", "file", "text", "finding", "kind", "patient", "set"],
        ["a", "1.png", "one", "Edema | Effusion|", "x", "p1", "train"],
        ["b", "2.png", "", "", "", "", "val"],
    ]
    columns = {"id": "key", "image": "file", "labels": "finding", "class_name": "kind", "group": "patient"}
    config = data_config(
        f"csv:{save(records)}", columns={**columns, "split": "set"}, image_root=str(tmp_path / "images")
    )
    first, second = rows_of(config)
    assert first["image"] == picture(1)
    assert {key: first[key] for key in ("row_id", "labels", "class_name", "group_id", "split")} == {
        "row_id": "a",
        "labels": ["Edema", "Effusion"],
        "class_name": "x",
        "group_id": "p1",
        "split": "train",
    }
    assert (second["captions"], second["labels"], second["class_name"], second["group_id"]) == (
        [],
        [],
        None,
        None,
    )
    assert second["split"] == "selection"


def test_images_that_are_not_there_are_counted(save, tmp_path):
    records = pairs(4)
    records[1][0] = "images/none.png"
    records[2][0] = ""
    records[3][0] = str(tmp_path / "images" / "7.png")
    records[4][0] = "https://example.org/x.png"
    config = data_config(f"csv:{save(records)}")
    rows = rows_of(config)
    assert problems_of(rows) == {"pairs:000000000": "missing_image", "pairs:000000003": "missing_image"}
    assert rows[2]["image"] == picture(7)
    report = written(config, tmp_path / "out")
    reasons = {row["row_id"]: (row["reason"], row["message"]) for row in report.quarantined}
    assert reasons["pairs:000000000"] == ("missing_image", f"no file '{tmp_path}/images/none.png'")
    assert reasons["pairs:000000001"] == ("missing_image", "no image bytes")
    assert "download the images first" in reasons["pairs:000000003"][1]


def test_damaged_records_are_counted_and_cost_one_line(save, tmp_path):
    path = tmp_path / "bad.csv"
    good = b"images/1.png,good\r\n"
    lines = [
        b"filepath,title\n",
        b'images/7.png,a "quote" inside\n',
        b"images/2.png\n",
        b"images/3.png,a,b\n",
        b"images/4.png,caf\xe9\n",
        b"images/6.png," + b"x" * 3_000_000 + b"\n",
        b'images/5.png,"never closed\n',
        good,
        b"\n",
        b"images/8.png,zero\x00byte\n",
        b"images/9.png,no end",
    ]
    path.write_bytes(b"".join(lines))
    rows = rows_of(data_config(f"csv:{path}", rows_per_shard=2))
    assert [row["captions"] for row in rows if not row.get("problem")] == [
        ['a "quote" inside'],
        ["good"],
        ["zero\x00byte"],
        ["no end"],
    ]
    assert [(row["problem"]["reason"], row["problem"]["message"]) for row in rows if row.get("problem")] == [
        ("malformed_row", "line 3: 1 fields, the header has 2"),
        ("malformed_row", "line 4: 3 fields, the header has 2"),
        ("undecodable_text", "line 5: field 2 is not UTF-8"),
        ("malformed_row", "line 6: more than 1048576 bytes"),
        ("malformed_row", "line 7: a quote that is not closed"),
    ]


def test_records_know_where_they_start():
    data = b'a,b\n\n"x\ny",1\r\nz,2\n'
    records = list(csv_records(io.BytesIO(data), delimiter=","))
    assert [(r.start, r.line, r.fields) for r in records] == [
        (0, 1, ["a", "b"]),
        (5, 3, ["x\ny", "1"]),
        (14, 5, ["z", "2"]),
    ]
    for record in records:
        again = csv_records(
            io.BytesIO(data[record.start :]), delimiter=",", start=record.start, line=record.line
        )
        assert next(again) == record


@pytest.mark.parametrize(
    ("records", "settings", "message"),
    [
        ([["a", "b"], ["x", "y"]], {}, r"column 'image;filepath;.*' is missing; .*columns found: a, b"),
        ([["filepath", "x"]], {}, r"column 'caption;title;text;description' is missing"),
        ([["filepath", "title"]], {}, "no row passes"),
        (
            pairs(3),
            {"columns": {"group": "patient"}},
            "column 'patient' is missing; columns found: filepath, title",
        ),
        (pairs(3), {"where": {"title": ["none"]}}, "no row passes data.where"),
        (pairs(3), {"where": {"lang": ["de"]}}, "data.where names the column 'lang'; columns found"),
        (
            pairs(3),
            {"image_root": "/nowhere"},
            "none of the first 3 images can be read: no file '/nowhere/images/0",
        ),
        ([["filepath", "title", "title"]], {}, r"more than one column \['title'\]"),
        ([["filepath", "title", "split"], ["images/1.png", "x", "dev"]], {}, r"unknown split \['dev'\]"),
        ([], {}, "is empty"),
    ],
)
def test_unusable_files_are_refused(save, records, settings, message):
    with pytest.raises(ValueError, match=message):
        open_source(data_config(f"csv:{save(records)}", **settings))


def test_absent_files_and_folders_are_refused(save, tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        open_source(data_config(f"csv:{tmp_path}/none.csv"))
    save(pairs(1))
    with pytest.raises(ValueError, match=r"is a folder; name one file, such as '.*pairs.csv'"):
        open_source(data_config(f"csv:{tmp_path}"))


def test_where_keeps_rows_and_their_ids(save):
    records = [[*row, "x" if i % 2 else "y"] for i, row in enumerate(pairs(6))]
    records[0][-1] = "kind"
    rows = rows_of(data_config(f"csv:{save(records)}", where={"kind": ["x"]}, rows_per_shard=4))
    assert [row["row_id"] for row in rows] == [f"pairs:{i:09d}" for i in (0, 2, 4)]


def test_a_class_is_put_into_words(save):
    records = [["filepath", "class"], ["images/1.png", "cat"]]
    [row] = rows_of(data_config(f"csv:{save(records)}", caption_template="a {}"))
    assert row["captions"] == ["a cat"]


def test_identity_and_notes(save):
    config = data_config(f"csv:{save(pairs(2))}")
    before = source_identity(config)
    save(pairs(3))
    assert source_identity(config) != before
    notes = open_source(config).notes
    assert "no column 'split': rows are divided 80/10/10 by a hash" in notes
    assert any("images lie in files of their own" in note for note in notes)
