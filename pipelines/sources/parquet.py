"""Parquet files with images and texts as a source: `parquet:<file or folder, local or s3://...>`.

Everything that can be wrong with the files is found from their footers and the split column, on the driver,
before a Ray task starts. Row groups are read inside tasks with pyarrow: exact, in order and in parallel,
which Ray's own readers do not promise together.
"""

from __future__ import annotations

import hashlib
import posixpath
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from pipelines.schemas import SPLITS
from pipelines.sources.column_names import PlainColumns
from pipelines.sources.columns import ColumnMapper
from pipelines.sources.source import Piece, SourceSettings
from pipelines.storage import filesystem, join, list_files

_ROWS_PER_TABLE = 256
_MADE_ID = "made row id"


@dataclass(frozen=True)
class _File:
    uri: str
    name: str  # below the folder, without suffix
    size: int
    changed_ns: int
    schema: pa.Schema
    rows_per_group: tuple[int, ...]


class ParquetSource:
    """Rows of one Parquet file or of all `*.parquet` below a folder, in the order of names and row groups.

    Raises:
        ValueError: nothing there, not Parquet, a missing or mistyped column, a split that `split_names` does
            not map, or a `where` that no row passes.
    """

    def __init__(self, settings: SourceSettings, *, uri: str) -> None:
        self._uri = uri
        self._rows_per_piece = settings.rows_per_shard
        stem = posixpath.basename(uri.partition("?")[0].rstrip("/")).removesuffix(".parquet")
        self._where = dict(settings.where)
        self._files = _describe(uri)
        wanted = PlainColumns.of(settings.columns)
        columns = wanted.without_absent({name for file in self._files for name in file.schema.names})
        self.notes = _absent_columns(wanted, columns)
        self._mapper = ColumnMapper(columns, dict(settings.split_names), default_source=stem)
        for file in self._files:
            self._mapper.check(file.schema, where=file.uri)
            self._filter(file.schema, uri=file.uri)
        self._check_splits()

    @property
    def identity(self) -> str:
        lines = [f"{file.uri} {file.size} {file.changed_ns}" for file in self._files]
        digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]
        size = sum(file.size for file in self._files)
        return f"parquet:{self._uri} files={len(lines)} bytes={size} state={digest}"

    def pieces(self) -> list[Piece]:
        """Consecutive row groups, over file borders, up to `rows_per_shard` rows or one larger row group."""
        packs: list[tuple[int, dict[str, list[int]]]] = []
        for file in self._files:
            for group, rows in enumerate(file.rows_per_group):
                if not packs or packs[-1][0] + rows > self._rows_per_piece:
                    packs.append((0, {}))
                held, groups = packs[-1]
                groups.setdefault(file.uri, []).append(group)
                packs[-1] = (held + rows, groups)
        return [Piece(number, rows, groups) for number, (rows, groups) in enumerate(packs)]

    def read(self, piece: Piece, *, with_images: bool = True) -> Iterator[pa.Table]:
        columns = self._mapper.needed(with_images=with_images)
        for uri, groups in piece.spec.items():
            fs, path = filesystem(uri)
            fragment = ds.ParquetFileFormat().make_fragment(path, filesystem=fs, row_groups=groups)
            row_filter = self._filter(fragment.physical_schema, uri=uri)
            if self._mapper.columns.id is None:
                tables = self._numbered(fragment, uri=uri, columns=columns, row_filter=row_filter)
            else:
                batches = _scan(fragment, columns=columns, row_filter=row_filter)
                tables = ((table, []) for table in batches)
            for table, made_ids in tables:
                if len(table):
                    yield self._mapper.pairs(table, made_ids=made_ids, with_images=with_images)

    def _numbered(
        self, fragment: ds.Fragment, *, uri: str, columns: list[str], row_filter: Any
    ) -> Iterator[tuple[pa.Table, list[str]]]:
        """Rows with ids from their place in the file, which is known only before the filter."""
        file = next(file for file in self._files if file.uri == uri)
        row = sum(file.rows_per_group[: fragment.row_groups[0].id])
        for table in _scan(fragment, columns=list(dict.fromkeys([*columns, *self._where])), row_filter=None):
            numbers = pa.array([f"{file.name}:{row + i:09d}" for i in range(len(table))])
            row += len(table)
            passed = table.append_column(_MADE_ID, numbers)
            passed = passed if row_filter is None else passed.filter(row_filter)
            yield passed, passed[_MADE_ID].to_pylist()

    def _filter(self, schema: pa.Schema, *, uri: str) -> Any:
        """`where` as a pyarrow expression, which skips row groups by their statistics; None lets all pass."""
        passes = None
        for name, values in self._where.items():
            if name not in schema.names:
                found = ", ".join(schema.names)
                raise ValueError(f"{uri}: data.where names the column '{name}'; columns found: {found}")
            column_type = schema.field(name).type
            if pa.types.is_nested(column_type):
                raise ValueError(f"{uri}: data.where needs one value per row, '{name}' is {column_type}")
            text = ds.field(name) if pa.types.is_string(column_type) else ds.field(name).cast(pa.string())
            condition = text.isin(pa.array(values, pa.string()))
            passes = condition if passes is None else passes & condition
        return passes

    def _check_splits(self) -> None:
        column = self._mapper.columns.split
        fs, _ = filesystem(self._uri)
        paths = [filesystem(file.uri)[1] for file in self._files]
        scanner = ds.dataset(paths, filesystem=fs, format="parquet").scanner(
            columns=[column] if column else [], filter=self._filter(self._files[0].schema, uri=self._uri)
        )
        num_rows, found = 0, set()
        for batch in scanner.to_batches():
            num_rows += batch.num_rows
            if column:
                found.update(pc.unique(batch[column].cast(pa.string())).to_pylist())
        if num_rows == 0:
            raise ValueError(f"{self._uri}: no row passes data.where={self._where or '{}'}")
        unknown = sorted(found - {None} - set(self._mapper.split_names))
        if unknown:
            raise ValueError(
                f"{self._uri}: unknown split {unknown} in column '{column}'; data.split_names maps "
                f"{sorted(self._mapper.split_names)} to {list(SPLITS)}. Add them there, or leave those "
                f"rows out with data.where"
            )


