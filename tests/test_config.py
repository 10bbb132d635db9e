"""The configuration tree: layers, short forms, round trips, and every refusal with its message."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from models.estimators import DonskerVaradhan, InfoLOOB, RelationKL, SoftKL
from models.methods.catalogue import METHODS
from models.recipe import RegionPool
from pipelines.config import Config
from pipelines.config_tree import build_config, load_config, merge, method_named, set_path, validate_tree


def with_overrides(*overrides: str) -> Config:
    return load_config(overrides=overrides)


def test_nothing_given_is_the_embedded_data_with_clip():
    config = with_overrides()
    assert (config.data.source, config.method.name) == ("scenes:quick", "clip")
    assert Path(config.output) == Path("runs/quick").absolute()


def test_right_most_wins(tmp_path):
    for name, tree in (("one", {"train": {"lr": 0.1, "steps": 7}}), ("two", {"train": {"lr": 0.2}})):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(tree))
    files = [str(tmp_path / "one.yaml"), str(tmp_path / "two.yaml")]
    assert load_config(files).train.lr == 0.2
    assert load_config(files[::-1]).train.lr == 0.1
    config = load_config(files, ["train.lr=0.3", "train.lr=0.4"])
    assert (config.train.lr, config.train.steps) == (0.4, 7)


def test_base_wins_over_the_preset_and_loses_to_files(tmp_path):
    assert load_config(base={"output": "/runs/base"}).output == "/runs/base"
    (tmp_path / "c.yaml").write_text("output: /runs/file\n")
    assert load_config([str(tmp_path / "c.yaml")], base={"output": "/runs/base"}).output == "/runs/file"


def test_an_empty_file_changes_nothing(tmp_path):
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    assert load_config([str(tmp_path / "empty.yaml")]) == with_overrides()


@pytest.mark.parametrize(
    ("source", "image_size", "output"),
    [
        ("scenes:quick", 32, "runs/quick"),
        ("scenes:tokens", 48, "runs/tokens"),
        ("parquet:/x", 48, "runs/parquet"),
        ("webdataset:/x/{0..1}.tar::/y", 48, "runs/webdataset"),
        ("mixture", 48, "runs/mixture"),
    ],
)
def test_a_source_brings_its_preset(source, image_size, output):
    config = with_overrides(f"data.source={source}")
    assert (config.data.image_size, config.model.image_size) == (image_size, image_size)
    assert Path(config.output) == Path(output).absolute()


def test_the_user_wins_over_the_preset():
    config = with_overrides("data.source=scenes:tokens", "data.image_size=64", "output=/elsewhere")
    assert (config.data.image_size, config.output) == (64, "/elsewhere")
    assert config.train.steps == 600


def test_the_towers_follow_the_data():
    config = with_overrides("data.image_size=64", "data.max_tokens=40")
    assert (config.model.image_size, config.model.max_tokens) == (64, 40)


def test_values_are_yaml():
    config = with_overrides(
        "data.tokenizer=null", "train.max_grad_norm=", "sweep.seeds=[1, 2]", "evaluation.labels=[a b, c]"
    )
    assert (config.data.tokenizer, config.train.max_grad_norm) == (None, None)
    assert (config.sweep.seeds, config.evaluation.labels) == ([1, 2], ["a b", "c"])


def test_local_paths_mean_the_same_in_every_process():
    config = with_overrides(
        "output=~/runs",
        "prepared=p",
        "data.source=parquet:x.parquet",
        "data.tokenizer=t",
        "model.pretrained=m",
    )
    here = Path.cwd()
    assert config.output == str(Path.home() / "runs")
    assert config.prepared == str(here / "p")
    assert config.data.source == f"parquet:{here / 'x.parquet'}"
    assert (config.data.tokenizer, config.model.pretrained) == (str(here / "t"), str(here / "m"))
    assert with_overrides("data.source=scenes:tokens").data.source == "scenes:tokens"
    assert with_overrides("data.source=parquet:s3://b/x").data.source == "parquet:s3://b/x"


def test_an_override_may_hold_equal_signs():
    output = "s3://bucket/x?endpoint_override=h:1&scheme=http"
    assert with_overrides(f"output={output}").output == output


def test_another_method_brings_its_own_defaults():
    config = with_overrides("method=cloob")
    assert config.method == METHODS["cloob"]
    assert with_overrides("method.name=cloob") == config
    assert with_overrides("method=cloob", "method=tier").method == METHODS["tier"]


def test_methods_can_be_recombined():
    config = with_overrides(
        "method=cloob",
        "method.regularisers.token_entropy.token_over_patches=0.2",
        "method.selection.kind=attentive",
        "method.transform.beta=4",
    )
    assert config.method.transform.kind == "hopfield"
    assert config.method.transform.beta == 4
    assert config.method.needs_teacher
    assert config.method.regularisers.token_entropy.is_on


def test_another_estimator_drops_the_fields_of_the_old_one():
    assert with_overrides("method.estimator.kind=dv").method.estimator == DonskerVaradhan()
    symmetric = ["method=softclip", "method.estimator.direction=symmetric"]
    assert with_overrides(*symmetric).method.estimator == SoftKL(direction="symmetric")
    hard = [*symmetric, "method.targets.kind=identity", "method.estimator.kind=loob"]
    assert with_overrides(*hard).method.estimator == InfoLOOB()
    assert with_overrides(
        "method=softclip", "method.estimator.kind=relation_kl", "method.estimator.direction=symmetric"
    ).method.estimator == RelationKL(direction="symmetric")
    # The same kind keeps what was set.
    assert with_overrides(*symmetric, "method.estimator.kind=kl").method.estimator == SoftKL(
        direction="symmetric"
    )


def test_tables_can_be_added_and_changed():
    added = with_overrides("method.extra_tables.local={weight: 2, region_pool: {kind: max}}").method
    assert list(added.tables) == ["main", "local"]
    assert added.extra_tables["local"].region_pool == RegionPool(kind="max")
    changed = with_overrides("method=softclip", "method.extra_tables.relation.weight=3").method
    assert changed.extra_tables["relation"].weight == 3
    assert changed.extra_tables["relation"].estimator == RelationKL()


def test_a_row_filter_replaces_and_split_names_add():
    first = ["data.source=parquet:/x", "data.where={dataset: [nih256]}"]
    assert with_overrides(*first).data.where == {"dataset": ["nih256"]}
    assert with_overrides(*first, "data.where={site: [a]}").data.where == {"site": ["a"]}
    named = with_overrides("data.split_names.dev=selection").data.split_names
    assert (named["dev"], named["train"]) == ("selection", "train")


@pytest.mark.parametrize("method", METHODS)
def test_a_written_tree_is_read_back_the_same(method):
    config = with_overrides(f"method={method}", "data.source=scenes:tokens", "train.betas=[0.8, 0.9]")
    assert validate_tree(json.loads(json.dumps(config.tree()))) == config
    assert validate_tree(yaml.safe_load(yaml.safe_dump(config.tree()))) == config
    changed = set_path(config.tree(), "method.temperature.init", 0.45)
    assert validate_tree(changed) != config


def test_a_written_tree_works_as_a_file(tmp_path):
    config = with_overrides("method=aclip", "train.steps=3", "data.where={dataset: [x]}")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config.tree()))
    assert load_config([str(tmp_path / "config.yaml")]) == config


def test_layers_are_left_as_they_were():
    layer = {"train": {"lr": 0.5}}
    build_config([layer])
    assert layer == {"train": {"lr": 0.5}}
    base = {"a": {"b": 1}}
    assert merge(base, {"a": {"b": 2}}) == {"a": {"b": 2}}
    assert base == {"a": {"b": 1}}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["trian.lr=1"], r"unknown config key 'trian'; did you mean 'train'\?"),
        (["train.learning_rate=1"], r"unknown config key 'train\.learning_rate'"),
        (
            ["method.transform.betta=1"],
            r"unknown config key 'method\.transform\.betta'; did you mean 'beta'\?",
        ),
        (["data.columns.class=kind"], r"did you mean 'class_name'\?"),
        (["method.extra_tables.x.wieght=1"], r"method\.extra_tables\.x\.wieght: Unexpected keyword argument"),
        (["method=cloop"], r"unknown method 'cloop'; did you mean 'cloob'\?; known: clip, clip_uniform,"),
        (
            ["method.estimator.kind=lob"],
            r"unknown estimator\.kind 'lob'; did you mean 'loob'\?; known: ce, loob,",
        ),
        (
            ["method.estimator={kind: kl, directon: x}"],
            r"'method\.estimator\.directon'; did you mean 'direction'\?",
        ),
        (["train.lr"], r"an override must read key\.sub=value, got 'train\.lr'"),
        (["=1"], r"an override must read key\.sub=value, got '=1'"),
        (["train.batch_size=1"], r"train\.batch_size: .*greater than or equal to 2"),
        (
            ["train.batch_size=10", "train.num_workers=4"],
            r"must be a multiple of train\.num_workers, got 10 and 4",
        ),
        (["train.lr=fast"], r"train\.lr: Input should be a valid number"),
        (["train.precision=fp16"], r"train\.precision: Input should be 'fp32' or 'bf16'"),
        (["seed=-1"], r"seed: Input should be greater than or equal to 0"),
        (["sweep.seeds=[1, -1]"], r"sweep\.seeds\.1: Input should be greater than or equal to 0"),
        (["output="], r"output: Input should be a valid string"),
        (["data.mixture=[{"], r"the value of 'data\.mixture=\[\{' is not valid YAML"),
        (["data=3"], r"config key 'data' must hold a mapping, got 3"),
        (["method="], r"config key 'method' must hold a mapping, got None"),
        (["evaluation.select_on=test"], r"must be different splits, both are 'test'"),
        (["evaluation.templates=[]"], r"evaluation\.templates: List should have at least 1 item"),
        (["sweep.methods=[]"], r"sweep\.methods: List should have at least 1 item"),
        (["model.image_size=48"], r"model\.image_size=48 and data\.image_size=32 must agree"),
        (["model.patch_size=7"], r"patch_size must divide image_size, got 7 and 32"),
        (["model.vision_heads=5"], r"vision_heads must divide vision_width, got 5 and 96"),
        (["method.transform.beta=0"], r"beta must be > 0, got 0"),
        (["method.selection.keep_ratio=1.5"], r"keep_ratio must be between 0 and 1, got 1\.5"),
        (["method.targets.off_diagonal_mass=1"], r"off_diagonal_mass must be strictly between 0 and 1"),
        (["method.temperature.init=2"], r"must start between minimum=0\.01 and 1, got 2"),
        (["method.temperature.policy=shared"], r"temperature\.policy=shared is for extra tables"),
        (["method=aclip", "method.features.num_views=1"], r"heads\.simclr contrasts 2 views"),
        (["method=cloob", "method.region_pool.kind=max"], r"set transform\.kind=none"),
        (
            ["method=softclip", "method.estimator.kind=dv"],
            r"estimator\.kind=dv .* would ignore targets\.kind=soft",
        ),
        (
            ["method.directions={image_to_text: 0, text_to_image: 0}"],
            r"direction weights must be >= 0 and not both 0, got image_to_text=0",
        ),
    ],
)
def test_refusals_say_what_must_hold(overrides, message):
    with pytest.raises(ValueError, match=message):
        with_overrides(*overrides)


def test_every_problem_is_in_one_message():
    with pytest.raises(ValueError, match=r"(?s)train\.steps: .*sweep\.num_trials: "):
        with_overrides("train.steps=0", "sweep.num_trials=0")


def test_a_file_must_hold_a_mapping(tmp_path):
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(ValueError, match=r"list\.yaml: a config file must hold a mapping, found list"):
        load_config([str(tmp_path / "list.yaml")])


def test_unknown_keys_of_a_whole_tree_are_refused():
    tree = with_overrides().tree()
    with pytest.raises(ValueError, match="trian: Extra inputs are not permitted"):
        validate_tree({**tree, "trian": {}})


def test_a_path_outside_the_tree_is_refused():
    tree = with_overrides().tree()
    assert set_path(tree, "train.lr", 0.5)["train"]["lr"] == 0.5
    assert tree["train"]["lr"] != 0.5
    with pytest.raises(
        ValueError, match=r"unknown config key 'method\.temperatur'; did you mean 'temperature'\?"
    ):
        set_path(tree, "method.temperatur.init", 0.5)


def test_settings_cannot_be_changed():
    with pytest.raises(ValueError, match="frozen"):
        with_overrides().train.lr = 1.0


def test_methods_are_found_by_name():
    assert method_named("tier") is METHODS["tier"]
    with pytest.raises(ValueError, match=r"unknown method 'TIERS'"):
        method_named("TIERS")
