"""Tars of samples as a source: `webdataset:<tars or folder>`, as webdataset and img2dataset write them.

`{00000..00127}`, `{a,b}` and `::` name several; a folder stands for the tars below it. A tar is read from
front to back in one task, member by member.
"""

from __future__ import annotations

import functools
import io
import itertools
import posixpath
import zlib
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, BinaryIO, cast

import pyarrow as pa

from pipelines.sources.column_names import PlainColumns
from pipelines.sources.files import THREADS, SourceFile, files_at, files_named, identity_of, pack, stem_of
from pipelines.sources.remote import open_unzipped, read_range
from pipelines.sources.rows import problem, tables_of, unusable_row
from pipelines.sources.shard_names import expand
from pipelines.sources.source import Piece, SourceSettings
from pipelines.sources.splits import BY_HASH, SplitRule, split_rule
from pipelines.sources.tar_members import Damage
from pipelines.sources.tar_rows import Shard, TarMapper, check_samples, tar_references
from pipelines.sources.tar_samples import Sample, tar_samples

_SUFFIXES = (".tar", ".tar.gz", ".tgz")
_PACKED = (".tar.gz", ".tgz")
# Small tars are read together.
_PIECE_BYTES = 1 << 25
_HEAD_BYTES = 1 << 13
_END_MARK = bytes(1024)
_SAMPLES = 16
# No file takes less than a block, and deflate packs at most about a thousandfold.
_BLOCK = 512
_MAX_PACKING = 1032


class WebdatasetSource:
    """Samples of tars in the order of names and members, one row each.

    What of a tar cannot be read (cut off, overwritten) becomes a row with a problem.

    Raises:
        ValueError: nothing there, no readable tar, or a column that the first samples do not have.
    """

    def __init__(self, settings: SourceSettings, *, spec: str) -> None:
        self._spec = spec
        self._files, absent = _find(spec)
        shared, names = _unique_names(self._files)
        with ThreadPoolExecutor(max_workers=THREADS) as pool:
            heads = list(pool.map(_look_at, self._files))
        rule = split_rule(settings.split_names, settings.split)
        columns = PlainColumns.of(settings.columns)
        self._shards = [
            Shard(file.uri, name, file.size, split)
            for file, name, split in zip(self._files, names, _splits(names, rule), strict=True)
        ]
        first_keys = Counter(head.first_key for head in heads if head.first_key is not None)
        self._mapper = TarMapper(
            tar_references(columns),
            {name: list(values) for name, values in settings.where.items()},
            rule,
            default_source=stem_of(shared) or "webdataset",
            caption_template=settings.caption_template,
            keys_repeat=any(count > 1 for count in first_keys.values()),
        )
        self._sample_bytes = self._check(heads, columns)
        self.notes = self._describe(heads, absent=absent, says_split=columns.split is not None)

    @property
    def default_source(self) -> str:
        return self._mapper.default_source

    @property
    def identity(self) -> str:
        return identity_of(f"webdataset:{self._spec}", self._files)

    def pieces(self) -> list[Piece]:
        """One tar each, small ones together. Tars do not tell their rows: a bound and an estimate."""
        packs = pack(((shard.size, number) for number, shard in enumerate(self._shards)), limit=_PIECE_BYTES)
        bounds = [_max_rows(shard) for shard in self._shards]
        return [
            Piece(
                number, sum(bounds[shard] for shard in shards), shards, round(size / self._sample_bytes) or 1
            )
            for number, (size, shards) in enumerate(packs)
        ]

    def read(self, piece: Piece, *, with_images: bool = True) -> Iterator[pa.Table]:
        shards = (self._shards[number] for number in piece.spec)
        rows = (row for shard in shards for row in self._rows(shard, with_images=with_images))
        return tables_of(rows, with_images=with_images)

    def _rows(self, shard: Shard, *, with_images: bool) -> Iterator[dict[str, Any]]:
        with open_unzipped(shard.uri) as file:
            samples = tar_samples(
                cast(BinaryIO, file),
                wants=functools.cache(lambda ending: self._mapper.wants(ending, with_images=with_images)),
                size=None if _is_packed(shard.uri) else shard.size,
            )
            for number, found in enumerate(samples):
                if isinstance(found, Damage):
                    wrong = problem(found.reason, f"'{shard.uri}': {found.message}")
                    name = f"{shard.name}@{found.position}"
                    yield unusable_row(name, wrong, source=self._mapper.default_source)
                elif (row := self._mapper.row(found, shard, number=number)) is not None:
                    yield row

    def _check(self, heads: list[_Head], columns: PlainColumns) -> float:
        """Look at the first samples of the first tar that has any; returns the bytes that one takes."""
        whole = [shard for shard, head in zip(self._shards, heads, strict=True) if head.first_key is not None]
        for shard in whole or self._shards[:_SAMPLES]:
            samples, num_bytes = self._first_samples(shard)
            if samples:
                check_samples(samples, self._mapper, columns=columns, where=shard.uri)
                return num_bytes / len(samples)
        raise ValueError(
            f"data.source: no whole sample in the {len(self._shards)} tars of '{self._spec}'; the first is "
            f"'{self._shards[0].uri}'. A sample's members are named <key>.<ending>, such as 000001.jpg"
        )

    def _first_samples(self, shard: Shard) -> tuple[list[Sample], int]:
        with open_unzipped(shard.uri) as file:
            found = tar_samples(
                cast(BinaryIO, file),
                wants=lambda ending: self._mapper.wants(ending, with_images=False),
                size=None if _is_packed(shard.uri) else shard.size,
            )
            samples = (sample for sample in found if isinstance(sample, Sample) and not sample.problem)
            return list(itertools.islice(samples, _SAMPLES)), file.tell()

    def _describe(self, heads: list[_Head], *, absent: list[str], says_split: bool) -> list[str]:
        notes = []
        if absent:
            notes.append(f"{len(absent)} of {len(absent) + len(heads)} tars are not there ({_some(absent)})")
        broken = [s.name for s, head in zip(self._shards, heads, strict=True) if not head.is_whole]
        if broken:
            notes.append(
                f"{len(broken)} of {len(heads)} tars are damaged or cut off ({_some(broken)}): what can be "
                "read is kept, the rest is counted"
            )
        if self._mapper.keys_repeat:
            notes.append("keys repeat from tar to tar: row ids are <tar>/<key>")
        if self._mapper.splits.fixed is None and (not says_split or self._shards[0].split is None):
            notes.append(f"rows that name no split: {BY_HASH}")
        return notes


