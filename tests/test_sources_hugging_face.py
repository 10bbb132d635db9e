"""Datasets saved by Hugging Face datasets as a source; written here as that library writes them."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from pipelines.sources.arrow_stream import read_batch, scan_stream
from pipelines.sources.open_source import open_source, source_identity
from tests.source_fixtures import data_config, picture, problems_of, rows_of

IMAGE = {"_type": "Image"}
STRING = {"dtype": "string", "_type": "Value"}
LABEL = {"names": ["cat", "dog"], "_type": "ClassLabel"}


def saved(
    folder: Path, table: pa.Table, features: dict[str, Any], *, num_files: int = 1, batch: int = 3
) -> Path:
    """What `Dataset.save_to_disk` leaves: state, info and Arrow streams."""
    folder.mkdir(parents=True)
    names = [f"data-{i:05d}-of-{num_files:05d}.arrow" for i in range(num_files)]
    per_file = -(-len(table) // num_files)
    for number, name in enumerate(names):
        with pa.ipc.new_stream(folder / name, table.schema) as stream:
            stream.write_table(table.slice(number * per_file, per_file), max_chunksize=batch)
    state = {"_data_files": [{"filename": name} for name in names], "_fingerprint": "0", "_split": "train"}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text(json.dumps({"features": features}))
    return folder


def animals(num_rows: int, *, start: int = 0) -> pa.Table:
    numbers = range(start, start + num_rows)
    return pa.table(
        {
            "picture": [{"bytes": picture(i), "path": f"{i}.png"} for i in numbers],
            "text": [f"caption {i}" for i in numbers],
            "label": pa.array([i % 2 for i in numbers], pa.int64()),
            "tags": pa.array([[i % 2, 1] for i in numbers], pa.list_(pa.int64())),
        }
    )


FEATURES = {"picture": IMAGE, "text": STRING, "label": LABEL, "tags": {"feature": LABEL, "_type": "List"}}


def test_columns_are_known_by_their_features(tmp_path):
    folder = saved(tmp_path / "pets", animals(7), FEATURES)
    rows = rows_of(data_config(f"hf:{folder}", columns={"labels": "tags"}))
    assert [row["row_id"] for row in rows] == [f"pets:{i:09d}" for i in range(7)]
    assert [row["image"] for row in rows] == [picture(i) for i in range(7)]
    assert rows[3]["captions"] == ["caption 3"]
    assert [row["class_name"] for row in rows[:3]] == ["cat", "dog", "cat"]
    assert [row["labels"] for row in rows[:2]] == [["cat", "dog"], ["dog"]]
    assert {row["source"] for row in rows} == {"pets"}
    assert rows_of(data_config(f"hf:file://{folder}", columns={"labels": "tags"})) == rows


@pytest.mark.parametrize("tags", [[LABEL], {"feature": LABEL, "_type": "Sequence"}])
def test_lists_of_classes_as_older_versions_write_them(tmp_path, tags):
    folder = saved(tmp_path / "pets", animals(2), {**FEATURES, "tags": tags})
    rows = rows_of(data_config(f"hf:{folder}", columns={"labels": "tags"}))
    assert [row["labels"] for row in rows] == [["cat", "dog"], ["dog"]]


def test_features_may_be_in_the_arrow_files_alone(tmp_path):
    metadata = {"huggingface": json.dumps({"info": {"features": FEATURES}})}
    folder = saved(tmp_path / "pets", animals(2).replace_schema_metadata(metadata), {})
    (folder / "dataset_info.json").unlink()
    assert [row["class_name"] for row in rows_of(data_config(f"hf:{folder}"))] == ["cat", "dog"]


def test_unknown_classes_are_null(tmp_path):
    table = animals(3).set_column(2, "label", pa.array([-1, None, 2], pa.int64()))
    rows = rows_of(data_config(f"hf:{saved(tmp_path / 'pets', table, FEATURES)}"))
    assert [row["class_name"] for row in rows] == [None, None, None]


@pytest.fixture
def splits(tmp_path):
    """Three splits, as `DatasetDict.save_to_disk` leaves them."""
    for number, split in enumerate(("train", "validation", "test")):
        saved(tmp_path / split, animals(4, start=10 * number), FEATURES, num_files=2)
    (tmp_path / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "validation", "test"]}))
    return tmp_path


def test_folders_are_splits(splits):
    rows = rows_of(data_config(f"hf:{splits}"))
    assert [row["split"] for row in rows] == ["train"] * 4 + ["selection"] * 4 + ["test"] * 4
    assert [row["row_id"] for row in rows[3:6]] == [
        "train:000000003",
        "validation:000000000",
        "validation:000000001",
    ]
    assert "no column 'split'" not in " ".join(open_source(data_config(f"hf:{splits}")).notes)
    some = rows_of(data_config(f"hf:{splits}", where={"split": ["test"], "label": ["1"]}))
    assert [row["row_id"] for row in some] == ["test:000000001", "test:000000003"]
    hashed = rows_of(data_config(f"hf:{splits}", columns={"split": None}))
    assert [row["split"] for row in hashed] != [row["split"] for row in rows]
    assert {row["split"] for row in rows_of(data_config(f"hf:{splits}", split="test"))} == {"test"}


def test_unknown_splits_are_refused_unless_left_out(splits):
    (splits / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "extra"]}))
    (splits / "test").rename(splits / "extra")
    with pytest.raises(ValueError, match=r"unknown split \['extra'\]"):
        open_source(data_config(f"hf:{splits}"))
    assert len(rows_of(data_config(f"hf:{splits}", where={"split": ["train"]}))) == 4


@pytest.mark.parametrize("rows_per_shard", [1, 4, 100])
def test_pieces_gather_batches(tmp_path, rows_per_shard):
    folder = saved(tmp_path / "pets", animals(10), FEATURES, num_files=2, batch=2)
    everything = rows_of(data_config(f"hf:{folder}", rows_per_shard=1000))
    config = data_config(f"hf:{folder}", rows_per_shard=rows_per_shard)
    assert rows_of(config) == everything
    sizes = [piece.num_rows for piece in open_source(config).pieces()]
    assert sizes == {1: [2, 2, 1, 2, 2, 1], 4: [4, 3, 3], 100: [10]}[rows_per_shard]


def test_images_may_lie_beside_the_dataset(tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    (images / "a.png").write_bytes(picture(1))
    table = pa.table({"image": [{"bytes": None, "path": "a.png"}, {"bytes": picture(2), "path": None}]})
    folder = saved(tmp_path / "pets", table.append_column("text", pa.array(["x", "y"])), {"image": IMAGE})
    rows = rows_of(data_config(f"hf:{folder}", image_root=str(images)))
    assert [row["image"] for row in rows] == [picture(1), picture(2)]


def test_a_class_is_put_into_words(tmp_path):
    folder = saved(tmp_path / "pets", animals(2).drop_columns("text"), FEATURES)
    rows = rows_of(data_config(f"hf:{folder}", caption_template="a photo of a {}"))
    assert [row["captions"] for row in rows] == [["a photo of a cat"], ["a photo of a dog"]]


def test_batches_are_found_without_reading_them(tmp_path):
    folder = saved(tmp_path / "pets", animals(8), FEATURES)
    [file] = folder.glob("*.arrow")
    stream = scan_stream(str(file), size=file.stat().st_size)
    assert stream.fault is None
    assert [batch.num_rows for batch in stream.batches] == [3, 3, 2]
    with pa.ipc.open_stream(file) as reader:
        expected = list(reader)
    assert [read_batch(str(file), batch, schema=stream.schema) for batch in stream.batches] == expected


def test_a_file_cut_off_keeps_its_whole_batches(tmp_path):
    folder = saved(tmp_path / "pets", animals(9), FEATURES)
    [file] = folder.glob("*.arrow")
    whole = scan_stream(str(file), size=file.stat().st_size)
    file.write_bytes(file.read_bytes()[: whole.batches[2].start + 100])
    config = data_config(f"hf:{folder}")
    rows = rows_of(config)
    assert len(rows) == 7
    assert problems_of(rows) == {f"{file.name}:end": "unreadable_shard"}
    assert any("damaged or cut off at byte" in note for note in open_source(config).notes)


def test_damaged_files_end_in_rows_or_a_refusal(tmp_path):
    folder = saved(tmp_path / "pets", animals(9), FEATURES)
    [file] = folder.glob("*.arrow")
    whole = file.read_bytes()
    generator = random.Random(0)
    outcomes = set()
    for _ in range(150):
        data = bytearray(whole)
        data[generator.randrange(len(data))] ^= 1 << generator.randrange(8)
        file.write_bytes(data)
        try:
            rows = rows_of(data_config(f"hf:{folder}"))
        except ValueError as error:
            outcomes.add("refused" if "Arrow stream" in str(error) or "column" in str(error) else str(error))
        else:
            # The end mark alone may be what is damaged.
            outcomes.add(("counted" if problems_of(rows) else "kept") if 1 <= len(rows) <= 10 else len(rows))
    assert outcomes == {"kept", "counted", "refused"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"columns": {"caption": "words"}},
            "column 'words' is missing; columns found: picture, text, label, tags",
        ),
        ({"where": {"lang": ["de"]}}, "data.where names the column 'lang'"),
        ({"where": {"tags": ["1"]}}, "data.where needs one value per row"),
    ],
)
def test_wrong_columns_are_refused(tmp_path, settings, message):
    folder = saved(tmp_path / "pets", animals(2), FEATURES)
    with pytest.raises(ValueError, match=message):
        open_source(data_config(f"hf:{folder}", **settings))


def test_what_is_no_saved_dataset_is_refused(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        open_source(data_config(f"hf:{tmp_path}/none"))
    with pytest.raises(ValueError, match=r"has neither state.json nor dataset_dict.json"):
        open_source(data_config(f"hf:{tmp_path}"))
    folder = saved(tmp_path / "pets", animals(4), FEATURES, num_files=2)
    next(folder.glob("*.arrow")).unlink()
    with pytest.raises(ValueError, match=r"lacks 1 of its files, the first is 'data-"):
        open_source(data_config(f"hf:{folder}"))
    (folder / "state.json").write_text("{")
    with pytest.raises(ValueError, match="is not valid JSON"):
        open_source(data_config(f"hf:{folder}"))


def test_identity_follows_the_files(tmp_path):
    config = data_config(f"hf:{saved(tmp_path / 'pets', animals(4), FEATURES)}")
    before = source_identity(config)
    [file] = (tmp_path / "pets").glob("*.arrow")
    file.write_bytes(file.read_bytes() + b"x")
    assert source_identity(config) != before
