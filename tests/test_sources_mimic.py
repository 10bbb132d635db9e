"""MIMIC-CXR-JPG trees as a source: studies that share a report, splits, labels, what is missing, refusals."""

from __future__ import annotations

import pytest

from pipelines import storage
from pipelines.config import DataConfig
from pipelines.sources.open_source import open_source, source_identity
from pipelines.sources.source import pair_dataset
from tests.medical_fixtures import (
    LABELS_HEADER,
    SECTIONED_HEADER,
    image_path,
    metadata_row,
    radiograph,
    report_path,
    write_csv,
    write_mimic,
)
from tests.s3_server import running
from tests.source_fixtures import data_config, problems_of, rows_of, written

# Ray itself sets options it has deprecated whenever a data context is made.
pytestmark = pytest.mark.filterwarnings(r"ignore::DeprecationWarning:ray\.")

REPORT = """                                 FINAL REPORT
 EXAMINATION:  CHEST (PA AND LAT)

 INDICATION:  ___F with cough

 FINDINGS:

 There is mild pulmonary edema.  Dr. ___ was told at 9:05 a.m.

 IMPRESSION:

 1. Mild edema.
 2. No focal consolidation or effusion.
"""
IMAGES = [
    metadata_row(10000032, 50414267, "02aa804e-bde0afdd", "PA"),
    metadata_row(10000032, 50414267, "174413ec-4ec4c1f7", "LATERAL"),
    metadata_row(10000032, 53189527, "2a2277a9-b0ded155", "AP"),
    metadata_row(11000764, 57375967, "096052b7-d256dc40", ""),
]
SPLITS = {
    "02aa804e-bde0afdd": "train",
    "174413ec-4ec4c1f7": "train",
    "2a2277a9-b0ded155": "validate",
    "096052b7-d256dc40": "test",
}
FIRST, SECOND, THIRD, LAST = (f"p{row['subject_id']}/s{row['study_id']}/{row['dicom_id']}" for row in IMAGES)


def labels() -> list[dict[str, str]]:
    return [
        {"subject_id": "10000032", "study_id": "50414267", "Edema": "1.0", "Pneumonia": "-1.0"},
        {"subject_id": "10000032", "study_id": "53189527", "No Finding": "1.0"},
    ]


def reports() -> dict[tuple[int, int], str]:
    return {
        (10000032, 50414267): REPORT,
        (10000032, 53189527): " FINAL REPORT\n INDICATION: Cough.\n\n The lungs are clear today.\n",
        (11000764, 57375967): " FINDINGS:\n\n Clear lungs again.\n\n IMPRESSION:\n",
    }


@pytest.fixture
def root(tmp_path):
    return write_mimic(tmp_path / "2.0.0", IMAGES, splits=SPLITS, labels=labels(), reports=reports())


def config(root, **settings) -> DataConfig:
    return data_config(f"mimic-cxr:{root}", **settings)


def test_images_of_a_study_share_its_report(root):
    rows = rows_of(config(root))
    assert [row["row_id"] for row in rows] == [FIRST, SECOND, THIRD, LAST]
    told = "There is mild pulmonary edema. Dr. ___ was told at 9:05 a.m."
    assert rows[0] == {
        "row_id": FIRST,
        "image": radiograph(0),
        "captions": [f"{told} 1. Mild edema. 2. No focal consolidation or effusion."],
        "sentences": [
            "There is mild pulmonary edema.",
            "Dr. ___ was told at 9:05 a.m.",
            "No focal consolidation or effusion.",
        ],
        "labels": ["Edema"],
        "class_name": None,
        "group_id": "p10000032",
        "source": "mimic-cxr",
        "split": "train",
        "boxes": None,
        "unknown_labels": ["Pneumonia"],
    }
    assert rows[1]["image"] == radiograph(1)
    assert rows[1]["captions"] == rows[0]["captions"]
    assert [row["split"] for row in rows] == ["train", "train", "selection", "test"]
    assert (rows[2]["labels"], rows[2]["captions"]) == (["No Finding"], ["The lungs are clear today."])
    # A study without labels has none; it is not refused.
    assert (rows[3]["labels"], rows[3]["group_id"]) == ([], "p11000764")


@pytest.mark.parametrize(
    ("sections", "captions"),
    [
        (
            "findings",
            ["There is mild pulmonary edema. Dr. ___ was told at 9:05 a.m.", "The lungs are clear today."],
        ),
        ("impression", ["1. Mild edema. 2. No focal consolidation or effusion.", None]),
    ],
)
def test_one_section_alone(root, sections, captions):
    rows = rows_of(config(root, sections=sections))
    assert [*rows[0]["captions"], *(rows[2]["captions"] or [None])] == captions
    expected = {} if sections == "findings" else {THIRD: "empty_section", LAST: "empty_section"}
    assert problems_of(rows) == expected


