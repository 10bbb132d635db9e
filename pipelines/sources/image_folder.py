"""Images in folders with the names of their classes as a source: `folder:<root>`.

Below the root lie <class>/<image>, or <split>/<class>/<image> when all folders are named like splits.
"""

from __future__ import annotations

import hashlib
import posixpath
import zlib
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from typing import Any, Final

import pyarrow as pa
import pyarrow.fs as pafs

from pipelines.sources.files import files_below, stem_of
from pipelines.sources.image_files import ImageFiles
from pipelines.sources.rows import pair_row, pairs_table
from pipelines.sources.source import Piece, SourceSettings
from pipelines.sources.splits import BY_HASH, split_rule
from pipelines.storage import filesystem

DEFAULT_TEMPLATE: Final = "a photo of a {}"
_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
_ROWS_PER_TABLE = 64
# The plan of the pieces holds every name; above this it weighs more than it should.
_MANY_FILES = 3_000_000


class FolderSource:
    """One row per image, in the order of a hash of their names: every piece is a fair sample of the classes.

    The class is the folder's name with spaces for underscores; a template makes the caption of it.

    Raises:
        ValueError: nothing there, no image in a class folder, or a filter on anything but class and split.
    """

    def __init__(self, settings: SourceSettings, *, uri: str) -> None:
        self._uri = uri
        self.default_source = stem_of(uri)
        self._rows_per_piece = settings.rows_per_shard
        self._template = settings.caption_template or DEFAULT_TEMPLATE
        self._rule = split_rule(settings.split_names, settings.split)
        self._images = ImageFiles(uri)
        found = _list_files(uri)
        # A leading dot marks what file managers leave beside the data.
        paths = [
            p for p in found if p.lower().endswith(_SUFFIXES) and not posixpath.basename(p).startswith(".")
        ]
        self._has_splits = _has_splits(paths, names={*self._rule.names}, uri=uri)
        paths = [path for path in paths if path.count("/") > self._has_splits]
        self._says_split = self._has_splits and settings.columns.split is not None
        kept = self._kept(paths, settings.where)
        self._pieces = [
            Piece(
                number,
                min(self._rows_per_piece, len(kept) - start),
                _packed(kept, start, self._rows_per_piece),
            )
            for number, start in enumerate(range(0, len(kept), self._rows_per_piece))
        ]
        self.identity = _identity(uri, found)
        self.notes = self._describe(found, paths, num_kept=len(kept))

    def _kept(self, paths: list[str], where: Mapping[str, list[str]]) -> list[str]:
        """The images that pass the filter, in the order of the hash of their names."""
        if other := sorted(set(where) - {"class", "split"}):
            raise ValueError(f"data.where may name class and split of an image folder, got {other}")
        kept = [path for path in paths if self._passes(path, where)]
        if not kept:
            wanted = f" passes data.where={dict(where)}" if where else ""
            raise ValueError(
                f"data.source: no image below '{self._uri}'{wanted}; images are <class>/<name> or "
                f"<split>/<class>/<name> with one of {', '.join(_SUFFIXES)}"
            )
        return sorted(kept, key=lambda path: hashlib.blake2b(path.encode(), digest_size=8).digest())

    def _passes(self, path: str, where: Mapping[str, list[str]]) -> bool:
        split, folder = self._folders(path)
        named = {"split": {split}, "class": {folder, _class_name(folder)}}
        return all(named[key] & {*values} for key, values in where.items())

    def _folders(self, path: str) -> tuple[str | None, str]:
        """The folders of split and class; images of a split that lie in no class were left out before."""
        parts = path.split("/")
        return (parts[0], parts[1]) if self._has_splits else (None, parts[0])

    def pieces(self) -> list[Piece]:
        return self._pieces

    def read(self, piece: Piece, *, with_images: bool = True) -> Iterator[pa.Table]:
        paths = zlib.decompress(piece.spec).decode().split("\0")
        for start in range(0, len(paths), _ROWS_PER_TABLE):
            chunk = paths[start : start + _ROWS_PER_TABLE]
            rows = [self._row(path) for path in chunk]
            if with_images:
                data, wrong = self._images.read(chunk)
                for row, image, found in zip(rows, data, wrong, strict=True):
                    row.update(image=image, problem=found)
            yield pairs_table(rows, with_images=with_images)

    def _row(self, path: str) -> dict[str, Any]:
        split, folder = self._folders(path)
        class_name = _class_name(folder)
        said = split if self._says_split else None
        return pair_row(
            path,
            captions=[self._template.format(class_name)],
            split=self._rule.hashed(path) if said is None else self._rule.named(said),
            source=self.default_source,
            class_name=class_name,
        )

    def _describe(self, found: Collection[str], paths: list[str], *, num_kept: int) -> list[str]:
        notes = []
        if len(paths) < len(found):
            suffixes = Counter(posixpath.splitext(path)[1].lower() or "none" for path in found)
            listed = ", ".join(f"{suffix} {count}" for suffix, count in suffixes.most_common(8))
            notes.append(
                f"{len(found) - len(paths)} of {len(found)} files are no image of a class ({listed})"
            )
        if num_kept > _MANY_FILES:
            notes.append(f"{num_kept} files are slow to list and to open one by one: tars hold them better")
        if not self._says_split and self._rule.fixed is None:
            notes.append(f"no folders of splits: {BY_HASH}")
        return notes


def _class_name(folder: str) -> str:
    return folder.replace("_", " ")


def _packed(paths: list[str], start: int, num_paths: int) -> bytes:
    """Names for a task, small: the plan with all of them travels to every worker."""
    return zlib.compress(b"\0".join(path.encode() for path in paths[start : start + num_paths]))


def _list_files(uri: str) -> dict[str, pafs.FileInfo]:
    """Everything below the root, by its path from there."""
    fs, root = filesystem(uri)
    if fs.get_file_info(root).type != pafs.FileType.Directory:
        raise ValueError(f"data.source: there is no folder '{uri}'")
    return files_below(fs, root)


def _has_splits(paths: list[str], *, names: set[str], uri: str) -> bool:
    """Whether the first folders are splits and the second ones classes.

    Raises:
        ValueError: folders named like splits hold the images themselves.
    """
    tops = {path.split("/", 1)[0] for path in paths if "/" in path}
    if not tops or not tops <= names:
        return False
    if all(path.count("/") < 2 for path in paths):
        raise ValueError(
            f"data.source: '{uri}' has the splits {sorted(tops)} with images but no folders of classes in "
            "them; use csv:<file> for images with captions"
        )
    return True


def _identity(uri: str, found: Mapping[str, pafs.FileInfo]) -> str:
    digest = hashlib.sha256()
    for path, info in sorted(found.items()):
        digest.update(f"{path} {info.size} {info.mtime_ns}\n".encode())
    return f"folder:{uri} files={len(found)} state={digest.hexdigest()[:16]}"
