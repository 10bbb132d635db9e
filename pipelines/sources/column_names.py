"""Names of the columns of a file that hold images and texts. No Ray here: the configuration imports it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields, replace
from typing import Protocol


class ColumnNames(Protocol):
    """Where a file keeps each column of `schemas.PAIRS`; None: it has no such column."""

    @property
    def id(self) -> str | None: ...
    @property
    def image(self) -> str: ...
    @property
    def caption(self) -> str | None: ...
    @property
    def captions(self) -> str | None: ...
    @property
    def sentences(self) -> str | None: ...
    @property
    def labels(self) -> str | None: ...
    @property
    def class_name(self) -> str | None: ...
    @property
    def group(self) -> str | None: ...
    @property
    def source(self) -> str | None: ...
    @property
    def split(self) -> str | None: ...
    @property
    def boxes(self) -> str | None: ...


@dataclass(frozen=True)
class PlainColumns:
    """`ColumnNames` without the config class, whose module would be imported in every worker."""

    id: str | None = "id"
    image: str = "image"
    caption: str | None = "caption"
    captions: str | None = "captions"
    sentences: str | None = None
    labels: str | None = "labels"
    class_name: str | None = "class"
    group: str | None = "group"
    source: str | None = "source"
    split: str | None = "split"
    boxes: str | None = "boxes"

    @classmethod
    def of(cls, columns: ColumnNames) -> PlainColumns:
        return cls(**{field.name: getattr(columns, field.name) for field in fields(cls)})

    def alternatives(self, usual: Mapping[str, str]) -> dict[str, list[str]]:
        """Per column the names that may hold it, the first that is there counts; null columns are left out.

        Args:
            usual: names that files of a kind have for a column, divided by `;`. They count beside the default
                name, and not at all where somebody gave another.
        """
        named = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if value == field.default:
                value = ";".join(filter(None, [value, usual.get(field.name)])) or None
            if value is not None:
                # A column may have a `;` in its name.
                named[field.name] = list(dict.fromkeys([value, *value.split(";")]))
        return named

    def given(self) -> set[str]:
        """The columns that somebody named: what is named must be there."""
        return {f.name for f in fields(self) if getattr(self, f.name) not in (f.default, None)}

    def found_in(
        self, found: Collection[str], *, usual: Mapping[str, str] | None = None, needs_text: bool = True
    ) -> PlainColumns:
        """The names the data has: of alternatives the first, and none where only a default name is absent.

        A name somebody gave stays, and so do, when absent, the image and (`needs_text`) one of the two texts:
        `ColumnMapper.check` refuses them by name.
        """
        named = self.alternatives(usual or {})
        picked = {key: next((name for name in names if name in found), None) for key, names in named.items()}
        kept = self.given() | {"image"}
        if needs_text and not (picked.get("caption") or picked.get("captions")):
            kept |= {"caption", "captions"} & named.keys()
        for key in kept & named.keys():
            picked[key] = picked[key] or named[key][0]
        return replace(PlainColumns(**dict.fromkeys(f.name for f in fields(self))), **picked)


# What the absence of a column means, where it means something.
_MEANING = {
    "id": "rows are named by their place in the file",
    "split": "rows are divided 80/10/10 by a hash",
    "group": "every row is a group of its own",
}


def absent_notes(wanted: PlainColumns, found: PlainColumns) -> list[str]:
    """What the user should know about columns that the data does not have."""
    absent = [f.name for f in fields(wanted) if getattr(wanted, f.name) and getattr(found, f.name) is None]
    return [
        f"no column '{getattr(wanted, name)}'" + (f": {_MEANING[name]}" if name in _MEANING else "")
        for name in absent
    ]
