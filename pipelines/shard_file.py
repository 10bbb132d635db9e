"""One shard of prepared data as a file: Arrow IPC, uncompressed.

Pixels lie in it as training takes them, so that a local shard is mapped into memory: an epoch costs a copy
instead of a decode, the workers of a machine share one copy in the page cache, and columns that are not asked
for are never read. From an object store the columns asked for are fetched.
"""

from __future__ import annotations

from typing import Final

import pyarrow as pa

from pipelines.storage import filesystem, is_local

SUFFIX: Final = ".arrow"


def shard_bytes(table: pa.Table) -> bytes:
    """A table as a shard file of one record batch; the same rows give the same bytes."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table.combine_chunks())
    return bytes(sink.getvalue().to_pybytes())


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
