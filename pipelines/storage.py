"""Local and S3 paths behind one set of calls: read, list, publish once, never overwrite.

Everything goes through pyarrow's filesystems, so `s3://bucket/key?endpoint_override=host:port&scheme=http`
works wherever a local path does; `anonymous=true` reads public data. Credentials come from the environment
or the instance role only.
"""

from __future__ import annotations

import contextlib
import json
import posixpath
import uuid
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

# In the query of an s3:// URI.
_S3_OPTIONS = {"endpoint_override", "scheme", "region", "anonymous"}
# Waits double from a fraction of a second: a store that is away for half a minute is waited for.
_S3_ATTEMPTS = 12
_S3_CONNECT_TIMEOUT_S = 5

# Ends the name of a local file until it is whole.
_PARTIAL = ".partial"


class AlreadyExistsError(FileExistsError):
    """An output location is taken; nothing was written."""


def filesystem(uri: str) -> tuple[pafs.FileSystem, str]:
    """The filesystem of a URI or local path, and the path inside it.

    Raises:
        ValueError: the scheme is unknown, the URI cannot be parsed or names an unknown option.
    """
    if "://" not in uri:
        return pafs.LocalFileSystem(), str(Path(uri).expanduser().absolute())
    try:
        if uri.startswith("s3://"):
            parts = urlsplit(uri)
            return _s3(parts.netloc, parts.query), posixpath.join(
                parts.netloc, unquote(parts.path).strip("/")
            )
        return pafs.FileSystem.from_uri(uri)
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"cannot open '{uri}': {error}") from error


@lru_cache(maxsize=64)
def _s3(bucket: str, query: str) -> pafs.S3FileSystem:
    """A client of a bucket; its options are those of the URI's query."""
    options = dict(parse_qsl(query))
    unknown = sorted(options.keys() - _S3_OPTIONS)
    if unknown:
        raise ValueError(f"s3://{bucket}: unknown options {unknown}; known: {', '.join(sorted(_S3_OPTIONS))}")
    endpoint = options.get("endpoint_override")
    region = options.get("region")
    if region is None and endpoint is None:
        region = pafs.resolve_s3_region(bucket)
    return pafs.S3FileSystem(
        endpoint_override=endpoint,
        scheme=options.get("scheme", "https"),
        region=region or "us-east-1",
        anonymous=options.get("anonymous", "false").lower() == "true",
        retry_strategy=pafs.AwsStandardS3RetryStrategy(max_attempts=_S3_ATTEMPTS),
        connect_timeout=_S3_CONNECT_TIMEOUT_S,
    )


def is_local(uri: str) -> bool:
    """Whether files below `uri` lie on this machine or are mounted on it, so that they can be mapped."""
    return isinstance(filesystem(uri)[0], pafs.LocalFileSystem)


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


def write_bytes(uri: str, data: bytes | pa.Buffer) -> None:
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
    try:
        with fs.open_output_stream(partial) as stream:
            stream.write(data)
        fs.move(partial, path)
    except OSError:
        # A full disk is not to be filled with what could not be finished.
        with contextlib.suppress(OSError):
            fs.delete_file(partial)
        raise


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
