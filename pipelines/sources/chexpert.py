"""CheXpert as a source: `chexpert:<folder of train.csv>`, as CheXpert-v1.0, -small and CheXpert Plus lie.

CheXpert has no reports: captions are its labels put into words, unless a CSV of CheXpert Plus gives the
sections of the reports.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.sources.chest_labels import CAPTION_TEMPLATE, LABELS, LabelPolicy
from pipelines.sources.files import files_named
from pipelines.sources.image_files import NAMED_IMAGES_NOTE, ImageFiles
from pipelines.sources.radiograph_files import (
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
from pipelines.sources.report_texts import LabelTexts, TextReader, scan_report_table
from pipelines.sources.rows import Problem, problem
from pipelines.sources.source import SourceSettings
from pipelines.sources.source_spec import FROM_LABELS
from pipelines.sources.splits import hashed_split, split_rule
from pipelines.sources.text_columns import header_of, read_text_columns, refuse_absent
from pipelines.storage import join

KIND = "chexpert"
# The test set was published later, its labels alone.
_TABLES = {"train": ("train.csv",), "valid": ("valid.csv",), "test": ("test.csv", "test_labels.csv")}
_PLUS_TABLE = r"df_chexpert_plus_\d+\.csv"
_PLUS_SECTIONS = {"findings": "section_findings", "impression": "section_impression"}
_PLACE = r"(?:^|/)(?P<id>(?:train|valid|test)/patient\d+/study\d+/[^/]+)\.(?:jpg|jpeg|png)$"


@dataclass(frozen=True)
class ChexpertLayout:
    """Row ids are the paths of the images from the split on, without ending."""

    ending: str = ".jpg"

    def image(self, row_id: str) -> str:
        return row_id + self.ending

    def patient(self, row_id: str) -> str:
        return row_id.split("/")[1]


def open_chexpert(settings: SourceSettings, *, root: str) -> RadiographSource:
    """Join the tables of a CheXpert tree.

    Raises:
        ValueError: no CheXpert tree, an absent column, no row left by the filters, or images of which none of
            a sample is there.
    """
    refuse_column_names(settings, kind=KIND)
    found = list_root(root, kind=KIND)
    tables = _tables(found)
    if not tables:
        looked_for = ", ".join(name for names in _TABLES.values() for name in names)
        raise wrong_root(root, kind=KIND, looked_for=looked_for, found=found, is_root=_is_root)
    uris = [join(root, name) for name in tables.values()]
    indices = [_index(uri, settings, said=said) for said, uri in zip(tables, uris, strict=True)]
    index = pa.concat_tables(indices, promote_options="default")
    usable = usable_ids(index, settings, root=root)
    splits, notes = _splits(index, list(tables), settings=settings)
    folder, ending = image_place(
        [settings.image_root or root],
        lambda ending: [name + ending for name in sample(usable)],
        kind=KIND,
    )
    policy = LabelPolicy(settings.uncertain, settings.blank)
    reports = _report_table(settings, found, root=root)
    texts, starts, said = _texts(settings, policy, index["row_id"], reports=reports)
    return RadiographSource(
        kind=KIND,
        root=root,
        index=index.drop_columns("said").append_column("report", starts).append_column("split", splits),
        images=ImageFiles(folder),
        layout=ChexpertLayout(ending),
        texts=texts,
        policy=policy,
        files=files_named([*uris, *filter(None, [reports])])[0],
        notes=[*notes, *said, NAMED_IMAGES_NOTE],
        rows_per_piece=settings.rows_per_shard,
    )


def _tables(found: Sequence[str]) -> dict[str, str]:
    """The table of each split that is there."""
    named = {split: next((name for name in names if name in found), None) for split, names in _TABLES.items()}
    return {split: name for split, name in named.items() if name is not None}


def _is_root(found: Sequence[str]) -> bool:
    return bool(_tables(found))


def _index(uri: str, settings: SourceSettings, *, said: str) -> pa.Table:
    """The images of one table: their ids, faults and labels, and the split it is of."""
    header = header_of(uri)
    labels = [label for label in LABELS if label in header]
    refuse_absent(["Path", *([] if labels else LABELS)], header, where=uri)
    extra = [name for name in ("Frontal/Lateral", *settings.where) if name in header]
    columns = read_text_columns(uri, list(dict.fromkeys(["Path", *labels, *extra])))
    kept = kept_rows(
        columns,
        conditions=settings.where,
        views=_views(columns.table),
        wanted=settings.views,
        where=uri,
    )
    values, wrong = read_labels(kept, labels, where=uri)
    places = pc.struct_field(pc.extract_regex(kept["Path"], _PLACE), "id")
    faults = [
        known or bad or (None if place else _no_place(path, uri=uri))
        for known, bad, place, path in zip(
            kept["fault"].to_pylist(), wrong, places.to_pylist(), kept["Path"].to_pylist(), strict=True
        )
    ]
    # What has no place in the tree is named by what stands there instead.
    ids = pc.coalesce(places, pc.binary_join_element_wise(said, kept["Path"], ":"))
    index = index_table(ids, faults=faults, labels=values, said=pa.array([said] * len(kept)))
    return with_malformed(index, columns.malformed, name=said)


def _no_place(path: str, *, uri: str) -> Problem:
    message = f"'{uri}': Path must end in <split>/patient<n>/study<n>/<image>, found '{path}'"
    return problem("malformed_row", message)


def _views(table: pa.Table) -> pa.ChunkedArray:
    """Which view each image shows; the test table leaves it to the name of the file."""
    if "Frontal/Lateral" in table.column_names:
        return pc.utf8_lower(table["Frontal/Lateral"])
    return pc.struct_field(pc.extract_regex(table["Path"], r"_(?P<view>frontal|lateral)\."), "view")


def _splits(
    index: pa.Table, tables: Sequence[str], *, settings: SourceSettings
) -> tuple[pa.ChunkedArray, list[str]]:
    """The split of each row, which `data.split_names` may say of a table (`valid.csv`).

    What no table provides is taken from the training patients, a tenth each.
    """
    rule = split_rule(settings.split_names, settings.split)
    # Radiologists labelled the small sets: without a test set, the other one is reported on.
    usual = {"train": "train", "valid": "selection" if "test" in tables else "test", "test": "test"}
    named = {said: rule.fixed or rule.names.get(f"{said}.csv", usual[said]) for said in tables}
    meant = pa.array([named.get(said, "") for said in index["said"].to_pylist()])
    missing = sorted({"selection", "test"} - set(named.values())) if rule.fixed is None else []
    notes = [] if rule.fixed else [f"{said}.csv is the split {split}" for said, split in named.items()]
    if missing and "train" in named.values():
        without = " and ".join(missing)
        notes.append(f"no table for {without}: a tenth each of the training patients, by a hash")
        patients = pc.struct_field(pc.extract_regex(index["row_id"], r"^\w+/(?P<id>\w+)/"), "id")
        held = _held_out(patients.combine_chunks(), missing)
        meant = pc.if_else(pc.equal(meant, "train"), held, meant)
    return pa.chunked_array([meant]), notes


def _held_out(patients: pa.Array, missing: Sequence[str]) -> pa.Array:
    """Per row a missing split, or train."""
    coded = patients.dictionary_encode()
    drawn = [hashed_split(patient) for patient in coded.dictionary.to_pylist()]
    return pa.array([split if split in missing else "train" for split in drawn], pa.string()).take(
        coded.indices
    )


def _report_table(settings: SourceSettings, found: Sequence[str], *, root: str) -> str | None:
    if settings.reports == FROM_LABELS:
        return None
    if settings.reports is not None:
        return settings.reports
    name = newest(found, _PLUS_TABLE)
    return None if name is None else join(root, name)


def _texts(
    settings: SourceSettings, policy: LabelPolicy, row_ids: pa.ChunkedArray, *, reports: str | None
) -> tuple[TextReader, pa.Array, list[str]]:
    """Where texts come from, and for each row the record that is its report."""
    if reports is None:
        template = settings.caption_template or CAPTION_TEMPLATE
        note = "no reports: captions and sentences are made of the labels"
        return LabelTexts(policy, template), pa.nulls(len(row_ids), pa.int64()), [note]
    table = scan_report_table(reports, key="path_to_image", sections=_PLUS_SECTIONS, wanted=settings.sections)
    keys = pc.struct_field(pc.extract_regex(pa.array(table.keys, pa.string()), _PLACE), "id")
    return table.reader, *table.starts_of(row_ids, keys=keys)
