"""Reading files that may lie far away: in large steps, for every step is a request."""

from __future__ import annotations

import gzip
import io

import pyarrow as pa
import pyarrow.fs as pafs

from pipelines.storage import filesystem

_REMOTE_STEP = 1 << 23
_LOCAL_STEP = 1 << 17

# What pyarrow raises on bytes that do not hold what their format promises, and on storage that fails.
DAMAGE = (pa.ArrowException, OSError)


def of_storage(error: Exception) -> bool:
    """Whether an error of `DAMAGE` speaks of the storage and not of the bytes."""
    return "AWS Error" in str(error)


def open_file(uri: str) -> io.BufferedReader:
    """A file to read and seek in."""
    fs, path = filesystem(uri)
    if isinstance(fs, pafs.LocalFileSystem):
        return open(path, "rb", buffering=_LOCAL_STEP)
    return io.BufferedReader(fs.open_input_file(path), buffer_size=_REMOTE_STEP)


def read_range(uri: str, start: int, num_bytes: int) -> bytes:
    """Some bytes of a file, fewer at its end; one request."""
    fs, path = filesystem(uri)
    with fs.open_input_file(path) as file:
        return bytes(file.read_at(num_bytes, start))


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
