"""A method is data: one frozen recipe that fills the slots of the pair table.

Every slot is a frozen dataclass with a `kind`, so a recipe can be written in a config file, overridden
by path (`method.transform.beta`) and recombined (CLOOB's transform with TIER's regulariser).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from models.estimators import DonskerVaradhan, InfoLOOB, InfoNCE, JensenShannon, RelationKL, SoftKL

EstimatorSlot = InfoNCE | InfoLOOB | JensenShannon | DonskerVaradhan | SoftKL | RelationKL


def _positive(**values: float) -> None:
    for name, value in values.items():
        if value <= 0:
            raise ValueError(f"{name} must be > 0, got {value}")


def _share(**values: float) -> None:
    for name, value in values.items():
        if not 0 <= value <= 1:
            raise ValueError(f"{name} must be between 0 and 1, got {value}")


@dataclass(frozen=True, kw_only=True)
class Features:
    """Which features of a pair enter the table.

    Attributes:
        image: feature of the whole image: the class token, or the mean of the projected patches.
        text: `caption` samples one whole text per epoch, `sentence` one sentence of the report.
        num_views: random crops of one image, each encoded and averaged in the loss.
    """

    image: Literal["class", "patch_mean"] = "class"
    text: Literal["caption", "sentence"] = "caption"
    num_views: int = 1

    def __post_init__(self) -> None:
        _positive(num_views=self.num_views)


@dataclass(frozen=True, kw_only=True)
class TokenSelection:
    """Which image patches the tower sees in training.

    Attributes:
        kind: `none` keeps all; `attentive` keeps the blocks the EMA teacher's class token attends to
            most; `high` is its control (removes those); `mixed` keeps a share of the best and fills up
            at random; `random` keeps as many blocks as `attentive`, drawn uniformly.
        keep_ratio: share of blocks to keep; the count is int(blocks * keep_ratio) + 1.
        block_size: patches per side of a block; None takes 2 on grids of 14 and more (the paper's
            7x7 blocks of a 14x14 grid) and 1 on smaller ones.
        mixed_share: share of the kept blocks that `mixed` takes from the top.
        warmup_share: share of all steps with random selection, before the teacher has learnt anything.
    """

    kind: Literal["none", "attentive", "high", "mixed", "random"] = "none"
    keep_ratio: float = 0.5
    block_size: int | None = None
    mixed_share: float = 0.5
    warmup_share: float = 0.1

    def __post_init__(self) -> None:
        _share(keep_ratio=self.keep_ratio, mixed_share=self.mixed_share, warmup_share=self.warmup_share)
        _positive(keep_ratio=self.keep_ratio)

    @property
    def needs_teacher(self) -> bool:
        return self.kind in ("attentive", "high", "mixed")


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """EMA copy of the vision tower.

    Attributes:
        decay: m at step 0; it rises to 1 along a cosine, m_t = 1 - (1 - decay) (1 + cos(pi t / T)) / 2.
    """

    decay: float = 0.996

    def __post_init__(self) -> None:
        _share(decay=self.decay)


@dataclass(frozen=True, kw_only=True)
class RegionPool:
    """How the patches of an image become one score per text.

    Attributes:
        kind: `global` scores the whole-image feature; the others score every patch and pool: `max`
            the best patch, `mean` their mean, `lse` (1/sharpness) [LSE(sharpness * h) - log P].
        sharpness: of `lse`; 0 would be the mean and infinity the maximum.
    """

    kind: Literal["global", "max", "mean", "lse"] = "global"
    sharpness: float = 10.0

    def __post_init__(self) -> None:
        _positive(sharpness=self.sharpness)


@dataclass(frozen=True, kw_only=True)
class Transform:
    """What happens to the features of both sides before they are compared.

    Attributes:
        kind: `none`, or `hopfield` retrieval of both sides from the global batch.
        beta: inverse temperature of the retrieval; tied to the global batch size.
    """

    kind: Literal["none", "hopfield"] = "none"
    beta: float = 8.0

    def __post_init__(self) -> None:
        _positive(beta=self.beta)


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """Which other pairs of the global batch count as negatives.

    Attributes:
        exclude: `nothing`, pairs of the `same_group` (study, patient, concept), or with the `same_text`.
    """

    exclude: Literal["nothing", "same_group", "same_text"] = "nothing"


@dataclass(frozen=True, kw_only=True)
class Targets:
    """What the table should look like.

    Attributes:
        kind: `identity` (the own pair), or `soft`: (1 - mixing) own pair + mixing * softmax of an
            intra-modal self-similarity.
        mixing: weight of the soft part, beta in SoftCLIP's notation.
        off_diagonal_mass: wanted share of the soft part outside the own pair; it sets the temperature
            of the self-similarity, which must not be the learned one (that collapses to hard CLIP).
        image_guidance: self-similarity of `patches` (mean of unit patch tokens) or image `embeds`.
        text_guidance: self-similarity of `words` (hashed bag of tokens) or text `embeds`.
    """

    kind: Literal["identity", "soft"] = "identity"
    mixing: float = 0.3
    off_diagonal_mass: float = 0.5
    image_guidance: Literal["patches", "embeds"] = "patches"
    text_guidance: Literal["words", "embeds"] = "words"

    def __post_init__(self) -> None:
        _share(mixing=self.mixing)
        if not 0 < self.off_diagonal_mass < 1:
            raise ValueError(
                f"off_diagonal_mass must be strictly between 0 and 1, got {self.off_diagonal_mass}"
            )


@dataclass(frozen=True, kw_only=True)
class Directions:
    """Weights of the two directions of a table; a weight of 0 skips the direction."""

    image_to_text: float = 0.5
    text_to_image: float = 0.5

    def __post_init__(self) -> None:
        if min(self.image_to_text, self.text_to_image) < 0 or self.image_to_text + self.text_to_image <= 0:
            raise ValueError(
                "direction weights must be >= 0 and not both 0, got "
                f"image_to_text={self.image_to_text}, text_to_image={self.text_to_image}"
            )


@dataclass(frozen=True, kw_only=True)
class Temperature:
    """Temperature of a table; scores are similarity / temperature.

    Attributes:
        policy: `learned` from `init` and clamped after each step, `fixed` at `init`, or `shared` with
            the main table (extra tables only).
        minimum: lower clamp of a learned temperature; CLIP's 0.01 is an inverse temperature of 100.
    """

    policy: Literal["learned", "fixed", "shared"] = "learned"
    init: float = 0.07
    minimum: float = 0.01

    def __post_init__(self) -> None:
        _positive(init=self.init, minimum=self.minimum)
        if self.policy == "learned" and not self.minimum <= self.init <= 1:
            raise ValueError(
                f"a learned temperature must start between minimum={self.minimum} and 1, got {self.init}"
            )


@dataclass(frozen=True, kw_only=True)
class TableRecipe:
    """One pair table and what is made of it.

    Attributes:
        weight: of this table's loss in the total.
    """

    weight: float = 1.0
    region_pool: RegionPool = RegionPool()
    transform: Transform = Transform()
    candidates: Candidates = Candidates()
    targets: Targets = Targets()
    estimator: EstimatorSlot = InfoNCE()
    directions: Directions = Directions()
    temperature: Temperature = Temperature()

    def __post_init__(self) -> None:
        if self.transform.kind == "hopfield" and self.region_pool.kind != "global":
            raise ValueError(
                "Hopfield retrieval works on global features; with "
                f"region_pool.kind={self.region_pool.kind} set transform.kind=none"
            )
        if self.targets.kind == "soft" and self.estimator.kind in ("loob", "jsd", "dv"):
            raise ValueError(
                f"estimator.kind={self.estimator.kind} knows pairs and negatives only and would ignore "
                "targets.kind=soft; set targets.kind=identity or estimator.kind=ce, kl or relation_kl"
            )


@dataclass(frozen=True, kw_only=True)
class TokenEntropy:
    """TIER's entropies of the matched patch-word similarities, both minimised.

    Attributes:
        token_over_patches: weight of each word's entropy over the patches (the code's `lam_words`).
        patch_over_tokens: weight of each patch's entropy over the words (the code's `lam_patches`).
        temperature: of both softmaxes; 1 as in the code, where entropy can fall by about 12 % only.
        padding: `masked` leaves padding out; `counted` is what the released code does.
    """

    token_over_patches: float = 0.0
    patch_over_tokens: float = 0.0
    temperature: float = 1.0
    padding: Literal["masked", "counted"] = "masked"

    def __post_init__(self) -> None:
        _positive(temperature=self.temperature)

    @property
    def is_on(self) -> bool:
        return self.token_over_patches != 0 or self.patch_over_tokens != 0


@dataclass(frozen=True, kw_only=True)
class Regularisers:
    """Terms added to the tables' losses; a weight of 0 switches one off."""

    token_entropy: TokenEntropy = TokenEntropy()


