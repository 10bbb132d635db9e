"""Members of a tar archive, one after the other, with what is damaged between them.

The standard library's reader ends silently at a damaged header and holds the list of members; here a damaged
stretch is reported and passed over, and nothing is kept.
"""

from __future__ import annotations

import gzip
import os
import tarfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import BinaryIO

_BLOCK = tarfile.BLOCKSIZE
_CHUNK = 1 << 20
_MAX_NAME_BYTES = 1 << 16
# A larger member is no image and no caption; its bytes are passed over.
MAX_MEMBER_BYTES = 1 << 28

_FILE_TYPES = {tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE}
# What the standard library raises on a damaged or shortened .tar.gz.
_UNPACKING = (EOFError, gzip.BadGzipFile, zlib.error)
_EXTENDED = {tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE}


@dataclass(frozen=True)
class Member:
    """A file of the archive; `data` is None when nobody wanted it."""

    name: str
    data: bytes | None


@dataclass(frozen=True)
class Damage:
    """Something that could not be read; `name` is the member it happened in, when that is known."""

    reason: str
    message: str
    position: int
    name: str | None = None


class _EndsEarlyError(Exception):
    def __init__(self, found: int, expected: int) -> None:
        super().__init__(f"ends after {found} of {expected} bytes")


class _Counted:
    """A stream that knows how far it was read. What cannot be unpacked any further is its end."""

    def __init__(self, stream: BinaryIO, size: int | None) -> None:
        self._stream = stream
        self._size = size
        self.position = 0

    def read(self, num_bytes: int) -> bytes:
        try:
            data = self._stream.read(num_bytes)
        except _UNPACKING:
            data = b""
        self.position += len(data)
        return data

    def skip(self, num_bytes: int) -> int:
        """Pass over bytes; returns how many there were."""
        if self._size is not None:
            num_bytes = min(num_bytes, self._size - self.position)
            self._stream.seek(num_bytes, os.SEEK_CUR)
            self.position += num_bytes
            return num_bytes
        start = self.position
        while (rest := start + num_bytes - self.position) and self.read(min(rest, _CHUNK)):
            pass
        return self.position - start

    def body(self, size: int, *, wanted: bool) -> bytes | None:
        """The content of a member and the padding after it.

        Raises:
            _EndsEarlyError: the archive ends in it.
        """
        data = b""
        if wanted:
            # In steps: a damaged size must not ask for its memory at once.
            parts = []
            while (rest := size - sum(map(len, parts))) and (part := self.read(min(rest, _CHUNK))):
                parts.append(part)
            data = b"".join(parts)
            found = len(data)
        else:
            found = self.skip(size)
        if found < size:
            raise _EndsEarlyError(found, size)
        self.skip(-size % _BLOCK)
        return data if wanted else None


def tar_members(
    stream: BinaryIO, *, wants: Callable[[str], bool], size: int | None = None
) -> Iterator[Member | Damage]:
    """Every regular file of an archive, and every damage; `wants` decides by name what is read.

    With the `size` of the archive, what nobody wants is sought over; without, it is read.

    Archives put behind one another are read as one. A stretch that is no header is passed over block by block
    up to the next header. An archive that does not end in its mark, two empty blocks, has lost its end.
    """
    counted = _Counted(stream, size)
    num_empty = 0
    damaged_from: int | None = None
    overrides: dict[str, str] = {}
    while block := counted.read(_BLOCK):
        start = counted.position - len(block)
        if not any(block):
            num_empty += 1
            continue
        info = _header(block)
        if len(block) < _BLOCK and damaged_from is None:
            yield Damage("truncated_shard", "the archive ends within a header", start)
            return
        if info is None:
            damaged_from = start if damaged_from is None else damaged_from
            continue
        if num_empty == 1 and damaged_from is None:
            damaged_from = start - _BLOCK  # one empty block is no end but a header that was wiped out
        if damaged_from is not None:
            yield _stretch(damaged_from, start)
        num_empty, damaged_from = 0, None
        try:
            found, overrides = _member(info, counted, wants=wants, overrides=overrides)
        except _EndsEarlyError as error:
            name = _name(info, overrides)
            yield Damage("truncated_member", f"'{name}' {error}", start, name)
            return
        if found is not None:
            yield found
    if damaged_from is not None:
        yield _stretch(damaged_from, counted.position)
    elif not num_empty:
        yield Damage("truncated_shard", "the archive ends without its end mark", counted.position)


