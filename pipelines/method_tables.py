"""`clipfleet methods`: the catalogue as tables."""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import json
from typing import Any

from rich.console import Console
from rich.table import Table

from models.methods.catalogue import METHODS
from models.recipe import MethodRecipe
from pipelines.config_tree import method_named
from tune_spaces.catalogue import SPACES
from tune_spaces.domains import describe

_HEADINGS = ("name", "source", "evidence")


def show_methods(console: Console, *, as_json: bool) -> None:
    """One line per method: source, evidence, and the slots that differ from CLIP's."""
    rows = [{**_head(recipe), "slots": differing_slots(recipe)} for recipe in METHODS.values()]
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    table = Table(box=None, pad_edge=False)
    for heading in (*_HEADINGS, "differs from CLIP in"):
        table.add_column(heading, overflow="fold", no_wrap=heading == "name")
    for row in rows:
        slots = ", ".join(f"{path}={value}" for path, value in row["slots"].items())
        table.add_row(row["name"], row["source"], row["evidence"], slots or "–")
    console.print(table)


def show_method(name: str, console: Console, *, as_json: bool) -> None:
    """A method's card, slots and search space.

    Raises:
        ValueError: unknown name; the nearest is named.
    """
    recipe = method_named(name)
    space = {path: describe(domain) for path, domain in SPACES[name].items()}
    if as_json:
        print(json.dumps({**dataclasses.asdict(recipe), "space": space, "card": card(recipe)}, indent=1))
        return
    console.print(
        f"[bold]{recipe.name}[/bold]  {recipe.source}  evidence: {recipe.evidence}\n", highlight=False
    )
    console.print(card(recipe), highlight=False, markup=False)
    table = Table(title="\nsearch space", title_justify="left", box=None, pad_edge=False)
    for heading in ("path", "default", "domain"):
        table.add_column(heading)
    for path, domain in space.items():
        table.add_row(path, str(_value(recipe, path)), domain)
    console.print(table)


def card(recipe: MethodRecipe) -> str:
    """The docstring of the file that holds a recipe."""
    for name in sorted({recipe.name, recipe.name.rpartition("_")[0] or recipe.name}, key=len, reverse=True):
        if importlib.util.find_spec(f"models.methods.{name}"):
            return inspect.cleandoc(importlib.import_module(f"models.methods.{name}").__doc__ or "")
    return ""


def differing_slots(recipe: MethodRecipe) -> dict[str, Any]:
    """Paths of a recipe whose values are not CLIP's."""
    return _differences(dataclasses.asdict(recipe), dataclasses.asdict(METHODS["clip"]), "")


def _differences(tree: dict[str, Any], base: dict[str, Any], path: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in tree.items():
        here = f"{path}.{key}" if path else key
        if here in _HEADINGS:
            continue
        if key == "extra_tables":
            found |= {f"{here}.{name}": table["estimator"]["kind"] for name, table in value.items()}
        elif isinstance(value, dict):
            found |= _differences(value, base.get(key) or {}, here)
        elif value != base.get(key):
            found[here] = round(value, 4) if isinstance(value, float) else value
    return found


def _head(recipe: MethodRecipe) -> dict[str, str]:
    return {heading: getattr(recipe, heading) for heading in _HEADINGS}


def _value(recipe: MethodRecipe, path: str) -> Any:
    value: Any = dataclasses.asdict(recipe)
    for part in path.removeprefix("method.").split("."):
        value = value[part]
    return value
