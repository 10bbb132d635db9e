"""`clipfleet methods`: the catalogue as tables, and one method's card with its search space."""

from __future__ import annotations

import dataclasses
import inspect
import json
import textwrap
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from models.methods.catalogue import CARDS, METHODS
from models.methods.without_recipe import WITHOUT_RECIPE, MissingRecipe
from models.recipe import MethodRecipe, TableRecipe
from pipelines.config_tree import load_config, nearest
from pipelines.spaces import default_params
from tune_spaces.catalogue import SPACES
from tune_spaces.domains import describe

_HEADINGS = ("name", "source", "evidence")
# What a slot is, more than one of its values: `transform.kind=hopfield` reads as "transform hopfield".
_CHOOSERS = ("kind", "policy")
_INDENT = " " * 4
_EVIDENCE = """
Indented: what differs from CLIP. official: values and gradients of the authors' code are reproduced; \
derived: the formula is ours, from the paper's text; paper-unverified: the paper could not be checked. \
`clipfleet methods show NAME` prints a card and its search space.
"""


def show_methods(console: Console, *, as_json: bool) -> None:
    """Every method with source, evidence and the slots that differ from CLIP's; then what has no recipe."""
    rows = [{**_head(recipe), "slots": differing_slots(recipe)} for recipe in METHODS.values()]
    if as_json:
        missing = [dataclasses.asdict(entry) for entry in WITHOUT_RECIPE.values()]
        print(json.dumps({"methods": rows, "without_recipe": missing}, indent=1))
        return
    console.print(_line(console, "name", "evidence", "source", style="bold"))
    for recipe in METHODS.values():
        console.print(_line(console, recipe.name, recipe.evidence, recipe.source))
        if slots := differing_slots(recipe):
            console.print(_below(console, _grouped(slots)))
    console.print(_EVIDENCE, highlight=False)
    console.print("[bold]without a recipe[/bold]", highlight=False)
    for entry in WITHOUT_RECIPE.values():
        console.print(_line(console, entry.name, "", entry.source))
        console.print(_below(console, f"no recipe: {entry.reason}"))
        console.print(_below(console, f"instead: {entry.residue}"))


def show_method(name: str, console: Console, *, as_json: bool) -> None:
    """A method's card, slots and search space; the reason of an entry without a recipe.

    Raises:
        ValueError: unknown name; the nearest is named.
    """
    if name in METHODS:
        _show_recipe(METHODS[name], console, as_json=as_json)
    elif name in WITHOUT_RECIPE:
        _show_missing(WITHOUT_RECIPE[name], console, as_json=as_json)
    else:
        known = [*METHODS, *WITHOUT_RECIPE]
        raise ValueError(f"unknown method '{name}'{nearest(name, known)}; `clipfleet methods` lists them")


def differing_slots(recipe: MethodRecipe) -> dict[str, Any]:
    """Paths of a recipe whose values are not CLIP's; of a further table also its estimator."""
    ours, base = dataclasses.asdict(recipe), dataclasses.asdict(METHODS["clip"])
    found = _differences({k: v for k, v in ours.items() if k not in (*_HEADINGS, "extra_tables")}, base, "")
    plain = dataclasses.asdict(TableRecipe())
    for name, table in ours["extra_tables"].items():
        here = f"extra_tables.{name}"
        found[f"{here}.estimator.kind"] = table["estimator"]["kind"]
        found |= _differences(table, plain, here)
    return found


def _show_recipe(recipe: MethodRecipe, console: Console, *, as_json: bool) -> None:
    space = {path: describe(domain) for path, domain in SPACES.get(recipe.name, {}).items()}
    card = inspect.cleandoc(CARDS[recipe.name])
    if as_json:
        print(json.dumps({**dataclasses.asdict(recipe), "space": space, "card": card}, indent=1))
        return
    console.print(
        f"[bold]{recipe.name}[/bold]  {recipe.source}\nevidence: {recipe.evidence}\n", highlight=False
    )
    console.print(_reflowed(card), highlight=False, markup=False)
    slots = _table("differs from CLIP in", "value")
    for path, value in differing_slots(recipe).items():
        slots.add_row(f"method.{path}", _shown(value))
    if slots.row_count:
        console.print("", slots)
    defaults = default_params(load_config(overrides=[f"method.name={recipe.name}"]).tree(), space)
    table = _table("search space", "default", "domain")
    for path, domain in space.items():
        table.add_row(path, _shown(defaults[path]), domain)
    if table.row_count:
        console.print("", table)


def _show_missing(entry: MissingRecipe, console: Console, *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(dataclasses.asdict(entry), indent=1))
        return
    console.print(f"[bold]{entry.name}[/bold]  {entry.source}\n", highlight=False)
    console.print(f"no recipe: {entry.reason}", highlight=False, markup=False)
    console.print(f"what of it can be had: {entry.residue}", highlight=False, markup=False)


def _line(console: Console, *cells: str, style: str = "") -> Text:
    """One entry: name and evidence in columns, the rest wrapped beside them."""
    widths = (max(map(len, [*METHODS, *WITHOUT_RECIPE])), max(len(r.evidence) for r in METHODS.values()))
    start = "".join(f"{cell:<{width}}  " for cell, width in zip(cells, widths, strict=False))
    lines = textwrap.fill(start + cells[-1], console.width, subsequent_indent=" " * len(start))
    text = Text(lines, style=style)
    text.stylize("bold", 0, len(cells[0]))
    return text


def _below(console: Console, about: str) -> Text:
    wrapped = textwrap.fill(
        about,
        console.width,
        initial_indent=_INDENT,
        subsequent_indent=_INDENT,
        break_on_hyphens=False,
    )
    return Text(wrapped, style="dim")


def _reflowed(card: str) -> str:
    """Paragraphs as single lines, for the terminal to wrap; a paragraph with indented lines stays."""
    paragraphs = [
        part if "\n " in part else " ".join(part.splitlines()) for part in card.strip().split("\n\n")
    ]
    return "\n\n".join(paragraphs)


def _table(*headings: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for heading in headings:
        table.add_column(heading, overflow="fold")
    return table


def _differences(tree: Mapping[str, Any], base: Mapping[str, Any], path: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in tree.items():
        here = f"{path}.{key}" if path else key
        if isinstance(value, Mapping):
            found |= _differences(value, base.get(key) or {}, here)
        elif value != base.get(key):
            found[here] = value
    return found


def _grouped(slots: Mapping[str, Any]) -> str:
    """Values by slot, in one line: `temperature fixed init=0.1; tables global=ce`."""
    by_slot: dict[str, list[str]] = {}
    for path, value in slots.items():
        slot, _, last = path.rpartition(".")
        if path.startswith("extra_tables."):
            if path.endswith(".estimator.kind"):
                by_slot.setdefault("tables", []).append(f"{path.split('.')[1]}={value}")
            continue
        short = slot.removeprefix("regularisers.").removeprefix("heads.")
        if slot and last in _CHOOSERS:
            by_slot.setdefault(short, []).insert(0, _shown(value))
        else:
            by_slot.setdefault(short, []).append(f"{last}={_shown(value)}")
    return "; ".join(f"{slot} {' '.join(values)}".strip() for slot, values in by_slot.items())


def _head(recipe: MethodRecipe) -> dict[str, str]:
    return {"name": recipe.name, "source": recipe.source, "evidence": recipe.evidence}


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
