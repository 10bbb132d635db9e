"""Image folders with class names as a source."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pipelines.sources.open_source import open_source, source_identity
from tests.source_fixtures import data_config, picture, problems_of, rows_of, written


def place(root: Path, *names: str) -> Path:
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(picture(number))
    return root


def test_folders_are_classes(tmp_path):
    root = place(tmp_path / "animals", "tabby_cat/0.png", "tabby_cat/deep/1.JPG", "dog/0.webp")
    rows = {row["row_id"]: row for row in rows_of(data_config(f"folder:{root}"))}
    assert set(rows) == {"tabby_cat/0.png", "tabby_cat/deep/1.JPG", "dog/0.webp"}
    row = rows["tabby_cat/deep/1.JPG"]
    assert (row["captions"], row["class_name"]) == (["a photo of a tabby cat"], "tabby cat")
    assert (row["image"], row["source"]) == (picture(1), "animals")
    drawn = rows_of(data_config(f"folder:file://{root}", caption_template="{}, drawn"))
    assert {row["captions"][0] for row in drawn} == {"tabby cat, drawn", "dog, drawn"}


def test_folders_named_like_splits_hold_the_classes(tmp_path):
    root = place(tmp_path, "train/a/0.png", "train/b/1.png", "val/a/2.png", "test/b/3.png")
    rows = rows_of(data_config(f"folder:{root}"))
    assert {row["row_id"]: (row["split"], row["class_name"]) for row in rows} == {
        "train/a/0.png": ("train", "a"),
        "train/b/1.png": ("train", "b"),
        "val/a/2.png": ("selection", "a"),
        "test/b/3.png": ("test", "b"),
    }
    some = rows_of(data_config(f"folder:{root}", where={"split": ["train", "val"], "class": ["a"]}))
    assert {row["row_id"] for row in some} == {"train/a/0.png", "val/a/2.png"}
    assert {row["split"] for row in rows_of(data_config(f"folder:{root}", split="test"))} == {"test"}


def test_a_class_may_be_called_like_a_split(tmp_path):
    root = place(tmp_path, "test/0.png", "cricket/1.png")
    assert {row["class_name"] for row in rows_of(data_config(f"folder:{root}"))} == {"test", "cricket"}


def test_every_piece_is_a_sample_of_the_classes(tmp_path):
    root = place(tmp_path, *(f"{name}/{i}.png" for name in "abcd" for i in range(25)))
    config = data_config(f"folder:{root}", rows_per_shard=40)
    source = open_source(config)
    assert [piece.num_rows for piece in source.pieces()] == [40, 40, 20]
    classes = [row["class_name"] for row in rows_of(config)[:40]]
    assert min(map(classes.count, "abcd")) >= 4
    assert {row["split"] for row in rows_of(config)} == {"train", "selection", "test"}
    assert any("divided 80/10/10" in note for note in source.notes)


def test_other_files_are_noted(tmp_path):
    root = place(tmp_path, "a/0.png", "a/1.png", "top.png", "a/._0.png")
    (root / "a" / "notes.txt").write_text("x")
    (root / "a" / "Makefile").write_text("x")
    config = data_config(f"folder:{root}")
    assert len(rows_of(config)) == 2
    assert "4 of 6 files are no image of a class (.png 4, none 1, .txt 1)" in open_source(config).notes


def test_files_that_vanish_or_are_no_images_are_counted(tmp_path):
    root = place(tmp_path / "data", "a/0.png", "a/1.png", "a/2.png")
    (root / "a" / "1.png").write_text("no image")
    config = data_config(f"folder:{root}")
    source = open_source(config)
    (root / "a" / "0.png").unlink()
    rows = [row for table in source.read(source.pieces()[0]) for row in table.to_pylist()]
    assert problems_of(rows) == {"a/0.png": "missing_image"}
    report = written(config, tmp_path / "out")
    assert [row["reason"] for row in report.quarantined] == ["undecodable_image"]


def test_names_of_any_bytes(tmp_path):
    root = place(tmp_path, "ä ö/0 #?%20.png", "b/line\nbreak.png", "b/2.png")
    # What is no UTF-8 has no name that a row could have.
    os.rename(os.fsencode(root / "b" / "2.png"), os.fsencode(root / "b") + b"/\xff.png")
    rows = rows_of(data_config(f"folder:{root}"))
    images = {row["row_id"]: row["image"] for row in rows}
    assert images == {"ä ö/0 #?%20.png": picture(0), "b/line\nbreak.png": picture(1)}


@pytest.mark.parametrize(
    ("names", "settings", "message"),
    [
        ((), {}, "no image below"),
        (("0.png",), {}, "no image below .*; images are <class>/<name> or <split>/<class>/<name>"),
        (
            ("train/0.png", "test/1.png"),
            {},
            r"has the splits \['test', 'train'\] with images but no folders of classes",
        ),
        (("a/0.png",), {"where": {"class": ["b"]}}, "no image below .* passes data.where"),
        (("a/0.png",), {"where": {"size": ["b"]}}, r"data.where may name class and split of an image folder"),
    ],
)
def test_unusable_folders_are_refused(tmp_path, names, settings, message):
    with pytest.raises(ValueError, match=message):
        open_source(data_config(f"folder:{place(tmp_path, *names)}", **settings))


def test_no_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"there is no folder '.*none'"):
        open_source(data_config(f"folder:{tmp_path}/none"))


@pytest.mark.parametrize("template", ["a photo", "{} and {}", "{name}"])
def test_templates_need_one_place(template):
    with pytest.raises(ValueError, match=r"caption_template must have one \{\} for the class"):
        data_config("folder:x", caption_template=template)


def test_identity_follows_the_files(tmp_path):
    config = data_config(f"folder:{place(tmp_path, 'a/0.png', 'a/1.png')}")
    before = source_identity(config)
    assert source_identity(config) == before
    os.utime(tmp_path / "a" / "1.png", ns=(1, 1))
    assert source_identity(config) != before
