"""The files of a source: found once on the driver, with what tells whether they changed."""

from __future__ import annotations

import contextlib
import hashlib
import posixpath
import re
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import pyarrow.fs as pafs

from pipelines.storage import filesystem, join

# Object storage is far away: this many requests wait side by side.
THREADS = 16

Item = TypeVar("Item")

_ENDINGS = re.compile(r"(\.(parquet|csv|tsv|txt|json|tar|tgz|gz|ya?ml))+$")


@dataclass(frozen=True)
class SourceFile:
    """`name` is the path below the folder that was given, or the file's own name."""

    uri: str
    name: str
    size: int
    changed_ns: int


def files_at(uri: str, *, suffixes: tuple[str, ...]) -> list[SourceFile]:
    """One file, or all files below a folder with one of the suffixes, in the order of names.

    Raises:
        ValueError: nothing is there.
    """
    fs, path = filesystem(uri)
    info = fs.get_file_info(path)
    if info.type == pafs.FileType.NotFound:
        raise ValueError(f"data.source: '{uri}' does not exist")
    if info.type == pafs.FileType.File:
        return [_file(info, uri=uri, name=posixpath.basename(path))]
    found = files_below(fs, path)
    files = sorted((name, each) for name, each in found.items() if _is_data(name, suffixes=suffixes))
    if not files:
        raise ValueError(
            f"data.source: no {' or '.join('*' + suffix for suffix in suffixes)} file below '{uri}'"
        )
    return [_file(each, uri=join(uri, name), name=name) for name, each in files]


def files_below(fs: pafs.FileSystem, folder: str) -> dict[str, pafs.FileInfo]:
    """Everything below a folder by its path from there; names that are no UTF-8 cannot be told."""
    found = {}
    for info in fs.get_file_info(pafs.FileSelector(folder, recursive=True)):
        if info.is_file:
            with contextlib.suppress(UnicodeDecodeError):
                found[posixpath.relpath(info.path, folder)] = info
    return found


def _is_data(name: str, *, suffixes: tuple[str, ...]) -> bool:
    # A leading dot marks what file managers and archivers leave beside the data.
    return name.lower().endswith(suffixes) and not posixpath.basename(name).startswith(".")


def files_named(uris: Sequence[str]) -> tuple[list[SourceFile], list[str]]:
    """The files that exist among those named, in the order given, and the URIs that do not."""
    with ThreadPoolExecutor(max_workers=THREADS) as pool:
        found = list(pool.map(_find, uris))
    files = [file for file in found if file is not None]
    return files, [uri for uri, file in zip(uris, found, strict=True) if file is None]


def _find(uri: str) -> SourceFile | None:
    fs, path = filesystem(uri)
    info = fs.get_file_info(path)
    return _file(info, uri=uri, name=posixpath.basename(path)) if info.is_file else None


def _file(info: pafs.FileInfo, *, uri: str, name: str) -> SourceFile:
    return SourceFile(uri, name, info.size or 0, info.mtime_ns or 0)


def identity_of(spec: str, files: Iterable[SourceFile]) -> str:
    """Text that changes whenever a file was added, removed, replaced or resized."""
    files = list(files)
    lines = [f"{file.uri} {file.size} {file.changed_ns}" for file in files]
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]
    return f"{spec} files={len(files)} bytes={sum(file.size for file in files)} state={digest}"


def folder_of(uri: str) -> str:
    """The folder a file lies in; a query stays."""
    base, mark, query = uri.partition("?")
    return posixpath.dirname(base) + mark + query


def stem_of(uri: str) -> str:
    """The name of a file or folder without query and endings: `pairs` of s3://bucket/pairs.csv.gz."""
    name = posixpath.basename(uri.partition("?")[0].rstrip("/"))
    return _ENDINGS.sub("", name) or name


def pack(sized: Iterable[tuple[int, Item]], *, limit: int) -> list[tuple[int, list[Item]]]:
    """Consecutive (rows, item) together up to a limit of rows, or one larger item alone."""
    packs: list[tuple[int, list[Item]]] = []
    for rows, item in sized:
        if packs and packs[-1][0] + rows <= limit:
            held, items = packs[-1]
            items.append(item)
            packs[-1] = (held + rows, items)
        else:
            packs.append((rows, [item]))
    return packs
