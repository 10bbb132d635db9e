"""The house: who imports whom, sizes, layout, and catalogues that agree. Each checker must catch a planted
offence."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from models.methods.catalogue import METHODS
from pipelines.config_tree import load_config, method_named
from pipelines.spaces import check_space, method_tree
from tests import house_rules as rules
from tune_spaces.catalogue import SPACES
from tune_spaces.domains import Uniform

ROOT = Path(__file__).parents[1]
FOLDERS = ("models", "pipelines", "tune_spaces", "tests")
# Only pipelines/ knows Ray, and of it not the step that the parity tests drive, nor any metric.
WITHOUT_RAY = ("pipelines/train_step.py", "pipelines/evaluation/")
# Read by a machine without Ray: a laptop that looks at results, the process that drives parity tests.
RAY_FREE_MODULES = (
    "models.methods.catalogue",
    "pipelines.train_step",
    "pipelines.evaluation.tasks",
    "pipelines.config",
    "pipelines.spaces",
    "pipelines.collate",
    "pipelines.feed",
    "pipelines.checkpoint",
    "pipelines.results",
)


def sources(*folders: str) -> dict[str, str]:
    """Text of every module below folders, by path from the root."""
    files = [file for folder in folders for file in sorted((ROOT / folder).rglob("*.py"))]
    return {str(file.relative_to(ROOT)): file.read_text() for file in files}


def offenders(found: dict[str, object]) -> dict[str, object]:
    return {path: problems for path, problems in found.items() if problems}


EVERYTHING = sources(*FOLDERS)


def test_the_walk_finds_the_code():
    assert {"models/recipe.py", "pipelines/sources/parquet.py", "tests/test_house.py"} <= set(EVERYTHING)


def test_models_import_torch_transformers_and_themselves():
    allowed = {"models", "torch", "transformers"}
    found = {path: rules.foreign_imports(text, allowed=allowed) for path, text in sources("models").items()}
    assert offenders(found) == {}


def test_models_touch_no_files_processes_or_environment():
    forbidden = {"os", "pathlib", "io", "shutil", "tempfile", "subprocess", "socket", "sys", "json", "pickle"}
    found = {path: rules.imported_roots(text) & forbidden for path, text in sources("models").items()}
    assert offenders(found) == {}


def test_spaces_import_the_standard_library_and_themselves():
    found = {
        path: rules.foreign_imports(text, allowed={"tune_spaces"})
        for path, text in sources("tune_spaces").items()
    }
    assert offenders(found) == {}


def test_the_code_does_not_import_the_tests():
    found = {path: rules.imported_roots(text) & {"tests"} for path, text in EVERYTHING.items()}
    assert all(path.startswith("tests/") for path in offenders(found))


def test_steps_and_metrics_do_not_import_ray():
    texts = {path: text for path, text in EVERYTHING.items() if path.startswith(WITHOUT_RAY)}
    assert len(texts) > 5
    assert offenders({path: rules.imported_roots(text) & {"ray"} for path, text in texts.items()}) == {}


def test_imports_are_absolute():
    found = {
        path: [name for name in rules.imported_modules(text) if name.startswith(".")]
        for path, text in EVERYTHING.items()
    }
    assert offenders(found) == {}


def import_without_ray(*modules: str) -> subprocess.CompletedProcess[str]:
    code = """
import importlib, sys
sys.modules["ray"] = None
for name in sys.argv[1:]:
    importlib.import_module(name)
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, *modules]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def test_nothing_below_them_imports_ray_either():
    done = import_without_ray(*RAY_FREE_MODULES)
    assert done.returncode == 0, done.stderr
    # The block works.
    blocked = import_without_ray("pipelines.cluster")
    assert "import of ray halted" in blocked.stderr


def test_packages_are_empty():
    packages = {path: text for path, text in EVERYTHING.items() if path.endswith("__init__.py")}
    assert offenders(packages) == {}
    folders = {str(Path(path).parent) for path in EVERYTHING if not path.startswith("tests/")}
    assert {str(Path(path).parent) for path in packages} >= folders