def _absent_columns(wanted: PlainColumns, found: PlainColumns) -> list[str]:
    """What the absence of a column means, for the user to read."""
    meaning = {
        "id": "rows are named by their place in the file",
        "split": "rows are divided 80/10/10 by a hash",
        "group": "every row is a group of its own",
    }
    absent = [f.name for f in fields(wanted) if getattr(wanted, f.name) != getattr(found, f.name)]
    return [
        f"no column '{getattr(wanted, name)}'" + (f": {meaning[name]}" if name in meaning else "")
        for name in absent
    ]


def _scan(fragment: ds.Fragment, *, columns: list[str], row_filter: Any) -> Iterator[pa.Table]:
    # One thread: the task was promised half a core.
    scanner = ds.Scanner.from_fragment(
        fragment, columns=columns, filter=row_filter, batch_size=_ROWS_PER_TABLE, use_threads=False
    )
    return (pa.Table.from_batches([batch]) for batch in scanner.to_batches())


def _describe(uri: str) -> list[_File]:
    fs, path = filesystem(uri)
    kind = fs.get_file_info(path).type
    if kind == pafs.FileType.NotFound:
        raise ValueError(f"data.source: '{uri}' does not exist")
    if kind == pafs.FileType.File:
        places = [(uri, posixpath.basename(path))]
    else:
        places = [(join(uri, name), name) for name in list_files(uri, suffix=".parquet")]
    if not places:
        raise ValueError(f"data.source: no *.parquet file below '{uri}'")
    # Footers are small and far away on object storage: threads wait for many at once.
    with ThreadPoolExecutor(max_workers=16) as pool:
        return list(pool.map(_describe_file, *zip(*places, strict=True)))


def _describe_file(uri: str, name: str) -> _File:
    fs, path = filesystem(uri)
    info = fs.get_file_info(path)
    try:
        footer = pq.read_metadata(path, filesystem=fs)
    except pa.ArrowInvalid as error:
        raise ValueError(f"'{uri}' is not a readable Parquet file: {error}") from error
    rows = tuple(footer.row_group(group).num_rows for group in range(footer.num_row_groups))
    schema = footer.schema.to_arrow_schema()
    return _File(uri, name.removesuffix(".parquet"), info.size, info.mtime_ns or 0, schema, rows)
