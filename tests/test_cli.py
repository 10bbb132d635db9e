"""The command line: help, options, dry runs, and what each verb prints."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from click.testing import Result
from typer.testing import CliRunner

from models.methods.catalogue import CARDS, METHODS
from models.methods.without_recipe import WITHOUT_RECIPE
from pipelines.cli import app
from pipelines.config_tree import load_config
from pipelines.results import Store
from tests.pipeline_fixture import SMALL

VERBS = (
    "sweep",
    "pretrain",
    "prepare",
    "data",
    "score",
    "evaluate",
    "results",
    "report",
    "methods",
    "doctor",
    "config",
)
# Verbs below a verb.
GROUPED = ("data check", "data stats", "data show", "methods show")


def clipfleet(*arguments: str) -> Result:
    """Run a command in this process, on a wide terminal."""
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200", "TERM": "dumb"})


def refusal(*arguments: str) -> str:
    """The message of a command that must be refused: exit code 2, no trace, nothing else."""
    result = clipfleet(*arguments)
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    return " ".join(result.stderr.split())


def resolved(*arguments: str) -> dict:
    result = clipfleet("config", *arguments)
    assert result.exit_code == 0, result.output
    return yaml.safe_load(result.stdout)


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: object) -> None:
        raise AssertionError("Ray was started")

    monkeypatch.setattr("pipelines.cluster.connect", refuse)


def test_every_verb_is_listed():
    names = {command.name or command.callback.__name__ for command in app.registered_commands}
    assert names | {group.name for group in app.registered_groups} == set(VERBS)
    shown = clipfleet("--help").output
    assert all(verb in shown for verb in VERBS)


@pytest.mark.parametrize("verb", [*(verb for verb in VERBS if verb != "data"), *GROUPED])
def test_every_verb_has_help_with_an_example(verb: str):
    result = clipfleet(*verb.split(), "--help")
    assert result.exit_code == 0
    assert f"Example: clipfleet {verb}" in result.output


@pytest.mark.parametrize("verb", ["sweep", "pretrain", "prepare", "evaluate", "results", "report"])
def test_every_verb_that_works_on_files_has_a_dry_run(verb: str):
    assert "--dry-run" in clipfleet(verb, "--help").output


@pytest.mark.parametrize("columns", ["80", "120"])
def test_methods_lists_the_catalogue(columns: str):
    result = CliRunner().invoke(app, ["methods"], env={"COLUMNS": columns, "TERM": "dumb"})
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert max(map(len, lines)) <= int(columns)
    heads = [line.split() for line in lines if line and not line.startswith(" ")]
    for recipe in METHODS.values():
        assert any(head[:2] == [recipe.name, recipe.evidence] for head in heads), recipe.name
    one_line = " ".join(result.stdout.split())
    assert all(" ".join(recipe.source.split()) in one_line for recipe in METHODS.values())
    for entry in WITHOUT_RECIPE.values():
        assert any(head[0] == entry.name for head in heads)
        for part in (entry.source, f"no recipe: {entry.reason}", f"instead: {entry.residue}"):
            assert " ".join(part.split()) in one_line


def test_methods_say_what_differs_from_clip():
    shown = " ".join(clipfleet("methods").stdout.split())
    assert "transform hopfield; estimator loob; temperature fixed init=0.03333" in shown
    found = json.loads(clipfleet("methods", "--json").stdout)
    assert [row["name"] for row in found["methods"]] == list(METHODS)
    slots = {row["name"]: row["slots"] for row in found["methods"]}
    assert slots["clip"] == {}
    assert slots["cloob"] == {
        "transform.kind": "hopfield",
        "estimator.kind": "loob",
        "temperature.policy": "fixed",
        "temperature.init": 1 / 30,
    }
    # A further table always says what is made of it, and else only what differs from a plain one.
    assert slots["local_mi"]["extra_tables.global.estimator.kind"] == "ce"
    assert "extra_tables.global.weight" not in slots["local_mi"]
    assert [row["name"] for row in found["without_recipe"]] == list(WITHOUT_RECIPE)
    assert all(row["reason"] and row["residue"] for row in found["without_recipe"])


def test_a_methods_card_shows_its_space():
    shown = clipfleet("methods", "show", "cloob").stdout
    assert "2110.11316" in shown
    assert "evidence: official" in shown
    assert "Each direction has its own memory" in shown
    assert "method.transform.beta    8        log [2, 32]" in shown
    found = json.loads(clipfleet("methods", "show", "cloob", "--json").stdout)
    assert (found["name"], found["transform"]["kind"]) == ("cloob", "hopfield")
    assert found["space"]["method.transform.beta"] == "log [2, 32]"
    assert found["card"].startswith("CLOOB: ")


@pytest.mark.parametrize("name", METHODS)
def test_every_method_can_be_shown(name: str):
    result = clipfleet("methods", "show", name)
    assert result.exit_code == 0, result.output
    assert METHODS[name].source in result.stdout
    first_words = " ".join(CARDS[name].split()[:6])
    assert first_words in " ".join(result.stdout.split())


def test_an_entry_without_recipe_says_why_and_what_can_be_had():
    name, entry = next(iter(WITHOUT_RECIPE.items()))
    shown = " ".join(clipfleet("methods", "show", name).stdout.split())
    assert f"no recipe: {entry.reason}" in shown
    assert entry.residue in shown
    assert json.loads(clipfleet("methods", "show", name, "--json").stdout) == dataclasses.asdict(entry)


def test_an_unknown_method_names_the_nearest():
    assert "unknown method 'clob'; did you mean 'cloob'?" in refusal("methods", "show", "clob")
    missing = next(iter(WITHOUT_RECIPE))
    assert f"did you mean '{missing}'?" in refusal("methods", "show", missing[:-1])
    assert "did you mean 'cloob'?" in refusal("sweep", "--methods", "clip,clob", "--dry-run")
    assert "did you mean 'cloob'?" in refusal("pretrain", "--method", "clob", "--dry-run")


def test_the_printed_configuration_is_accepted_again(tmp_path: Path):
    file = tmp_path / "printed.yaml"
    result = clipfleet("config", "method=tier", "train.steps=30", "data.where={source: [a, b]}")
    file.write_text(result.stdout)
    again = load_config([str(file)])
    assert again.tree() == yaml.safe_load(result.stdout)
    assert (again.method.name, again.train.steps, again.data.where) == ("tier", 30, {"source": ["a", "b"]})


def test_the_schema_names_every_part():
    schema = json.loads(clipfleet("config", "--schema").stdout)
    assert {"data", "model", "method", "train", "evaluation", "sweep"} <= set(schema["properties"])


def test_right_most_wins_and_overrides_win_over_files(tmp_path: Path):
    low, high = tmp_path / "low.yaml", tmp_path / "high.yaml"
    low.write_text("train: {steps: 10, lr: 0.1}\n")
    high.write_text("train: {steps: 20}\n")
    assert resolved("-c", str(low), "-c", str(high))["train"]["steps"] == 20
    assert resolved("-c", str(high), "-c", str(low))["train"]["steps"] == 10
    train = resolved("-c", str(low), "train.steps=30", "train.steps=40")["train"]
    assert (train["steps"], train["lr"]) == (40, 0.1)


def test_source_chooses_the_preset():
    tokens = resolved("--source", "scenes:tokens")
    assert (tokens["data"]["source"], tokens["data"]["image_size"]) == ("scenes:tokens", 48)
    assert resolved("--source", "parquet:/there/pairs.parquet")["train"]["min_crop_area"] == 0.6
    # What the user sets wins over a preset.
    assert resolved("--source", "scenes:tokens", "data.image_size=32")["data"]["image_size"] == 32


def test_a_missing_config_file_is_one_line(tmp_path: Path):
    assert "absent.yaml" in refusal("config", "-c", str(tmp_path / "absent.yaml"))


def test_sweep_dry_run_shows_the_plan_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_ray: None
):
    monkeypatch.chdir(tmp_path)
    result = clipfleet("sweep", *SMALL, "--methods", "clip,cloob", "--dry-run", "sweep.num_trials=3")
    assert result.exit_code == 0, result.output
    assert "per method 3 trials" in result.stdout
    assert "transform.beta" in result.stdout
    assert "tier" not in result.stdout
    assert "scenes:quick" in result.stdout
    assert list(tmp_path.iterdir()) == []


def test_pretrain_dry_run_shows_the_plan_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_ray: None
):
    monkeypatch.chdir(tmp_path)
    result = clipfleet("pretrain", *SMALL, "--method", "tier", "--output", "elsewhere", "--dry-run")
    assert result.exit_code == 0, result.output
    assert "tier" in result.stdout
    assert str(tmp_path / "elsewhere") in result.stdout
    assert list(tmp_path.iterdir()) == []


def test_prepare_dry_run_names_the_place_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_ray: None
):
    monkeypatch.chdir(tmp_path)
    result = clipfleet("prepare", *SMALL, "--dry-run")
    assert result.exit_code == 0, result.output
    assert str(tmp_path / "prepared" / "scenes-quick-") in result.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("verb", ["results", "report"])
def test_a_folder_that_is_no_run_root_is_refused(verb: str, tmp_path: Path):
    message = refusal(verb, str(tmp_path))
    assert f"'{tmp_path}' is not a run root" in message
    assert list(tmp_path.iterdir()) == []


@dataclass(frozen=True)
class Trained:
    root: str
    run_id: str
    printed: str


@pytest.fixture(scope="module")
def trained(ray_session: None, small_prepared: str, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A finished single run of the command line."""
    root = str(tmp_path_factory.mktemp("trained") / "root")
    places = (f"prepared={Path(small_prepared).parent}", "--output", root)
    result = clipfleet("pretrain", *SMALL, *places, "--method", "aclip", "--local")
    assert result.exit_code == 0, result.output
    return Trained(root, "aclip-s0", result.stdout)


