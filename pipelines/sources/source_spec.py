"""The setting `data.source` as text: made absolute, and shortened to a name. No Ray here."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, Final

from pipelines.sources.files import folder_of, stem_of
from pipelines.storage import absolute

# The value of data.reports that asks for captions made of labels, whatever reports are there.
FROM_LABELS: Final = "labels"

# Kinds whose places may be lists with `::`.
_LISTS: Final = ("webdataset", "coco")


def absolute_source(source: str, *, place: Callable[[str], str] = absolute) -> str:
    """The same source for any process on this machine; `place` says what a relative path is relative to."""
    kind, colon, rest = source.partition(":")
    if not colon or not rest or kind == "scenes":
        return source
    parts = rest.split("::") if kind in _LISTS else [rest]
    return f"{kind}:{'::'.join(place(part) if part else part for part in parts)}"


def absolute_places(data: Any, *, place: Callable[[str], str] = absolute) -> Any:
    """A data config, or a part of a mixture, as plain values with its places made absolute.

    What has a wrong type stays as it is: validation has something to say about it.
    """
    if not isinstance(data, Mapping):
        return data
    placed = dict(data)
    if isinstance(placed.get("source"), str):
        placed["source"] = absolute_source(placed["source"], place=place)
    if isinstance(placed.get("image_root"), str):
        placed["image_root"] = place(placed["image_root"])
    if isinstance(placed.get("reports"), str) and placed["reports"] != FROM_LABELS:
        placed["reports"] = place(placed["reports"])
    if isinstance(placed.get("mixture"), list):
        placed["mixture"] = [absolute_places(part, place=place) for part in placed["mixture"]]
    return placed


def source_stem(source: str) -> str:
    """A short name for results and folders: the design of scenes, or the file or folder of a source."""
    kind, _, rest = source.partition(":")
    if kind == "scenes":
        return f"scenes-{rest}"
    first = rest.split("::")[0] if kind in _LISTS else rest
    # A brace stands for many names: what they share is their folder.
    name = stem_of(folder_of(first) if "{" in first else first)
    return re.sub(r"[^\w.-]+", "-", name).strip("-.") or kind
