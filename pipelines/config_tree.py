"""Building and changing a configuration: defaults, preset, YAML files and `key.sub=value`, right-most wins.

Unknown keys are refused with the nearest known name, before anything starts.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import ValidationError

from models.methods.catalogue import METHODS
from models.recipe import EstimatorSlot, MethodRecipe
from pipelines.config import Config, Tree
from pipelines.presets import preset_of
from pipelines.sources.source_spec import absolute_places
from pipelines.storage import absolute

# Paths whose keys are the user's own.
_OPEN_PATHS = {"data.where", "data.split_names", "scoring.node_labels", "sweep.space", "method.extra_tables"}
# A given mapping replaces the default one instead of being mixed with it.
_REPLACED_PATHS = {"data.where"}


def load_config(
    files: Sequence[str] = (), overrides: Sequence[str] = (), *, base: Mapping[str, Any] | None = None
) -> Config:
    """Build the tree from defaults, the source's preset, YAML files and overrides, right-most wins.

    Args:
        files: YAML files with any part of the tree.
        overrides: `key.sub=value`, the value in YAML syntax.
        base: a part of the tree that wins over the preset and loses to the files.

    Raises:
        ValueError: a file that is no mapping, an unknown key (nearest named), or a bad value.
    """
    layers: list[Tree] = [dict(base or {})]
    for file in files:
        content = yaml.safe_load(Path(file).read_text()) or {}
        if not isinstance(content, dict):
            raise ValueError(f"{file}: a config file must hold a mapping, found {type(content).__name__}")
        layers.append(content)
    layers.extend(_parse_override(text) for text in overrides)
    layers = [_method_as_tree(layer) for layer in layers]
    return build_config(layers)


def build_config(layers: Sequence[Tree]) -> Config:
    """Merge layers over the defaults and validate the result; see `load_config`."""
    tree = Config().tree()
    source = _last(layers, "data", "source") or tree["data"]["source"]
    name = _last(layers, "method", "name") or tree["method"]["name"]
    tree["method"] = dataclasses.asdict(method_named(name))
    for layer in (preset_of(source), *layers):
        tree = merge(tree, layer)
    _make_paths_absolute(tree)
    for shared in ("image_size", "max_tokens"):
        if _last(layers, "model", shared) is None:
            tree["model"][shared] = tree["data"][shared]
    return validate_tree(tree)


def _make_paths_absolute(tree: Tree) -> None:
    """Local paths of the tree as every process of a run must see them."""
    tree["data"] = absolute_places(tree["data"])
    for part, key in (
        (tree, "output"),
        (tree, "prepared"),
        (tree["data"], "tokenizer"),
        (tree["model"], "pretrained"),
        (tree["train"], "start_from"),
    ):
        # Validation has something to say about other types.
        if isinstance(part[key], str):
            part[key] = absolute(part[key])


def validate_tree(tree: Tree) -> Config:
    """A config from a complete tree, with every problem in one message."""
    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        lines = [f"  {'.'.join(map(str, e['loc'])) or 'config'}: {e['msg']}" for e in error.errors()]
        raise ValueError("invalid configuration:\n" + "\n".join(lines)) from error
    if config.model.image_size != config.data.image_size:
        raise ValueError(
            f"model.image_size={config.model.image_size} and data.image_size={config.data.image_size} must "
            "agree"
        )
    return config


def method_named(name: str) -> MethodRecipe:
    """A recipe of the catalogue.

    Raises:
        ValueError: unknown name; the nearest is named.
    """
    if name not in METHODS:
        raise ValueError(f"unknown method '{name}'{nearest(name, METHODS)}; known: {', '.join(METHODS)}")
    return METHODS[name]


def merge(base: Tree, override: Mapping[str, Any], *, path: str = "") -> Tree:
    """`base` with `override` on top; keys that are in neither the base nor an open path are refused."""
    merged = dict(base)
    for key, value in override.items():
        here = f"{path}.{key}" if path else str(key)
        if key not in base and path not in _OPEN_PATHS:
            raise ValueError(f"unknown config key '{here}'{nearest(str(key), base)}")
        old = base.get(key)
        if isinstance(old, dict) and isinstance(value, Mapping) and here not in _REPLACED_PATHS:
            # Another estimator has other fields; what was set for the old one means nothing to it.
            if key == "estimator" and value.get("kind", old["kind"]) != old["kind"]:
                old = _estimator_defaults(value["kind"])
            merged[key] = merge(old, value, path=here)
        elif isinstance(old, dict) and not isinstance(value, Mapping) and path not in _OPEN_PATHS:
            raise ValueError(f"config key '{here}' must hold a mapping, got {value!r}")
        else:
            merged[key] = value
    return merged


def _estimator_defaults(kind: Any) -> Tree:
    known = {estimator.kind: estimator for estimator in get_args(EstimatorSlot)}
    if kind not in known:
        raise ValueError(
            f"unknown estimator.kind '{kind}'{nearest(str(kind), known)}; known: {', '.join(known)}"
        )
    return dataclasses.asdict(known[kind]())


def set_path(tree: Tree, path: str, value: Any) -> Tree:
    """`tree` with the value at a dotted path replaced.

    Raises:
        ValueError: the path is not in the tree; the nearest name is given.
    """
    return merge(tree, _nested(path, value))


def with_overrides(tree: Tree, overrides: Sequence[str], *, below: str) -> Tree:
    """A finished run's tree with `key.sub=value` overrides of one part of it.

    Raises:
        ValueError: an override of another part: it would describe a run that never was.
    """
    for text in overrides:
        layer = _parse_override(text)
        if set(layer) != {below}:
            raise ValueError(f"only values below '{below}' can be overridden here, got '{text}'")
        tree = merge(tree, layer)
    return tree


def nearest(name: str, known: Any) -> str:
    """A "did you mean" clause, or nothing when no known name is close."""
    close = difflib.get_close_matches(name, [str(k) for k in known], n=1, cutoff=0.5)
    return f"; did you mean '{close[0]}'?" if close else ""


def _parse_override(text: str) -> Tree:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ValueError(f"an override must read key.sub=value, got '{text}'")
    try:
        return _nested(key.strip(), yaml.safe_load(value) if value else None)
    except yaml.YAMLError as error:
        message = " ".join(str(error).split())
        raise ValueError(f"the value of '{text}' is not valid YAML: {message}") from error


def _nested(path: str, value: Any) -> Tree:
    """`a.b=1` as `{a: {b: 1}}`."""
    for part in reversed(path.split(".")):
        value = {part: value}
    tree: Tree = value
    return tree


def _method_as_tree(layer: Tree) -> Tree:
    """`method: cloob` is short for `method: {name: cloob}`."""
    if isinstance(layer.get("method"), str):
        return {**layer, "method": {"name": layer["method"]}}
    return layer


def _last(layers: Sequence[Tree], *path: str) -> Any:
    """Value at a path in the right-most layer that has it."""
    for layer in reversed(layers):
        value: Any = layer
        for part in path:
            value = value.get(part) if isinstance(value, Mapping) else None
        if value is not None:
            return value
    return None
