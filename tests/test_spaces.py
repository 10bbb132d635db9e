"""Search spaces: domains, paths that must exist, values that must be valid, and what the user adds."""

from __future__ import annotations

import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution

from models.methods.catalogue import METHODS
from pipelines.config import Config
from pipelines.config_tree import load_config, validate_tree
from pipelines.spaces import apply_params, check_space, default_params, distributions, method_tree, space_of
from tune_spaces.catalogue import SPACES
from tune_spaces.domains import Choice, LogUniform, Uniform, describe, parse_domain


def with_overrides(*overrides: str) -> Config:
    return load_config(overrides=overrides)


DEFAULT = with_overrides()


@pytest.mark.parametrize(
    ("domain", "corners", "text"),
    [
        (Uniform(low=-1, high=0.5), (-1, 0.5), "[-1, 0.5]"),
        (LogUniform(low=0.01, high=10), (0.01, 10), "log [0.01, 10]"),
        (Choice(("ce", 3, True)), ("ce", 3, True), "{ce, 3, True}"),
    ],
)
def test_domains(domain, corners, text):
    assert domain.corners() == corners
    assert describe(domain) == text


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Uniform(low=1, high=1), "finite low < high, got low=1 and high=1"),
        (lambda: Uniform(low=2, high=1), "finite low < high"),
        (lambda: Uniform(low=0, high=float("inf")), "finite low < high"),
        (lambda: LogUniform(low=float("nan"), high=1), "finite low < high"),
        (lambda: LogUniform(low=0, high=1), "low of a log domain must be > 0, got 0"),
        (lambda: Choice((1,)), r"at least 2 options, got \[1\]"),
    ],
)
def test_domains_refuse(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("spec", "domain"),
    [
        ({"uniform": [0, 1]}, Uniform(low=0, high=1)),
        # YAML reads 1e-5 as text.
        ({"log_uniform": ["1e-5", 0.1]}, LogUniform(low=1e-5, high=0.1)),
        ({"choice": ["a", 2]}, Choice(("a", 2))),
    ],
)
def test_domains_are_read_from_the_config(spec, domain):
    assert parse_domain(spec) == domain


@pytest.mark.parametrize(
    "spec",
    [{}, {"normal": [0, 1]}, {"uniform": [0]}, {"uniform": 3}, {"uniform": [0, 1], "choice": [1, 2]}],
)
def test_other_forms_are_refused(spec):
    with pytest.raises(ValueError, match=r"a domain reads \{uniform: \[low, high\]\}"):
        parse_domain(spec)


def test_optuna_gets_the_same_domains():
    space = {"a": Uniform(low=0, high=1), "b": LogUniform(low=0.1, high=1), "c": Choice((1.0, 0.1))}
    assert distributions(space) == {
        "a": FloatDistribution(0, 1),
        "b": FloatDistribution(0.1, 1, log=True),
        "c": CategoricalDistribution((1.0, 0.1)),
    }


@pytest.mark.parametrize("method", METHODS)
def test_untuned_values_are_those_of_the_recipe(method):
    tree, space = method_tree(DEFAULT, method), space_of(DEFAULT, method)
    params = default_params(tree, space)
    assert set(params) == set(SPACES[method])
    assert validate_tree(apply_params(tree, params)).method == METHODS[method]


def test_the_user_adds_replaces_and_removes():
    config = with_overrides(
        "sweep.space={method.transform.beta: null, method.temperature.init: {log_uniform: [0.1, 0.2]}, "
        "train.lr: {choice: [0.001, 0.003]}}"
    )
    assert space_of(config, "cloob") == {
        "method.temperature.init": LogUniform(low=0.1, high=0.2),
        "train.lr": Choice((0.001, 0.003)),
    }
    # Removing a path that a method does not search changes nothing.
    assert "method.transform.beta" not in space_of(config, "clip")


@pytest.mark.parametrize(
    ("path", "spec", "message"),
    [
        (
            "method.temprature.init",
            "{uniform: [0.1, 0.2]}",
            r"'clip', method\.temprature\.init=0\.1: unknown config key .*did you mean 'temperature'\?",
        ),
        (
            "method.temperature.init",
            "{uniform: [0.5, 2]}",
            r"(?s)init=2\.0: .*between minimum=0\.01 and 1, got 2",
        ),
        ("train", "{choice: [1, 2]}", r"train=1: config key 'train' must hold a mapping"),
        ("train.lr.x", "{choice: [1, 2]}", r"train\.lr\.x=1: "),
        ("train.steps", "{uniform: [1, 10]}", r"(?s)train\.steps=3\.86\d*: .*valid integer"),
        (
            "method.estimator.kind",
            "{choice: [ce, nce]}",
            r"kind=nce: unknown estimator\.kind 'nce'; did you mean 'ce'\?",
        ),
        ("train.lr", "{uniform: [1, 0]}", r"sweep\.space, train\.lr: a domain needs finite low < high"),
        ("train.lr", "{between: [1, 0]}", r"sweep\.space, train\.lr: a domain reads"),
        ("train.lr", "{uniform: [a, b]}", r"sweep\.space, train\.lr: could not convert"),
    ],
)
def test_spaces_that_cannot_work_are_refused_before_any_trial(path, spec, message):
    config = with_overrides(f"sweep.space={{{path}: {spec}}}")
    with pytest.raises(ValueError, match=message):
        space_of(config, "clip")


