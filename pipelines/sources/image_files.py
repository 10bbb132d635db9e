"""Image files that a table names instead of holding them: read side by side, what is absent is counted."""

from __future__ import annotations

import os
import posixpath
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.fs as pafs

from pipelines.sources.rows import Problem, UnusableError
from pipelines.storage import filesystem

# A longer file is a film or an archive in the wrong place.
MAX_IMAGE_BYTES = 1 << 28

# For the user: files that a table names are too many to look at before anything starts.
NAMED_IMAGES_NOTE = "images lie in files of their own: a changed image under an old name is not noticed"

_LOCAL_THREADS = 4
_REMOTE_THREADS = 32
_NOT_A_FILE = (FileNotFoundError, IsADirectoryError, NotADirectoryError)


@dataclass(frozen=True)
class ImageFiles:
    """Files below a folder (local or URI); absolute paths and URIs stand for themselves.

    A URI without a query takes that of the folder, where the endpoint of a storage server is named.
    """

    root: str

    def read(self, names: Sequence[str | None]) -> tuple[list[bytes], list[Problem | None]]:
        """The bytes of each file, and what is wrong with it; empty bytes alone where no name is given.

        Raises:
            OSError: the storage cannot be reached, or refuses.
        """
        places = _Places(self.root)
        threads = _LOCAL_THREADS if "://" not in self.root else _REMOTE_THREADS
        with ThreadPoolExecutor(max_workers=threads) as pool:
            found = list(pool.map(lambda name: _read_named(name, places), names))
        return [data for data, _ in found], [wrong for _, wrong in found]

    def check(self, names: Sequence[str | None], *, where: str) -> None:
        """Refuse names of which not one leads to a file; `names` are a sample.

        Raises:
            ValueError: saying where was looked.
        """
        _, problems = self.read(names)
        wrong = [found for found in problems if found is not None]
        if wrong and len(wrong) == len(names):
            raise ValueError(
                f"{where}: none of the first {len(names)} images can be read: {wrong[0]['message']}. "
                f"Relative names are taken from '{self.root}'; name another folder with data.image_root"
            )


class _Places:
    """From names to files, with one filesystem per bucket: making one costs a request."""

    def __init__(self, root: str) -> None:
        self._root = filesystem(root)
        self._query = root.partition("?")[2] if "://" in root else ""
        self._scheme = root.partition("://")[0] if "://" in root else ""
        self._buckets: dict[str, tuple[pafs.FileSystem, str]] = {}

    def of(self, name: str) -> tuple[pafs.FileSystem, str]:
        """
        Raises:
            UnusableError: reason missing_image: an address that is downloaded, not read.
        """
        scheme, is_uri, rest = name.partition("://")
        if not is_uri:
            if name.startswith("/"):
                return pafs.LocalFileSystem(), name
            fs, folder = self._root
            return fs, posixpath.join(folder, name)
        if scheme in ("http", "https", "ftp"):
            raise UnusableError(
                "missing_image", f"'{name}' is an address of the web; download the images first (img2dataset)"
            )
        if scheme == "file":
            return pafs.LocalFileSystem(), rest
        path, _, query = rest.partition("?")
        bucket, _, key = path.partition("/")
        query = query or (self._query if scheme == self._scheme else "")
        place = f"{scheme}://{bucket}" + (f"?{query}" if query else "")
        if place not in self._buckets:
            try:
                self._buckets[place] = filesystem(place)
            except ValueError as error:
                raise UnusableError("missing_image", str(error)) from error
        fs, folder = self._buckets[place]
        return fs, posixpath.join(folder, key)


def _read_named(name: str | None, places: _Places) -> tuple[bytes, Problem | None]:
    if not name:
        return b"", None
    try:
        fs, path = places.of(name)
        return _read(fs, path), None
    except UnusableError as error:
        return b"", error.problem


def _read(fs: pafs.FileSystem, path: str) -> bytes:
    """
    Raises:
        UnusableError: reason missing_image, unreadable_image or image_too_large.
    """
    if isinstance(fs, pafs.LocalFileSystem):
        try:
            with open(path, "rb") as file:
                _check_size(os.fstat(file.fileno()).st_size, path)
                return file.read()
        except _NOT_A_FILE as error:
            raise UnusableError("missing_image", f"no file '{path}'") from error
        except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
            raise UnusableError("unreadable_image", f"'{path}': {error}") from error
    try:
        with fs.open_input_file(path) as file:
            _check_size(file.size(), path)
            return bytes(file.read())
    except _NOT_A_FILE as error:
        raise UnusableError("missing_image", f"no file '{path}'") from error
    except pa.ArrowInvalid as error:
        raise UnusableError("missing_image", f"'{path}': {error}") from error


def _check_size(num_bytes: int, path: str) -> None:
    if num_bytes > MAX_IMAGE_BYTES:
        raise UnusableError("image_too_large", f"'{path}' has {num_bytes} bytes, over {MAX_IMAGE_BYTES}")
