"""Sources: scenes and Parquet files become the same rows, in pieces, with clear refusals."""

from __future__ import annotations

import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.config import ColumnMap, DataConfig
from pipelines.schemas import PAIRS, check_schema
from pipelines.sources.open_source import open_source, source_identity
from pipelines.sources.source import pair_dataset
from pipelines.sources.splits import hashed_split

# Ray itself sets options it has deprecated whenever a data context is made.
pytestmark = pytest.mark.filterwarnings(r"ignore::DeprecationWarning:ray\.")

BOX = {"label": "a", "x": 0.0, "y": 0.0, "w": 0.5, "h": 0.5}


def raw_table(num_rows=6, **replaced) -> pa.Table:
    """A small table with every column of the default mapping."""
    columns = {
        "id": [f"row{i}" for i in range(num_rows)],
        "image": [b"image %d" % i for i in range(num_rows)],
        "caption": [f"caption {i}" for i in range(num_rows)],
        "captions": [[f"caption {i}", f"other {i}"] for i in range(num_rows)],
        "labels": [["a", "b"] for _ in range(num_rows)],
        "class": ["a" for _ in range(num_rows)],
        "group": [f"group{i // 2}" for i in range(num_rows)],
        "source": ["here" for _ in range(num_rows)],
        "split": (["train"] * (num_rows - 2) + ["val", "test"])[-num_rows:],
        "boxes": [[BOX] for _ in range(num_rows)],
    }
    columns.update(replaced)
    return pa.table({name: values for name, values in columns.items() if values is not None})


def config_for(path, **settings) -> DataConfig:
    columns = ColumnMap(**settings.pop("columns", {}))
    return DataConfig(source=f"parquet:{path}", columns=columns, **settings)


def rows_of(config: DataConfig, *, with_images=True) -> list[dict]:
    source = open_source(config)
    tables = [t for piece in source.pieces() for t in source.read(piece, with_images=with_images)]
    return [row for table in tables for row in table.to_pylist()]


@pytest.fixture
def save(tmp_path):
    def save(table: pa.Table, name="pairs.parquet", **options) -> str:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        pq.write_table(table, path, **options)
        return str(path)

    return save


def test_default_columns_are_mapped(save):
    rows = rows_of(config_for(save(raw_table())))
    assert rows[1] == {
        "row_id": "row1",
        "image": b"image 1",
        "captions": ["caption 1", "other 1"],
        "sentences": [],
        "labels": ["a", "b"],
        "class_name": "a",
        "group_id": "group0",
        "source": "here",
        "split": "train",
        "boxes": [BOX],
    }
    assert [row["split"] for row in rows] == ["train"] * 4 + ["selection", "test"]


def test_schema_with_and_without_images(save):
    source = open_source(config_for(save(raw_table())))
    [piece] = source.pieces()
    [table] = source.read(piece)
    check_schema(table.schema, PAIRS, where="parquet")
    [texts] = source.read(piece, with_images=False)
    assert texts.equals(table.drop_columns("image"))


def test_captions_are_the_union_in_order(save):
    table = raw_table(3, captions=[["b", "a", None, "b"], None, []], caption=["a", "c", None])
    assert [row["captions"] for row in rows_of(config_for(save(table)))] == [["b", "a"], ["c"], []]


def test_absent_columns_are_declared_as_null(save):
    absent = dict.fromkeys(["captions", "labels", "class_name", "group", "source", "boxes"])
    table = raw_table().select(["id", "image", "caption", "split"])
    row = rows_of(config_for(save(table), columns=absent))[0]
    assert (row["captions"], row["labels"], row["class_name"], row["boxes"]) == (
        ["caption 0"],
        [],
        None,
        None,
    )
    assert row["source"] == "pairs"  # the file's name


def test_numbers_become_text_and_other_layouts_are_read(save):
    table = raw_table(
        3,
        id=[7, 8, 9],
        labels=[[1, 2], [3], None],
        captions=["one text", "another", None],
        image=[{"bytes": b"x", "path": "a.png"}, {"bytes": None, "path": None}, None],
        **{"class": [0, 1, None]},
    )
    rows = rows_of(config_for(save(table)))
    assert [row["row_id"] for row in rows] == ["7", "8", "9"]
    assert [row["labels"] for row in rows] == [["1", "2"], ["3"], []]
    assert [row["class_name"] for row in rows] == ["0", "1", None]
    assert rows[0]["captions"] == ["one text", "caption 0"]
    assert [row["image"] for row in rows] == [b"x", b"", b""]


