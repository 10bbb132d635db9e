"""Members of a tar -> samples by key -> values of columns, as webdataset and img2dataset lay them out."""

from __future__ import annotations

import functools
import json
import posixpath
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from pipelines.sources.rows import Problem, UnusableError, as_texts, decoded, problem
from pipelines.sources.tar_members import Damage, Member, tar_members

# Endings that hold what a column needs, and paths into JSON members; the first that is there counts.
USUAL_MEMBERS = {
    "id": "__key__",
    "image": "jpg;jpeg;png;webp;bmp;gif;tif;tiff;ppm;pgm;img",
    "caption": "txt;text;json.caption",
    "captions": "captions.json;json.captions",
    "labels": "labels.json;json.labels",
    "class_name": "cls;json.class",
    "group": "json.group",
    "split": "json.split",
    "boxes": "boxes.json;json.boxes",
}


@dataclass
class Sample:
    """Members with the same key; `members` is by ending, without the data that nobody wanted."""

    key: str
    members: dict[str, bytes | None] = field(default_factory=dict)
    problem: Problem | None = None
    _parsed: dict[str, Any] = field(default_factory=dict)

    def get(self, reference: str) -> Any:
        """The bytes of a member, or the value at a path into a JSON member; None when it is not there.

        Raises:
            UnusableError: reason undecodable_json.
        """
        if reference == "__key__":
            return self.key
        if reference in self.members:
            return self.json(reference) if reference.endswith("json") else self.members[reference]
        ending, path = json_path(reference)
        if not path or ending not in self.members:
            return None
        return _walk(self.json(ending), path)

    def json(self, ending: str) -> Any:
        if ending not in self._parsed:
            text = decoded(self.members[ending] or b"", what=f"'{ending}'")
            try:
                self._parsed[ending] = json.loads(text)
            # Deep nesting is no error of the syntax.
            except (ValueError, RecursionError) as error:
                raise UnusableError("undecodable_json", f"'{ending}': {error}") from error
        return self._parsed[ending]

    def texts(self, reference: str) -> list[str]:
        """What a reference holds, as texts: a member, a JSON value, or a JSON list."""
        value = self.get(reference)
        if isinstance(value, bytes):
            return [decoded(value, what=f"'{reference}'")]
        return [] if value is None else as_texts(value, what=f"'{reference}'")

    def has(self, reference: str) -> bool:
        """Whether anything lies there; a member counts whether or not it was read."""
        try:
            return reference in self.members or self.get(reference) is not None
        except UnusableError:
            return False

    def describe(self) -> str:
        """What there is to map, for an error message."""
        endings = ", ".join(sorted(self.members)) or "no member"
        for ending in sorted(self.members):
            if not ending.endswith("json"):
                continue
            try:
                value = self.json(ending)
            except UnusableError:
                continue
            if isinstance(value, Mapping):
                endings += f"; keys of its {ending}: {', '.join(map(str, value)) or 'none'}"
        return f"sample '{self.key}' has: {endings}"


@functools.lru_cache(maxsize=1024)
def json_path(reference: str) -> tuple[str, tuple[str, ...]]:
    """`meta.json.caption.de` as the ending `meta.json` and the path to walk; no path without JSON."""
    parts = reference.split(".")
    if "json" not in parts:
        return reference, ()
    end = parts.index("json") + 1
    return ".".join(parts[:end]), tuple(parts[end:])


def ending_of(reference: str) -> str:
    """The member a reference needs."""
    return json_path(reference)[0]


def _walk(value: Any, path: tuple[str, ...]) -> Any:
    for position, part in enumerate(path):
        if not isinstance(value, Mapping):
            return None
        # A key may have dots in it.
        whole = ".".join(path[position:])
        if whole in value:
            return value[whole]
        value = value.get(part)
    return value


def split_name(name: str) -> tuple[str, str] | None:
    """Key and ending of a member, divided at the first dot of its file name; None: part of no sample."""
    folder, base = posixpath.split(name)
    stem, dot, ending = base.partition(".")
    return (posixpath.join(folder, stem), ending.lower()) if stem and dot and ending else None


def tar_samples(
    stream: BinaryIO, *, wants: Callable[[str], bool], size: int | None = None
) -> Iterator[Sample | Damage]:
    """Consecutive members of one key together; `wants` decides by ending what is read.

    A damaged member makes its sample unusable. A damage that hit no known member comes by itself. An ending
    that a key has already starts another sample, whose id is then a repeat.
    """

    def wanted(name: str) -> bool:
        found = split_name(name)
        return found is not None and wants(found[1])

    sample: Sample | None = None
    for found in tar_members(stream, wants=wanted, size=size):
        named = split_name(found.name) if found.name else None
        if named is None:
            if isinstance(found, Damage):
                yield found
            continue
        key, ending = named
        if sample is None or sample.key != key or ending in sample.members:
            if sample is not None:
                yield sample
            sample = Sample(key)
        if isinstance(found, Member):
            sample.members[ending] = found.data
        else:
            sample.members[ending] = None
            sample.problem = sample.problem or problem(found.reason, found.message)
    if sample is not None:
        yield sample
