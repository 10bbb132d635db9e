"""The configuration tree: defaults in Python, overridden by YAML files and `key.sub=value`.

Everything is checked when the tree is built, before any worker starts. Unknown keys are refused with
the nearest known name.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, ValidationError, model_validator

from models.methods.catalogue import METHODS
from models.recipe import EstimatorSlot, MethodRecipe
from models.towers import TowerSettings
from pipelines.storage import absolute

Tree = dict[str, Any]


class Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ColumnMap(Settings):
    """Which column of a Parquet source holds what; null means the source has none."""

    id: str | None = "id"
    image: str = "image"
    caption: str | None = "caption"
    captions: str | None = "captions"
    sentences: str | None = None
    labels: str | None = "labels"
    class_name: str | None = "class"
    group: str | None = "group"
    source: str | None = "source"
    split: str | None = "split"
    boxes: str | None = "boxes"


class DataConfig(Settings):
    """Where image-text pairs come from and how they are prepared."""

    source: str = "scenes:quick"
    columns: ColumnMap = ColumnMap()
    # Row filter: a row stays when each named column holds one of the listed values.
    where: dict[str, list[str]] = {}
    split_names: dict[str, str] = {
        "train": "train",
        "val": "selection",
        "selection": "selection",
        "validation": "selection",
        "test": "test",
    }
    image_size: int = Field(32, ge=8)
    max_tokens: int = Field(77, ge=4)
    # Byte-level: 256 bytes and three special tokens are the least.
    vocab_size: int = Field(2048, ge=259)
    tokenizer: str | None = None
    seed: NonNegativeInt = 0
    # Scenes only.
    num_train: int = Field(6000, ge=2)
    num_selection: int = Field(500, ge=2)
    num_test: int = Field(1000, ge=2)
    max_quarantined_share: float = Field(0.05, ge=0, le=1)
    rows_per_shard: int = Field(1000, ge=1)


class TrainConfig(Settings):
    """One training run."""

    steps: int = Field(200, ge=1)
    # Pairs of all workers together: the number of candidates each pair is contrasted with.
    batch_size: int = Field(64, ge=2)
    lr: float = Field(5e-4, gt=0)
    weight_decay: float = Field(0.1, ge=0)
    betas: tuple[float, float] = (0.9, 0.98)
    # Retrieval makes small gradients: at 1e-6 they drown in the denominator.
    eps: float = Field(1e-8, gt=0)
    # None: a twentieth of the steps.
    warmup_steps: int | None = Field(None, ge=0)
    final_lr_share: float = Field(0.0, ge=0, le=1)
    max_grad_norm: float | None = Field(1.0, gt=0)
    precision: Literal["fp32", "bf16"] = "fp32"
    # Smallest share of the image area a random crop covers; 1 switches cropping off.
    min_crop_area: float = Field(1.0, gt=0, le=1)
    num_workers: int = Field(1, ge=1)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    cpus_per_worker: float = Field(1.0, gt=0)
    # "memory" holds the prepared images in each worker; "stream" reads shards through Ray Data.
    feed: Literal["auto", "memory", "stream"] = "auto"
    evaluate_every: int = Field(50, ge=1)
    checkpoint_every: int = Field(50, ge=1)
    log_every: int = Field(5, ge=1)
    max_failures: int = Field(2, ge=0)

    @property
    def num_warmup_steps(self) -> int:
        return self.steps // 20 if self.warmup_steps is None else self.warmup_steps

    @model_validator(mode="after")
    def _warmup_ends(self) -> TrainConfig:
        if self.num_warmup_steps > self.steps:
            raise ValueError(f"warmup_steps must not exceed steps={self.steps}, got {self.warmup_steps}")
        return self


class EvalConfig(Settings):
    """Zero-shot evaluation and which split decides what."""

    templates: list[str] = Field(["{}", "a photo of {}"], min_length=1)
    positive_templates: list[str] = Field(["{}"], min_length=1)
    negative_templates: list[str] = Field(["no {}"], min_length=1)
    # Whole texts that stand for "none of this"; they replace the negative templates when given.
    negative_texts: list[str] = []
    multi_label_score: Literal["difference", "softmax"] = "difference"
    labels: list[str] | None = None
    ignore_labels: list[str] = []
    recall_at: list[int] = [1, 5, 10]
    resamples: int = Field(1000, ge=0)
    confidence: float = Field(0.95, gt=0, lt=1)
    select_on: Literal["selection", "test"] = "selection"
    report_on: Literal["selection", "test"] = "test"
    main_metric: str = "auto"
    # Test images drawn in the report with what the token scorer keeps.
    num_samples: int = Field(8, ge=0)

    @model_validator(mode="after")
    def _splits_differ(self) -> EvalConfig:
        if self.select_on == self.report_on:
            raise ValueError(
                f"select_on and report_on must be different splits, both are '{self.select_on}': a "
                "configuration chosen on the split it is reported on is not a result"
            )
        return self


class PrunerConfig(Settings):
    """When a trial is stopped early: below the median of its method's earlier trials at that step."""

    kind: Literal["median", "none"] = "median"
    # Trials of a method that always run to the end before anything is compared.
    startup_trials: int = Field(2, ge=1)


