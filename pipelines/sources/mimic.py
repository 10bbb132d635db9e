"""MIMIC-CXR-JPG as a source: `mimic-cxr:<folder of mimic-cxr-2.0.0-metadata.csv.gz>`.

One row per image; the images of a study share its report, found beside the images, in the unpacked archive
of reports of MIMIC-CXR, or in `mimic_cxr_sectioned.csv`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.sources.chest_labels import CAPTION_TEMPLATE, LABELS, LabelPolicy
from pipelines.sources.files import files_named
from pipelines.sources.image_files import NAMED_IMAGES_NOTE, ImageFiles
from pipelines.sources.radiograph_files import (
    count_files,
    image_place,
    list_root,
    newest,
    refuse_column_names,
    sample,
    wrong_root,
)
from pipelines.sources.radiographs import (
    RadiographSource,
    index_table,
    kept_rows,
    read_labels,
    usable_ids,
    with_malformed,
)
from pipelines.sources.report_texts import (
    LabelTexts,
    ReportFiles,
    ReportTable,
    TextReader,
    scan_report_table,
)
from pipelines.sources.rows import Problem, problem
from pipelines.sources.source import SourceSettings
from pipelines.sources.source_spec import FROM_LABELS
from pipelines.sources.splits import BY_HASH, split_rule
from pipelines.sources.text_columns import TextColumns, read_text_columns
from pipelines.storage import join

KIND = "mimic-cxr"
_METADATA, _SPLIT, _LABELS = "metadata", "split", "labels"
_TABLES: Final = {
    _METADATA: (r"mimic-cxr-[\d.]+-metadata\.csv",),
    _SPLIT: (r"mimic-cxr-[\d.]+-split\.csv",),
    # Two labelers read the same reports; the one that CheXpert was labelled with comes first.
    _LABELS: (r"mimic-cxr-[\d.]+-chexpert\.csv", r"mimic-cxr-[\d.]+-negbio\.csv"),
}
_SECTIONED = r"mimic_cxr_sectioned\.csv"
_SECTIONS: Final = {"findings": "findings", "impression": "impression", "body": "last_paragraph"}
_REPORT_FOLDERS = ("files", "mimic-cxr-reports/files", "mimic-cxr-reports", "reports")
_SPLIT_NAMES = {"validate": "selection"}
# `ViewPosition` of the DICOM headers; the others are oblique, or not recorded.
_VIEWS: Final = {
    **dict.fromkeys(("AP", "PA", "AP AXIAL", "AP LLD", "AP RLD", "PA LLD", "PA RLD"), "frontal"),
    **dict.fromkeys(("LATERAL", "LL", "RL", "XTABLE LATERAL"), "lateral"),
}


@dataclass(frozen=True)
class MimicLayout:
    """Row ids are p<patient>/s<study>/<image>, the path of the image from the patient on."""

    ending: str = ".jpg"

    def image(self, row_id: str) -> str:
        return f"{row_id[:3]}/{row_id}{self.ending}"

    def patient(self, row_id: str) -> str:
        return row_id.split("/")[0]


@dataclass(frozen=True)
class _Tree:
    """The root, the names in it, and which of the tables are there."""

    root: str
    names: list[str]
    tables: dict[str, str]

    def uri(self, table: str) -> str:
        return join(self.root, self.tables[table])


def open_mimic(settings: SourceSettings, *, root: str) -> RadiographSource:
    """Join the tables of a MIMIC-CXR-JPG tree.

    Raises:
        ValueError: no such tree, an absent column, an unknown split, no row left by the filters, or images or
            reports of which none of a sample is there.
    """
    refuse_column_names(settings, kind=KIND)
    names = list_root(root, kind=KIND)
    tree = _Tree(root, names, _tables(names))
    if _METADATA not in tree.tables:
        looked_for = "mimic-cxr-2.0.0-metadata.csv(.gz)"
        raise wrong_root(root, kind=KIND, looked_for=looked_for, found=names, is_root=_is_root)
    index, notes = _index(tree, settings)
    usable = usable_ids(index, settings, root=root)
    base = settings.image_root or root
    folder, ending = image_place(
        [join(base, "files"), base],
        lambda ending: [MimicLayout(ending).image(row_id) for row_id in sample(usable)],
        kind=KIND,
    )
    layout, policy = MimicLayout(ending), LabelPolicy(settings.uncertain, settings.blank)
    texts, reports, said = _texts(tree, index, settings=settings, policy=policy, usable=usable)
    tables = [tree.uri(table) for table in tree.tables]
    if isinstance(texts, ReportTable):
        tables.append(texts.uri)
    return RadiographSource(
        kind=KIND,
        root=root,
        index=index.drop_columns(["dicom_id", "study_id"]).append_column("report", reports),
        images=ImageFiles(folder),
        layout=layout,
        texts=texts,
        policy=policy,
        files=files_named(tables)[0],
        notes=[*notes, *said, NAMED_IMAGES_NOTE],
        rows_per_piece=settings.rows_per_shard,
    )


def _tables(names: Sequence[str]) -> dict[str, str]:
    found = {
        table: next(filter(None, (newest(names, pattern) for pattern in patterns)), None)
        for table, patterns in _TABLES.items()
    }
    return {table: name for table, name in found.items() if name is not None}


def _is_root(names: Sequence[str]) -> bool:
    return _METADATA in _tables(names)


def _index(tree: _Tree, settings: SourceSettings) -> tuple[pa.Table, list[str]]:
    """One row per image of the metadata with its labels and split, and what to know of these."""
    uri = tree.uri(_METADATA)
    needed = ["dicom_id", "subject_id", "study_id", "ViewPosition"]
    columns = read_text_columns(uri, list(dict.fromkeys([*needed, *settings.where])))
    views = pa.array([_VIEWS.get(view) for view in columns.table["ViewPosition"].to_pylist()], pa.string())
    kept = kept_rows(columns, conditions=settings.where, views=views, wanted=settings.views, where=uri)
    parts = ["p", kept["subject_id"], "/s", kept["study_id"], "/", kept["dicom_id"], ""]
    ids = pc.binary_join_element_wise(*parts)
    is_place = pc.match_substring_regex(ids, r"^p\d{3,}/s\d+/[^/]+$").to_pylist()
    labels, wrong, said_labels = _labels(tree, kept["study_id"])
    faults = [
        known or (None if fits else _no_place(row_id, uri=uri)) or bad
        for known, fits, row_id, bad in zip(
            kept["fault"].to_pylist(), is_place, ids.to_pylist(), wrong, strict=True
        )
    ]
    splits, said_splits = _splits(tree, kept, settings=settings)
    index = index_table(
        ids, faults=faults, labels=labels, split=splits, dicom_id=kept["dicom_id"], study_id=kept["study_id"]
    )
    return with_malformed(index, columns.malformed, name=_METADATA), [*said_splits, *said_labels]


def _no_place(row_id: str, *, uri: str) -> Problem:
    message = f"'{uri}': subject_id and study_id must be numbers and dicom_id a name, found {row_id}"
    return problem("malformed_row", message)


def _labels(tree: _Tree, studies: pa.ChunkedArray) -> tuple[pa.Table, list[Problem | None], list[str]]:
    """Values of the labels of each study, what is wrong with them, and where they are from."""
    if _LABELS not in tree.tables:
        nothing = pa.table({"study_id": studies}).select([])
        return nothing, [None] * len(studies), ["no table of labels (mimic-cxr-2.0.0-chexpert.csv)"]
    uri = tree.uri(_LABELS)
    columns = read_text_columns(uri, ["study_id", *LABELS])
    values, wrong = read_labels(columns.table, LABELS, where=uri)
    at = pc.index_in(studies, value_set=columns.table["study_id"].combine_chunks())
    faults = [None if place is None else wrong[place] for place in at.to_pylist()]
    notes = [f"labels: {tree.tables[_LABELS]}, for {len(at) - at.null_count} of {len(at)} images"]
    return values.take(at), faults, [*notes, *_said_malformed(columns, tree.tables[_LABELS])]


def _splits(tree: _Tree, kept: pa.Table, *, settings: SourceSettings) -> tuple[pa.Array, list[str]]:
    """The split of each image: of the table, or of its patient by a hash."""
    rule = split_rule({**_SPLIT_NAMES, **settings.split_names}, settings.split)
    if rule.fixed is not None:
        return pa.array([rule.fixed] * len(kept)), []
    if _SPLIT not in tree.tables:
        splits = [rule.hashed(f"p{patient}") for patient in kept["subject_id"].to_pylist()]
        return pa.array(splits, pa.string()), [f"no table of splits: {BY_HASH} of the patient"]
    uri = tree.uri(_SPLIT)
    columns = read_text_columns(uri, ["dicom_id", "split"])
    rule.check(pc.unique(columns.table["split"]).to_pylist(), where=uri, column="split")
    at = pc.index_in(kept["dicom_id"], value_set=columns.table["dicom_id"].combine_chunks())
    said = columns.table["split"].take(at).to_pylist()
    splits = pa.array([rule.named(name) for name in said], pa.string())
    return splits, _said_malformed(columns, tree.tables[_SPLIT])


def _said_malformed(columns: TextColumns, name: str) -> list[str]:
    if not columns.malformed:
        return []
    first = columns.malformed[0]["message"]
    return [f"{len(columns.malformed)} records of {name} cannot be read; the first: {first}"]


def _texts(
    tree: _Tree, index: pa.Table, *, settings: SourceSettings, policy: LabelPolicy, usable: Sequence[str]
) -> tuple[TextReader, pa.Array, list[str]]:
    """Where texts come from, what names each row's report, and what to know of it."""
    if settings.reports == FROM_LABELS:
        if _LABELS not in tree.tables:
            raise ValueError(f"data.reports=labels: no table of labels in '{tree.root}'")
        reader = LabelTexts(policy, settings.caption_template or CAPTION_TEMPLATE)
        return reader, pa.nulls(len(index)), ["captions and sentences are made of the labels"]
    sectioned = settings.reports
    if sectioned is None and (name := newest(tree.names, _SECTIONED)):
        sectioned = join(tree.root, name)
    if sectioned is not None and sectioned.partition("?")[0].endswith((".csv", ".csv.gz")):
        scanned = scan_report_table(sectioned, key="study", sections=_SECTIONS, wanted=settings.sections)
        keys = pa.array([key.removeprefix("s") for key in scanned.keys], pa.string())
        return scanned.reader, *scanned.starts_of(index["study_id"], keys=keys)
    folder = _report_folder(tree, usable, given=settings.reports)
    names = pa.array([_report(row_id) for row_id in index["row_id"].to_pylist()], pa.string())
    note = f"texts: {settings.sections} of the reports below '{folder}'"
    return ReportFiles(ImageFiles(folder), settings.sections), names, [note]


def _report(row_id: str) -> str:
    patient, _, rest = row_id.partition("/")
    return f"{patient[:3]}/{patient}/{rest.partition('/')[0]}.txt"


def _report_folder(tree: _Tree, usable: Sequence[str], *, given: str | None) -> str:
    """The folder with most reports of a sample.

    Raises:
        ValueError: nowhere is one.
    """
    if given is not None:
        folders = [join(given, "files"), given]
    else:
        folders = [join(tree.root, name) for name in _REPORT_FOLDERS]
    names = [_report(row_id) for row_id in sample(usable)]
    counts = [count_files(folder, names) for folder in folders]
    if not max(counts):
        raise ValueError(
            f"data.source: no report such as '{names[0]}' below {folders}, and no mimic_cxr_sectioned.csv in "
            f"'{tree.root}'. Unpack mimic-cxr-reports.zip there, name a folder or CSV with data.reports, or "
            "set data.reports=labels to make captions of the labels"
        )
    return folders[counts.index(max(counts))]
