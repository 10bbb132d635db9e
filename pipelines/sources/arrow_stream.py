"""Arrow stream files, batch by batch: where each lies is found from the heads of its messages alone.

A stream has no list of its batches. Between the heads lie the pixels, which the driver has no need to read.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.fs as pafs

from pipelines.sources.remote import DAMAGE, read_range
from pipelines.storage import filesystem

# A head is some hundred bytes; one request brings it.
_HEAD_BYTES = 1 << 14
_RECORD_BATCH = 3
_END = -1
# A head that says more was damaged: even packed, no column holds a row in less.
_MAX_ROWS_PER_BYTE = 1000


@dataclass(frozen=True)
class StreamBatch:
    """A record batch of a stream file: the bytes of its message, and how many rows it has."""

    start: int
    num_bytes: int
    num_rows: int


@dataclass(frozen=True)
class Stream:
    """The schema and batches of a stream file; `fault` says what ends it before its time."""

    schema: pa.Schema
    batches: list[StreamBatch]
    fault: str | None


@dataclass(frozen=True)
class _Message:
    kind: int
    end: int
    num_rows: int


def scan_stream(uri: str, *, size: int) -> Stream:
    """Find the batches of a stream file of `size` bytes.

    Raises:
        ValueError: it does not begin with a schema, or has dictionaries, which no task could do without.
    """
    first = _message(uri, 0, size=size)
    try:
        if first is None or first.end > size:
            raise pa.ArrowInvalid("no schema")
        schema = pa.ipc.read_schema(pa.py_buffer(read_range(uri, 0, first.end)))
        str(schema)  # names that are no text are damage too
    except (*DAMAGE, UnicodeDecodeError) as error:
        raise ValueError(f"'{uri}' is no Arrow stream: {error}") from error
    if any(pa.types.is_dictionary(field.type) for field in schema):
        raise ValueError(
            f"'{uri}' has dictionary-encoded columns, which are not read; cast them to their values"
        )
    batches: list[StreamBatch] = []
    place = first.end
    fault: str | None = "it ends without its end mark"
    while place < size:
        message = _message(uri, place, size=size)
        if message is None or message.end > size:
            fault = f"damaged or cut off at byte {place}"
            break
        if message.kind == _END:
            fault = None if message.end == size else f"its end mark comes early, at byte {place}"
            break
        if message.kind != _RECORD_BATCH:
            fault = f"no record batch at byte {place}"
            break
        batches.append(StreamBatch(place, message.end - place, message.num_rows))
        place = message.end
    return Stream(schema, batches, fault)


def read_batch(uri: str, batch: StreamBatch, *, schema: pa.Schema) -> pa.RecordBatch:
    """A batch, checked wholly: a damaged offset must not be followed.

    Raises:
        pa.ArrowException, OSError: the bytes are no such batch.
    """
    fs, path = filesystem(uri)
    if isinstance(fs, pafs.LocalFileSystem):
        with pa.memory_map(path) as file:
            file.seek(batch.start)
            message = pa.ipc.read_message(file)
    else:
        message = pa.ipc.read_message(pa.BufferReader(read_range(uri, batch.start, batch.num_bytes)))
    found = pa.ipc.read_record_batch(message, schema)
    found.validate(full=True)
    return found


def _message(uri: str, place: int, *, size: int) -> _Message | None:
    """The head of the message at a byte; None when there is none."""
    head = read_range(uri, place, _HEAD_BYTES)
    prefix = 8 if head[:4] == b"\xff\xff\xff\xff" else 4  # files of the first Arrow versions have no mark
    if len(head) < prefix:
        return None
    (length,) = struct.unpack_from("<i", head, prefix - 4)
    if length == 0:
        return _Message(_END, place + prefix, 0)
    if length < 0 or place + prefix + length > size:
        return None
    if prefix + length > len(head):
        head = read_range(uri, place, prefix + length)
    try:
        kind, num_rows, body = _flat_message(head[prefix : prefix + length])
    except struct.error:
        return None
    if body < 0 or not 0 <= num_rows <= body * _MAX_ROWS_PER_BYTE:
        return None
    return _Message(kind, place + prefix + length + body, num_rows)


def _flat_message(data: bytes) -> tuple[int, int, int]:
    """Kind, rows and length of the body, from the flatbuffer that Arrow's format describes a message with."""
    table = struct.unpack_from("<I", data)[0]
    kind = _field(data, table, 1, "<B")
    body = _field(data, table, 3, "<q")
    header = _offset(data, table, 2)
    if kind != _RECORD_BATCH or not header:
        return kind, 0, body
    inner = header + struct.unpack_from("<I", data, header)[0]
    return kind, _field(data, inner, 0, "<q"), body


def _offset(data: bytes, table: int, number: int) -> int:
    """Where a field of a flatbuffer table lies; 0: it has its default value."""
    vtable = table - struct.unpack_from("<i", data, table)[0]
    (length,) = struct.unpack_from("<H", data, vtable)
    entry = 4 + 2 * number
    if entry >= length:
        return 0
    (offset,) = struct.unpack_from("<H", data, vtable + entry)
    return table + offset if offset else 0


def _field(data: bytes, table: int, number: int, form: str) -> int:
    place = _offset(data, table, number)
    return int(struct.unpack_from(form, data, place)[0]) if place else 0
