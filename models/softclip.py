"""The whole SoftCLIP objective of one process, for parity tests and for use outside a recipe."""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from models.targets import (
    cross_entropy_rows,
    is_positive,
    kl_rows,
    negative_targets,
    smoothed_over_negatives,
    soft_targets,
    symmetric_kl_rows,
)

# N pairs, D width


@dataclass(frozen=True, kw_only=True)
class SoftClipSettings:
    """Settings of `softclip_loss`; the paper's own values are not published.

    Attributes:
        guidance_temperature: of the intra-modal similarities, > 0.
        mixing: share of the similarities in the soft targets, in [0, 1].
        divergence: "forward" is KL(y || p), "symmetric" the mean of both directions.
        label_smoothing: of the hard term, spread over the negatives, in [0, 1).
        hard_weight, soft_weight, relation_weight: weights in the total.
        image_to_text, text_to_image: which modality's self-similarity guides each direction.
        detach_targets: no gradient into the guidance.
    """

    guidance_temperature: float = 0.1
    mixing: float = 0.3
    divergence: Literal["forward", "symmetric"] = "forward"
    label_smoothing: float = 0.0
    hard_weight: float = 0.0
    soft_weight: float = 1.0
    relation_weight: float = 1.0
    image_to_text: Literal["image", "text", "mean"] = "image"
    text_to_image: Literal["image", "text", "mean"] = "text"
    detach_targets: bool = True

    def __post_init__(self) -> None:
        if not self.guidance_temperature > 0:
            raise ValueError(f"guidance_temperature must be > 0, got {self.guidance_temperature}")
        if not 0.0 <= self.mixing <= 1.0:
            raise ValueError(f"mixing must be in [0, 1], got {self.mixing}")
        if not 0.0 <= self.label_smoothing < 1.0:
            raise ValueError(f"label_smoothing must be in [0, 1), got {self.label_smoothing}")
        if self.divergence == "symmetric" and self.mixing == 0.0:
            raise ValueError("the symmetric divergence needs mixing > 0: it is infinite for one-hot targets")


@dataclass(frozen=True)
class SoftClipTerms:
    """Scalars in nats, each the mean of both directions.

    Attributes:
        hard: cross-entropy with the (smoothed) own pair.
        soft: divergence from the softened targets.
        relation: divergence among the negatives alone.
        total: weighted sum.
    """

    hard: Tensor
    soft: Tensor
    relation: Tensor
    total: Tensor


def softclip_loss(
    image_embeds: Tensor,
    text_embeds: Tensor,
    *,
    image_guidance: Tensor,
    text_guidance: Tensor,
    temperature: float | Tensor,
    settings: SoftClipSettings,
) -> SoftClipTerms:
    """SoftCLIP on the global batch of one process; all inputs are brought to unit length first.

    Args:
        image_embeds: [N, D]; row i and row i of `text_embeds` are a pair.
        text_embeds: [N, D].
        image_guidance: image side of the intra-modal similarities, [N, G] (regions).
        text_guidance: text side, [N, G'] (tags).
        temperature: of the cross-modal logits, > 0.
        settings: weights, targets and divergence.

    Returns:
        the three terms and their weighted sum.

    Raises:
        ValueError: N < 2.

    Source: SoftCLIP, arXiv 2303.17561: equations as understood from the abstract and second-hand
        descriptions; there is no released code.
    """
    logits = F.normalize(image_embeds, dim=1) @ F.normalize(text_embeds, dim=1).T / temperature
    image, text = F.normalize(image_guidance, dim=1), F.normalize(text_guidance, dim=1)
    by_image, by_text = image @ image.T, text @ text.T
    if settings.detach_targets:
        by_image, by_text = by_image.detach(), by_text.detach()
    tables = {"image": by_image, "text": by_text, "mean": 0.5 * (by_image + by_text)}
    forward = _softclip_direction(logits, tables[settings.image_to_text], settings)
    backward = _softclip_direction(logits.T, tables[settings.text_to_image], settings)
    hard, soft, relation = (0.5 * (a + b) for a, b in zip(forward, backward, strict=True))
    total = settings.hard_weight * hard + settings.soft_weight * soft + settings.relation_weight * relation
    return SoftClipTerms(hard=hard, soft=soft, relation=relation, total=total)


def _softclip_direction(
    logits: Tensor, similarities: Tensor, settings: SoftClipSettings
) -> tuple[Tensor, Tensor, Tensor]:
    divergence = kl_rows if settings.divergence == "forward" else symmetric_kl_rows
    own = torch.arange(len(logits), device=logits.device)
    temperature = settings.guidance_temperature
    hard_targets = smoothed_over_negatives(logits, own, smoothing=settings.label_smoothing)
    soft = soft_targets(similarities, own, temperature=temperature, mixing=settings.mixing)
    relation = negative_targets(similarities, own, temperature=temperature)
    return (
        cross_entropy_rows(hard_targets, logits).mean(),
        divergence(soft, logits).mean(),
        divergence(relation, logits, ~is_positive(logits, own)).mean(),
    )
