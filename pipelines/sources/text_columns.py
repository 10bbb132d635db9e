"""Whole columns of a CSV file as text: for the small tables that lie beside images and say what these are."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv

from pipelines.sources.remote import open_unzipped
from pipelines.sources.rows import Problem, problem

_MAX_HEADER_BYTES = 1 << 20
# One character per byte: pyarrow stumbles over a malformed record that is no UTF-8, and would not count it.
_BYTES = "latin-1"


@dataclass(frozen=True)
class TextColumns:
    """Columns of a CSV file, never null, and the records that have not as many fields as the header.

    `undecodable` is, per row of the table, whether something is no UTF-8; the text there is empty.
    """

    table: pa.Table
    malformed: list[Problem]
    undecodable: list[Problem | None]


def header_of(uri: str) -> list[str]:
    """The column names of a CSV file.

    Raises:
        ValueError: no header, one that is no text, or a name twice.
    """
    with open_unzipped(uri) as file:
        line = file.readline(_MAX_HEADER_BYTES).decode("utf-8-sig", "replace")
    try:
        names = [name.strip() for name in next(csv.reader([line]), [])]
    except csv.Error as error:
        raise ValueError(f"'{uri}' has no readable header: {error}") from error
    if not any(names):
        raise ValueError(f"'{uri}' has no header")
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"'{uri}' has more than one column {twice}")
    return names


def refuse_absent(names: Iterable[str], found: Sequence[str], *, where: str) -> None:
    """Raise ValueError naming the columns that are not there, and those that are."""
    if absent := [name for name in names if name not in found]:
        raise ValueError(f"'{where}' lacks the columns {absent}; columns found: {', '.join(found)}")


def read_text_columns(uri: str, names: Sequence[str]) -> TextColumns:
    """Read some columns; a record with more or fewer fields than the header is malformed.

    Raises:
        ValueError: an absent column, or no CSV at all.
    """
    found = header_of(uri)
    refuse_absent(names, found, where=uri)
    malformed: list[Problem] = []

    def set_aside(row: pa_csv.InvalidRow) -> str:
        counted = f"{row.actual_columns} fields, the header has {row.expected_columns}"
        malformed.append(problem("malformed_row", f"'{uri}', record {row.number}: {counted}"))
        return "skip"

    with open_unzipped(uri) as file:
        try:
            table = pa_csv.read_csv(
                file,
                # One thread: only then do records have numbers.
                read_options=pa_csv.ReadOptions(
                    use_threads=False, column_names=found, skip_rows=1, encoding=_BYTES
                ),
                parse_options=pa_csv.ParseOptions(newlines_in_values=True, invalid_row_handler=set_aside),
                convert_options=pa_csv.ConvertOptions(
                    column_types=dict.fromkeys(found, pa.string()),
                    strings_can_be_null=False,
                    include_columns=list(names),
                ),
            )
        except pa.ArrowInvalid as error:
            raise ValueError(f"'{uri}' cannot be read as CSV: {error}") from error
    return _decoded(table, malformed, where=uri)


def _decoded(table: pa.Table, malformed: list[Problem], *, where: str) -> TextColumns:
    undecodable: list[Problem | None] = [None] * len(table)
    columns = {}
    for name in table.column_names:
        if pc.all(pc.string_is_ascii(table[name]), min_count=0).as_py():
            columns[name] = table[name]
            continue
        values = [_text(value.encode(_BYTES)) for value in table[name].to_pylist()]
        for row, value in enumerate(values):
            if value is None:
                message = f"'{where}', row {row + 1}: column '{name}' is not UTF-8"
                undecodable[row] = undecodable[row] or problem("undecodable_text", message)
        columns[name] = pa.chunked_array([pa.array([value or "" for value in values], pa.string())])
    return TextColumns(pa.table(columns), malformed, undecodable)


def _text(data: bytes) -> str | None:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return None