@dataclass(frozen=True, kw_only=True)
class SimCLRHead:
    """Image-image contrast of two views (arXiv 2002.05709).

    Attributes:
        weight: 0 switches it off.
        hidden_ratio, out_ratio: layer widths relative to the tower's; 4096 and 256 at width 768.
    """

    weight: float = 0.0
    temperature: float = 0.1
    hidden_ratio: float = 16 / 3
    out_ratio: float = 1 / 3

    def __post_init__(self) -> None:
        _positive(temperature=self.temperature, hidden_ratio=self.hidden_ratio, out_ratio=self.out_ratio)


@dataclass(frozen=True, kw_only=True)
class BYOLHead:
    """Prediction of the EMA teacher's projection from every view (arXiv 2006.07733)."""

    weight: float = 0.0
    hidden_ratio: float = 16 / 3
    out_ratio: float = 1 / 3

    def __post_init__(self) -> None:
        _positive(hidden_ratio=self.hidden_ratio, out_ratio=self.out_ratio)


@dataclass(frozen=True, kw_only=True)
class Heads:
    """Auxiliary heads on the vision feature."""

    simclr: SimCLRHead = SimCLRHead()
    byol: BYOLHead = BYOLHead()


@dataclass(frozen=True, kw_only=True)
class MethodRecipe(TableRecipe):
    """A whole method: the main table (inherited slots), more tables, and what surrounds them.

    Attributes:
        name: key in the catalogue.
        source: paper.
        evidence: `official` when values and gradients of the authors' code are reproduced, `derived`
            when the formula is ours from the paper's text, `paper-unverified` otherwise.
        extra_tables: further tables by name, each with its own slots and weight.
    """

    name: str
    source: str
    evidence: Literal["official", "derived", "paper-unverified"]
    features: Features = Features()
    selection: TokenSelection = TokenSelection()
    teacher: Teacher = Teacher()
    extra_tables: Mapping[str, TableRecipe] = field(default_factory=dict)
    regularisers: Regularisers = Regularisers()
    heads: Heads = Heads()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.temperature.policy == "shared":
            raise ValueError("temperature.policy=shared is for extra tables; the main table has its own")
        if self.heads.simclr.weight and self.features.num_views != 2:
            raise ValueError(
                f"heads.simclr contrasts 2 views, got features.num_views={self.features.num_views}"
            )

    @property
    def tables(self) -> dict[str, TableRecipe]:
        """Every table by name, the main one first."""
        return {"main": self, **self.extra_tables}

    @property
    def needs_teacher(self) -> bool:
        return self.selection.needs_teacher or self.heads.byol.weight > 0
