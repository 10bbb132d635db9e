"""Several sources as one: `mixture:<file.yaml>`, or `mixture` with the parts listed in `data.mixture`.

The rows of all parts end in one prepared set. Each keeps its source, and the manifest the weight of each
source, which is what the order of the feed goes by.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import pyarrow as pa
import pyarrow.compute as pc
import yaml

from pipelines.sources.column_names import PlainColumns
from pipelines.sources.files import folder_of
from pipelines.sources.source import PairSource, PartSettings, Piece, SourceSettings
from pipelines.sources.source_spec import absolute_places, source_stem
from pipelines.storage import absolute, join, read_bytes

Open = Callable[[SourceSettings], PairSource]


@dataclass(frozen=True)
class _Part:
    name: str
    weight: float
    source: PairSource

    @property
    def default_source(self) -> str:
        """What rows of the part say as their source when the data says nothing."""
        return str(getattr(self.source, "default_source", self.name))


class MixtureSource:
    """The rows of each part after the other; ids and groups begin with the name of the part.

    `source` of a row is the name of its part, or <part>/<source> where the rows of the part name their own.

    Raises:
        ValueError: no parts, a part that is a mixture, two parts of one name, or whatever a part refuses.
    """

    def __init__(self, settings: SourceSettings, *, uri: str, open_part: Open) -> None:
        if uri and settings.mixture:
            raise ValueError("data.mixture and mixture:<file> both list parts; give one of them")
        given = _listed(uri) if uri else list(settings.mixture)
        if not given:
            raise ValueError(
                "data.source=mixture needs parts: data.mixture=[{source: parquet:a.parquet, weight: 2}, "
                "{source: hf:b}], or mixture:<file.yaml> with such a list"
            )
        names = _names(given)
        self._parts: list[_Part] = []
        for part, name in zip(given, names, strict=True):
            if part.source.partition(":")[0] == "mixture":
                raise ValueError(f"data.mixture: part '{name}' is a mixture itself; list its parts here")
            try:
                source = open_part(_Overlay.of(settings, part))
            except ValueError as error:
                raise ValueError(f"data.mixture: part '{name}': {error}") from error
            self._parts.append(_Part(name, part.weight, source))
        self.identity = self._identity(given)
        self.notes = [f"{part.name}: {note}" for part in self._parts for note in part.source.notes]

    def _identity(self, given: Iterable[PartSettings]) -> str:
        """The identities of the parts, and their settings: those of a file are in no config."""
        parts = [
            f"{part.name} weight={part.weight} [{part.source.identity}] {_settings_digest(settings)}"
            for part, settings in zip(self._parts, given, strict=True)
        ]
        return f"mixture: {'; '.join(parts)}"

    @property
    def weights(self) -> dict[str, float]:
        """How often a row of a part is seen for each time a row of weight 1 is."""
        return {part.name: part.weight for part in self._parts}

    def pieces(self) -> list[Piece]:
        numbered = [
            (number, piece) for number, part in enumerate(self._parts) for piece in part.source.pieces()
        ]
        return [
            dataclasses.replace(piece, number=number, spec=(part, piece))
            for number, (part, piece) in enumerate(numbered)
        ]

    def read(self, piece: Piece, *, with_images: bool = True) -> Iterator[pa.Table]:
        number, inner = piece.spec
        part = self._parts[number]
        for table in part.source.read(inner, with_images=with_images):
            yield _named(table, part)


def source_weights(source: PairSource, names: Iterable[str]) -> dict[str, float]:
    """The weight of each source that rows of a mixture name; empty for anything else.

    A weight says how often a row of that source is seen for each time a row of weight 1 is.
    """
    if not isinstance(source, MixtureSource):
        return {}
    weights = source.weights
    return {name: weights[name.partition("/")[0]] for name in names}


def piece_weights(source: PairSource) -> dict[int, dict[str, float]]:
    """What the manifest says of the shards of each piece of a mixture; empty for anything else.

    A piece belongs to one part, and so do its shards.
    """
    if not isinstance(source, MixtureSource):
        return {}
    weights = list(source.weights.values())
    return {piece.number: {"weight": weights[piece.spec[0]]} for piece in source.pieces()}


@dataclass(frozen=True)
class _Overlay:
    """The settings of one part: its own where it has any, else those of the whole."""

    base: SourceSettings
    given: Mapping[str, Any]

    @classmethod
    def of(cls, settings: SourceSettings, part: PartSettings) -> SourceSettings:
        named = {key: getattr(part, key) for key in _keys(part)}
        given = {key: value for key, value in named.items() if value is not None}
        return cast(SourceSettings, cls(settings, {**given, "mixture": ()}))

    def __getattr__(self, key: str) -> Any:
        # Copying and unpickling ask for attributes before there are any.
        if key.startswith("__") or key in ("base", "given"):
            raise AttributeError(key)
        return self.given[key] if key in self.given else getattr(self.base, key)


def _keys(part: PartSettings) -> list[str]:
    fields: Iterable[str] = getattr(type(part), "model_fields", ())
    return list(fields)


def _settings_digest(part: PartSettings) -> str:
    columns = None if part.columns is None else dataclasses.asdict(PlainColumns.of(part.columns))
    own = {key: getattr(part, key) for key in _keys(part) if key not in ("columns", "weight")}
    text = repr((columns, sorted(own.items())))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _listed(uri: str) -> list[PartSettings]:
    """The parts a YAML file lists; relative places are taken from its folder."""
    # Reading a mixture is the driver's business: workers have no need of the config's imports.
    from pydantic import TypeAdapter, ValidationError

    from pipelines.config import MixturePart

    folder = folder_of(uri)

    def place(value: str) -> str:
        return absolute(value) if "://" in value or value.startswith("~") else join(folder, value)

    try:
        content = yaml.safe_load(read_bytes(uri))
        listed = content.get("mixture") if isinstance(content, Mapping) else content
        placed = (
            [absolute_places(part, place=place) for part in listed] if isinstance(listed, list) else listed
        )
        return list(TypeAdapter(list[MixturePart]).validate_python(placed))
    except FileNotFoundError as error:
        raise ValueError(f"data.source: '{uri}' does not exist") from error
    except yaml.YAMLError as error:
        raise ValueError(f"data.source: '{uri}' is not valid YAML: {error}") from error
    except ValidationError as error:
        lines = [f"{'.'.join(map(str, e['loc'])) or 'list'}: {e['msg']}" for e in error.errors()]
        raise ValueError(f"data.source: '{uri}' must list parts of a mixture: {'; '.join(lines)}") from error


def _names(parts: Iterable[PartSettings]) -> list[str]:
    """A name for each part: its own, or that of its file or folder, numbered when it comes again."""
    names: list[str] = []
    for part in parts:
        name = stem = part.name or source_stem(part.source)
        number = 1
        while name in names:
            if part.name is not None:
                raise ValueError(f"data.mixture: two parts are called '{name}'")
            number += 1
            name = f"{stem}-{number}"
        names.append(name)
    return names


def _named(table: pa.Table, part: _Part) -> pa.Table:
    """Rows of a part as rows of the mixture. An id that is missing stays missing."""
    ids, sources = table["row_id"], table["source"]
    own = pc.binary_join_element_wise(part.name, sources, "/")
    named = {
        "row_id": pc.if_else(pc.equal(ids, ""), "", pc.binary_join_element_wise(part.name, ids, "/")),
        "group_id": pc.binary_join_element_wise(part.name, table["group_id"], "/"),
        "source": pc.if_else(pc.equal(sources, part.default_source), part.name, own),
    }
    for name, column in named.items():
        position = table.schema.get_field_index(name)
        table = table.set_column(position, table.schema.field(name), column)
    return table
