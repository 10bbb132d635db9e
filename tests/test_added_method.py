"""A method is a recipe file, a space file and a line in each catalogue: nothing else is touched."""

from __future__ import annotations

import importlib.util
import io
from pathlib import Path
from types import ModuleType

import pytest
from rich.console import Console

from models.methods.catalogue import CARDS, METHODS
from pipelines.config_tree import load_config, method_named
from pipelines.leaderboard import leaderboards
from pipelines.method_tables import show_method, show_methods
from pipelines.results import Store
from pipelines.spaces import check_space, method_tree
from pipelines.sweep import run_sweep
from tests.pipeline_fixture import small_config
from tune_spaces.catalogue import SPACES

RECIPE = '''
"""Leaky CLOOB on attentive patches: a recombination nobody published."""

from models.estimators import InfoLOOB
from models.recipe import MethodRecipe, TableRecipe
from models.table_slots import RegionPool, Temperature, Transform
from models.training_slots import Regularisers, TokenEntropy, TokenSelection

RECIPE = MethodRecipe(
    name="mixture",
    source="this test",
    evidence="derived",
    selection=TokenSelection(kind="attentive"),
    transform=Transform(kind="leaky", limit=0.7),
    estimator=InfoLOOB(),
    regularisers=Regularisers(token_entropy=TokenEntropy(token_over_patches=0.1)),
    extra_tables={
        "regions": TableRecipe(
            weight=0.5, region_pool=RegionPool(kind="lse"), temperature=Temperature(policy="shared")
        )
    },
)
'''

SPACE = '''
"""Search space of the mixture."""

from tune_spaces.domains import LogUniform, Space, Uniform

SPACE: Space = {
    "method.transform.limit": Uniform(low=0.5, high=0.9),
    "method.extra_tables.regions.weight": LogUniform(low=0.1, high=2.0),
}
'''

BUDGET = ("sweep.num_trials=2", "sweep.seeds=[5]", "sweep.num_default_seeds=1")


def module_at(path: Path, source: str) -> ModuleType:
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def mixture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The two files, and the line each catalogue gets."""
    recipe = module_at(tmp_path / "mixture_recipe.py", RECIPE)
    space = module_at(tmp_path / "mixture_space.py", SPACE)
    monkeypatch.setitem(METHODS, "mixture", recipe.RECIPE)
    monkeypatch.setitem(CARDS, "mixture", recipe.__doc__)
    monkeypatch.setitem(SPACES, "mixture", space.SPACE)
    return "mixture"


@pytest.mark.ray
def test_an_added_method_is_swept_beside_the_others(mixture, small_prepared, tmp_path):
    config = small_config(tmp_path, f"sweep.methods=[clip,{mixture}]", *BUDGET)
    run_sweep(config, small_prepared, console=Console(file=io.StringIO()))
    store = Store(config.output)
    runs = [run for run in store.runs() if run["method"] == mixture]
    assert sorted(run["kind"] for run in runs) == ["best", "default", "trial", "trial"]
    searched = [run["params"] for run in runs if run["kind"] == "trial"]
    assert all(set(params) == set(SPACES[mixture]) for params in searched)
    assert searched[0] != searched[1]
    ranked = [row.method for board in leaderboards(store) for row in board.rows]
    assert set(ranked) == {"clip", mixture}


def test_it_is_listed_shown_and_checked(mixture):
    console = Console(width=200, record=True, file=io.StringIO())
    show_methods(console, as_json=False)
    show_method(mixture, console, as_json=False)
    shown = console.export_text()
    assert "a recombination nobody published" in shown
    assert "method.extra_tables.regions.weight" in shown
    check_space(SPACES[mixture], method_tree(load_config(), mixture), method=mixture)


def test_without_the_lines_it_is_unknown():
    with pytest.raises(ValueError, match="unknown method 'mixture'"):
        method_named("mixture")
