"""Which files of a tree of radiographs are there: the tables in its root, and the folder of its images."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable, Sequence

import pyarrow.fs as pafs

from pipelines.sources.column_names import PlainColumns
from pipelines.sources.source import SourceSettings
from pipelines.storage import filesystem, join

_MAX_LISTED = 8
_MAX_FOLDERS = 16
_FIRST, _SPREAD = 8, 24


def refuse_column_names(settings: SourceSettings, *, kind: str) -> None:
    """Raise ValueError when columns are mapped: the layout knows its own."""
    if given := PlainColumns.of(settings.columns).given():
        raise ValueError(f"data.columns: {kind}: knows its own columns; take out {sorted(given)}")


def list_root(root: str, *, kind: str) -> list[str]:
    """Names of what lies in a folder, those of folders with a slash.

    Raises:
        ValueError: it is no folder.
    """
    fs, path = filesystem(root)
    found = fs.get_file_info(path).type
    if found != pafs.FileType.Directory:
        what = "does not exist" if found == pafs.FileType.NotFound else "is a file"
        raise ValueError(f"data.source: '{root}' {what}; {kind}: takes the folder with the tables")
    return _list(fs, path)


def _list(fs: pafs.FileSystem, path: str) -> list[str]:
    return sorted(
        posixpath.basename(each.path) + ("/" if each.type == pafs.FileType.Directory else "")
        for each in fs.get_file_info(pafs.FileSelector(path))
    )


def newest(names: Sequence[str], pattern: str) -> str | None:
    """The last of the names that a pattern fits, by versions in them; plain files before packed ones."""
    found = [name for name in names if re.fullmatch(rf"{pattern}(\.gz)?", name)]
    return max(found, key=lambda name: (name.removesuffix(".gz"), not name.endswith(".gz")), default=None)


def wrong_root(
    root: str, *, kind: str, looked_for: str, found: Sequence[str], is_root: Callable[[Sequence[str]], bool]
) -> ValueError:
    """The refusal of a folder that is not the root of a layout, with what it holds and what may be meant."""
    listed = ", ".join(found[:_MAX_LISTED]) or "nothing"
    if len(found) > _MAX_LISTED:
        listed += f", ... ({len(found)} in all)"
    fs, path = filesystem(root)
    folders = [name.rstrip("/") for name in found if name.endswith("/")][:_MAX_FOLDERS]
    inside = [name for name in folders if is_root(_list(fs, posixpath.join(path, name)))]
    hint = f"; did you mean '{kind}:{join(root, inside[0])}'?" if inside else ""
    return ValueError(f"data.source: looked for {looked_for} in '{root}', found {listed}{hint}")


def sample(values: Sequence[str]) -> list[str]:
    """The first values and some from everywhere: of large data often a part alone was downloaded."""
    step = max(1, len(values) // _SPREAD)
    return list(dict.fromkeys([*values[:_FIRST], *values[::step][:_SPREAD]]))


def count_files(folder: str, names: Sequence[str]) -> int:
    """How many of the names are files below a folder."""
    fs, path = filesystem(folder)
    return sum(info.is_file for info in fs.get_file_info([posixpath.join(path, name) for name in names]))


def image_place(
    folders: Sequence[str], names: Callable[[str], Sequence[str]], *, kind: str
) -> tuple[str, str]:
    """The folder and the ending with which most of a sample of images are files.

    Args:
        folders: where to look.
        names: the sample, for an ending.

    Raises:
        ValueError: nowhere is one of them.
    """
    tried = [(folder, ending) for folder in dict.fromkeys(folders) for ending in (".jpg", ".png")]
    counts = [count_files(folder, names(ending)) for folder, ending in tried]
    if not max(counts):
        first = names(".jpg")
        places = " and ".join(f"'{folder}'" for folder in dict.fromkeys(folders))
        raise ValueError(
            f"data.source: none of {len(first)} images of the {kind} tables is there, such as '{first[0]}' "
            f"(.jpg or .png), below {places}; name another folder with data.image_root"
        )
    return tried[counts.index(max(counts))]