@pytest.mark.ray
def test_pretrain_prints_its_results(trained: Trained):
    assert "aclip-s0: complete" in trained.printed
    assert "(there already)" in trained.printed
    for result in Store(trained.root).results():
        for metric, value in result["metrics"].items():
            if metric != "main_metric" and value is not None:
                assert f"{value:.3f}" in trained.printed


@pytest.mark.ray
def test_evaluate_repeats_the_stored_result(trained: Trained):
    stored = {
        (r["task"], r["clipfleet"]["keep_rule"]): (r["metrics"], r["clipfleet"]["ci"])
        for r in Store(trained.root).results()
    }
    result = clipfleet("evaluate", trained.root, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    again = {(r["task"], r["clipfleet"]["keep_rule"]): (r["metrics"], r["clipfleet"]["ci"]) for r in found}
    assert again == stored
    # Control: the other split gives other numbers, and nothing was added to the store.
    other = json.loads(clipfleet("evaluate", trained.root, "--split", "selection", "--json").stdout)
    assert {r["clipfleet"]["split"] for r in other} == {"selection"}
    assert [r["metrics"] for r in other] != [r["metrics"] for r in found]
    assert len(Store(trained.root).results()) == len(stored)


@pytest.mark.ray
def test_evaluate_prints_a_table_and_takes_other_settings(trained: Trained):
    folder = f"{trained.root}/runs/{trained.run_id}"
    shown = clipfleet("evaluate", folder, "evaluation.recall_at=[2]").stdout
    assert "image_retrieval_recall@2" in shown
    assert "image_retrieval_recall@10" not in shown
    assert "only values below 'evaluation'" in refusal("evaluate", folder, "train.lr=1")
    assert "must be selection or test, got 'tset'" in refusal("evaluate", folder, "--split", "tset")


@pytest.mark.ray
def test_results_of_a_single_run(trained: Trained):
    assert "aclip" in clipfleet("results", trained.root).stdout
    header, *lines = clipfleet("results", trained.root, "--csv").stdout.splitlines()
    assert '"metric"' in header
    assert any("acc1" in line for line in lines)
    boards = json.loads(clipfleet("results", trained.root, "--json").stdout)
    assert boards
    assert "1 runs" in clipfleet("results", trained.root, "--dry-run").stdout


@pytest.mark.ray
def test_report_of_a_single_run(trained: Trained, tmp_path: Path):
    place = tmp_path / "site"
    dry = clipfleet("report", trained.root, "--output", str(place), "--dry-run")
    assert dry.exit_code == 0
    assert not place.exists()
    result = clipfleet("report", trained.root, "--output", str(place))
    assert result.exit_code == 0, result.output
    assert (place / "index.html").exists()
    assert str(place) in result.stdout


def test_doctor_exits_with_its_finding(tmp_path: Path):
    result = clipfleet("doctor", "--output", str(tmp_path), "--json")
    assert result.exit_code in (0, 1), result.output
    assert json.loads(result.stdout)
