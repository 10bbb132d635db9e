"""Any table with images and texts, mapped to `schemas.PAIRS`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from pipelines.schemas import PAIRS
from pipelines.sources.column_names import PlainColumns
from pipelines.sources.column_types import holds_boxes, holds_texts, is_bytes, is_list, is_text, prints
from pipelines.sources.image_files import ImageFiles
from pipelines.sources.rows import Problem, printable, problem, with_problems
from pipelines.sources.splits import SplitRule


@dataclass(frozen=True)
class ColumnMapper:
    """Column names, where splits come from, and the source name of rows that carry none.

    `caption_template` makes a caption of the class where the columns of texts give none.
    """

    columns: PlainColumns
    splits: SplitRule
    default_source: str
    caption_template: str | None = None

    def needed(self, *, with_images: bool = True) -> list[str]:
        """The raw columns to read, without repeats."""
        names = self.columns
        wanted = [names.id, names.captions, names.caption, names.sentences, names.labels, names.class_name]
        wanted += [names.group, names.source, names.split, names.boxes]
        if with_images:
            wanted.append(names.image)
        return list(dict.fromkeys(name for name in wanted if name is not None))

    def names_files(self, schema: pa.Schema) -> bool:
        """Whether the images of a checked file lie in files of their own."""
        return is_text(schema.field(self.columns.image).type)

    def check(self, schema: pa.Schema, *, where: str) -> None:
        """Refuse a file that cannot be mapped.

        Raises:
            ValueError: naming each missing or mistyped column, and the columns found.
        """
        names = self.columns
        from_class = self.caption_template is not None and names.class_name is not None
        if names.caption is None and names.captions is None and not from_class:
            raise ValueError("data.columns: one of caption and captions must name a column")
        problems = [f"column '{name}' is missing" for name in self.needed() if name not in schema.names]
        if not problems:
            problems = self._mistyped(schema)
        if problems:
            raise ValueError(
                f"{where}: {'; '.join(problems)}; columns found: {', '.join(schema.names)}. Map them with "
                "data.columns.<name>=<column>, or null where the data has no such column"
            )

    def pairs(
        self,
        table: pa.Table,
        *,
        made_ids: list[str],
        files: ImageFiles,
        with_images: bool = True,
        known: Sequence[Problem | None] | None = None,
    ) -> pa.Table:
        """Raw rows as `schemas.PAIRS` (without `image` unless `with_images`).

        `made_ids` are the row ids where no column holds them; `files` reads the images that the table names;
        `known` is what was found wrong with rows before.
        Rows that name their image and no group are grouped by it: captions of one image belong together.
        A missing image becomes empty bytes, a missing id or split an empty string: `prepare` counts them.
        """
        names, raw = self.columns, _RawTable(table, known)
        row_ids = [value or "" for value in raw.strings(names.id)] if names.id else made_ids
        groups = raw.strings(names.group)
        if names.group is None and names.image in table.column_names and self.names_files(table.schema):
            groups = raw.strings(names.image)
        out: dict[str, Any] = {"row_id": row_ids}
        if with_images:
            out["image"] = raw.images(names.image, files=files)
        classes = raw.strings(names.class_name)
        listed, single = raw.lists(names.captions), raw.lists(names.caption)
        captions = [_union(many, one) for many, one in zip(listed, single, strict=True)]
        out["captions"] = [
            self._caption_of(class_name, texts) for class_name, texts in zip(classes, captions, strict=True)
        ]
        out["sentences"] = raw.lists(names.sentences)
        out["labels"] = [_union(labels) for labels in raw.lists(names.labels)]
        out["class_name"] = classes
        out["group_id"] = groups
        out["source"] = [value or self.default_source for value in raw.strings(names.source)]
        out["split"] = self._splits(raw, row_ids=row_ids, groups=groups)
        out["boxes"] = raw.values(names.boxes)
        schema = PAIRS if with_images else PAIRS.remove(PAIRS.get_field_index("image"))
        return with_problems(pa.Table.from_pydict(out, schema=schema), raw.problems)

    def _caption_of(self, class_name: str | None, captions: list[str]) -> list[str]:
        if captions or self.caption_template is None or not class_name:
            return captions
        return [self.caption_template.format(class_name)]

    def _splits(self, raw: _RawTable, *, row_ids: list[str], groups: list[str | None]) -> list[str]:
        if self.columns.split is None:
            keys = zip(groups, row_ids, strict=True)
            return [self.splits.hashed(group or row_id) for group, row_id in keys]
        return [self.splits.named(value) for value in raw.strings(self.columns.split)]

    def _mistyped(self, schema: pa.Schema) -> list[str]:
        names, problems = self.columns, []
        image = schema.field(names.image).type
        in_struct = pa.types.is_struct(image) and image.get_field_index("bytes") >= 0
        if not is_bytes(image) and not is_text(image) and not in_struct:
            problems.append(
                f"column '{names.image}' must hold encoded image bytes or names of image files, found {image}"
            )
        for name in (names.id, names.class_name, names.group, names.source, names.split):
            if name is not None and not prints(schema.field(name).type):
                problems.append(
                    f"column '{name}' must hold one value per row, found {schema.field(name).type}"
                )
        for name in (names.caption, names.captions, names.sentences, names.labels):
            if name is not None and not holds_texts(schema.field(name).type):
                problems.append(f"column '{name}' must hold texts, found {schema.field(name).type}")
        if names.boxes is not None and not holds_boxes(schema.field(names.boxes).type):
            found = schema.field(names.boxes).type
            problems.append(f"column '{names.boxes}' must be list<struct<label, x, y, w, h>>, found {found}")
        return problems


class _RawTable:
    """Columns of a table as Python values, and what is wrong with the rows that have none.

    Parquet and Arrow files do not promise that their text is UTF-8.
    """

    def __init__(self, table: pa.Table, known: Sequence[Problem | None] | None) -> None:
        self._table = table
        self.problems = [None] * len(table) if known is None else list(known)

    def strings(self, name: str | None) -> list[str | None]:
        """A column as text; numbers as they print."""
        if name is None:
            return [None] * len(self._table)
        return self._pylist(self._table[name].cast(pa.string()), name=name)

    def lists(self, name: str | None) -> list[list[str]]:
        """A column of texts or of lists of texts, as lists without nulls."""
        if name is None:
            return [[] for _ in range(len(self._table))]
        column = self._table[name]
        if not is_list(column.type):
            return [[] if value is None else [value] for value in self.strings(name)]
        values = self._pylist(column.cast(pa.list_(pa.string())), name=name)
        return [[item for item in value or [] if item is not None] for value in values]

    def values(self, name: str | None) -> list[Any]:
        return [None] * len(self._table) if name is None else self._pylist(self._table[name], name=name)

    def images(self, name: str, *, files: ImageFiles) -> list[bytes]:
        """Encoded images, from the column itself or from the files it names."""
        column = self._table[name]
        if is_text(column.type):
            return self._from_files(self.strings(name), [None] * len(column), files=files)
        if not pa.types.is_struct(column.type):
            return [value or b"" for value in column.to_pylist()]
        # Hugging Face keeps an image as struct<bytes, path>, either of which may be null.
        rows = [row or {} for row in self._pylist(column, name=name)]
        held = [row.get("bytes") for row in rows]
        named = [None if row.get("bytes") else row.get("path") for row in rows]
        return self._from_files(named, held, files=files)

    def _from_files(
        self, names: list[str | None], held: list[bytes | None], *, files: ImageFiles
    ) -> list[bytes]:
        if not any(names):
            return [data or b"" for data in held]
        read, wrong = files.read(names)
        for row, found in enumerate(wrong):
            self.problems[row] = self.problems[row] or found
        return [here or there for here, there in zip(held, read, strict=True)]

    def _pylist(self, column: pa.ChunkedArray, *, name: str) -> list[Any]:
        try:
            return column.to_pylist()
        except UnicodeDecodeError:
            return [self._value(row, value, name=name) for row, value in enumerate(column)]

    def _value(self, row: int, value: pa.Scalar, *, name: str) -> Any:
        try:
            return value.as_py()
        except UnicodeDecodeError as error:
            message = printable(f"column '{name}' is not UTF-8: {error.reason}")
            self.problems[row] = self.problems[row] or problem("undecodable_text", message)
            return None


def _union(*lists: list[str]) -> list[str]:
    return list(dict.fromkeys(item for values in lists for item in values))
