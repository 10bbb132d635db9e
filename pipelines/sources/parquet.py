"""Parquet files with images and texts as a source: `parquet:<file or folder, local or s3://...>`.

Everything that can be wrong with the files is found from their footers and the split column, on the driver,
before a Ray task starts. Row groups are read inside tasks with pyarrow: exact, in order and in parallel,
which Ray's own readers do not promise together. The image column holds encoded bytes or names of image files.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from pipelines.sources.column_names import PlainColumns, absent_notes
from pipelines.sources.columns import ColumnMapper
from pipelines.sources.files import THREADS, SourceFile, files_at, folder_of, identity_of, pack, stem_of
from pipelines.sources.image_files import NAMED_IMAGES_NOTE, ImageFiles
from pipelines.sources.remote import DAMAGE, of_storage
from pipelines.sources.row_filter import arrow_filter
from pipelines.sources.rows import pairs_table, problem, unusable_row
from pipelines.sources.source import Piece, SourceSettings
from pipelines.sources.splits import split_rule
from pipelines.storage import filesystem

_MADE_ID = "made row id"
_SAMPLE_ROWS = 8


@dataclass(frozen=True)
class _Footer:
    file: SourceFile
    schema: pa.Schema
    rows_per_group: tuple[int, ...]

    def first_row(self, group: int) -> int:
        return sum(self.rows_per_group[:group])

    def row_name(self, row: int) -> str:
        return f"{self.file.name.removesuffix('.parquet')}:{row:09d}"


class ParquetSource:
    """Rows of one Parquet file or of all `*.parquet` below a folder, in the order of names and row groups.

    Raises:
        ValueError: nothing there, not Parquet, a missing or mistyped column, a split that `split_names` does
            not map, a `where` that no row passes, or names of images of which none exists.
    """

    def __init__(self, settings: SourceSettings, *, uri: str) -> None:
        self._uri = uri
        self._rows_per_piece = settings.rows_per_shard
        self._where = dict(settings.where)
        self._image_root = settings.image_root
        with ThreadPoolExecutor(max_workers=THREADS) as pool:
            self._footers = list(pool.map(_read_footer, files_at(uri, suffixes=(".parquet",))))
        wanted = PlainColumns.of(settings.columns)
        found = {name for footer in self._footers for name in footer.schema.names}
        columns = wanted.found_in(found, needs_text=settings.caption_template is None)
        self._mapper = ColumnMapper(
            columns,
            split_rule(settings.split_names, settings.split),
            default_source=stem_of(uri),
            caption_template=settings.caption_template,
        )
        for footer in self._footers:
            self._mapper.check(footer.schema, where=footer.file.uri)
            arrow_filter(self._where, footer.schema, where=footer.file.uri)
        self.notes = absent_notes(wanted, columns)
        if any(self._mapper.names_files(footer.schema) for footer in self._footers):
            self.notes.append(NAMED_IMAGES_NOTE)
        self._check_splits()
        self._check_images()

    @property
    def default_source(self) -> str:
        return self._mapper.default_source

    @property
    def identity(self) -> str:
        return identity_of(f"parquet:{self._uri}", [footer.file for footer in self._footers])

    def pieces(self) -> list[Piece]:
        """Consecutive row groups, over file borders, up to `rows_per_shard` rows or one larger row group."""
        sized = (
            (rows, (number, group))
            for number, footer in enumerate(self._footers)
            for group, rows in enumerate(footer.rows_per_group)
        )
        packs = pack(sized, limit=self._rows_per_piece)
        return [Piece(number, rows, groups) for number, (rows, groups) in enumerate(packs)]

    def read(self, piece: Piece, *, with_images: bool = True) -> Iterator[pa.Table]:
        for number, group in piece.spec:
            footer, num_read = self._footers[number], 0
            try:
                for table in self._group(footer, group, with_images=with_images):
                    num_read += len(table)
                    yield table
            except DAMAGE as error:
                if of_storage(error):
                    raise
                rest = self._damaged(footer, group, what=str(error), with_images=with_images)
                yield rest.slice(num_read)

    def _group(self, footer: _Footer, group: int, *, with_images: bool) -> Iterator[pa.Table]:
        files = self._files(footer)
        for table, made_ids in self._raw(footer, group, with_images=with_images):
            if len(table):
                yield self._mapper.pairs(table, made_ids=made_ids, files=files, with_images=with_images)

    def _raw(self, footer: _Footer, group: int, *, with_images: bool) -> Iterator[tuple[pa.Table, list[str]]]:
        """Tables of the needed columns that pass the filter, and the ids of their rows where none has one."""
        fs, path = filesystem(footer.file.uri)
        fragment = ds.ParquetFileFormat().make_fragment(path, filesystem=fs, row_groups=[group])
        names_files = self._mapper.names_files(footer.schema)
        columns = self._mapper.needed(with_images=with_images or names_files)
        passes = arrow_filter(self._where, footer.schema, where=footer.file.uri)
        rows = 64 if names_files else rows_per_table(footer.file.size, num_rows=sum(footer.rows_per_group))
        if self._mapper.columns.id is not None:
            for table in _scan(fragment, columns=columns, row_filter=passes, rows=rows):
                yield table, []
            return
        # The place in the file is known only before the filter.
        row = footer.first_row(group)
        columns = list(dict.fromkeys([*columns, *self._where]))
        for table in _scan(fragment, columns=columns, row_filter=None, rows=rows):
            numbers = pa.array([footer.row_name(row + i) for i in range(len(table))])
            row += len(table)
            passed = table.append_column(_MADE_ID, numbers)
            passed = passed if passes is None else passed.filter(passes)
            yield passed, passed[_MADE_ID].to_pylist()

    def _damaged(self, footer: _Footer, group: int, *, what: str, with_images: bool) -> pa.Table:
        """The rows of a row group of which not every column can be read: their texts if those can, no image.

        Raises:
            ValueError: nothing of it can be read, so that nobody knows which rows the filter leaves.
        """
        found = problem("unreadable_shard", f"row group {group} of '{footer.file.name}': {what}")
        try:
            texts = [
                row for table in self._group(footer, group, with_images=False) for row in table.to_pylist()
            ]
            rows = [{**row, "image": b"", "problem": found} for row in texts]
        except DAMAGE as error:
            if self._where:
                raise ValueError(
                    f"'{footer.file.uri}': row group {group} is damaged ({what}), so data.where cannot be "
                    "applied to it"
                ) from error
            first = footer.first_row(group)
            names = [footer.row_name(first + i) for i in range(footer.rows_per_group[group])]
            rows = [unusable_row(name, found, source=self._mapper.default_source) for name in names]
        return pairs_table(rows, with_images=with_images)

    def _files(self, footer: _Footer) -> ImageFiles:
        return ImageFiles(self._image_root or folder_of(footer.file.uri))

    def _check_splits(self) -> None:
        column = self._mapper.columns.split
        fs, _ = filesystem(self._uri)
        paths = [filesystem(footer.file.uri)[1] for footer in self._footers]
        scanner = ds.dataset(paths, filesystem=fs, format="parquet").scanner(
            columns=[column] if column else [],
            filter=arrow_filter(self._where, self._footers[0].schema, where=self._uri),
        )
        num_rows, found = 0, set()
        for batch in scanner.to_batches():
            num_rows += batch.num_rows
            if column:
                found.update(pc.unique(batch[column].cast(pa.string())).to_pylist())
        if num_rows == 0:
            raise ValueError(f"{self._uri}: no row passes data.where={self._where or '{}'}")
        self._mapper.splits.check(found, where=self._uri, column=column or "")

    def _check_images(self) -> None:
        """Look for the first images that are named: a wrong folder would set every row aside."""
        for footer in self._footers:
            if not self._mapper.names_files(footer.schema):
                continue
            fs, path = filesystem(footer.file.uri)
            column = self._mapper.columns.image
            head = ds.dataset(path, filesystem=fs, format="parquet").head(_SAMPLE_ROWS, columns=[column])
            self._files(footer).check(head[column].to_pylist(), where=footer.file.uri)
            return


def rows_per_table(num_bytes: int, *, num_rows: int) -> int:
    """Rows of which about 64 MB lie in memory at once, by the mean size of a row."""
    return max(1, min(256, (1 << 26) * num_rows // max(1, num_bytes)))


def _scan(fragment: ds.Fragment, *, columns: list[str], row_filter: Any, rows: int) -> Iterator[pa.Table]:
    # One thread: the task was promised half a core.
    scanner = ds.Scanner.from_fragment(
        fragment, columns=columns, filter=row_filter, batch_size=rows, use_threads=False
    )
    return (pa.Table.from_batches([batch]) for batch in scanner.to_batches())


def _read_footer(file: SourceFile) -> _Footer:
    fs, path = filesystem(file.uri)
    try:
        footer = pq.read_metadata(path, filesystem=fs)
    except DAMAGE as error:
        if of_storage(error):
            raise
        raise ValueError(f"'{file.uri}' is not a readable Parquet file: {error}") from error
    rows = tuple(footer.row_group(group).num_rows for group in range(footer.num_row_groups))
    return _Footer(file, footer.schema.to_arrow_schema(), rows)
