"""Any table with images and texts, mapped to `schemas.PAIRS`."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.schemas import PAIRS
from pipelines.sources.column_names import PlainColumns

_BOX_FIELDS = {"label", "x", "y", "w", "h"}


@dataclass(frozen=True)
class ColumnMapper:
    """Column names, split names and the source name of rows that carry none."""

    columns: PlainColumns
    split_names: Mapping[str, str]
    default_source: str

    def needed(self, *, with_images: bool = True) -> list[str]:
        """The raw columns to read, without repeats."""
        names = self.columns
        wanted = [names.id, names.captions, names.caption, names.sentences, names.labels, names.class_name]
        wanted += [names.group, names.source, names.split, names.boxes]
        if with_images:
            wanted.append(names.image)
        return list(dict.fromkeys(name for name in wanted if name is not None))

    def check(self, schema: pa.Schema, *, where: str) -> None:
        """Refuse a file that cannot be mapped.

        Raises:
            ValueError: naming each missing or mistyped column, and the columns found.
        """
        if self.columns.caption is None and self.columns.captions is None:
            raise ValueError("data.columns: one of caption and captions must name a column")
        problems = [f"column '{name}' is missing" for name in self.needed() if name not in schema.names]
        if not problems:
            problems = self._mistyped(schema)
        if problems:
            raise ValueError(
                f"{where}: {'; '.join(problems)}; columns found: {', '.join(schema.names)}. Map them with "
                "data.columns.<name>=<column>, or null where the data has no such column"
            )

    def pairs(self, table: pa.Table, *, made_ids: list[str], with_images: bool = True) -> pa.Table:
        """Raw rows as `schemas.PAIRS` (without `image` unless `with_images`).

        `made_ids` are the row ids where no column holds them. A missing image becomes empty bytes, a missing
        id or split an empty string: `prepare` counts them.
        """
        names = self.columns
        row_ids = [value or "" for value in _strings(table, names.id)] if names.id else made_ids
        groups = _strings(table, names.group)
        out: dict[str, Any] = {"row_id": row_ids}
        if with_images:
            out["image"] = [value or b"" for value in _image_column(table[names.image]).to_pylist()]
        listed, single = _lists(table, names.captions), _lists(table, names.caption)
        out["captions"] = [_union(many, one) for many, one in zip(listed, single, strict=True)]
        out["sentences"] = _lists(table, names.sentences)
        out["labels"] = [_union(labels) for labels in _lists(table, names.labels)]
        out["class_name"] = _strings(table, names.class_name)
        out["group_id"] = groups
        out["source"] = [value or self.default_source for value in _strings(table, names.source)]
        out["split"] = self._splits(table, row_ids=row_ids, groups=groups)
        out["boxes"] = table[names.boxes].to_pylist() if names.boxes else [None] * len(table)
        schema = PAIRS if with_images else PAIRS.remove(PAIRS.get_field_index("image"))
        return pa.Table.from_pydict(out, schema=schema)

    def _splits(self, table: pa.Table, *, row_ids: list[str], groups: list[str | None]) -> list[str]:
        if self.columns.split is None:
            return [hashed_split(group or row_id) for group, row_id in zip(groups, row_ids, strict=True)]
        return [self.split_names.get(value or "", "") for value in _strings(table, self.columns.split)]

    def _mistyped(self, schema: pa.Schema) -> list[str]:
        names, problems = self.columns, []
        image = schema.field(names.image).type
        if not _is_bytes(image) and not (pa.types.is_struct(image) and image.get_field_index("bytes") >= 0):
            problems.append(f"column '{names.image}' must hold encoded image bytes, found {image}")
        for name in (names.id, names.class_name, names.group, names.source, names.split):
            if name is not None and pa.types.is_nested(schema.field(name).type):
                problems.append(
                    f"column '{name}' must hold one value per row, found {schema.field(name).type}"
                )
        for name in (names.caption, names.captions, names.sentences, names.labels):
            if name is not None and not _holds_texts(schema.field(name).type):
                problems.append(f"column '{name}' must hold texts, found {schema.field(name).type}")
        if names.boxes is not None and not _holds_boxes(schema.field(names.boxes).type):
            found = schema.field(names.boxes).type
            problems.append(f"column '{names.boxes}' must be list<struct<label, x, y, w, h>>, found {found}")
        return problems


def hashed_split(key: str) -> str:
    """A split for data that names none: 80 % train, 10 % selection, 10 % test, by the hash of the group."""
    share = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64
    return "train" if share < 0.8 else "selection" if share < 0.9 else "test"


def _strings(table: pa.Table, name: str | None) -> list[str | None]:
    """A column as text; numbers as they print."""
    if name is None:
        return [None] * len(table)
    return table[name].cast(pa.string()).to_pylist()


def _lists(table: pa.Table, name: str | None) -> list[list[str]]:
    """A column of texts or of lists of texts, as lists without nulls."""
    if name is None:
        return [[] for _ in range(len(table))]
    column = table[name]
    if not _is_list(column.type):
        return [[] if value is None else [value] for value in column.cast(pa.string()).to_pylist()]
    values = column.cast(pa.list_(pa.string())).to_pylist()
    return [[item for item in value or [] if item is not None] for value in values]


def _image_column(column: pa.ChunkedArray) -> pa.ChunkedArray:
    # Hugging Face datasets keep an image as struct<bytes, path>.
    return pc.struct_field(column, "bytes") if pa.types.is_struct(column.type) else column


def _union(*lists: list[str]) -> list[str]:
    return list(dict.fromkeys(item for values in lists for item in values))


def _is_bytes(type_: pa.DataType) -> bool:
    return (
        pa.types.is_binary(type_) or pa.types.is_large_binary(type_) or pa.types.is_fixed_size_binary(type_)
    )


def _is_list(type_: pa.DataType) -> bool:
    return pa.types.is_list(type_) or pa.types.is_large_list(type_) or pa.types.is_fixed_size_list(type_)


def _holds_texts(type_: pa.DataType) -> bool:
    item = type_.value_type if _is_list(type_) else type_
    return not pa.types.is_nested(item) and not _is_bytes(item)


def _holds_boxes(type_: pa.DataType) -> bool:
    if pa.types.is_null(type_):
        return True
    if not _is_list(type_) or not pa.types.is_struct(type_.value_type):
        return False
    return {field.name for field in type_.value_type} >= _BOX_FIELDS
