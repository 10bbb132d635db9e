"""The example cluster against Ray's own schema, offline, and against what our code relies on."""

from __future__ import annotations

import copy
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from ray.autoscaler._private.util import prepare_config, validate_config

from pipelines.cluster import DRIVER_RESOURCE

ROOT = Path(__file__).parents[1]
TREE: dict[str, Any] = yaml.safe_load((ROOT / "cluster.yaml").read_text())
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def validated(tree: dict[str, Any]) -> dict[str, Any]:
    """What `ray up` makes of a tree before it calls the cloud."""
    prepared: dict[str, Any] = prepare_config(copy.deepcopy(tree))
    validate_config(prepared)
    return prepared


def pinned(name: str) -> SpecifierSet:
    parsed = [Requirement(text) for text in PROJECT["dependencies"]]
    return next(requirement.specifier for requirement in parsed if requirement.name == name)


def test_ray_accepts_it():
    types = validated(TREE)["available_node_types"]
    assert set(types) == {"head", "gpu_worker", "data_worker"}


def test_unknown_key_is_refused():
    with pytest.raises(jsonschema.ValidationError, match="min_worker"):
        validated({**TREE, "min_worker": 1})


def test_unknown_key_of_a_node_type_is_refused():
    tree = copy.deepcopy(TREE)
    tree["available_node_types"]["gpu_worker"]["label"] = {"role": "gpu"}
    with pytest.raises(jsonschema.ValidationError, match="'label' was unexpected"):
        validated(tree)


def test_missing_head_is_refused():
    tree = {key: value for key, value in TREE.items() if key != "head_node_type"}
    with pytest.raises(ValueError, match="head_node_type"):
        validated(tree)


def test_half_a_driver_is_refused():
    tree = copy.deepcopy(TREE)
    tree["available_node_types"]["head"]["resources"][DRIVER_RESOURCE] = 0.5
    with pytest.raises(jsonschema.ValidationError, match="not of type 'integer'"):
        validated(tree)


def test_more_started_than_allowed_is_refused():
    tree = copy.deepcopy(TREE)
    tree["available_node_types"]["gpu_worker"]["min_workers"] = tree["max_workers"] + 1
    with pytest.raises(ValueError, match="max_workers"):
        validated(tree)


def test_drivers_live_on_the_head_alone():
    types = TREE["available_node_types"]
    assert types["head"]["resources"] == {"CPU": 0, DRIVER_RESOURCE: 32}
    assert not any(DRIVER_RESOURCE in types[name]["resources"] for name in ("gpu_worker", "data_worker"))
    assert "InstanceMarketOptions" not in types["head"]["node_config"]


@pytest.mark.parametrize(("name", "role"), [("gpu_worker", "gpu"), ("data_worker", "data")])
def test_workers_can_be_taken_away_and_told_apart(name, role):
    node = TREE["available_node_types"][name]
    assert node["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert node["labels"] == {"role": role}
    assert node["min_workers"] == 0


def test_images_are_of_our_versions():
    images = [TREE["docker"]["image"], TREE["available_node_types"]["gpu_worker"]["docker"]["worker_image"]]
    for image in images:
        ray_version, python, _ = image.removeprefix("rayproject/ray:").split("-")
        assert ray_version in pinned("ray")
        assert f"{python[2]}.{python[3:]}" in SpecifierSet(PROJECT["requires-python"])


def test_every_node_installs_the_checkout_that_is_mounted():
    place = next(remote for remote, local in TREE["file_mounts"].items() if local == ".")
    assert f"pip install -e {place}" in TREE["setup_commands"]
    # A type's own setup commands would replace these.
    assert not any("worker_setup_commands" in node for node in TREE["available_node_types"].values())


def test_a_token_guards_every_node():
    assert "--env RAY_AUTH_MODE=token" in TREE["docker"]["run_options"]
    assert "/home/ray/.ray/auth_token" in TREE["file_mounts"]
