"""A dataset saved to disk by Hugging Face datasets as a source: `hf:<folder>`, read with pyarrow alone.

The folder holds one dataset (state.json and Arrow streams) or several splits (dataset_dict.json and a folder
each). Record batches are read inside tasks.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final

import pyarrow as pa

from pipelines.sources.arrow_stream import Stream, read_batch, scan_stream
from pipelines.sources.column_names import PlainColumns, absent_notes
from pipelines.sources.columns import ColumnMapper
from pipelines.sources.files import THREADS, SourceFile, files_at, identity_of, pack, stem_of
from pipelines.sources.hugging_face_features import Features, read_features, with_class_names
from pipelines.sources.image_files import ImageFiles
from pipelines.sources.remote import DAMAGE, of_storage
from pipelines.sources.row_filter import arrow_filter
from pipelines.sources.rows import pairs_table, problem, unusable_row
from pipelines.sources.source import Piece, SourceSettings
from pipelines.sources.splits import split_rule
from pipelines.storage import exists, join, read_json

USUAL_COLUMNS: Final = {"image": "img;jpg;jpeg;png;webp", "caption": "text;txt;title;description"}
_ROWS_PER_TABLE = 64
# The column made of the folder of a split, where the data has none of that name.
_SPLIT = "split"


@dataclass(frozen=True)
class _Part:
    """One Arrow file: the split its folder names, and how many rows of that folder come before it."""

    file: SourceFile
    stream: Stream
    split: str | None
    first_row: int
    features: Features


class HuggingFaceSource:
    """Rows of a saved dataset in the order of its splits and files.

    Class numbers become their names. Images are bytes, or struct{bytes, path} of which either is there.

    Raises:
        ValueError: no such dataset, an unreadable file, a missing or mistyped column, or an unknown split.
    """

    def __init__(self, settings: SourceSettings, *, uri: str) -> None:
        self._uri = uri
        self._rows_per_piece = settings.rows_per_shard
        self._where = dict(settings.where)
        self._parts = [part for split, folder in _folders(uri) for part in _read_folder(folder, split=split)]
        self._has_splits = any(part.split for part in self._parts)
        wanted = PlainColumns.of(settings.columns)
        schemas = [self._schema(part) for part in self._parts]
        columns = wanted.found_in(
            {name for schema in schemas for name in schema.names},
            usual=_usual_columns(self._parts[0].features),
            needs_text=settings.caption_template is None,
        )
        self._mapper = ColumnMapper(
            columns,
            split_rule(settings.split_names, settings.split),
            default_source=stem_of(uri),
            caption_template=settings.caption_template,
        )
        for part, schema in zip(self._parts, schemas, strict=True):
            self._mapper.check(schema, where=part.file.uri)
            arrow_filter(self._where, schema, where=part.file.uri)
        if columns.split == _SPLIT and self._has_splits:
            wanted_splits = self._where.get(_SPLIT)
            named = {part.split for part in self._parts}
            self._mapper.splits.check(
                named & {*wanted_splits} if wanted_splits else named, where=uri, column="folder of the split"
            )
        self._files = ImageFiles(settings.image_root or uri)
        self.notes = absent_notes(wanted, columns)
        self.notes += [f"'{p.file.name}': {p.stream.fault}" for p in self._parts if p.stream.fault]

    @property
    def default_source(self) -> str:
        return self._mapper.default_source

    @property
    def identity(self) -> str:
        return identity_of(f"hf:{self._uri}", [part.file for part in self._parts])

    def pieces(self) -> list[Piece]:
        """Consecutive batches, over file borders, up to `rows_per_shard` rows or one larger batch."""
        sized: list[tuple[int, tuple[int, int | None]]] = []
        for number, part in enumerate(self._parts):
            sized += [(batch.num_rows, (number, i)) for i, batch in enumerate(part.stream.batches)]
            if part.stream.fault:
                sized.append((1, (number, None)))
        packs = pack(sized, limit=self._rows_per_piece)
        return [Piece(number, rows, batches) for number, (rows, batches) in enumerate(packs)]

    def read(self, piece: Piece, *, with_images: bool = True) -> Iterator[pa.Table]:
        for number, batch in piece.spec:
            part = self._parts[number]
            if batch is None:
                yield self._unreadable(part, ["end"], str(part.stream.fault), with_images=with_images)
            else:
                yield from self._read_batch(part, batch, with_images=with_images)

    def _read_batch(self, part: _Part, number: int, *, with_images: bool) -> Iterator[pa.Table]:
        batch = part.stream.batches[number]
        first = part.first_row + sum(before.num_rows for before in part.stream.batches[:number])
        try:
            found = read_batch(part.file.uri, batch, schema=part.stream.schema)
        except DAMAGE as error:
            if of_storage(error):
                raise
            names = [str(first + row) for row in range(batch.num_rows)]
            yield self._unreadable(part, names, f"batch {number}: {error}", with_images=with_images)
            return
        raw = self._with_split(part, pa.Table.from_batches([found]))
        passes = arrow_filter(self._where, raw.schema, where=part.file.uri)
        needed = self._mapper.needed(with_images=with_images or self._mapper.names_files(raw.schema))
        stem = part.split or self._mapper.default_source
        for start in range(0, len(raw), _ROWS_PER_TABLE):
            table = raw.slice(start, _ROWS_PER_TABLE)
            ids = [f"{stem}:{first + start + row:09d}" for row in range(len(table))]
            table = table.append_column("made row id", pa.array(ids))
            table = table if passes is None else table.filter(passes)
            if len(table):
                yield self._mapper.pairs(
                    with_class_names(table.select(needed), part.features),
                    made_ids=table["made row id"].to_pylist(),
                    files=self._files,
                    with_images=with_images,
                )

    def _unreadable(self, part: _Part, names: list[str], what: str, *, with_images: bool) -> pa.Table:
        found = problem("unreadable_shard", f"'{part.file.name}': {what}")
        source = self._mapper.default_source
        rows = [unusable_row(f"{part.file.name}:{name}", found, source=source) for name in names]
        return pairs_table(rows, with_images=with_images)

    def _adds_split(self, part: _Part) -> bool:
        return part.split is not None and _SPLIT not in part.stream.schema.names

    def _schema(self, part: _Part) -> pa.Schema:
        """The schema as the mapper sees it: class numbers are names, and the folder of the split a column."""
        table = with_class_names(part.stream.schema.empty_table(), part.features)
        return self._with_split(part, table).schema

    def _with_split(self, part: _Part, table: pa.Table) -> pa.Table:
        if not self._adds_split(part):
            return table
        return table.append_column(_SPLIT, pa.array([part.split] * len(table), pa.string()))


def _usual_columns(features: Features) -> dict[str, str]:
    """Names to look under; a column that is declared to hold images or one class is known by that."""
    usual = dict(USUAL_COLUMNS)
    if features.images:
        usual["image"] = ";".join([*features.images, usual["image"]])
    if features.classes:
        usual["class_name"] = ";".join(features.classes)
    return usual


def _folders(uri: str) -> list[tuple[str | None, str]]:
    """The datasets below a folder, each with its split; one without a name when there are no splits."""
    if exists(join(uri, "dataset_dict.json")):
        splits: list[str] = _json(join(uri, "dataset_dict.json")).get("splits", [])
        return [(str(split), join(uri, str(split))) for split in splits]
    if not exists(uri):
        raise ValueError(f"data.source: '{uri}' does not exist")
    return [(None, uri)]


def _read_folder(uri: str, *, split: str | None) -> list[_Part]:
    state = join(uri, "state.json")
    if not exists(state):
        raise ValueError(
            f"data.source: '{uri}' has neither state.json nor dataset_dict.json; hf:<folder> is what "
            "save_to_disk of Hugging Face datasets wrote"
        )
    named = [str(entry["filename"]) for entry in _json(state).get("_data_files", [])]
    there = {file.name: file for file in files_at(uri, suffixes=(".arrow",))}
    if absent := [name for name in named if name not in there]:
        raise ValueError(f"data.source: '{uri}' lacks {len(absent)} of its files, the first is '{absent[0]}'")
    files = [there[name] for name in named]
    with ThreadPoolExecutor(max_workers=THREADS) as pool:
        streams = list(pool.map(lambda file: scan_stream(file.uri, size=file.size), files))
    info = join(uri, "dataset_info.json")
    declared = _json(info).get("features") if exists(info) else None
    parts, first_row = [], 0
    for file, stream in zip(files, streams, strict=True):
        features = read_features(declared, stream.schema)
        parts.append(_Part(file, stream, split, first_row, features))
        first_row += sum(batch.num_rows for batch in stream.batches)
    if not parts:
        raise ValueError(f"data.source: '{state}' names no data file")
    return parts


def _json(uri: str) -> dict[str, Any]:
    try:
        content = read_json(uri)
    except ValueError as error:
        raise ValueError(f"data.source: '{uri}' is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"data.source: '{uri}' must hold an object, found {type(content).__name__}")
    return content