def test_modules_and_functions_are_short():
    assert offenders({path: rules.oversized(text) for path, text in EVERYTHING.items()}) == {}


def test_nothing_is_caught_broadly():
    assert offenders({path: rules.broad_handlers(text) for path, text in EVERYTHING.items()}) == {}


def test_ignored_types_name_the_error():
    assert offenders({path: rules.unexplained_ignores(text) for path, text in EVERYTHING.items()}) == {}


def test_modules_say_what_they_are():
    texts = {path: text for path, text in EVERYTHING.items() if text}
    assert [path for path, text in texts.items() if not rules.has_docstring(text)] == []


def test_no_drawer_for_odds_and_ends():
    names = {"utils.py", "helpers.py", "misc.py", "common.py"}
    assert [path for path in EVERYTHING if Path(path).name in names] == []


def test_top_level_is_the_named_one():
    packages = {file.parent.name for file in ROOT.glob("*/__init__.py")}
    assert packages == set(FOLDERS)
    assert [file.name for file in ROOT.glob("*.py")] == []
    for name in ("pyproject.toml", "README.md", "LICENSE", "cluster.yaml", ".gitignore"):
        assert (ROOT / name).is_file(), name
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


def test_catalogues_agree():
    assert set(METHODS) == set(SPACES)
    assert {name: recipe.name for name, recipe in METHODS.items()} == {name: name for name in METHODS}


@pytest.mark.parametrize("name", METHODS)
def test_every_corner_of_every_space_is_a_valid_config(name):
    assert SPACES[name]
    check_space(SPACES[name], method_tree(load_config(), name), method=name)
    assert method_named(name).source


class TestCheckersCatch:
    """A checker that finds nothing anywhere proves nothing."""

    @pytest.mark.parametrize(
        "source",
        [
            "import ray",
            "from ray.train import report",
            "def f():\n    import ray.data as d",
            "import torch, ray",
        ],
    )
    def test_an_import(self, source):
        assert "ray" in rules.imported_roots(source)
        assert rules.foreign_imports(source, allowed={"torch"}) == {"ray"}
        assert rules.foreign_imports(source.replace("ray", "json"), allowed={"torch"}) == set()

    def test_a_relative_import(self):
        assert rules.imported_modules("from . import x\nfrom ..a import b") == {".", "..a"}

    @pytest.mark.parametrize("caught", ["", " Exception", " BaseException as e", " (OSError, Exception)"])
    def test_a_broad_handler(self, caught):
        assert rules.broad_handlers(f"try:\n    f()\nexcept{caught}:\n    pass") == [3]

    def test_but_no_narrow_one(self):
        assert rules.broad_handlers("try:\n    f()\nexcept (OSError, ValueError):\n    pass") == []

    def test_size(self):
        body = "def f():\n" + "    x = 1\n" * 60
        assert rules.oversized(body) == ["f: 61 lines"]
        assert rules.oversized(body[: -len("    x = 1\n")]) == []
        assert rules.oversized("x = 1\n" * 401) == ["module: 401 lines"]
        assert rules.oversized("class A:\n    async def g(self):\n" + "        y = 2\n" * 60) == [
            "g: 61 lines"
        ]

    def test_an_unexplained_ignore(self):
        plain, explained = "x = f()  # type: " + "ignore", "x = f()  # type: " + "ignore[arg-type]"
        assert rules.unexplained_ignores(f"\n{plain}\n{explained}\n") == [2]

    def test_a_missing_docstring(self):
        assert not rules.has_docstring("x = 1")
        assert rules.has_docstring('"""What it is."""')

    def test_a_bad_corner(self):
        with pytest.raises(ValueError, match=r"space of 'clip', method\.no_such=0"):
            check_space(
                {"method.no_such": Uniform(low=0, high=1)}, method_tree(load_config(), "clip"), method="clip"
            )