def _stretch(start: int, end: int) -> Damage:
    return Damage("damaged_shard", f"{end - start} bytes from byte {start} are no part of an archive", start)


@dataclass
class _Header:
    name: str
    size: int
    type: bytes


def _header(block: bytes) -> _Header | None:
    """The fields of a header that matter here; None when its checksum is not that of the block."""
    if len(block) < _BLOCK:
        return None
    size, checksum = _number(block[124:136]), _number(block[148:156])
    if size is None or size < 0 or checksum is None:
        return None
    # The checksum counts its own field as blanks.
    if sum(block) - sum(block[148:156]) + 8 * 32 != checksum and checksum not in tarfile.calc_chksums(block):
        return None
    name = block[:100].partition(b"\0")[0]
    if block[257:263] == b"ustar\0" and block[345]:
        name = block[345:500].partition(b"\0")[0] + b"/" + name
    return _Header(name.decode("utf-8", "surrogateescape"), size, block[156:157])


def _number(field: bytes) -> int | None:
    """Octal digits, or for what does not fit them binary digits after a mark; None when it is neither."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    try:
        return int(field.partition(b"\0")[0].strip() or b"0", 8)
    except ValueError:
        return None


def _member(
    info: _Header, counted: _Counted, *, wants: Callable[[str], bool], overrides: dict[str, str]
) -> tuple[Member | Damage | None, dict[str, str]]:
    """What a header announces, and what the headers so far say of the next member."""
    start = counted.position - _BLOCK
    if info.type in _EXTENDED or info.type == tarfile.GNUTYPE_LONGNAME:
        if info.size > _MAX_NAME_BYTES:
            counted.body(info.size, wanted=False)
            return Damage("damaged_shard", f"a name of {info.size} bytes", start), {}
        data = counted.body(info.size, wanted=True) or b""
        if info.type == tarfile.GNUTYPE_LONGNAME:
            return None, {**overrides, "path": data.rstrip(b"\0").decode("utf-8", "surrogateescape")}
        return None, {**overrides, **_extended(data)}
    if overrides.get("size", "").isdecimal():
        info.size = int(overrides["size"])
    name = _name(info, overrides)
    if info.type not in _FILE_TYPES:
        # Links and folders have no content whatever their size says; other types pass over theirs.
        if info.type not in (tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.DIRTYPE):
            counted.body(info.size, wanted=False)
        return None, overrides if info.type == tarfile.XGLTYPE else {}
    if wants(name) and info.size > MAX_MEMBER_BYTES:
        counted.body(info.size, wanted=False)
        return Damage("member_too_large", f"'{name}' has {info.size} bytes", start, name), {}
    return Member(name, counted.body(info.size, wanted=wants(name))), {}


def _name(info: _Header, overrides: dict[str, str]) -> str:
    name = overrides.get("path", info.name)
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace").removeprefix("./")


def _extended(data: bytes) -> dict[str, str]:
    """The records of an extended header, "<length> <key>=<value>"; a damaged rest is left out."""
    records: dict[str, str] = {}
    while data:
        digits, _, _ = data.partition(b" ")
        if not digits.isdigit() or not len(digits) < int(digits) <= len(data):
            break
        record, data = data[len(digits) + 1 : int(digits)], data[int(digits) :]
        key, _, value = record.rstrip(b"\n").decode("utf-8", "surrogateescape").partition("=")
        records[key] = value
    return records