@dataclass(frozen=True)
class _Head:
    """What the ends of a tar tell: the first key, and whether it starts and ends as a tar does."""

    first_key: str | None
    is_whole: bool


def _look_at(file: SourceFile) -> _Head:
    head = read_range(file.uri, 0, _HEAD_BYTES)
    is_whole = True
    if _is_packed(file.uri):
        try:
            head = zlib.decompressobj(wbits=31).decompress(head)
        except zlib.error:
            head, is_whole = b"", False
    else:
        tail = read_range(file.uri, max(0, file.size - len(_END_MARK)), len(_END_MARK))
        is_whole = tail == _END_MARK
    samples = tar_samples(io.BytesIO(head), wants=lambda ending: False)
    found = next((sample for sample in samples if isinstance(sample, Sample)), None)
    return _Head(None, False) if found is None else _Head(found.key, is_whole)


def _find(spec: str) -> tuple[list[SourceFile], list[str]]:
    """The tars a list names, and the names behind which there is nothing."""
    files: list[SourceFile] = []
    absent: list[str] = []
    for named, group in itertools.groupby(expand(spec), key=_is_tar):
        if named:
            found, missing = files_named(list(group))
            files, absent = files + found, absent + missing
        else:
            files += [file for folder in group for file in files_at(folder, suffixes=_SUFFIXES)]
    if not files:
        raise ValueError(f"data.source: '{spec}' matches no tar; the first looked for is '{expand(spec)[0]}'")
    return files, absent


def _unique_names(files: list[SourceFile]) -> tuple[str, list[str]]:
    """The deepest folder that all tars share, and their names below it without ending."""
    paths = [file.uri.partition("?")[0] for file in files]
    prefix = posixpath.commonprefix([posixpath.dirname(path) + "/" for path in paths])
    shared = prefix[: prefix.rfind("/") + 1]
    return shared, [_without_suffix(path.removeprefix(shared)) for path in paths]


def _without_suffix(name: str) -> str:
    return next(name[: -len(s)] for s in (*_PACKED, ".tar") if name.lower().endswith(s))


def _splits(names: list[str], rule: SplitRule) -> list[str | None]:
    """The splits that tars name, when every one does."""
    said = [rule.word_in(name) for name in names]
    return said if all(said) else [None] * len(said)


def _max_rows(shard: Shard) -> int:
    size = shard.size * _MAX_PACKING if _is_packed(shard.uri) else shard.size
    return size // _BLOCK + 1


def _is_tar(uri: str) -> bool:
    return uri.partition("?")[0].lower().endswith(_SUFFIXES)


def _is_packed(uri: str) -> bool:
    return uri.partition("?")[0].lower().endswith(_PACKED)


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
