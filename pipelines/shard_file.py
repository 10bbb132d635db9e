"""One shard of prepared data as a file: Arrow IPC, uncompressed.

Pixels lie in it as training takes them, so that a local shard is mapped into memory: an epoch costs a copy
instead of a decode, the workers of a machine share one copy in the page cache, and columns that are not asked
for are never read. From an object store the columns asked for are fetched.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipelines.storage import filesystem, is_local

SUFFIX: Final = ".arrow"


def pack_shard(table: pa.Table) -> pa.Buffer:
    """A table as the content of a shard file; the same rows give the same bytes."""
    table = table.combine_chunks()
    # Measured first: a buffer that grows would copy the pixels again and again.
    measure = pa.MockOutputStream()
    _write(table, measure)
    buffer = pa.allocate_buffer(measure.size())
    _write(table, pa.FixedSizeBufferWriter(buffer))
    return buffer


def _write(table: pa.Table, sink: pa.NativeFile) -> None:
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)


def image_column(images: Sequence[NDArray[np.uint8]]) -> pa.ChunkedArray:
    """Pixels of equal size, uint8 [S, S, 3] each, as a binary column."""
    chunks = []
    # Offsets of a binary column are 32 bits wide.
    per_chunk = (2**31 - 1) // images[0].size
    for first in range(0, len(images), per_chunk):
        part = np.stack(images[first : first + per_chunk])
        offsets = np.arange(len(part) + 1, dtype=np.int32) * np.int32(part[0].size)
        buffers = [None, pa.py_buffer(offsets), pa.py_buffer(part)]
        chunks.append(pa.Array.from_buffers(pa.binary(), len(part), buffers))
    return pa.chunked_array(chunks, pa.binary())


def read_shard(uri: str, *, columns: list[str] | None = None) -> pa.Table:
    """The rows of a shard file, with some of its columns; a local file is mapped, not read.

    Raises:
        ValueError: it is no shard file, or a damaged one.
    """
    fs, path = filesystem(uri)
    try:
        if is_local(uri):
            table = pa.ipc.open_file(pa.memory_map(path)).read_all()
        else:
            with fs.open_input_file(path) as file:
                table = _fetch(file, columns)
    except pa.ArrowInvalid as error:
        raise ValueError(
            f"'{uri}' is not a readable shard of prepared data ({error}); delete the folder and prepare again"
        ) from error
    # A column that is not there must not be asked for: the caller checks what it got against a schema.
    return (
        table if columns is None else table.select([name for name in columns if name in table.column_names])
    )


def _fetch(file: pa.NativeFile, columns: list[str] | None) -> pa.Table:
    schema = pa.ipc.open_file(file).schema
    wanted = None if columns is None else [i for i, name in enumerate(schema.names) if name in columns]
    return pa.ipc.open_file(file, options=pa.ipc.IpcReadOptions(included_fields=wanted)).read_all()
