"""Rows on their way to `schemas.PAIRS`: valid text, and what is known against a row."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa

from pipelines.schemas import PAIRS, PROBLEM, UNKNOWN_LABELS

Problem = dict[str, str]

# A longer text is no caption but a file in the wrong place.
MAX_TEXT_CHARS = 1_000_000


class UnusableError(Exception):
    """A value a row cannot be made of; `reason` is a short identifier for the quarantine."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason

    @property
    def problem(self) -> Problem:
        return problem(self.reason, str(self))


def problem(reason: str, message: str) -> Problem:
    """Why a row is to be set aside, in `schemas.PROBLEM`."""
    return {"reason": reason, "message": printable(message)}


def printable(text: str) -> str:
    """Text that Arrow can hold: what is no Unicode becomes question marks."""
    return text.encode("utf-8", "replace").decode()


def decoded(data: bytes, *, what: str) -> str:
    """Bytes as text.

    Raises:
        UnusableError: reason undecodable_text: not UTF-8.
    """
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UnusableError("undecodable_text", f"{what} is not UTF-8: {error.reason}") from error


def as_text(value: Any, *, what: str) -> str:
    """A scalar of a JSON file as text; numbers as they print.

    Raises:
        UnusableError: reason undecodable_text (lone surrogates, endless text) or mistyped_text (no scalar).
    """
    if not isinstance(value, str | int | float):
        raise UnusableError("mistyped_text", f"{what} must hold a text, found {type(value).__name__}")
    text = str(value)
    if printable(text) != text:
        raise UnusableError("undecodable_text", f"{what} is not valid Unicode")
    if len(text) > MAX_TEXT_CHARS:
        raise UnusableError("undecodable_text", f"{what} has {len(text)} characters, over {MAX_TEXT_CHARS}")
    return text


def as_texts(value: Any, *, what: str) -> list[str]:
    """A scalar or a list of scalars as texts, without nulls; see `as_text`."""
    values = value if isinstance(value, list) else [value]
    return [as_text(item, what=what) for item in values if item is not None]


def as_boxes(value: Any, *, what: str) -> list[dict[str, Any]]:
    """A JSON list of {label, x, y, w, h} in `schemas.BOX`.

    Raises:
        UnusableError: reason invalid_box.
    """
    boxes = []
    for box in value if isinstance(value, list) else [value]:
        if not isinstance(box, Mapping) or not all(isinstance(box.get(k), int | float) for k in "xywh"):
            raise UnusableError("invalid_box", f"{what} must list objects of label, x, y, w, h")
        numbers = {k: float(box[k]) for k in "xywh"}
        boxes.append({"label": as_text(box.get("label", ""), what=what), **numbers})
    return boxes


def pair_row(
    row_id: str,
    *,
    image: bytes = b"",
    captions: Sequence[str] = (),
    split: str = "",
    source: str,
    **annotations: Any,
) -> dict[str, Any]:
    """A row of `schemas.PAIRS` with what is not named left empty."""
    empty = {"sentences": [], "labels": [], "class_name": None, "group_id": None, "boxes": None}
    named = {"row_id": row_id, "image": image, "captions": list(captions), "source": source, "split": split}
    return {**empty, **named, **annotations}


def unusable_row(row_id: str, found: Problem, *, source: str) -> dict[str, Any]:
    """A row that stands for something unreadable, so that the quarantine counts it."""
    return pair_row(printable(row_id), source=source, problem=found)


def pairs_table(rows: Sequence[Mapping[str, Any]], *, with_images: bool) -> pa.Table:
    """Rows of `pair_row` as a table of `schemas.PAIRS`, with problems where there are any."""
    schema = PAIRS if with_images else PAIRS.remove(PAIRS.get_field_index("image"))
    if any(UNKNOWN_LABELS.name in row for row in rows):
        schema = schema.append(UNKNOWN_LABELS)
    return with_problems(pa.Table.from_pylist(rows, schema=schema), [row.get("problem") for row in rows])


def with_problems(table: pa.Table, problems: Sequence[Problem | None]) -> pa.Table:
    """The table with `schemas.PROBLEM` beside it, when anything is known against a row."""
    if not any(problems):
        return table
    return table.append_column(PROBLEM, pa.array(problems, PROBLEM.type))


def tables_of(
    rows: Iterator[dict[str, Any]], *, with_images: bool, max_rows: int = 256, max_bytes: int = 1 << 26
) -> Iterator[pa.Table]:
    """Gather rows to tables of bounded size, whatever size the images have."""
    waiting: list[dict[str, Any]] = []
    num_bytes = 0
    for row in rows:
        waiting.append(row)
        num_bytes += len(row["image"])
        if len(waiting) == max_rows or num_bytes >= max_bytes:
            yield pairs_table(waiting, with_images=with_images)
            waiting, num_bytes = [], 0
    if waiting:
        yield pairs_table(waiting, with_images=with_images)
