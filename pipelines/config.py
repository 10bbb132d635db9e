"""The configuration tree: defaults in Python, overridden by YAML files and `key.sub=value`.

Everything is checked when the tree is built, before any worker starts. Unknown keys are refused with
the nearest known name.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, NonNegativeInt, model_validator

from models.methods.catalogue import METHODS
from models.recipe import MethodRecipe
from models.towers import TowerSettings
from pipelines.scoring import ScoringConfig, recipe_in_mode
from pipelines.sources.column_names import PlainColumns

Tree = dict[str, Any]


class Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


_COLUMNS = PlainColumns()


class ColumnMap(Settings):
    """Which column of a source holds what; null means the source has none.

    A default name that the data does not have counts as null; a name given here must be there. `jpg;png`
    names alternatives, of which the first one there counts. In tars a column is the ending of a member
    (`txt`), or a path into its JSON (`json.meta.caption`).
    """

    id: str | None = _COLUMNS.id
    image: str = _COLUMNS.image
    caption: str | None = _COLUMNS.caption
    captions: str | None = _COLUMNS.captions
    sentences: str | None = _COLUMNS.sentences
    labels: str | None = _COLUMNS.labels
    class_name: str | None = _COLUMNS.class_name
    group: str | None = _COLUMNS.group
    source: str | None = _COLUMNS.source
    split: str | None = _COLUMNS.split
    boxes: str | None = _COLUMNS.boxes


def _check_template(template: str | None) -> str | None:
    if template is not None and (template.count("{}") != 1 or template.count("{") + template.count("}") != 2):
        raise ValueError(
            f"caption_template must have one {{}} for the class and no other brace, got '{template}'"
        )
    return template


CaptionTemplate = Annotated[str | None, AfterValidator(_check_template)]


class MixturePart(Settings):
    """One source of a mixture; what is null here is as `data` says for all of them."""

    source: str
    # Stands in each row's `source` and before its id; null: the name of the file or folder.
    name: str | None = Field(None, pattern=r"^[^/:]+$")
    # How often a row of this source is seen for each time a row of weight 1 is.
    weight: float = Field(1.0, gt=0, allow_inf_nan=False)
    columns: ColumnMap | None = None
    where: dict[str, list[str]] | None = None
    split_names: dict[str, str] | None = None
    split: str | None = None
    image_root: str | None = None
    caption_template: CaptionTemplate = None
    views: Literal["all", "frontal", "lateral"] | None = None
    sections: Literal["both", "findings", "impression"] | None = None
    reports: str | None = None
    uncertain: Literal["ignore", "positive", "negative"] | None = None
    blank: Literal["negative", "ignore"] | None = None


class DataConfig(Settings):
    """Where image-text pairs come from and how they are prepared."""

    # <kind>:<place>; the help of `--source` and the error of an unknown kind list the kinds.
    source: str = "scenes:quick"
    columns: ColumnMap = ColumnMap()
    # The split of every row, whatever the data says; null: a column, a folder, a file name or a hash decides.
    split: str | None = None
    # Where relative names of images are looked up; null: beside the file that names them.
    image_root: str | None = None
    # Makes a caption of the class where a row has no other; image folders use "a photo of a {}", radiographs
    # without reports "a chest X-ray with {}".
    caption_template: CaptionTemplate = None
    # Radiographs only (chexpert:, mimic-cxr:). Which views are read; which section of a report becomes the
    # caption; where reports are: null beside the images, "labels" makes captions of the labels instead.
    views: Literal["all", "frontal", "lateral"] = "all"
    sections: Literal["both", "findings", "impression"] = "both"
    reports: str | None = None
    # What an uncertain label (-1) and a blank one count as; an ignored one is neither said nor scored.
    uncertain: Literal["ignore", "positive", "negative"] = "ignore"
    blank: Literal["negative", "ignore"] = "negative"
    # The parts of source=mixture.
    mixture: list[MixturePart] = []
    # Row filter: a row stays when each named column holds one of the listed values.
    where: dict[str, list[str]] = {}
    split_names: dict[str, str] = {
        "train": "train",
        "val": "selection",
        "selection": "selection",
        "valid": "selection",
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
    # "memory" maps local shards into each worker (from an object store: fetches and holds them); "stream"
    # reads shards through Ray Data; "auto" streams more than 2 GiB of pixels from an object store.
    feed: Literal["auto", "memory", "stream"] = "auto"
    # Folder on the machines' own disks where a feed that streams from an object store keeps shards, so that
    # they are fetched once and not every epoch; null: nowhere. And how large it may grow on each machine.
    shard_cache: str | None = None
    shard_cache_gib: float = Field(64.0, gt=0)
    # Methods with prototypes: actors that embed the training split between epochs when the feed streams,
    # and the share of a GPU each takes beside the workers'. They take no CPU, for the workers wait; at a
    # share of 0 workers with GPUs embed on these themselves.
    embed_actors: int = Field(1, ge=1)
    embed_gpus: float = Field(0.0, ge=0, le=1)
    evaluate_every: int = Field(50, ge=1)
    checkpoint_every: int = Field(50, ge=1)
    log_every: int = Field(5, ge=1)
    max_failures: int = Field(2, ge=0)
    # Fine-tuning: run root, run folder or checkpoint folder of an earlier run whose weights are loaded
    # before the first step. A run that continues takes its own checkpoint instead.
    start_from: str | None = None
    # Of those weights; filled in when a run begins, refused when what is there has another one.
    start_sha256: str | None = None
    # Rows of a large table that are computed at once; null decides by size.
    table_rows_per_chunk: int | None = Field(None, ge=1)

    @property
    def num_warmup_steps(self) -> int:
        return self.steps // 20 if self.warmup_steps is None else self.warmup_steps

    @model_validator(mode="after")
    def _warmup_ends(self) -> TrainConfig:
        if self.num_warmup_steps > self.steps:
            raise ValueError(f"warmup_steps must not exceed steps={self.steps}, got {self.warmup_steps}")
        return self

    @model_validator(mode="after")
    def _hash_has_a_start(self) -> TrainConfig:
        if self.start_sha256 is not None and self.start_from is None:
            raise ValueError("start_sha256 says which weights to start from; name them with start_from")
        return self


class PromptConfig(Settings):
    """How few-shot prompts are fitted: CPL, arXiv 2210.10362, on frozen towers."""

    # Words before the class name at the start. None: those of the longest of evaluation.templates that ends
    # with the name, else the paper's "a photo of a".
    context: str | None = Field(None, min_length=1)
    # Weight of the counterfactual term, 1 in the paper; a fit without it always stands beside.
    counterfactual: float = Field(1.0, ge=0)
    num_steps: int = Field(200, ge=1)
    # The paper's base CoCoOp (arXiv 2203.05557) takes .002, for a bias network whose hidden units start about
    # 40 times smaller than ours: at that rate ours ends above the loss it starts from.
    learning_rate: float = Field(1e-4, gt=0)


class EvalConfig(Settings):
    """Zero-shot evaluation, prompts from a few shots beside it, and which split decides what."""

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
    # Training images per class that prompts are fitted on, to classify the report split; 0 is off. Nothing is
    # ever selected on it.
    shots: int = Field(0, ge=0)
    prompts: PromptConfig = PromptConfig()

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
    scoring: ScoringConfig = ScoringConfig()
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

    @property
    def recipe(self) -> MethodRecipe:
        """The method as it is trained: `scoring.mode` may replace its token selection."""
        return recipe_in_mode(self.method, self.scoring.mode)

    def tree(self) -> Tree:
        """The resolved tree as plain values, for records and files."""
        return self.model_dump(mode="json")
