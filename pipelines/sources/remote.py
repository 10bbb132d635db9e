"""Reading files that may lie far away: in large steps, and again when the storage does not answer."""

from __future__ import annotations

import gzip
import io
import os
import time
from collections.abc import Callable
from typing import TypeVar

import pyarrow as pa
import pyarrow.fs as pafs

from pipelines.storage import filesystem

# Together a minute and a half: a storage server is restarted in that time.
RETRY_WAITS_S = (0.5, 1, 2, 4, 8, 16, 30, 30)
# Every step is a request.
_REMOTE_STEP = 1 << 23
_LOCAL_STEP = 1 << 17
_NOT_THERE = (FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError)

# What pyarrow raises on bytes that do not hold what their format promises, and on storage that fails.
DAMAGE = (pa.ArrowException, OSError)

Result = TypeVar("Result")


def of_storage(error: Exception) -> bool:
    """Whether an error of `DAMAGE` speaks of the storage and not of the bytes."""
    return "AWS Error" in str(error)


def retried(attempt: Callable[[], Result]) -> Result:
    """What an attempt returns, tried again for a minute and a half while the storage does not answer.

    Raises:
        OSError: of the last attempt, or at once where waiting mends nothing (absent, refused).
    """
    for wait_s in RETRY_WAITS_S:
        try:
            return attempt()
        except _NOT_THERE:
            raise
        except OSError as error:
            if "ACCESS_DENIED" in str(error):
                raise
            time.sleep(wait_s)
    return attempt()


def open_file(uri: str) -> io.BufferedReader:
    """A file to read and seek in."""
    fs, path = filesystem(uri)
    if isinstance(fs, pafs.LocalFileSystem):
        return open(path, "rb", buffering=_LOCAL_STEP)
    return io.BufferedReader(_RemoteFile(fs, path), buffer_size=_REMOTE_STEP)


def read_range(uri: str, start: int, num_bytes: int) -> bytes:
    """Some bytes of a file, fewer at its end; one request."""
    fs, path = filesystem(uri)

    def read() -> bytes:
        with fs.open_input_file(path) as file:
            return bytes(file.read_at(num_bytes, start))

    return read() if isinstance(fs, pafs.LocalFileSystem) else retried(read)


def open_unzipped(uri: str) -> io.BufferedIOBase:
    """A file to read and seek in, unpacked on the way when its name ends in .gz or .tgz."""
    file = open_file(uri)
    packed = uri.partition("?")[0].endswith((".gz", ".tgz"))
    return io.BufferedReader(_Unpacked(fileobj=file)) if packed else file


class _Unpacked(gzip.GzipFile):
    """Closes the packed file too, which the standard class leaves to whoever opened it."""

    def close(self) -> None:
        packed = self.fileobj
        super().close()
        if packed is not None:
            packed.close()


class _RemoteFile(io.RawIOBase):
    """A pyarrow file as a raw Python one; a read that fails is done again, from a file opened anew."""

    def __init__(self, fs: pafs.FileSystem, path: str) -> None:
        self._fs = fs
        self._path = path
        self._position = 0
        self._file = retried(lambda: fs.open_input_file(path))
        self._size = self._file.size()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        self._position = start + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: memoryview) -> int:
        data = retried(lambda: self._read(len(buffer)))
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)

    def _read(self, num_bytes: int) -> bytes:
        try:
            self._file.seek(min(self._position, self._size))
            return bytes(self._file.read(num_bytes))
        except OSError:
            self._file = self._fs.open_input_file(self._path)
            raise

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()