@pytest.mark.parametrize(("views", "ids"), [("frontal", [FIRST, THIRD]), ("lateral", [SECOND])])
def test_views_are_chosen(root, views, ids):
    assert [row["row_id"] for row in rows_of(config(root, views=views))] == ids


def test_labels_follow_the_policy_and_come_from_the_first_labeler(root):
    rows = rows_of(config(root, uncertain="positive"))
    assert [row["labels"] for row in rows] == [["Edema", "Pneumonia"]] * 2 + [["No Finding"], []]
    write_csv(root / "mimic-cxr-2.0.0-negbio.csv", LABELS_HEADER, [{"study_id": "50414267", "Fracture": "1"}])
    assert rows_of(config(root))[0]["labels"] == ["Edema"]
    (root / "mimic-cxr-2.0.0-chexpert.csv.gz").unlink()
    assert rows_of(config(root))[0]["labels"] == ["Fracture"]
    assert "labels: mimic-cxr-2.0.0-negbio.csv, for 2 of 4 images" in open_source(config(root)).notes


def test_what_is_missing_is_counted(root, tmp_path):
    (root / image_path(IMAGES[1])).unlink()
    (root / "files" / report_path(10000032, 53189527)).unlink()
    (root / "files" / report_path(11000764, 57375967)).write_bytes(b"FINDINGS: caf\xe9")
    rows = rows_of(config(root))
    assert problems_of(rows) == {SECOND: "missing_image", THIRD: "missing_report", LAST: "undecodable_text"}
    report = written(config(root), tmp_path / "out")
    assert (report.num_rows, len(report.quarantined)) == (4, 3)
    messages = [row["message"] for row in report.quarantined]
    assert messages[1] == f"no file '{root}/files/{report_path(10000032, 53189527)}'"


def test_records_that_do_not_fit_are_counted(root):
    write_csv(
        root / "mimic-cxr-2.0.0-split.csv.gz",
        "dicom_id,study_id,subject_id,split",
        [{"dicom_id": image, "split": split} for image, split in SPLITS.items() if split != "test"],
    )
    path = root / "mimic-cxr-2.0.0-metadata.csv"
    write_csv(path, "dicom_id,subject_id,study_id,ViewPosition", IMAGES_SHORT)
    path.write_text(path.read_text() + "a,b\nimage,patient,5,PA\n")
    (root / "mimic-cxr-2.0.0-chexpert.csv.gz").unlink()
    bad = [{"subject_id": "10000032", "study_id": "50414267", "Edema": "yes"}]
    write_csv(root / "mimic-cxr-2.0.0-chexpert.csv", LABELS_HEADER, bad)
    rows = rows_of(config(root))
    assert problems_of(rows) == {
        FIRST: "invalid_label",
        SECOND: "invalid_label",
        "ppatient/s5/image": "malformed_row",
        "metadata:malformed:0": "malformed_row",
    }
    # An image that the table of splits lacks belongs to none.
    assert {row["row_id"]: row["split"] for row in rows}[LAST] == ""


IMAGES_SHORT = [
    {key: row[key] for key in ("dicom_id", "subject_id", "study_id", "ViewPosition")} for row in IMAGES
]


@pytest.mark.parametrize("ending", [".csv", ".csv.gz"])
def test_a_table_of_sections_comes_before_the_files(root, ending):
    records = [
        {"study": "s53189527", "findings": 'Clear lungs,\nno "edema" seen.', "impression": " "},
        {"study": "s50414267", "impression": "Mild edema.\n"},
        {"study": "s57375967", "last_paragraph": "Heart is large.", "comparison": "None."},
        {"study": "s1", "findings": "Nobody's."},
    ]
    write_csv(root / f"mimic_cxr_sectioned{ending}", SECTIONED_HEADER, records)
    rows = rows_of(config(root, rows_per_shard=3))
    assert [row["captions"] for row in rows] == [
        ["Mild edema."],
        ["Mild edema."],
        ['Clear lungs, no "edema" seen.'],
        ["Heart is large."],
    ]
    assert problems_of(rows_of(config(root, sections="impression"))) == {
        THIRD: "empty_section",
        LAST: "empty_section",
    }
    table = root / f"mimic_cxr_sectioned{ending}"
    before = source_identity(config(root))
    write_csv(table, SECTIONED_HEADER, records[:2])
    assert source_identity(config(root)) != before
    assert problems_of(rows_of(config(root))) == {LAST: "missing_report"}


