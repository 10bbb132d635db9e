"""What Hugging Face datasets says of columns beside their Arrow types: images, and what classes mean."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

_LISTS = ("Sequence", "List", "LargeList")


@dataclass(frozen=True)
class Features:
    """Columns that hold images, and names of classes by column: of those with one class, and with several."""

    images: tuple[str, ...]
    classes: dict[str, list[str]]
    class_lists: dict[str, list[str]]


def read_features(declared: Any, schema: pa.Schema) -> Features:
    """Features from dataset_info.json, or from the metadata of the Arrow schema when that says none."""
    if not isinstance(declared, dict):
        declared = _from_metadata(schema)
    images, classes, lists = [], {}, {}
    for name, feature in declared.items():
        if name not in schema.names:
            continue
        if _kind(feature) == "Image":
            images.append(name)
        elif names := _class_names(feature):
            classes[name] = names
        elif names := _class_names(_item(feature)):
            lists[name] = names
    return Features(tuple(images), classes, lists)


def with_class_names(table: pa.Table, features: Features) -> pa.Table:
    """The table with class numbers as names; numbers without a name (-1: unknown) become null."""
    for position, column in enumerate(table.column_names):
        if names := features.classes.get(column):
            values = [_name(names, number) for number in table[column].to_pylist()]
            table = table.set_column(position, column, pa.array(values, pa.string()))
        elif names := features.class_lists.get(column):
            lists = [
                [_name(names, number) for number in numbers or []] for numbers in table[column].to_pylist()
            ]
            table = table.set_column(position, column, pa.array(lists, pa.list_(pa.string())))
    return table


def _name(names: list[str], number: Any) -> str | None:
    return names[number] if isinstance(number, int) and 0 <= number < len(names) else None


def _from_metadata(schema: pa.Schema) -> dict[str, Any]:
    try:
        described = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        features = described.get("info", {}).get("features")
    except (ValueError, AttributeError):
        return {}
    return features if isinstance(features, dict) else {}


def _kind(feature: Any) -> str:
    return str(feature.get("_type", "")) if isinstance(feature, dict) else ""


def _item(feature: Any) -> Any:
    """What a list feature holds: older versions write a list of one, newer ones name the kind of list."""
    if isinstance(feature, list) and len(feature) == 1:
        return feature[0]
    return feature.get("feature") if _kind(feature) in _LISTS else None


def _class_names(feature: Any) -> list[str]:
    names = feature.get("names") if _kind(feature) == "ClassLabel" else None
    return [str(name) for name in names] if isinstance(names, list) else []
