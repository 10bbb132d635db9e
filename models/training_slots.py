"""Slots around the tables: features, token selection, EMA teacher, regularisers and heads."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

from models.table_slots import not_negative, positive, share


@dataclass(frozen=True, kw_only=True)
class Features:
    """Which features of a pair enter the tables.

    Attributes:
        image: feature of the whole image: the `class` token, the mean of the projected patches, or an
            `attention` pool over the patches.
        text: `caption` samples one whole text per epoch, `sentence` sentences of the report.
        num_texts: texts of a pair that are encoded: different sentences, in the report's order.
        sentences_per_text: sentences joined into one text.
        report: how several texts become the pair's one text feature: the `first`, their `mean`, or an
            `attention` pool over them.
        text_attention: `causal`, or `full` attention in the text tower.
        projection: into the joint space: `linear`, `mlp` (linear-ReLU-linear), or `mi_block` (two layers
            beside a shortcut, Deep InfoMax).
        num_views: random crops of one image, each encoded.
    """

    image: Literal["class", "patch_mean", "attention"] = "class"
    text: Literal["caption", "sentence"] = "caption"
    num_texts: int = 1
    sentences_per_text: int = 1
    report: Literal["first", "mean", "attention"] = "first"
    text_attention: Literal["causal", "full"] = "causal"
    projection: Literal["linear", "mlp", "mi_block"] = "linear"
    num_views: int = 1

    def __post_init__(self) -> None:
        positive(
            num_views=self.num_views, num_texts=self.num_texts, sentences_per_text=self.sentences_per_text
        )
        if self.text == "caption" and (self.num_texts > 1 or self.sentences_per_text > 1):
            raise ValueError(
                f"num_texts={self.num_texts} and sentences_per_text={self.sentences_per_text} choose "
                "sentences; set features.text=sentence"
            )


@dataclass(frozen=True, kw_only=True)
class TokenSelection:
    """Which image patches the tower sees in training.

    Attributes:
        kind: `none` keeps all; `attentive` keeps the blocks the EMA teacher's class token attends to
            most; `high` is its control (removes those); `mixed` keeps a share of the best and fills up
            at random; `random` keeps as many blocks as `attentive`, drawn uniformly; `tokens` draws
            single patches (FLIP).
        keep_ratio: share of blocks to keep; the count is int(blocks * keep_ratio) + 1, of `tokens`
            int(patches * keep_ratio).
        block_size: patches per side of a block; None takes 2 on grids of 14 and more (the paper's
            7x7 blocks of a 14x14 grid) and 1 on smaller ones.
        mixed_share: share of the kept blocks that `mixed` takes from the top.
        warmup_share: share of all steps with random selection, before the teacher has learnt anything.
        unmasked_share: share of all steps, the last ones, that see every patch.
    """

    kind: Literal["none", "attentive", "high", "mixed", "random", "tokens"] = "none"
    keep_ratio: float = 0.5
    block_size: int | None = None
    mixed_share: float = 0.5
    warmup_share: float = 0.1
    unmasked_share: float = 0.0

    def __post_init__(self) -> None:
        share(
            keep_ratio=self.keep_ratio,
            mixed_share=self.mixed_share,
            warmup_share=self.warmup_share,
            unmasked_share=self.unmasked_share,
        )
        positive(keep_ratio=self.keep_ratio)

    @property
    def needs_teacher(self) -> bool:
        return self.kind in ("attentive", "high", "mixed")


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """EMA copy of the encoder.

    Attributes:
        decay: m at step 0; it rises to 1 along a cosine, m_t = 1 - (1 - decay) (1 + cos(pi t / T)) / 2.
        image_scale: side of the image the teacher sees, as a share; 0.5 costs a quarter.
    """

    decay: float = 0.996
    image_scale: float = 1.0

    def __post_init__(self) -> None:
        share(decay=self.decay, image_scale=self.image_scale)
        positive(image_scale=self.image_scale)


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
        positive(temperature=self.temperature)

    @property
    def is_on(self) -> bool:
        return self.token_over_patches != 0 or self.patch_over_tokens != 0

    @property
    def counts_padding(self) -> bool:
        return self.is_on and self.padding == "counted"


@dataclass(frozen=True, kw_only=True)
class Uniformity:
    """Spread of each modality's embeddings, log mean exp(-scale d^2) (arXiv 2005.10242)."""

    weight: float = 0.0
    scale: float = 2.0

    def __post_init__(self) -> None:
        positive(scale=self.scale)

    @property
    def is_on(self) -> bool:
        return self.weight != 0


@dataclass(frozen=True, kw_only=True)
class SlicedWasserstein:
    """Distance of the two modalities' distributions along random directions (CoCoNet)."""

    weight: float = 0.0
    num_directions: int = 64

    def __post_init__(self) -> None:
        positive(num_directions=self.num_directions)

    @property
    def is_on(self) -> bool:
        return self.weight != 0