def test_missing_ids_and_splits_are_passed_on_as_empty(save):
    rows = rows_of(config_for(save(raw_table(3, id=["a", None, "c"], split=["train", "val", None]))))
    assert [row["row_id"] for row in rows] == ["a", "", "c"]
    assert [row["split"] for row in rows] == ["train", "selection", ""]


def test_null_boxes_differ_from_no_boxes(save):
    rows = rows_of(config_for(save(raw_table(3, boxes=[None, [], [BOX]]))))
    assert [row["boxes"] for row in rows] == [None, [], [BOX]]


@pytest.mark.parametrize("row_group_size", [2, 3, 100])
def test_where_keeps_rows_that_pass_every_condition(save, row_group_size):
    table = raw_table(6, source=["x", "y", "x", "z", "y", "x"], year=[1, 2, 3, 1, 2, 3])
    path = save(table, row_group_size=row_group_size)
    assert [row["row_id"] for row in rows_of(config_for(path, where={"source": ["x", "z"]}))] == [
        "row0",
        "row2",
        "row3",
        "row5",
    ]
    both = config_for(path, where={"source": ["x", "z"], "year": ["1"]})
    assert [row["row_id"] for row in rows_of(both, with_images=False)] == ["row0", "row3"]


def test_made_ids_are_places_in_the_file_whatever_the_filter(save):
    table = raw_table(6, id=None, source=["x", "y", "x", "z", "y", "x"])
    path = save(table, row_group_size=2)
    columns = {"id": None}
    everything = rows_of(config_for(path, columns=columns))
    assert [row["row_id"] for row in everything] == [f"pairs:{i:09d}" for i in range(6)]
    some = rows_of(
        config_for(path, columns={**columns, "source": None}, where={"source": ["x"]}, rows_per_shard=2)
    )
    assert [row["row_id"] for row in some] == [everything[i]["row_id"] for i in (0, 2, 5)]
    assert [row["captions"] for row in some] == [everything[i]["captions"] for i in (0, 2, 5)]


def test_splits_by_hash_keep_groups_together():
    splits = [hashed_split(f"group{i}") for i in range(5000)]
    assert splits == [hashed_split(f"group{i}") for i in range(5000)]
    shares = {name: splits.count(name) / 5000 for name in ("train", "selection", "test")}
    assert shares == pytest.approx({"train": 0.8, "selection": 0.1, "test": 0.1}, abs=0.02)


def test_data_without_splits_is_divided_by_group(save):
    rows = rows_of(config_for(save(raw_table(200, split=None)), columns={"split": None}))
    by_group = {row["group_id"]: row["split"] for row in rows}
    assert all(row["split"] == by_group[row["group_id"]] for row in rows)
    assert set(by_group.values()) == {"train", "selection", "test"}


def test_a_folder_is_read_in_the_order_of_names(save, tmp_path):
    save(raw_table(3, id=["c", "d", "e"]), "data/part-1.parquet", row_group_size=2)
    save(raw_table(2, id=["a", "b"]), "data/part-0.parquet")
    (tmp_path / "data" / "notes.txt").write_text("not data")
    config = config_for(tmp_path / "data", rows_per_shard=2)
    assert [row["row_id"] for row in rows_of(config)] == list("abcde")
    assert [piece.num_rows for piece in open_source(config).pieces()] == [2, 2, 1]


def test_pieces_gather_row_groups_up_to_a_shard(save):
    path = save(raw_table(10), row_group_size=3)  # 3, 3, 3, 1
    sizes = {
        rows: [piece.num_rows for piece in open_source(config_for(path, rows_per_shard=rows)).pieces()]
        for rows in (1, 4, 6, 100)
    }
    assert sizes == {1: [3, 3, 3, 1], 4: [3, 3, 4], 6: [6, 4], 100: [10]}


def test_identity_follows_the_files(save, tmp_path):
    path = save(raw_table())
    config = config_for(path)
    before = source_identity(config)
    assert source_identity(config) == before
    os.utime(path, ns=(1, 1))
    assert source_identity(config) != before


