"""Records of a CSV file with the byte each starts at, so that tasks can begin in the middle.

A record that cannot be read costs its first line: reading goes on with the next one. An open quote would
otherwise swallow the rest of the file.
"""

from __future__ import annotations

import csv
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from pipelines.sources.rows import Problem, printable, problem

# A quoted field may hold line breaks, but a quote that stays open this long was never closed.
_MAX_LINES = 200
_MAX_LINE_BYTES = 1 << 20


class LineReader(Protocol):
    def readline(self, size: int, /) -> bytes: ...


@dataclass(frozen=True)
class Record:
    """Fields of a record; `fault` says why there are none that can be used."""

    start: int
    line: int
    fields: list[str]
    fault: Problem | None = None


def csv_records(file: LineReader, *, delimiter: str, start: int = 0, line: int = 1) -> Iterator[Record]:
    """The records of a file that stands at byte `start`, the first of line `line`; empty lines are none.

    What is wrong with a record has the reason malformed_row or undecodable_text.
    """
    lines = _Lines(file)
    while data := lines.take():
        record_start, record_line = start, line
        used, fields, wrong = [data], [], ""
        if len(data) > _MAX_LINE_BYTES:
            wrong = f"more than {_MAX_LINE_BYTES} bytes"
        elif b'"' not in data:
            fields = _text(data).rstrip("\r\n").split(delimiter)
        else:
            fields, used, wrong = _quoted(data, lines, delimiter=delimiter)
        start += lines.length(used)
        line += len(used)
        fault = problem("malformed_row", f"line {record_line}: {wrong}") if wrong else None
        if not wrong and not all(map(bytes.isascii, used)):
            fault = _undecodable(fields, line=record_line)
        if fault is not None or fields not in ([], [""]):
            yield Record(record_start, record_line, fields, fault)


class _Lines:
    """Lines of a file, some of which may be given back. Of an endless line only the start is kept."""

    def __init__(self, file: LineReader) -> None:
        self._file = file
        self._waiting: deque[bytes] = deque()
        self._cut: dict[bytes, int] = {}

    def take(self) -> bytes:
        if self._waiting:
            return self._waiting.popleft()
        data = self._file.readline(_MAX_LINE_BYTES + 1)
        length, last = len(data), data
        while len(last) > _MAX_LINE_BYTES and not last.endswith(b"\n"):
            last = self._file.readline(_MAX_LINE_BYTES + 1)
            length += len(last)
        if length > len(data):
            self._cut[data] = length
        return data

    def give_back(self, lines: list[bytes]) -> None:
        self._waiting.extendleft(reversed(lines))

    def length(self, lines: list[bytes]) -> int:
        """Bytes that lines take in the file."""
        return sum(self._cut.get(data, len(data)) if self._cut else len(data) for data in lines)


def _quoted(first: bytes, lines: _Lines, *, delimiter: str) -> tuple[list[str], list[bytes], str]:
    """Fields of a record that has a quote, the lines it took, and what is wrong with it (empty: nothing)."""
    used = [first]
    is_open = False

    def feed() -> Iterator[str]:
        nonlocal is_open
        yield _text(first)
        while len(used) < _MAX_LINES and (data := lines.take()):
            used.append(data)
            yield _text(data)
        is_open = True

    try:
        fields = next(csv.reader(feed(), delimiter=delimiter))
    except csv.Error as error:
        wrong = str(error)
    else:
        wrong = "a quote that is not closed" if is_open else ""
    if not wrong:
        return fields, used, ""
    lines.give_back(used[1:])
    return [], [first], wrong


def _undecodable(fields: list[str], *, line: int) -> Problem | None:
    for number, text in enumerate(fields, start=1):
        if printable(text) != text:
            return problem("undecodable_text", f"line {line}: field {number} is not UTF-8")
    return None


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")