def test_whole_numbers_can_be_chosen():
    config = with_overrides("sweep.space={train.steps: {choice: [10, 20]}}")
    assert space_of(config, "clip")["train.steps"] == Choice((10, 20))


def test_one_bad_corner_is_enough():
    tree = method_tree(DEFAULT, "clip")
    check_space({"method.temperature.init": Uniform(low=0.1, high=1)}, tree, method="clip")
    with pytest.raises(ValueError, match=r"space of 'clip', method\.temperature\.init=0\.001"):
        check_space({"method.temperature.init": Uniform(low=0.001, high=1)}, tree, method="clip")


def test_values_are_set_in_the_tree():
    tree = method_tree(DEFAULT, "cloob")
    changed = validate_tree(apply_params(tree, {"method.transform.beta": 5.0, "train.lr": 0.01}))
    assert (changed.method.transform.beta, changed.train.lr) == (5.0, 0.01)
    assert validate_tree(tree).method == METHODS["cloob"]


@pytest.mark.parametrize("reverse", [False, True])
def test_another_estimator_comes_before_its_fields(reverse):
    """Searching kind and a field of the new kind works whatever their order."""
    tree = method_tree(DEFAULT, "softclip")
    params = {"method.estimator.kind": "relation_kl", "method.estimator.direction": "symmetric"}
    ordered = dict(sorted(params.items(), reverse=reverse))
    estimator = validate_tree(apply_params(tree, ordered)).method.estimator
    assert (estimator.kind, estimator.direction) == ("relation_kl", "symmetric")


def test_a_swapped_estimator_leaves_no_field_behind():
    tree = method_tree(DEFAULT, "softclip")
    changed = apply_params(tree, {"method.estimator.kind": "ce"})
    assert changed["method"]["estimator"] == {"kind": "ce", "slack": 0.0}


def test_the_users_settings_hold_for_every_method():
    config = with_overrides(
        "method=cloob", "method.features.text=sentence", "method.candidates.exclude=same_text", "train.lr=0.5"
    )
    # Candidates that are no batch have nobody to leave out.
    takes_it = {name: recipe for name, recipe in METHODS.items() if recipe.candidates.kind == "batch"}
    assert len(takes_it) > 50
    for name, recipe in takes_it.items():
        found = validate_tree(method_tree(config, name))
        assert found.train.lr == 0.5
        assert (found.method.features.text, found.method.candidates.exclude) == ("sentence", "same_text")
        # What the user left alone stays as each method has it.
        assert (found.method.name, found.method.estimator) == (name, recipe.estimator)
        assert found.method.features.num_views == recipe.features.num_views
        assert found.method.temperature == recipe.temperature


def test_without_settings_every_method_is_its_recipe():
    for name, recipe in METHODS.items():
        assert validate_tree(method_tree(with_overrides("method=aclip"), name)).method == recipe


def test_an_added_table_is_added_to_every_method():
    config = with_overrides("method.extra_tables.local={weight: 2, region_pool: {kind: max}}")
    for name, recipe in METHODS.items():
        tables = validate_tree(method_tree(config, name)).method.extra_tables
        assert set(tables) == {*recipe.extra_tables, "local"}


def test_a_change_to_one_methods_table_does_not_become_anothers():
    config = with_overrides("method=softclip", "method.extra_tables.relation.weight=2")
    assert validate_tree(method_tree(config, "softclip")).method.extra_tables["relation"].weight == 2
    with pytest.raises(ValueError, match=r"'clip' has no such table; sweep 'softclip' alone"):
        method_tree(config, "clip")


def test_settings_that_a_method_cannot_take_are_refused():
    config = with_overrides("method.region_pool.kind=max")
    assert method_tree(config, "clip")["method"]["region_pool"]["kind"] == "max"
    with pytest.raises(ValueError, match=r"Hopfield retrieval works on global features"):
        method_tree(config, "cloob")
    config = with_overrides("method.candidates.exclude=same_text")
    with pytest.raises(ValueError, match=r"candidates\.kind=roll knows neither exclude=same_text"):
        method_tree(config, "clip_lite")