class SweepConfig(Settings):
    """Equal tuning budget per method, then fresh seeds for the best configuration of each."""

    methods: list[str] = Field(["clip", "tier", "cloob", "aclip", "softclip", "local_mi"], min_length=1)
    num_trials: int = Field(4, ge=1)
    seeds: list[NonNegativeInt] = Field([101, 102, 103], min_length=1)
    # Untuned defaults, run with the first of the seeds; 0 leaves them out.
    num_default_seeds: int = Field(3, ge=0)
    max_concurrent: int | None = Field(None, ge=1)
    pruner: PrunerConfig = PrunerConfig()
    # Domains by config path that replace or extend every method's own space; null removes one.
    space: dict[str, dict[str, Any] | None] = {}
    seed: NonNegativeInt = 0


class Config(Settings):
    """Everything one command needs."""

    # One sweep, or one single run: local path or s3://bucket/prefix.
    output: str = "runs/quick"
    # Prepared data is content addressed below this location and reused.
    prepared: str = "prepared"
    ray_address: str | None = None
    seed: NonNegativeInt = 0
    data: DataConfig = DataConfig()
    model: TowerSettings = TowerSettings()
    method: MethodRecipe = METHODS["clip"]
    train: TrainConfig = TrainConfig()
    evaluation: EvalConfig = EvalConfig()
    sweep: SweepConfig = SweepConfig()

    @model_validator(mode="after")
    def _batch_fits_workers(self) -> Config:
        if self.train.batch_size % self.train.num_workers:
            raise ValueError(
                f"train.batch_size must be a multiple of train.num_workers, got {self.train.batch_size} "
                f"and {self.train.num_workers}"
            )
        return self

    def tree(self) -> Tree:
        """The resolved tree as plain values, for records and files."""
        return self.model_dump(mode="json")


# Presets below the user's files: what fits a source best. Keys are a source or its scheme.
PRESETS: dict[str, Tree] = {
    "scenes:quick": {
        "output": "runs/quick",
        "evaluation": {
            "templates": ["a {}", "a picture of a {}", "the digit {}"],
            "positive_templates": ["a {}", "a picture of a {}", "the digit {}"],
            "negative_texts": ["no digit", "only scribbles"],
        },
    },
    "scenes:tokens": {
        "output": "runs/tokens",
        "data": {"image_size": 48},
        "train": {"steps": 600},
        "evaluation": {
            "templates": ["a {}", "a picture of a {}", "the digit {}"],
            "positive_templates": ["a {}", "a picture of a {}", "the digit {}"],
            "negative_texts": ["no digit", "only scribbles"],
        },
    },
    "parquet": {
        "output": "runs/parquet",
        "data": {"image_size": 48},
        "train": {"min_crop_area": 0.6, "steps": 300},
    },
}

# Paths whose keys are the user's own.
_OPEN_PATHS = {"data.where", "data.split_names", "sweep.space", "method.extra_tables"}


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
    preset = PRESETS.get(source, PRESETS.get(source.partition(":")[0], {}))
    name = _last(layers, "method", "name") or tree["method"]["name"]
    tree["method"] = dataclasses.asdict(method_named(name))
    for layer in (preset, *layers):
        tree = merge(tree, layer)
    _make_paths_absolute(tree)
    for shared in ("image_size", "max_tokens"):
        if _last(layers, "model", shared) is None:
            tree["model"][shared] = tree["data"][shared]
    return validate_tree(tree)


def _make_paths_absolute(tree: Tree) -> None:
    """Local paths of the tree as every process of a run must see them."""
    scheme, colon, rest = str(tree["data"]["source"]).partition(":")
    if colon and scheme != "scenes":
        tree["data"]["source"] = f"{scheme}:{absolute(rest)}"
    for part, key in (
        (tree, "output"),
        (tree, "prepared"),
        (tree["data"], "tokenizer"),
        (tree["model"], "pretrained"),
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


# A given mapping replaces the default one instead of being mixed with it.
_REPLACED_PATHS = {"data.where"}


def set_path(tree: Tree, path: str, value: Any) -> Tree:
    """`tree` with the value at a dotted path replaced.

    Raises:
        ValueError: the path is not in the tree; the nearest name is given.
    """
    nested: Any = value
    for part in reversed(path.split(".")):
        nested = {part: nested}
    return merge(tree, nested)


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
    nested: Any = yaml.safe_load(value) if value else None
    for part in reversed(key.strip().split(".")):
        nested = {part: nested}
    assert isinstance(nested, dict)
    return nested


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
