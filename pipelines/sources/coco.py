"""COCO caption files as a source: `coco:<captions.json or folder>`, several with `::` or braces.

Images lie below `data.image_root`, or where the official archives put them beside the annotations.
"""

from __future__ import annotations

import posixpath
from collections.abc import Iterator
from typing import Any, Final

import pyarrow as pa

from pipelines.sources.coco_captions import Entry, read_captions
from pipelines.sources.files import SourceFile, files_at, folder_of, identity_of, stem_of
from pipelines.sources.image_files import NAMED_IMAGES_NOTE, ImageFiles
from pipelines.sources.rows import pair_row, pairs_table, unusable_row
from pipelines.sources.shard_names import expand
from pipelines.sources.source import Piece, SourceSettings
from pipelines.sources.splits import BY_HASH, split_rule
from pipelines.storage import join

_ROWS_PER_TABLE = 64
_SAMPLE_ROWS = 8


class CocoSource:
    """One row per image with all its captions, in the order of files and of their images.

    The split is that of the image where the file says one, else a word of the file's name
    (captions_val2017.json), else a hash of the id.

    Raises:
        ValueError: nothing there, no caption file, an unknown split, or images of which none of the first
            exists.
    """

    def __init__(self, settings: SourceSettings, *, spec: str) -> None:
        if settings.where:
            raise ValueError("data.where names columns, and COCO caption files have none")
        self._spec = spec
        self._rows_per_piece = settings.rows_per_shard
        self._splits = split_rule(settings.split_names, settings.split)
        self._says_split = settings.columns.split is not None
        self._files = [file for place in expand(spec) for file in _caption_files(place)]
        self._names = [stem_of(file.uri) for file in self._files]
        self._counts: list[int] = []
        self._images: list[ImageFiles] = []
        needs_hash = False
        for number, file in enumerate(self._files):
            entries = read_captions(file)
            self._counts.append(len(entries))
            found = {entry.split for entry in entries} if self._says_split else {None}
            self._splits.check(found, where=file.uri, column="split")
            needs_hash |= None in found and self._word(number) is None
            names = [entry.file for entry in entries if entry.file][:_SAMPLE_ROWS]
            self._images.append(_image_files(file, names, root=settings.image_root))
        self.notes = [NAMED_IMAGES_NOTE]
        if needs_hash and self._splits.fixed is None:
            self.notes.append(f"rows that name no split: {BY_HASH}")

    default_source: Final = "coco"

    @property
    def identity(self) -> str:
        return identity_of(f"coco:{self._spec}", self._files)

    def pieces(self) -> list[Piece]:
        size = self._rows_per_piece
        ranges = [
            (file, start, min(start + size, count))
            for file, count in enumerate(self._counts)
            for start in range(0, count, size)
        ]
        return [
            Piece(number, stop - start, (file, start, stop))
            for number, (file, start, stop) in enumerate(ranges)
        ]

    def read(self, piece: Piece, *, with_images: bool = True) -> Iterator[pa.Table]:
        file, first, last = piece.spec
        entries = read_captions(self._files[file])
        for start in range(first, last, _ROWS_PER_TABLE):
            chunk = entries[start : min(start + _ROWS_PER_TABLE, last)]
            rows = [self._row(entry, file) for entry in chunk]
            if with_images:
                images, wrong = self._images[file].read([entry.file for entry in chunk])
                for row, image, found in zip(rows, images, wrong, strict=True):
                    row["image"] = image
                    row["problem"] = row.get("problem") or found
            yield pairs_table(rows, with_images=with_images)

    def _row(self, entry: Entry, file: int) -> dict[str, Any]:
        name = self._names[file]
        row_id = entry.id if len(self._files) == 1 else f"{name}/{entry.id}"
        if entry.problem is not None:
            return unusable_row(f"{name}: {entry.id}", entry.problem, source=self.default_source)
        said = (entry.split or self._word(file)) if self._says_split else None
        split = self._splits.hashed(row_id) if said is None else self._splits.named(said)
        return pair_row(row_id, captions=entry.captions, split=split, source=self.default_source)

    def _word(self, file: int) -> str | None:
        return self._splits.word_in(self._names[file]) if self._says_split else None


def _caption_files(place: str) -> list[SourceFile]:
    """A file that is named, or the files of captions of a folder."""
    files = files_at(place, suffixes=(".json",))
    if files[0].uri == place:
        return files
    captions = [file for file in files if posixpath.basename(file.name).startswith(("captions_", "dataset_"))]
    if not captions:
        found = ", ".join(file.name for file in files[:5])
        raise ValueError(f"data.source: no captions_*.json or dataset_*.json below '{place}'; found {found}")
    return captions


def _image_files(file: SourceFile, names: list[str], *, root: str | None) -> ImageFiles:
    """The folder in which the first images lie.

    Raises:
        ValueError: in none of those looked into.
    """
    # The archives are called train2017, val2014 ...; so do captions_train2017.json and its like end.
    part = stem_of(file.uri).rpartition("_")[2]
    beside = folder_of(file.uri)
    above = folder_of(beside)
    folders = (
        [root, join(root, part)]
        if root is not None
        else [join(above, "images"), join(above, part), join(above, "images", part), above, beside]
    )
    for folder in folders:
        found = ImageFiles(folder)
        if not names or not all(found.read(names)[1]):
            return found
    looked = ", ".join(f"'{folder}'" for folder in folders)
    raise ValueError(
        f"'{file.uri}': none of the first {len(names)} images is in any of {looked}; the first is "
        f"'{names[0]}'. Name their folder with data.image_root"
    )
