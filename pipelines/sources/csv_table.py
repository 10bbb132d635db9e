"""A CSV file that names images as a source: `csv:<file>`, comma or tab, packed or not, with a header.

The driver reads the file once for the places where tasks begin; a task reads its records and their images.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import pyarrow as pa

from pipelines.sources.column_names import PlainColumns, absent_notes
from pipelines.sources.columns import ColumnMapper
from pipelines.sources.csv_records import Record, csv_records
from pipelines.sources.files import files_at, folder_of, identity_of, stem_of
from pipelines.sources.image_files import NAMED_IMAGES_NOTE, ImageFiles
from pipelines.sources.remote import open_unzipped
from pipelines.sources.rows import Problem, problem
from pipelines.sources.source import Piece, SourceSettings
from pipelines.sources.splits import split_rule

# Names in use, among them those of open_clip's training script.
USUAL_COLUMNS: Final = {
    "image": "filepath;file_path;path;image_path;file_name;filename;file",
    "caption": "title;text;description",
}
_SUFFIXES = (".csv", ".tsv", ".txt", ".csv.gz", ".tsv.gz", ".txt.gz")
# Labels of one cell are divided at this mark.
_LABEL_MARK = "|"
_ROWS_PER_TABLE = 64
_SAMPLE_ROWS = 8
# A packed file is unpacked from its start by every task.
_MAX_PACKED_PIECES = 64


@dataclass(frozen=True)
class _Layout:
    delimiter: str
    names: list[str]
    header: Record


@dataclass(frozen=True)
class _Place:
    """Where a task begins: byte, line and row."""

    start: int
    line: int
    row: int


class CsvSource:
    """Rows of a CSV file, one per record; images lie below `image_root` or the folder of the file.

    Empty cells are null. Several labels of one cell are divided by `|`. Rows that share an image share a
    split.

    Raises:
        ValueError: nothing there, no header, a missing column, an unknown split, a `where` that no row
            passes, or images of which none of the first exists.
    """

    def __init__(self, settings: SourceSettings, *, uri: str) -> None:
        self._uri = uri
        [self._file] = files_at(uri, suffixes=_SUFFIXES)[:1]
        if self._file.uri != uri:
            raise ValueError(f"data.source: '{uri}' is a folder; name one file, such as '{self._file.uri}'")
        self._layout = _read_header(uri)
        self._where = {name: frozenset(values) for name, values in settings.where.items()}
        wanted = PlainColumns.of(settings.columns)
        names = self._layout.names
        columns = wanted.found_in(names, usual=USUAL_COLUMNS, needs_text=settings.caption_template is None)
        self._mapper = ColumnMapper(
            columns,
            split_rule(settings.split_names, settings.split),
            default_source=stem_of(uri),
            caption_template=settings.caption_template,
        )
        self._mapper.check(pa.schema([(name, pa.string()) for name in names]), where=uri)
        for name in set(self._where) - set(names):
            raise ValueError(
                f"{uri}: data.where names the column '{name}'; columns found: {', '.join(names)}"
            )
        self._files = ImageFiles(settings.image_root or folder_of(uri))
        self._places, self._num_rows = self._scan(settings.rows_per_shard)
        self.notes = [*absent_notes(wanted, columns), NAMED_IMAGES_NOTE]

    @property
    def default_source(self) -> str:
        return self._mapper.default_source

    @property
    def identity(self) -> str:
        return identity_of(f"csv:{self._uri}", [self._file])

    def pieces(self) -> list[Piece]:
        ends = [place.row for place in self._places[1:]] + [self._num_rows]
        return [
            Piece(number, end - place.row, place)
            for number, (place, end) in enumerate(zip(self._places, ends, strict=True))
        ]

    def read(self, piece: Piece, *, with_images: bool = True) -> Iterator[pa.Table]:
        place: _Place = piece.spec
        with open_unzipped(self._uri) as file:
            file.seek(place.start)
            found = csv_records(file, delimiter=self._layout.delimiter, start=place.start, line=place.line)
            records = enumerate(itertools.islice(found, piece.num_rows), start=place.row)
            passed = ((row, record) for row, record in records if self._passes(record))
            while chunk := list(itertools.islice(passed, _ROWS_PER_TABLE)):
                yield self._table(chunk, with_images=with_images)

    def _table(self, chunk: list[tuple[int, Record]], *, with_images: bool) -> pa.Table:
        known = [self._fault(record) for _, record in chunk]
        columns = {}
        # Names of images are read in any case: they are the groups of rows that have no other.
        for name in self._mapper.needed():
            position = self._layout.names.index(name)
            values = [
                None if wrong else record.fields[position] or None
                for wrong, (_, record) in zip(known, chunk, strict=True)
            ]
            columns[name] = pa.array(values, pa.string())
        if labels := self._mapper.columns.labels:
            cells = columns[labels].to_pylist()
            divided = [
                [part.strip() for part in (cell or "").split(_LABEL_MARK) if part.strip()] for cell in cells
            ]
            columns[labels] = pa.array(divided, pa.list_(pa.string()))
        stem = self._mapper.default_source
        return self._mapper.pairs(
            pa.table(columns),
            made_ids=[f"{stem}:{row:09d}" for row, _ in chunk],
            files=self._files,
            with_images=with_images,
            known=known,
        )

    def _fault(self, record: Record) -> Problem | None:
        names, fields = self._layout.names, record.fields
        if record.fault is not None or len(fields) == len(names):
            return record.fault
        return problem(
            "malformed_row", f"line {record.line}: {len(fields)} fields, the header has {len(names)}"
        )

    def _passes(self, record: Record) -> bool:
        """Whether the row filter keeps a record; what cannot be read is kept, to be counted."""
        if not self._where or self._fault(record) is not None:
            return True
        index = self._layout.names.index
        return all(record.fields[index(name)] in values for name, values in self._where.items())

    def _scan(self, rows_per_shard: int) -> tuple[list[_Place], int]:
        """Where pieces begin, and how many records there are; checks splits, filter and the first images."""
        names, columns = self._layout.names, self._mapper.columns
        split = names.index(columns.split) if columns.split else None
        image = names.index(columns.image)
        places: list[_Place] = []
        splits: set[str | None] = set()
        sample: list[str] = []
        num_rows = num_passed = 0
        for record in self._records():
            if num_rows % rows_per_shard == 0:
                places.append(_Place(record.start, record.line, num_rows))
            num_rows += 1
            if not self._passes(record):
                continue
            num_passed += 1
            if self._fault(record) is None:
                if split is not None:
                    splits.add(record.fields[split] or None)
                if len(sample) < _SAMPLE_ROWS and record.fields[image]:
                    sample.append(record.fields[image])
        if not num_passed:
            raise ValueError(f"{self._uri}: no row passes data.where={dict(self._where) or '{}'}")
        self._mapper.splits.check(splits, where=self._uri, column=columns.split or "")
        self._files.check(sample, where=self._uri)
        return _thinned(places, packed=self._uri.partition("?")[0].endswith(".gz")), num_rows

    def _records(self) -> Iterator[Record]:
        with open_unzipped(self._uri) as file:
            records = csv_records(file, delimiter=self._layout.delimiter)
            next(records)
            yield from records


def _thinned(places: list[_Place], *, packed: bool) -> list[_Place]:
    step = -(-len(places) // _MAX_PACKED_PIECES) if packed else 1
    return places[::step]


def _read_header(uri: str) -> _Layout:
    with open_unzipped(uri) as file:
        line = file.readline(1 << 20)
        file.seek(0)
        delimiter = "\t" if b"\t" in line else ","
        header = next(csv_records(file, delimiter=delimiter), None)
    if header is None or header.fault is not None:
        wrong = "is empty" if header is None else f"has no readable header: {header.fault['message']}"
        raise ValueError(f"data.source: '{uri}' {wrong}")
    names = [name.strip().removeprefix("\ufeff") for name in header.fields]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"data.source: '{uri}' has more than one column {twice}")
    return _Layout(delimiter, names, header)
