"""Small trees in the layouts of CheXpert and MIMIC-CXR-JPG: real headers, synthetic images and reports."""

from __future__ import annotations

import csv
import gzip
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from pipelines.sources.chest_labels import LABELS

# Columns as the first line of a file.
CHEXPERT_HEADER = ",".join(("Path", "Sex", "Age", "Frontal/Lateral", "AP/PA", *LABELS))
PLUS_HEADER = (
    "path_to_image,path_to_dcm,frontal_lateral,ap_pa,deid_patient_id,patient_report_date_order,report,"
    "section_narrative,section_clinical_history,section_history,section_comparison,section_technique,"
    "section_procedure_comments,section_findings,section_impression,section_end_of_impression,"
    "section_summary,section_accession_number,age,sex,race,ethnicity,interpreter_needed,insurance_type,recent_bmi,"
    "deceased,split"
)
METADATA_HEADER = (
    "dicom_id,subject_id,study_id,PerformedProcedureStepDescription,ViewPosition,Rows,Columns,StudyDate,"
    "StudyTime,ProcedureCodeSequence_CodeMeaning,ViewCodeSequence_CodeMeaning,"
    "PatientOrientationCodeSequence_CodeMeaning"
)
SPLIT_HEADER = "dicom_id,study_id,subject_id,split"
# The tables of labels are in alphabetical order.
LABELS_HEADER = ",".join(("subject_id", "study_id", *sorted(LABELS)))
SECTIONED_HEADER = "study,impression,findings,last_paragraph,comparison"


def radiograph(number: int = 0, *, size: tuple[int, int] = (24, 20)) -> bytes:
    """A grey JPEG; another number gives other pixels."""
    pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0]), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="JPEG")
    return file.getvalue()


def write_csv(path: Path, header: str, rows: Sequence[Mapping[str, str]]) -> Path:
    """A CSV with what rows do not name left blank; packed when its name ends in .gz."""
    text = io.StringIO()
    writer = csv.DictWriter(text, header.split(","), restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    data = text.getvalue().encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def write_image(path: Path, number: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(radiograph(number))
    return path


def chexpert_row(name: str, **values: str) -> dict[str, str]:
    """A row of train.csv; `name` is the place below the root, labels are named with underscores."""
    labels = {label: values.pop(label.replace(" ", "_"), "") for label in LABELS}
    view = "Frontal" if "frontal" in name else "Lateral"
    about = {
        "Sex": "Female",
        "Age": "68",
        "Frontal/Lateral": view,
        "AP/PA": "AP" if view == "Frontal" else "",
    }
    return {"Path": f"CheXpert-v1.0-small/{name}", **about, **labels, **values}


def write_chexpert(root: Path, tables: Mapping[str, Sequence[Mapping[str, str]]]) -> Path:
    """A tree of tables by the names of their files, with an image for every row."""
    for name, rows in tables.items():
        write_csv(root / name, CHEXPERT_HEADER, rows)
        for number, row in enumerate(rows):
            write_image(root / row["Path"].partition("/")[2], number)
    return root


def metadata_row(subject: int, study: int, image: str, view: str = "PA") -> dict[str, str]:
    return {
        "dicom_id": image,
        "subject_id": str(subject),
        "study_id": str(study),
        "PerformedProcedureStepDescription": "CHEST (PA AND LAT), PORTABLE",
        "ViewPosition": view,
        "Rows": "3056",
        "Columns": "2544",
        "StudyDate": "21800506",
        "StudyTime": "213014.531",
    }


def report_path(subject: int, study: int) -> str:
    return f"p{str(subject)[:2]}/p{subject}/s{study}.txt"


def image_path(row: Mapping[str, str]) -> str:
    subject, study = row["subject_id"], row["study_id"]
    return f"files/p{subject[:2]}/p{subject}/s{study}/{row['dicom_id']}.jpg"


def write_mimic(
    root: Path,
    images: Sequence[Mapping[str, str]],
    *,
    splits: Mapping[str, str] | None = None,
    labels: Sequence[Mapping[str, str]] | None = None,
    reports: Mapping[tuple[int, int], str] | None = None,
    ending: str = ".csv.gz",
) -> Path:
    """A tree of images (rows of `metadata_row`), splits by image, reports by (patient, study)."""
    write_csv(root / f"mimic-cxr-2.0.0-metadata{ending}", METADATA_HEADER, images)
    for number, row in enumerate(images):
        write_image(root / image_path(row), number)
    if splits is not None:
        keys = ("dicom_id", "study_id", "subject_id")
        rows = [
            {**{key: row[key] for key in keys}, "split": splits[row["dicom_id"]]}
            for row in images
            if row["dicom_id"] in splits
        ]
        write_csv(root / f"mimic-cxr-2.0.0-split{ending}", SPLIT_HEADER, rows)
    if labels is not None:
        write_csv(root / f"mimic-cxr-2.0.0-chexpert{ending}", LABELS_HEADER, labels)
    for (subject, study), report in (reports or {}).items():
        place = root / "files" / report_path(subject, study)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(report)
    return root