@pytest.mark.parametrize(
    ("table", "settings", "message"),
    [
        (
            raw_table(),
            {"columns": {"captions": "texts"}},
            r"column 'texts' is missing; columns found: id, image, caption, captions, labels",
        ),
        (
            raw_table(caption=None, captions=None),
            {},
            "'caption' is missing; column 'captions' is missing|"
            "'captions' is missing; column 'caption' is missing",
        ),
        (raw_table(image=None), {}, "column 'image' is missing"),
        (raw_table(), {"columns": {"image": "picture"}}, "column 'picture' is missing"),
        (raw_table(), {"columns": {"caption": None, "captions": None}}, "one of caption and captions"),
        (
            raw_table(image=[1.0] * 6),
            {},
            "must hold encoded image bytes or names of image files",
        ),
        (raw_table(boxes=[[1.0]] * 6), {}, "column 'boxes' must be list<struct<label, x, y, w, h>>"),
        (raw_table(id=[["a"]] * 6), {}, "column 'id' must hold one value per row"),
        (raw_table(labels=[[["a"]]] * 6), {}, "column 'labels' must hold texts"),
        (raw_table(split=["train", "dev"] * 3), {}, r"unknown split \['dev'\] in column 'split'"),
        (raw_table(), {"where": {"sauce": ["x"]}}, "data.where names the column 'sauce'"),
        (raw_table(), {"where": {"labels": ["x"]}}, "data.where needs one value per row"),
        (raw_table(), {"where": {"source": ["x"]}}, "no row passes data.where"),
    ],
)
def test_unusable_files_are_refused_when_opened(save, table, settings, message):
    with pytest.raises(ValueError, match=message):
        open_source(config_for(save(table), **settings))


def test_two_columns_are_enough(save):
    table = raw_table().select(["image", "caption"]).rename_columns(["image", "text"])
    config = config_for(save(table), columns={"caption": "text"})
    rows = rows_of(config)
    assert [row["captions"] for row in rows] == [[f"caption {i}"] for i in range(6)]
    assert {row["split"] for row in rows} <= {"train", "selection", "test"}
    assert all(row["labels"] == [] and row["class_name"] is None for row in rows)
    notes = open_source(config).notes
    assert "no column 'split': rows are divided 80/10/10 by a hash" in notes
    assert "no column 'labels'" in notes
    assert open_source(config_for(save(raw_table()))).notes == []


def test_where_can_leave_an_unknown_split_out(save):
    table = raw_table(split=["train", "dev"] * 3)
    assert len(rows_of(config_for(save(table), where={"split": ["train"]}))) == 3


def test_absent_and_foreign_files_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"nothing\.parquet' does not exist"):
        open_source(config_for(tmp_path / "nothing.parquet"))
    with pytest.raises(ValueError, match=r"no \*\.parquet file below"):
        open_source(config_for(tmp_path))
    (tmp_path / "words.parquet").write_text("not parquet")
    with pytest.raises(ValueError, match=r"words\.parquet' is not a readable Parquet file"):
        open_source(config_for(tmp_path / "words.parquet"))


@pytest.mark.parametrize("source", ["scenes", "scenes:huge", "parquet:", "cvs:x", "/data/x.parquet"])
def test_unknown_sources_are_refused(source):
    with pytest.raises(ValueError, match=r"data\.source must be (scenes:)?<"):
        open_source(DataConfig(source=source))


def test_scenes_are_cut_by_split_and_shard():
    config = DataConfig(num_train=25, num_selection=4, num_test=10, rows_per_shard=10)
    rows = rows_of(config, with_images=False)
    assert [row["row_id"] for row in rows[22:28]] == [
        *(f"quick-train-{i:06d}" for i in (22, 23, 24)),
        *(f"quick-selection-{i:06d}" for i in (0, 1, 2)),
    ]
    assert [piece.num_rows for piece in open_source(config).pieces()] == [10, 10, 5, 4, 10]
    assert source_identity(config) != source_identity(config.model_copy(update={"seed": 1}))


@pytest.mark.ray
def test_pairs_as_a_ray_dataset(ray_session, save):
    config = config_for(save(raw_table(10), row_group_size=3), rows_per_shard=3)
    rows = pair_dataset(open_source(config)).take_all()
    assert sorted(row["row_id"] for row in rows) == sorted(row["row_id"] for row in rows_of(config))
    scenes = DataConfig(source="scenes:tokens", num_train=5, num_selection=2, num_test=2, rows_per_shard=4)
    assert pair_dataset(open_source(scenes)).count() == 9


@pytest.mark.shared_data
def test_chest_x_rays_of_one_source(shared_data):
    config = config_for(shared_data / "cxr.parquet", where={"source": ["nih256"]})
    rows = rows_of(config, with_images=False)
    assert len(rows) == 1000
    assert {row["source"] for row in rows} == {"nih256"}
    assert {row["split"] for row in rows} == {"train", "selection", "test"}
    assert sum("Pneumonia" in row["labels"] for row in rows) == 474
    assert sum(bool(row["boxes"]) for row in rows) == 44
