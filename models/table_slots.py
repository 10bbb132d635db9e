"""Slots of one pair table: what is compared, how it is pooled, scaled and estimated.

Every slot is a frozen dataclass with a `kind`, so a recipe can be written in a config file, overridden
by path (`method.transform.beta`) and recombined.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from models.bounds import NWJ, TUBA, Interpolated, SigmoidPairs
from models.estimators import DonskerVaradhan, InfoLOOB, InfoNCE, JensenShannon, RelationKL, SoftKL

EstimatorSlot = (
    InfoNCE
    | InfoLOOB
    | JensenShannon
    | DonskerVaradhan
    | SoftKL
    | RelationKL
    | SigmoidPairs
    | NWJ
    | TUBA
    | Interpolated
)

# Between which features a table stands, first side and second side; `image_to_text` is first to second.
Between = Literal[
    "image_text", "image_text2", "image_views", "texts", "image_regions", "regions", "sentences"
]


def positive(**values: float) -> None:
    """Refuse settings that are not > 0, by name."""
    for name, value in values.items():
        if not value > 0:
            raise ValueError(f"{name} must be > 0, got {value}")


def share(**values: float) -> None:
    """Refuse settings outside [0, 1], by name."""
    for name, value in values.items():
        if not 0 <= value <= 1:
            raise ValueError(f"{name} must be between 0 and 1, got {value}")


def not_negative(**values: float) -> None:
    """Refuse settings below 0, by name."""
    for name, value in values.items():
        if value < 0:
            raise ValueError(f"{name} must be >= 0, got {value}")


@dataclass(frozen=True, kw_only=True)
class Score:
    """Instance score of an image (or region) and a text.

    Attributes:
        kind: `cosine`, or `concat`: a perceptron on the concatenated features, unscaled.
        hidden: widths of the perceptron's two hidden layers, as multiples of the joint width.
    """

    kind: Literal["cosine", "concat"] = "cosine"
    hidden: tuple[float, float] = (2.0, 1.0)

    def __post_init__(self) -> None:
        positive(hidden_first=self.hidden[0], hidden_second=self.hidden[1])


@dataclass(frozen=True, kw_only=True)
class RegionPool:
    """How the patches of an image become one score per text.

    Attributes:
        kind: `global` scores the whole-image feature. Over the scores of single patches: `max`, `mean`,
            `lse` (1/sharpness) [LSE(sharpness * h) - log P], `noisy_or` (log-odds that any patch
            matches). Over the patches themselves: `mean_region`, `attention` (softmax of the scores /
            temperature), `non_local` (patches that resemble the best one), `words` (GLoRIA: attention
            per word). `select` and `pmi` choose a patch on the own pair and reuse it against every text.
            `each` makes every patch a query of its own.
        sharpness: of `lse` over patches, and of the sum over words of `words`; > 0.
        temperature: of the softmax over patches of `attention`; `words` has 1 / 4.
    """

    kind: Literal[
        "global",
        "max",
        "mean",
        "lse",
        "noisy_or",
        "mean_region",
        "attention",
        "non_local",
        "words",
        "select",
        "pmi",
        "each",
    ] = "global"
    sharpness: float = 10.0
    temperature: float = 0.1

    def __post_init__(self) -> None:
        positive(sharpness=self.sharpness, temperature=self.temperature)


@dataclass(frozen=True, kw_only=True)
class SentencePool:
    """How the texts of a report become one score per image.

    Attributes:
        kind: `none` scores text 0 (or the pooled report); the others score every text of the report.
        sharpness: of `lse`.
    """

    kind: Literal["none", "mean", "sum", "max", "lse"] = "none"
    sharpness: float = 10.0

    def __post_init__(self) -> None:
        positive(sharpness=self.sharpness)


@dataclass(frozen=True, kw_only=True)
class Transform:
    """What happens to features or cosines before they are scaled.

    Attributes:
        kind: `none`; `hopfield`: retrieval of both sides from the global batch; or a relaxation of the
            cosines: `cap` holds a positive's at `limit`, `leaky` lets it rise above with `slope`,
            `cap_all` caps every pair.
        beta: inverse temperature of the retrieval; tied to the global batch size.
        limit: of the relaxations, a cosine.
        slope: of `leaky` above the limit.
    """

    kind: Literal["none", "hopfield", "cap", "leaky", "cap_all"] = "none"
    beta: float = 8.0
    limit: float = 0.8
    slope: float = 0.1

    def __post_init__(self) -> None:
        positive(beta=self.beta)
        share(slope=self.slope)
        if not -1 < self.limit <= 1:
            raise ValueError(f"limit is a cosine and must be in (-1, 1], got {self.limit}")

    @property
    def relaxes(self) -> bool:
        return self.kind in ("cap", "leaky", "cap_all")


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """What a query is contrasted with.

    Attributes:
        kind: `batch`: the other pairs of the global batch. `roll`: one of them, by a permutation of the
            global batch drawn anew each step. `queue`: the EMA teacher's embeddings of earlier batches.
            `memory`: `size` rows drawn from a bank of the whole training split. `prototypes`: centres
            of the teacher's embeddings, found between epochs.
        exclude: of the batch, leave out pairs of the `same_group` (study, patient, concept) or with the
            `same_text`.
        modality: `cross`, or `both`: a query's own modality adds negatives too.
        size: rows of the queue, draws from the memory, or prototypes drawn beside the batch's own.
        num_clusters: prototypes of each clustering.
        first_epoch: epochs of training before prototypes are used.
        momentum: of the memory bank's rows.
    """

    kind: Literal["batch", "roll", "queue", "memory", "prototypes"] = "batch"
    exclude: Literal["nothing", "same_group", "same_text"] = "nothing"
    modality: Literal["cross", "both"] = "cross"
    size: int = 1024
    num_clusters: tuple[int, ...] = (16, 32, 64)
    first_epoch: int = 1
    momentum: float = 0.5

    def __post_init__(self) -> None:
        positive(size=self.size)
        share(momentum=self.momentum)
        not_negative(first_epoch=self.first_epoch)
        if not self.num_clusters or min(self.num_clusters) < 2:
            raise ValueError(f"num_clusters must name at least one count >= 2, got {self.num_clusters}")
        if self.kind != "batch" and (self.exclude != "nothing" or self.modality != "cross"):
            raise ValueError(
                f"candidates.kind={self.kind} knows neither exclude={self.exclude} nor "
                f"modality={self.modality}; set them with candidates.kind=batch"
            )

    @property
    def needs_teacher(self) -> bool:
        return self.kind in ("queue", "prototypes")


@dataclass(frozen=True, kw_only=True)
class Targets:
    """What the table should look like.

    Attributes:
        kind: `identity` (the own pair); `soft`: (1 - mixing) own pair + mixing * softmax of an
            intra-modal self-similarity; `smoothed`: 1 - mixing at the own pair, the rest over the
            negatives; `same_group`: every pair of the own group alike; `spatial`: neighbouring patches
            (tables between regions only).
        mixing: weight of the soft part, beta in SoftCLIP's notation.
        off_diagonal_mass: wanted share of the soft part outside the own pair; it sets the temperature
            of the self-similarity, which must not be the learned one (that collapses to hard CLIP).
        image_guidance: self-similarity of `patches` (mean of unit patch tokens), image `embeds`, or
            `tags` (hashed labels).
        text_guidance: self-similarity of `words` (hashed bag of tokens), text `embeds`, or `tags`.
        radius: of `spatial`, as a share of the grid's diagonal.
    """

    kind: Literal["identity", "soft", "smoothed", "same_group", "spatial"] = "identity"
    mixing: float = 0.3
    off_diagonal_mass: float = 0.5
    image_guidance: Literal["patches", "embeds", "tags"] = "patches"
    text_guidance: Literal["words", "embeds", "tags"] = "words"
    radius: float = 0.5

    def __post_init__(self) -> None:
        share(mixing=self.mixing)
        positive(radius=self.radius)
        if self.kind == "smoothed" and self.mixing == 1:
            raise ValueError("targets.kind=smoothed with mixing=1 leaves the own pair nothing; lower mixing")
        if not 0 < self.off_diagonal_mass < 1:
            raise ValueError(
                f"off_diagonal_mass must be strictly between 0 and 1, got {self.off_diagonal_mass}"
            )


@dataclass(frozen=True, kw_only=True)
class Directions:
    """Weights of the two directions of a table; a weight of 0 skips the direction.

    Between other features than image and text, `image_to_text` is from the first to the second.
    """

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
        policy: `learned` from `init` and clamped after each step; `fixed` at `init`; `kept` where the run
            it starts from left it, at `init` without one; or `shared` with the main table (extra tables
            only).
        minimum: lower clamp of a learned temperature; CLIP's 0.01 is an inverse temperature of 100.
    """

    policy: Literal["learned", "fixed", "kept", "shared"] = "learned"
    init: float = 0.07
    minimum: float = 0.01

    def __post_init__(self) -> None:
        positive(init=self.init, minimum=self.minimum)
        if self.policy == "learned" and not self.minimum <= self.init <= 1:
            raise ValueError(
                f"a learned temperature must start between minimum={self.minimum} and 1, got {self.init}"
            )

    @property
    def smallest(self) -> float:
        """The lowest value it can take."""
        if self.policy == "kept":
            return min(self.minimum, self.init)
        return self.minimum if self.policy == "learned" else self.init


@dataclass(frozen=True, kw_only=True)
class Bias:
    """A number added to every scaled score: SigLIP's prior, noisy-or's threshold.

    Attributes:
        policy: `none`, `learned` from `init`, or `fixed`.
    """

    policy: Literal["none", "learned", "fixed"] = "none"
    init: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """Log-baseline a of each query, for the bounds that take one.

    Attributes:
        kind: `constant` at `value`, or `learned`: a linear function of the query's feature that starts
            at `value`.
    """

    kind: Literal["constant", "learned"] = "constant"
    value: float = 1.0
