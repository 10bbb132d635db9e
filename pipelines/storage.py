"""Local and S3 paths behind one set of calls: read, list, publish once, never overwrite.

Everything goes through pyarrow's filesystems, so `s3://bucket/key?endpoint_override=host:port&scheme=http`
works wherever a local path does. Credentials come from the environment or the instance role only.
"""

from __future__ import annotations

import json
import posixpath
import uuid
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

# Ends the name of a local file until it is whole.
_PARTIAL = ".partial"


class AlreadyExistsError(FileExistsError):
    """An output location is taken; nothing was written."""


def filesystem(uri: str) -> tuple[pafs.FileSystem, str]:
    """The filesystem of a URI or local path, and the path inside it.

    Raises:
        ValueError: the scheme is unknown or the URI cannot be parsed.
    """
    if "://" not in uri:
        return pafs.LocalFileSystem(), str(Path(uri).expanduser().absolute())
    try:
        return pafs.FileSystem.from_uri(uri)
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"cannot open '{uri}': {error}") from error


def absolute(uri: str) -> str:
    """The same location for any process on this machine; a URI stays as it is.

    Trials run in working directories of their own, where a relative path means something else.
    """
    return uri if "://" in uri else str(Path(uri).expanduser().absolute())


def join(uri: str, *parts: str) -> str:
    """Append path parts to a URI, before its query string."""
    base, mark, query = uri.partition("?")
    return posixpath.join(base, *parts) + mark + query


def exists(uri: str) -> bool:
    fs, path = filesystem(uri)
    return fs.get_file_info(path).type != pafs.FileType.NotFound


def list_files(uri: str, *, suffix: str = "", recursive: bool = True) -> list[str]:
    """Paths of the files below `uri`, relative to it, sorted; empty when the folder is absent.

    Files still being written, or left half written by a process that died, are not listed.
    """
    fs, path = filesystem(uri)
    found = fs.get_file_info(pafs.FileSelector(path, recursive=recursive, allow_not_found=True))
    files = (info.path for info in found if info.type == pafs.FileType.File)
    whole = (file for file in files if file.endswith(suffix) and not file.endswith(_PARTIAL))
    return sorted(posixpath.relpath(file, path) for file in whole)


def read_bytes(uri: str) -> bytes:
    fs, path = filesystem(uri)
    with fs.open_input_stream(path) as stream:
        return bytes(stream.read())


def write_bytes(uri: str, data: bytes) -> None:
    """Write a file whole: a reader sees the old content or the new, never a part.

    A local file is written beside its place and renamed; an object store publishes on close.
    """
    fs, path = filesystem(uri)
    fs.create_dir(posixpath.dirname(path), recursive=True)
    if not isinstance(fs, pafs.LocalFileSystem):
        with fs.open_output_stream(path) as stream:
            stream.write(data)
        return
    partial = f"{path}.{uuid.uuid4().hex[:8]}{_PARTIAL}"
    with fs.open_output_stream(partial) as stream:
        stream.write(data)
    fs.move(partial, path)


def publish_bytes(uri: str, data: bytes) -> None:
    """Write a file that must not exist yet.

    Raises:
        AlreadyExistsError: the place is taken.
    """
    refuse_existing(uri)
    write_bytes(uri, data)


def refuse_existing(uri: str) -> None:
    """Raise `AlreadyExistsError` when something is at `uri`."""
    if exists(uri):
        raise AlreadyExistsError(f"'{uri}' exists already and is never overwritten; name another output")


def read_json(uri: str) -> Any:
    return json.loads(read_bytes(uri))


def write_json(uri: str, value: Any) -> None:
    write_bytes(uri, (json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n").encode())


def publish_json(uri: str, value: Any) -> None:
    refuse_existing(uri)
    write_json(uri, value)


def read_table(uri: str, *, columns: list[str] | None = None) -> pa.Table:
    fs, path = filesystem(uri)
    return pq.read_table(path, filesystem=fs, columns=columns)


def write_table(uri: str, table: pa.Table) -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    write_bytes(uri, sink.getvalue().to_pybytes())


def delete_folder(uri: str) -> None:
    """Remove a folder and everything below it."""
    fs, path = filesystem(uri)
    fs.delete_dir(path)
