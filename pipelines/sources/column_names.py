"""Names of the columns of a file that hold images and texts. No Ray here: the configuration imports it."""

from __future__ import annotations

from collections.abc import Collection
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

    def without_absent(self, found: Collection[str]) -> PlainColumns:
        """The same less the default names that the data does not have; a name somebody gave must be there.

        The image has to be there in any case, and one of the two texts.
        """
        absent = {
            field.name: None
            for field in fields(self)
            if getattr(self, field.name) == field.default and field.default not in found
        }
        absent.pop("image", None)
        if not {self.caption, self.captions} & {*found}:
            absent.pop("caption", None)
            absent.pop("captions", None)
        return replace(self, **absent)
