"""The search space of each method of a sweep: its own, with the config's changes, checked."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution

from pipelines.config import Config, Tree
from pipelines.config_tree import merge as merge_trees
from pipelines.config_tree import method_named, set_path, validate_tree
from tune_spaces.catalogue import SPACES
from tune_spaces.domains import Choice, Domain, LogUniform, Value, parse_domain

Space = dict[str, Domain]


def method_tree(config: Config, method: str) -> Tree:
    """The configuration a sweep trains a method with before anything is searched.

    What the user set below `method` (other than its name) holds for every method of the sweep.

    Raises:
        ValueError: it cannot hold for this method.
    """
    tree = config.tree()
    own = _changed(dataclasses.asdict(config.method), dataclasses.asdict(method_named(config.method.name)))
    own.pop("name", None)
    _refuse_foreign_tables(own, config.method.name, method)
    tree["method"] = merge_trees(dataclasses.asdict(method_named(method)), own, path="method")
    return validate_tree(tree).tree()


def _refuse_foreign_tables(own: Tree, named: str, method: str) -> None:
    """A change to a table that only the named method has would become a new table of the other method."""
    known = {*method_named(named).extra_tables} - {*method_named(method).extra_tables}
    for name in known & {*own.get("extra_tables", {})}:
        raise ValueError(
            f"method.extra_tables.{name} is changed, but '{method}' has no such table; sweep '{named}' alone "
            f"with sweep.methods=[{named}]"
        )


def space_of(config: Config, method: str) -> Space:
    """Domains by config path.

    Raises:
        ValueError: a path that is not in the tree (nearest named), a value that makes an invalid
            config, or a malformed domain.
    """
    space = dict(SPACES.get(method, {}))
    for path, spec in config.sweep.space.items():
        if spec is None:
            space.pop(path, None)
        else:
            try:
                space[path] = parse_domain(spec)
            except ValueError as error:
                raise ValueError(f"sweep.space, {path}: {error}") from error
    check_space(space, method_tree(config, method), method=method)
    return space


def check_space(space: Mapping[str, Domain], tree: Tree, *, method: str) -> None:
    """Every corner of every domain, and a value inside, must give a valid configuration.

    Raises:
        ValueError: naming method, path and value.
    """
    for path, domain in space.items():
        for value in _probes(domain):
            try:
                validate_tree(set_path(tree, path, value))
            except ValueError as error:
                raise ValueError(f"space of '{method}', {path}={value}: {error}") from error


def distributions(space: Mapping[str, Domain]) -> dict[str, BaseDistribution]:
    """The space in Optuna's types."""
    return {path: _distribution(domain) for path, domain in space.items()}


def apply_params(tree: Tree, params: Mapping[str, Any]) -> Tree:
    """`tree` with searched values set.

    Kinds come first: naming another estimator replaces the fields of the old one.
    """
    for path in sorted(params, key=lambda path: not path.endswith(".kind")):
        tree = set_path(tree, path, params[path])
    return tree


def default_params(tree: Tree, space: Mapping[str, Domain]) -> dict[str, Any]:
    """The untuned values of a space's paths."""
    found = {}
    for path in space:
        value: Any = tree
        for part in path.split("."):
            value = value[part]
        found[path] = value
    return found


def _probes(domain: Domain) -> tuple[Value, ...]:
    """The corners, and a fraction between them: a setting that counts something takes the corners only."""
    if isinstance(domain, Choice):
        return domain.corners()
    return (*domain.corners(), domain.low + (domain.high - domain.low) / math.pi)


def _distribution(domain: Domain) -> BaseDistribution:
    if isinstance(domain, Choice):
        return CategoricalDistribution(domain.options)
    return FloatDistribution(domain.low, domain.high, log=isinstance(domain, LogUniform))


def _changed(tree: Mapping[str, Any], base: Mapping[str, Any]) -> Tree:
    """The part of `tree` that differs from `base`."""
    found = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and isinstance(base.get(key), Mapping):
            below = _changed(value, base[key])
            if below:
                found[key] = below
        elif value != base.get(key):
            found[key] = value
    return found


# Optuna reports every trial at INFO; the sweep has its own view.
optuna.logging.set_verbosity(optuna.logging.WARNING)