@dataclass(frozen=True, kw_only=True)
class Prior:
    """Adversarial matching of sigmoid(feature) to uniform noise (Deep InfoMax, with the sign mended).

    Attributes:
        weight: of the encoder's term; the discriminator's own loss has weight 1 and touches only it.
        penalty: of the discriminator's gradient.
    """

    weight: float = 0.0
    penalty: float = 1.0

    def __post_init__(self) -> None:
        not_negative(penalty=self.penalty)

    @property
    def is_on(self) -> bool:
        return self.weight != 0


@dataclass(frozen=True, kw_only=True)
class Regularisers:
    """Terms added to the tables' losses; a weight of 0 switches one off."""

    token_entropy: TokenEntropy = TokenEntropy()
    uniformity: Uniformity = Uniformity()
    sliced_wasserstein: SlicedWasserstein = SlicedWasserstein()
    prior: Prior = Prior()


@dataclass(frozen=True, kw_only=True)
class SimCLRHead:
    """Image-image contrast of the last two views (arXiv 2002.05709).

    Attributes:
        weight: 0 switches it off.
        hidden_ratio, out_ratio: layer widths relative to the tower's; 4096 and 256 at width 768.
    """

    weight: float = 0.0
    temperature: float = 0.1
    hidden_ratio: float = 16 / 3
    out_ratio: float = 1 / 3

    def __post_init__(self) -> None:
        positive(temperature=self.temperature, hidden_ratio=self.hidden_ratio, out_ratio=self.out_ratio)


@dataclass(frozen=True, kw_only=True)
class BYOLHead:
    """Prediction of the EMA teacher's projection from every view (arXiv 2006.07733)."""

    weight: float = 0.0
    hidden_ratio: float = 16 / 3
    out_ratio: float = 1 / 3

    def __post_init__(self) -> None:
        positive(hidden_ratio=self.hidden_ratio, out_ratio=self.out_ratio)


@dataclass(frozen=True, kw_only=True)
class MaskedTokensHead:
    """Masked language modelling on text 0; needs `features.text_attention=full`."""

    weight: float = 0.0
    share: float = 0.15

    def __post_init__(self) -> None:
        share(share=self.share)
        positive(share=self.share)


@dataclass(frozen=True, kw_only=True)
class CaptionHead:
    """Text 0 written forwards and backwards from the image's patches (RadTex, VirTex)."""

    weight: float = 0.0
    num_layers: int = 1
    num_heads: int = 4

    def __post_init__(self) -> None:
        positive(num_layers=self.num_layers, num_heads=self.num_heads)


@dataclass(frozen=True, kw_only=True)
class DistilHead:
    """Mutual information with the EMA teacher, one negative each (MIMKD).

    Attributes:
        weight: of both terms together; 0 switches the head off.
        global_share: of the feature of the whole image; the rest goes to patches against that feature.
    """

    weight: float = 0.0
    global_share: float = 0.5

    def __post_init__(self) -> None:
        share(global_share=self.global_share)


@dataclass(frozen=True, kw_only=True)
class MaskedDistillationHead:
    """Prediction of the EMA teacher's patches at removed positions, as soft codes (MaskCLIP).

    Attributes:
        weight: 0 switches it off.
        keep_ratio: share of patches the student sees in this extra pass.
        num_codes: rows of the code book.
        num_layers: of the decoder.
    """

    weight: float = 0.0
    keep_ratio: float = 0.25
    num_codes: int = 256
    num_layers: int = 1
    num_heads: int = 4
    student_temperature: float = 0.1
    teacher_temperature: float = 0.04

    def __post_init__(self) -> None:
        share(keep_ratio=self.keep_ratio)
        positive(
            keep_ratio=self.keep_ratio,
            num_codes=self.num_codes,
            num_layers=self.num_layers,
            num_heads=self.num_heads,
            student_temperature=self.student_temperature,
            teacher_temperature=self.teacher_temperature,
        )


@dataclass(frozen=True, kw_only=True)
class HashHead:
    """Binary codes for Hamming retrieval (CMIMH).

    Attributes:
        weight: 0 switches it off.
        num_bits: length of a code.
        temperature: of the codes' contrast.
        balance: weight of each bit's entropy over the batch, maximised.
        certainty: weight of each code's own entropy, minimised.
        gap: weight of the divergence between the two modalities' bits; small, since closing the gap
            loses information.
    """

    weight: float = 0.0
    num_bits: int = 32
    temperature: float = 0.2
    balance: float = 0.1
    certainty: float = 0.1
    gap: float = 0.01

    def __post_init__(self) -> None:
        positive(num_bits=self.num_bits, temperature=self.temperature)
        not_negative(balance=self.balance, certainty=self.certainty, gap=self.gap)


@dataclass(frozen=True, kw_only=True)
class Heads:
    """Auxiliary heads; a weight of 0 switches one off."""

    simclr: SimCLRHead = SimCLRHead()
    byol: BYOLHead = BYOLHead()
    masked_tokens: MaskedTokensHead = MaskedTokensHead()
    caption: CaptionHead = CaptionHead()
    distil: DistilHead = DistilHead()
    masked_distillation: MaskedDistillationHead = MaskedDistillationHead()
    hash: HashHead = HashHead()

    def __post_init__(self) -> None:
        not_negative(**{f"heads.{f.name}.weight": getattr(self, f.name).weight for f in fields(self)})
