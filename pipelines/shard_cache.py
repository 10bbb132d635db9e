"""Shards of an object store on this machine's disk: fetched once, mapped from then on.

A file is named by the hash of its content, which is checked when it is fetched; any number of processes and
runs share a folder. The files used longest ago make room. Where the disk cannot be written to, shards are
read from the store as before.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pipelines import storage
from pipelines.shard_file import SUFFIX

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class ShardCache:
    """A folder of shards.

    Attributes:
        max_bytes: of all files together; a larger shard is not kept.
    """

    folder: str
    max_bytes: int

    def local_copy(self, uri: str, *, sha256: str) -> str | None:
        """Where the content of a shard lies on this machine; None when it cannot be kept here.

        Raises:
            ValueError: the store holds other content than its manifest says.
            OSError: the store cannot be read.
        """
        place = Path(self.folder) / f"{sha256}{SUFFIX}"
        with contextlib.ExitStack() as stack:
            try:
                place.parent.mkdir(parents=True, exist_ok=True)
                # One process fetches a shard; the others wait for it rather than fetch it too.
                stack.enter_context(_locked(place.with_suffix(".lock")))
                if place.exists():
                    os.utime(place)
                    return str(place)
            except OSError as error:
                return self._not_kept(error)
            data = storage.read_bytes(uri)
            found = hashlib.sha256(data).hexdigest()
            if found != sha256:
                raise ValueError(
                    f"'{uri}': the manifest says sha256 {sha256}, found {found}; the shard was changed or "
                    "damaged, prepare the data again"
                )
            try:
                return self._keep(place, data)
            except OSError as error:
                return self._not_kept(error)

    def _keep(self, place: Path, data: bytes) -> str | None:
        """Write a file; those used longest ago make room, and one that is mapped stays readable."""
        files = sorted(Path(self.folder).glob(f"*{SUFFIX}"), key=lambda file: file.stat().st_mtime)
        used = sum(file.stat().st_size for file in files)
        while files and used + len(data) > self.max_bytes:
            oldest = files.pop(0)
            used -= oldest.stat().st_size
            oldest.unlink()
        if used + len(data) > self.max_bytes:
            return None
        storage.write_bytes(str(place), data)
        return str(place)

    def _not_kept(self, error: OSError) -> None:
        _LOG.warning("shards are not kept in '%s' and are read from the store again: %s", self.folder, error)


@contextlib.contextmanager
def _locked(file: Path) -> Iterator[None]:
    with file.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