def test_damaged_records_of_sections_are_said(root):
    table = root / "mimic_cxr_sectioned.csv"
    write_csv(table, SECTIONED_HEADER, [{"study": "s50414267", "impression": "Mild edema."}])
    table.write_text(table.read_text() + "s53189527,too,few\n")
    notes = open_source(config(root)).notes
    assert "1 reports cannot be read; the first: line 3: 3 fields, the header has 5" in notes
    assert problems_of(rows_of(config(root))) == {THIRD: "missing_report", LAST: "missing_report"}


def test_reports_may_lie_elsewhere(root, tmp_path):
    place = tmp_path / "mimic-cxr" / "files" / report_path(10000032, 50414267)
    place.parent.mkdir(parents=True)
    place.write_text("IMPRESSION: Another text.")
    rows = rows_of(config(root, reports=str(tmp_path / "mimic-cxr")))
    assert rows[0]["captions"] == ["Another text."]
    assert problems_of(rows) == {THIRD: "missing_report", LAST: "missing_report"}
    for name in reports():
        (root / "files" / report_path(*name)).unlink()
    with pytest.raises(ValueError, match=r"no report such as 'p10/p10000032/s50414267.txt' below .*labels"):
        open_source(config(root))
    rows = rows_of(config(root, reports="labels"))
    assert [row["captions"] for row in rows[1:3]] == [
        ["a chest X-ray with edema"],
        ["a chest X-ray with no finding"],
    ]


def test_without_splits_patients_are_divided(root):
    (root / "mimic-cxr-2.0.0-split.csv.gz").unlink()
    rows = rows_of(config(root))
    assert rows[0]["split"] == rows[1]["split"] == rows[2]["split"] != ""
    assert any("80/10/10 by a hash of the patient" in note for note in open_source(config(root)).notes)
    assert {row["split"] for row in rows_of(config(root, split="test"))} == {"test"}


def test_the_row_filter_knows_the_metadata(root):
    rows = rows_of(config(root, where={"ViewPosition": ["AP", ""]}))
    assert [row["row_id"] for row in rows] == [THIRD, LAST]


def test_pieces_hold_ranges_of_the_rows(root):
    everything = rows_of(config(root))
    for size in (1, 3):
        assert rows_of(config(root, rows_per_shard=size)) == everything


@pytest.mark.ray
def test_rows_are_read_in_tasks(root, ray_session):
    found = pair_dataset(open_source(config(root, rows_per_shard=2))).take_all()
    assert sorted(row["row_id"] for row in found) == sorted([FIRST, SECOND, THIRD, LAST])


def test_a_tree_in_a_bucket_is_read_like_one_on_a_disk(root, tmp_path, monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "tester")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    here = rows_of(config(root))
    with running(tmp_path, bucket="lab") as server:
        place = server.uri("lab", "tree")
        for file in (path for path in root.rglob("*") if path.is_file()):
            fs, key = storage.filesystem(storage.join(place, str(file.relative_to(root))))
            # Not packed once more because of its name.
            with fs.open_output_stream(key, compression=None) as stream:
                stream.write(file.read_bytes())
        assert rows_of(config(place)) == here
        table = write_csv(
            tmp_path / "mimic_cxr_sectioned.csv",
            SECTIONED_HEADER,
            [{"study": "s50414267", "impression": "Mild edema."}],
        )
        storage.write_bytes(storage.join(place, table.name), table.read_bytes())
        assert rows_of(config(place, views="lateral"))[0]["captions"] == ["Mild edema."]
        with pytest.raises(ValueError, match=r"found tree/; did you mean 'mimic-cxr:s3://lab/tree\?"):
            open_source(config(server.uri("lab", "")))
    storage._s3.cache_clear()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"where": {"Sex": ["F"]}}, r"lacks the columns \['Sex'\]; columns found: dicom_id, subject_id"),
        ({"where": {"ViewPosition": ["X"]}}, "no row passes data.where"),
        ({"columns": {"id": "dicom_id"}}, r"mimic-cxr: knows its own columns; take out \['id'\]"),
        ({"image_root": "/nowhere"}, "none of 4 images of the mimic-cxr tables is there"),
        ({"split_names": {"train": "train"}}, r"unknown split \['test'\] in column 'split'"),
    ],
)
def test_what_does_not_fit_is_refused(root, settings, message):
    with pytest.raises(ValueError, match=message):
        open_source(config(root, **settings))


def test_another_folder_is_refused_with_what_is_there(root, tmp_path):
    with pytest.raises(
        ValueError, match=rf"looked for mimic-cxr-2.*found 2.0.0/; did you mean 'mimic-cxr:{root}'"
    ):
        open_source(config(tmp_path))
    (root / "mimic-cxr-2.0.0-metadata.csv.gz").unlink()
    with pytest.raises(ValueError, match=r"found files/, mimic-cxr-2.0.0-chexpert.csv.gz"):
        open_source(config(root))
