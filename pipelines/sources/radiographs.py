"""Radiographs in folders of patients and studies, as rows: what CheXpert and MIMIC-CXR have in common.

The driver joins the tables that lie beside the images to an index, one row per image; tasks read images and
reports. The index of all of MIMIC-CXR takes some forty megabytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.schemas import UNKNOWN_LABELS
from pipelines.sources.chest_labels import LabelPolicy, parse_label
from pipelines.sources.files import SourceFile, identity_of
from pipelines.sources.image_files import ImageFiles
from pipelines.sources.report_texts import TextReader, Texts
from pipelines.sources.row_filter import arrow_filter
from pipelines.sources.rows import Problem, pair_row, pairs_table, problem
from pipelines.sources.source import Piece, SourceSettings
from pipelines.sources.text_columns import TextColumns

# Films are large: some megabytes each.
_ROWS_PER_TABLE = 32

FAULT = pa.field("fault", pa.struct([("reason", pa.string()), ("message", pa.string())]))


class Layout(Protocol):
    """From the id of a row to its place in the tree."""

    def image(self, row_id: str) -> str: ...
    def patient(self, row_id: str) -> str: ...


@dataclass(frozen=True, kw_only=True)
class RadiographSource:
    """Images of an index, one row each; rows of a patient are one group.

    Args:
        index: see `index_table`.
        texts: gives captions and sentences.
        files: the tables the index was made of.
    """

    kind: str
    root: str
    index: pa.Table
    images: ImageFiles
    layout: Layout
    texts: TextReader
    policy: LabelPolicy
    files: list[SourceFile]
    notes: list[str]
    rows_per_piece: int

    @property
    def default_source(self) -> str:
        return self.kind

    @property
    def identity(self) -> str:
        return identity_of(f"{self.kind}:{self.root}", self.files)

    def pieces(self) -> list[Piece]:
        size, num_rows = self.rows_per_piece, len(self.index)
        return [
            Piece(number, min(size, num_rows - start), start)
            for number, start in enumerate(range(0, num_rows, size))
        ]

    def read(self, piece: Piece, *, with_images: bool = True) -> Iterator[pa.Table]:
        rows = self.index.slice(piece.spec, piece.num_rows).to_pylist()
        for start in range(0, len(rows), _ROWS_PER_TABLE):
            yield self._table(rows[start : start + _ROWS_PER_TABLE], with_images=with_images)

    def _table(self, rows: list[dict[str, Any]], *, with_images: bool) -> pa.Table:
        usable = [row for row in rows if row["fault"] is None]
        texts = iter(self.texts.read(usable))
        contents = [b""] * len(usable)
        problems: list[Problem | None] = [None] * len(usable)
        if with_images:
            contents, problems = self.images.read([self.layout.image(row["row_id"]) for row in usable])
        images = iter(zip(contents, problems, strict=True))
        made = []
        for row in rows:
            if row["fault"] is not None:
                made.append(pair_row(row["row_id"], source=self.kind, problem=row["fault"]))
            else:
                data, wrong = next(images)
                made.append(self._row(row, next(texts), image=data, wrong=wrong))
        return pairs_table(made, with_images=with_images)

    def _row(
        self, row: Mapping[str, Any], texts: Texts, *, image: bytes, wrong: Problem | None
    ) -> dict[str, Any]:
        return pair_row(
            row["row_id"],
            image=image,
            captions=texts.captions,
            sentences=list(texts.sentences),
            labels=self.policy.present(row),
            group_id=self.layout.patient(row["row_id"]),
            source=self.kind,
            split=row["split"],
            problem=texts.problem or wrong,
            **self._open(row),
        )

    def _open(self, row: Mapping[str, Any]) -> dict[str, list[str]]:
        """The labels of a row that are ignored, under a policy that ignores any."""
        if not self.policy.ignores:
            return {}
        return {UNKNOWN_LABELS.name: self.policy.unknown(row)}


def index_table(
    row_ids: pa.ChunkedArray, *, faults: Sequence[Problem | None], labels: pa.Table, **columns: pa.Array
) -> pa.Table:
    """One row per image: `row_id`, `fault` (null: nothing is known against it), a value of each label that
    the files have, `split` and `report`, which is the text reader's business."""
    named = {"row_id": row_ids, FAULT.name: pa.array(faults, FAULT.type), **columns}
    for label in labels.column_names:
        named[label] = labels[label]
    return pa.table(named)


def with_malformed(index: pa.Table, malformed: Sequence[Problem], *, name: str) -> pa.Table:
    """The index with a row for each record that could not be read."""
    if not malformed:
        return index
    ids = [f"{name}:malformed:{number}" for number in range(len(malformed))]
    added = pa.table({"row_id": ids, FAULT.name: pa.array(malformed, FAULT.type)})
    return pa.concat_tables([index, added], promote_options="default")


def usable_ids(index: pa.Table, settings: SourceSettings, *, root: str) -> list[str]:
    """The ids of the rows nothing is known against.

    Raises:
        ValueError: there is none.
    """
    usable: list[str] = index.filter(pc.field(FAULT.name).is_null())["row_id"].to_pylist()
    if not usable:
        filters = f"data.where={dict(settings.where)} and data.views={settings.views}"
        faults = [fault["message"] for fault in index[FAULT.name].to_pylist()]
        unread = f"; what is there cannot be used: {faults[0]}" if faults else ""
        raise ValueError(f"'{root}': no row passes {filters}{unread}")
    return usable


def kept_rows(
    columns: TextColumns, *, conditions: Mapping[str, list[str]], views: pa.Array, wanted: str, where: str
) -> pa.Table:
    """The rows that pass the row filter and show a wanted view, with `fault`; what cannot be read stays.

    Raises:
        ValueError: the filter names an unknown column.
    """
    table = columns.table.append_column(FAULT, pa.array(columns.undecodable, FAULT.type))
    passes = pa.array([True] * len(table), pa.bool_()) if wanted == "all" else pc.equal(views, wanted)
    table = table.append_column("shows", passes)
    keeps = pc.field("shows")
    if conditions:
        keeps &= arrow_filter(conditions, columns.table.schema, where=where)
    return table.filter(keeps | pc.field(FAULT.name).is_valid()).drop_columns("shows")


def read_labels(
    table: pa.Table, labels: Sequence[str], *, where: str
) -> tuple[pa.Table, list[Problem | None]]:
    """Values of labels as int8, and what is wrong with rows whose value is none."""
    columns: dict[str, pa.Array] = {}
    wrong: list[Problem | None] = [None] * len(table)
    for label in labels:
        columns[label], is_wrong = parse_label(table[label])
        for row in pc.indices_nonzero(is_wrong).to_pylist():
            value = table[label][row].as_py()
            found = f"'{where}': {label} must be 1, 0, -1 or blank, found '{value}'"
            wrong[row] = wrong[row] or problem("invalid_label", found)
    return pa.table(columns) if columns else pa.table({"row": [0] * len(table)}).select([]), wrong
