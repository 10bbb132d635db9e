"""COCO caption files as a source: both layouts, where images lie, and entries that are damaged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipelines.sources.open_source import open_source, source_identity
from tests.source_fixtures import data_config, picture, problems_of, rows_of


def coco(root: Path, name: str, numbers: range, *, folder: str = "images", **changes: Any) -> Path:
    """A caption file with two captions per image, and its images."""
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    (root / folder).mkdir(parents=True, exist_ok=True)
    for number in numbers:
        (root / folder / f"{number:012d}.png").write_bytes(picture(number))
    content: dict[str, Any] = {
        "info": {},
        "images": [{"id": n, "file_name": f"{n:012d}.png", "width": 8, "height": 6} for n in numbers],
        "annotations": [
            {"id": 10 * n + i, "image_id": n, "caption": f"caption {i} of {n}"}
            for i in range(2)
            for n in numbers
        ],
    }
    path = root / "annotations" / name
    path.write_text(json.dumps({**content, **changes}))
    return path


def test_images_come_with_all_their_captions(tmp_path):
    path = coco(tmp_path, "captions.json", range(5))
    rows = rows_of(data_config(f"coco:{path}", rows_per_shard=2))
    assert [row["row_id"] for row in rows] == ["0", "1", "2", "3", "4"]
    assert rows[3]["captions"] == ["caption 0 of 3", "caption 1 of 3"]
    assert [row["image"] for row in rows] == [picture(n) for n in range(5)]
    assert {row["source"] for row in rows} == {"coco"}
    assert rows_of(data_config(f"coco:file://{path}")) == rows
    assert [
        piece.num_rows for piece in open_source(data_config(f"coco:{path}", rows_per_shard=2)).pieces()
    ] == [2, 2, 1]


def test_files_name_their_splits_and_folders(tmp_path):
    coco(tmp_path, "captions_train2017.json", range(3), folder="train2017")
    coco(tmp_path, "captions_val2017.json", range(2, 4), folder="val2017")
    (tmp_path / "annotations" / "instances_val2017.json").write_text("{}")
    rows = rows_of(data_config(f"coco:{tmp_path}/annotations"))
    assert [(row["row_id"], row["split"]) for row in rows] == [
        ("captions_train2017/0", "train"),
        ("captions_train2017/1", "train"),
        ("captions_train2017/2", "train"),
        ("captions_val2017/2", "selection"),
        ("captions_val2017/3", "selection"),
    ]
    assert rows_of(data_config(f"coco:{tmp_path}/annotations/captions_{{train,val}}2017.json")) == rows
    as_test = rows_of(data_config(f"coco:{tmp_path}/annotations/captions_val2017.json", split="test"))
    assert [(row["row_id"], row["split"]) for row in as_test] == [("2", "test"), ("3", "test")]


def test_rows_without_a_split_are_divided_by_hash(tmp_path):
    config = data_config(f"coco:{coco(tmp_path, 'captions.json', range(60))}")
    assert {row["split"] for row in rows_of(config)} == {"train", "selection", "test"}
    assert any("divided 80/10/10" in note for note in open_source(config).notes)
    path = coco(tmp_path, "captions_train2017.json", range(60))
    hashed = data_config(f"coco:{path}", columns={"split": None})
    assert {row["split"] for row in rows_of(hashed)} == {"train", "selection", "test"}
    assert not any("divided" in note for note in open_source(data_config(f"coco:{path}")).notes)


def test_the_layout_with_sentences_and_splits(tmp_path):
    images = [
        {
            "filepath": "val2014",
            "filename": "0.png",
            "cocoid": 7,
            "split": "train",
            "sentences": [{"raw": "a"}, {"raw": "b"}],
        },
        {"filename": "1.png", "imgid": 8, "split": "restval", "sentences": [{"raw": "c"}]},
        {"filename": "2.png", "imgid": 9, "split": "val", "sentences": [{"tokens": []}]},
    ]
    (tmp_path / "val2014").mkdir()
    for name in ("val2014/0.png", "1.png", "2.png"):
        (tmp_path / name).write_bytes(picture())
    path = tmp_path / "dataset_coco.json"
    path.write_text(json.dumps({"images": images, "dataset": "coco"}))
    with pytest.raises(ValueError, match=r"unknown split \['restval'\] in column 'split'"):
        open_source(data_config(f"coco:{path}", image_root=str(tmp_path)))
    names = {"train": "train", "restval": "train", "val": "selection"}
    rows = rows_of(data_config(f"coco:{path}", split_names=names))
    assert [(row["row_id"], row["captions"], row["split"], bool(row["image"])) for row in rows[:2]] == [
        ("7", ["a", "b"], "train", True),
        ("8", ["c"], "train", True),
    ]
    assert problems_of(rows) == {"dataset_coco: image 2": "malformed_row"}


def test_damaged_entries_are_counted(tmp_path):
    images = [
        {"id": 0, "file_name": "000000000000.png"},
        {"id": 1},
        "image",
        {"id": 3, "file_name": "000000000009.png"},
        {"id": 4, "file_name": "000000000000.png"},
    ]
    annotations = [
        {"image_id": 0, "caption": "fine"},
        {"image_id": 0, "caption": ["no", "text"]},
        {"image_id": 5, "caption": "of nothing"},
        {"image_id": 3, "caption": "\ud800"},
        None,
    ]
    path = coco(tmp_path, "captions.json", range(1), images=images, annotations=annotations)
    rows = rows_of(data_config(f"coco:{path}"))
    assert problems_of(rows) == {
        "captions: image 1": "malformed_row",
        "captions: image 2": "malformed_row",
        "3": "missing_image",
        "captions: annotation 1": "malformed_row",
        "captions: annotation 2": "missing_image",
        "captions: annotation 3": "undecodable_text",
        "captions: annotation 4": "malformed_row",
    }
    assert [row["captions"] for row in rows if not row.get("problem")] == [["fine"], []]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": {}}, "must hold a list 'images'; keys found: info, images, annotations"),
        ({"annotations": 3}, "must hold a list 'annotations'"),
        (
            {"annotations": [{"bbox": [], "image_id": 1}]},
            "no annotation has a caption; the first has keys found: bbox",
        ),
        ({"annotations": []}, "no annotation has a caption"),
    ],
)
def test_other_layouts_are_refused(tmp_path, changes, message):
    path = coco(tmp_path, "captions.json", range(2), **changes)
    with pytest.raises(ValueError, match=message):
        open_source(data_config(f"coco:{path}"))


def test_what_cannot_be_read_is_refused(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        open_source(data_config(f"coco:{tmp_path}/none.json"))
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(ValueError, match="is not valid JSON"):
        open_source(data_config(f"coco:{tmp_path}/x.json"))
    with pytest.raises(ValueError, match=r"no captions_\*.json or dataset_\*.json below '.*'; found x.json"):
        open_source(data_config(f"coco:{tmp_path}"))
    path = coco(tmp_path, "captions_val2017.json", range(2))
    with pytest.raises(ValueError, match=r"data\.where names columns, and COCO caption files have none"):
        open_source(data_config(f"coco:{path}", where={"split": ["val"]}))
    (tmp_path / "images").rename(tmp_path / "elsewhere")
    with pytest.raises(
        ValueError, match=r"none of the first 2 images is in any of '.*/images', '.*/val2017'"
    ):
        open_source(data_config(f"coco:{path}"))
    assert len(rows_of(data_config(f"coco:{path}", image_root=str(tmp_path / "elsewhere")))) == 2


def test_identity_follows_the_file(tmp_path):
    config = data_config(f"coco:{coco(tmp_path, 'captions.json', range(2))}")
    before = source_identity(config)
    coco(tmp_path, "captions.json", range(3))
    assert source_identity(config) != before
    assert len(rows_of(config)) == 3
