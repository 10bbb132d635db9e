"""Parquet files with images and texts as a source: `parquet:<file or folder, local or s3://...>`.

Everything that can be wrong with the files is found from their footers and the split column, on the driver,
before a Ray task starts. Row groups are read inside tasks with pyarrow: exact, in order and in parallel,
which Ray's own readers do not promise together. The image column holds encoded bytes or names of image files.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds

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
# Files whose footers a process keeps: the pieces of a file are read one after the other.
_KEPT_FOOTERS = 16


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
            read = list(pool.map(_read_footer, files_at(uri, suffixes=(".parquet",))))
        # Fragments know their footers, which are not read again, but do not go to workers.
        self._footers = [footer for footer, _ in read]
        fragments = [fragment for _, fragment in read]
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
        self._check_splits(fragments)
        self._check_images(fragments)

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
        fragment = _kept_fragment(footer.file).subset(row_group_ids=[group])
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

    def _check_splits(self, fragments: list[ds.ParquetFileFragment]) -> None:
        column = self._mapper.columns.split
        schema = self._footers[0].schema
        dataset = ds.FileSystemDataset(fragments, schema, fragments[0].format, fragments[0].filesystem)
        scanner = dataset.scanner(
            columns=[column] if column else [], filter=arrow_filter(self._where, schema, where=self._uri)
        )
        num_rows, found = 0, set()
        for batch in scanner.to_batches():
            num_rows += batch.num_rows
            if column:
                found.update(pc.unique(batch[column].cast(pa.string())).to_pylist())
        if num_rows == 0:
            raise ValueError(f"{self._uri}: no row passes data.where={self._where or '{}'}")
        self._mapper.splits.check(found, where=self._uri, column=column or "")

    def _check_images(self, fragments: list[ds.ParquetFileFragment]) -> None:
        """Look for the first images that are named: a wrong folder would set every row aside."""
        for footer, fragment in zip(self._footers, fragments, strict=True):
            if not self._mapper.names_files(footer.schema):
                continue
            column = self._mapper.columns.image
            head = fragment.head(_SAMPLE_ROWS, columns=[column])
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


def _read_footer(file: SourceFile) -> tuple[_Footer, ds.ParquetFileFragment]:
    try:
        fragment = _fragment(file)
    except DAMAGE as error:
        if of_storage(error):
            raise
        raise ValueError(f"'{file.uri}' is not a readable Parquet file: {error}") from error
    metadata = fragment.metadata
    rows = tuple(metadata.row_group(group).num_rows for group in range(metadata.num_row_groups))
    return _Footer(file, metadata.schema.to_arrow_schema(), rows), fragment


def _fragment(file: SourceFile) -> ds.ParquetFileFragment:
    """A file whose footer is read; that its size is known saves asking for it."""
    fs, path = filesystem(file.uri)
    fragment = ds.ParquetFileFormat().make_fragment(path, filesystem=fs, file_size=file.size)
    fragment.ensure_complete_metadata()
    return fragment


# A file is known by place, size and time: one that was replaced is another.
_kept_fragment = lru_cache(maxsize=_KEPT_FOOTERS)(_fragment)
