"""CheXpert trees as a source: labels, views, splits, captions with and without reports, and refusals."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipelines.config import DataConfig
from pipelines.sources.chest_labels import LABELS, LabelPolicy, caption_of, sentences_of
from pipelines.sources.open_source import open_source, source_identity
from pipelines.sources.source_spec import absolute_places
from tests.medical_fixtures import (
    PLUS_HEADER,
    chexpert_row,
    radiograph,
    write_chexpert,
    write_csv,
    write_image,
)
from tests.source_fixtures import data_config, problems_of, rows_of, written

FIRST = "train/patient00001/study1/view1_frontal"


def train_rows() -> list[dict[str, str]]:
    return [
        chexpert_row(f"{FIRST}.jpg", Edema="1.0", Pneumonia="-1.0", Pleural_Effusion="0.0"),
        chexpert_row("train/patient00001/study2/view2_lateral.jpg", No_Finding="1.0"),
        chexpert_row("train/patient00002/study1/view1_frontal.jpg", Fracture="1.0", Support_Devices="1.0"),
    ]


def valid_rows() -> list[dict[str, str]]:
    return [chexpert_row("valid/patient64541/study1/view1_frontal.jpg", **dict.fromkeys(["Edema"], "0.0"))]


@pytest.fixture
def root(tmp_path):
    return write_chexpert(
        tmp_path / "CheXpert-v1.0-small", {"train.csv": train_rows(), "valid.csv": valid_rows()}
    )


def config(root, **settings) -> DataConfig:
    return data_config(f"chexpert:{root}", **settings)


def test_rows_of_a_small_tree(root):
    rows = rows_of(config(root))
    assert [row["row_id"] for row in rows] == [
        FIRST,
        "train/patient00001/study2/view2_lateral",
        "train/patient00002/study1/view1_frontal",
        "valid/patient64541/study1/view1_frontal",
    ]
    assert rows[0] | {"split": ""} == {
        "row_id": FIRST,
        "image": radiograph(0),
        "captions": ["a chest X-ray with edema"],
        "sentences": ["there is edema", "there is no pleural effusion"],
        "labels": ["Edema"],
        "class_name": None,
        "group_id": "patient00001",
        "source": "chexpert",
        "split": "",
        "boxes": None,
        "unknown_labels": ["Pneumonia"],
    }
    assert rows[1]["labels"] == ["No Finding"]
    assert rows[1]["captions"] == ["a chest X-ray with no finding"]
    assert rows[2]["captions"] == ["a chest X-ray with fracture and support devices"]
    assert rows[2]["sentences"] == ["there is fracture", "there are support devices"]
    assert rows[3]["captions"] == ["a chest X-ray with no certain finding"]


@pytest.mark.parametrize(
    ("settings", "labels", "sentences"),
    [
        ({}, ["Edema"], ["there is edema", "there is no pleural effusion"]),
        ({"blank": "ignore"}, ["Edema"], ["there is edema", "there is no pleural effusion"]),
        (
            {"uncertain": "positive"},
            ["Edema", "Pneumonia"],
            ["there is edema", "there is pneumonia", "there is no pleural effusion"],
        ),
        (
            {"uncertain": "negative"},
            ["Edema"],
            ["there is edema", "there is no pneumonia", "there is no pleural effusion"],
        ),
    ],
)
def test_uncertain_labels_follow_the_setting(root, settings, labels, sentences):
    row = rows_of(config(root, **settings))[0]
    assert (row["labels"], row["sentences"]) == (labels, sentences)


def test_every_value_is_present_absent_or_open():
    values = {"Edema": 1, "Pneumonia": 0, "Fracture": -1}
    policy = LabelPolicy("ignore", "ignore")
    assert policy.present(values) == ["Edema"]
    assert policy.absent(values) == ["No Finding", "Pneumonia"]
    policy = LabelPolicy("positive", "negative")
    assert policy.present(values) == ["Edema", "Fracture"]
    assert sorted(policy.present(values) + policy.absent(values)) == sorted(LABELS)
    assert caption_of({}, policy, template="shows {}") == "shows no certain finding"
    assert sentences_of({"No Finding": 1, "Support Devices": 1}, policy) == ["there are support devices"]


@pytest.mark.parametrize(
    ("views", "numbers"), [("frontal", [0, 2, 3]), ("lateral", [1]), ("all", [0, 1, 2, 3])]
)
def test_views_are_chosen(root, views, numbers):
    everything = rows_of(config(root))
    assert rows_of(config(root, views=views)) == [everything[number] for number in numbers]


def test_without_a_test_table_a_tenth_of_the_training_patients_select(tmp_path):
    rows = [
        chexpert_row(f"train/patient{patient:05d}/study{study}/view1_frontal.jpg", Edema="1.0")
        for patient in range(80)
        for study in (1, 2)
    ]
    root = write_chexpert(tmp_path, {"train.csv": rows, "valid.csv": valid_rows()})
    found = rows_of(config(root))
    splits = {row["group_id"]: set() for row in found}
    for row in found:
        splits[row["group_id"]].add(row["split"])
    assert all(len(named) == 1 for named in splits.values())
    assert splits.pop("patient64541") == {"test"}
    held = sum(named == {"selection"} for named in splits.values())
    assert 3 <= held <= 16  # 8 expected of 80
    assert sum(named == {"train"} for named in splits.values()) == 80 - held
    notes = open_source(config(root)).notes
    assert "no table for selection: a tenth each of the training patients, by a hash" in notes


def test_with_a_test_table_the_validation_set_selects(root):
    # The published table of the test set has labels only.
    rows = [{"Path": "test/patient64741/study1/view1_frontal.jpg", "Edema": "1.0", "Pneumonia": "0.0"}]
    write_csv(root / "test_labels.csv", "Path,Edema,Pneumonia", rows)
    write_image(root / rows[0]["Path"])
    found = rows_of(config(root, views="frontal"))
    assert [row["split"] for row in found] == ["train", "train", "selection", "test"]
    assert found[-1]["labels"] == ["Edema"]
    assert [row["split"] for row in rows_of(config(root, split="train"))] == ["train"] * 5
    named = config(root, split_names={"valid.csv": "test", "test.csv": "selection"})
    assert [row["split"] for row in rows_of(named)][-2:] == ["test", "selection"]


def test_captions_come_from_reports_where_these_are_given(root):
    reports = [
        {
            "path_to_image": f"{FIRST}.jpg",
            "section_findings": "Edema of 1.5 cm.\nHeart is normal.",
            "section_impression": "1. Mild pulmonary edema.\n2. No pneumothorax, compared with ___.",
        },
        {"path_to_image": "train/patient00001/study2/view2_lateral.jpg", "section_impression": " "},
    ]
    write_csv(root / "df_chexpert_plus_240401.csv", PLUS_HEADER, reports)
    first, second, third, _ = rows_of(config(root))
    assert first["captions"] == [
        "Edema of 1.5 cm. Heart is normal. 1. Mild pulmonary edema. 2. No pneumothorax, compared with ___."
    ]
    assert first["sentences"] == [
        "Edema of 1.5 cm.",
        "Heart is normal.",
        "Mild pulmonary edema.",
        "No pneumothorax, compared with ___.",
    ]
    assert first["labels"] == ["Edema"]
    assert second["problem"] == {
        "reason": "empty_section",
        "message": "the report has no findings and no impression",
    }
    assert third["problem"]["reason"] == "missing_report"
    [impression, *_] = rows_of(config(root, sections="impression"))
    assert impression["sentences"] == first["sentences"][2:]
    [labelled, *_] = rows_of(config(root, reports="labels"))
    assert labelled["captions"] == ["a chest X-ray with edema"]
    assert any("for 2 of 4 images" in note for note in open_source(config(root)).notes)


def test_reports_may_lie_elsewhere(root, tmp_path):
    table = write_csv(
        tmp_path / "texts.csv",
        "path_to_image,section_impression",
        [{"path_to_image": f"{FIRST}.jpg", "section_impression": "Mild edema."}],
    )
    before = source_identity(config(root, reports=str(table)))
    assert rows_of(config(root, reports=str(table)))[0]["captions"] == ["Mild edema."]
    table.write_text("path_to_image,section_findings\n")
    assert source_identity(config(root, reports=str(table))) != before
    with pytest.raises(ValueError, match=r"lacks the columns \['path_to_image'"):
        open_source(config(root, reports=str(root / "train.csv")))


def test_rows_that_cannot_be_used_are_counted(root, tmp_path):
    table = root / "train.csv"
    blanks = "," * 14
    extra = [
        f"CheXpert-v1.0-small/{FIRST}x.jpg,Male,1,Frontal,AP{blanks}",  # no such image
        f"elsewhere/view1_frontal.jpg,Male,1,Frontal,AP{blanks}",
        "CheXpert-v1.0-small/train/patient00003/study1/view1_frontal.jpg,Male,1,Frontal",
        f"CheXpert-v1.0-small/train/patient00004/study1/view1_frontal.jpg,Male,1,Frontal,AP,2.0{blanks[1:]}",
    ]
    table.write_bytes(
        table.read_bytes()
        + "\n".join(extra).encode()
        + b"\nno\xff,fields"
        + f"\nCheXpert-v1.0-small/train/patient\xe9/study1/x.jpg,,,Frontal,{blanks}\n".encode("latin-1")
    )
    rows = rows_of(config(root))
    assert problems_of(rows) == {
        f"{FIRST}x": "missing_image",
        "train:elsewhere/view1_frontal.jpg": "malformed_row",
        "train:malformed:0": "malformed_row",
        "train:malformed:1": "malformed_row",
        "train/patient00004/study1/view1_frontal": "invalid_label",
        "train:": "undecodable_text",
    }
    report = written(config(root), tmp_path / "out")
    assert report.num_rows == 10
    assert len(report.quarantined) == 6
    messages = {row["row_id"]: row["message"] for row in report.quarantined}
    assert messages[f"{FIRST}x"] == f"no file '{root}/{FIRST}x.jpg'"
    assert messages["train:malformed:0"].endswith("record 7: 4 fields, the header has 19")
    assert messages["train/patient00004/study1/view1_frontal"].endswith(
        "No Finding must be 1, 0, -1 or blank, found '2.0'"
    )


def test_pieces_hold_ranges_of_the_rows(root):
    everything = rows_of(config(root))
    assert rows_of(config(root, rows_per_shard=2)) == everything
    assert [piece.num_rows for piece in open_source(config(root, rows_per_shard=3)).pieces()] == [3, 1]


def test_images_may_lie_elsewhere_and_be_png(root, tmp_path):
    moved = tmp_path / "films"
    for row in [*train_rows(), *valid_rows()]:
        write_image(moved / row["Path"].partition("/")[2].replace(".jpg", ".png"), 7)
    rows = rows_of(config(root, image_root=str(moved)))
    assert {row["image"] for row in rows} == {radiograph(7)}


def test_the_row_filter_knows_the_columns_of_the_tables(root):
    rows = rows_of(config(root, where={"AP/PA": ["AP"]}, reports="labels"))
    assert [row["row_id"] for row in rows] == [
        row["row_id"] for row in rows_of(config(root, views="frontal"))
    ]


def test_the_place_of_reports_is_absolute_in_a_config():
    assert absolute_places({"reports": "texts.csv"}) == {"reports": str(Path.cwd() / "texts.csv")}
    for kept in ("labels", "s3://bucket/texts.csv", None):
        assert absolute_places({"reports": kept}) == {"reports": kept}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"where": {"ViewPosition": ["PA"]}},
            "data.where names the column 'ViewPosition'; columns found: Path",
        ),
        ({"where": {"Sex": ["X"]}}, r"no row passes data.where=\{'Sex': \['X'\]\} and data.views=all"),
        ({"columns": {"group": "patient"}}, r"chexpert: knows its own columns; take out \['group'\]"),
        (
            {"image_root": "/nowhere"},
            "none of 4 images of the chexpert tables is there, such as 'train/patient",
        ),
        ({"split": "dev"}, "data.split must be one of"),
        ({"reports": "/nowhere.csv"}, "data.reports: '/nowhere.csv' is no file"),
    ],
)
def test_what_does_not_fit_is_refused(root, settings, message):
    with pytest.raises(ValueError, match=message):
        open_source(config(root, **settings))


def test_another_folder_is_refused_with_what_is_there(root, tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(
        ValueError, match=r"looked for train\.csv, valid\.csv, test\.csv.*found CheXpert-v1.0-small/"
    ):
        open_source(config(tmp_path))
    with pytest.raises(ValueError, match=f"did you mean 'chexpert:{root}'"):
        open_source(config(tmp_path))
    with pytest.raises(ValueError, match="does not exist"):
        open_source(config(tmp_path / "none"))
    with pytest.raises(ValueError, match="is a file; chexpert: takes the folder"):
        open_source(config(root / "train.csv"))
    for header, message in (
        ("", "has no header"),
        ("Path,\ra", "has no readable header: new-line character"),
        ("Path,Sex,Path\n", r"more than one column \['Path'\]"),
    ):
        (root / "train.csv").write_text(header)
        with pytest.raises(ValueError, match=message):
            open_source(config(root))
    (root / "train.csv").write_text("Path,Sex\n")
    with pytest.raises(ValueError, match=r"lacks the columns .*'No Finding'.*columns found: Path, Sex"):
        open_source(config(root))
