"""Zero-shot scores from prompts: class embeddings, single-label and multi-label.

No logit scale enters anywhere: ranks do not need it, and a score that carries the learned temperature
could not be compared between two methods. Retrieval through a Hopfield memory is a training device;
inference uses the plain unit embeddings (CLOOB, arXiv 2110.11316).
"""

# B images, C classes or labels, T prompts per class, D width

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import torch
from torch import Tensor

PLACEHOLDER: Final = "{}"


def format_prompts(names: Sequence[str], templates: Sequence[str]) -> list[str]:
    """Every template filled with every name, all prompts of the first name first.

    A template without "{}" is the same text for every name (TIER's negative bank mixes "No {}." with
    fixed normal sentences). Names are inserted as they are; braces in a name are left alone.

    Returns:
        len(names) * len(templates) texts; reshape the embeddings to [C, T, D].

    Raises:
        ValueError: no name, no template, a template with "{}" twice, or several names and no template
            that mentions them.
    """
    if not names or not templates:
        raise ValueError(f"prompts need names and templates, got {len(names)} and {len(templates)}")
    for template in templates:
        if template.count(PLACEHOLDER) > 1:
            raise ValueError(f"a template names the class once with '{{}}', got '{template}'")
    if len(names) > 1 and not any(PLACEHOLDER in template for template in templates):
        raise ValueError(f"no template mentions the class with '{{}}', got {list(templates)}")
    return [template.replace(PLACEHOLDER, name) for name in names for template in templates]


def unit(vectors: Tensor) -> Tensor:
    """Rows (last axis) scaled to length 1.

    Raises:
        ValueError: a row is zero or not finite, so it has no direction.
    """
    lengths: Tensor = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
    is_bad = ~(torch.isfinite(lengths) & (lengths > 0))
    if bool(is_bad.any()):
        raise ValueError(f"{int(is_bad.sum())} of {is_bad.numel()} embeddings are zero or not finite")
    return vectors / lengths


def class_embeddings(prompt_embeds_CTD: Tensor) -> Tensor:
    """One unit embedding per class: unit each prompt, mean over prompts, unit again.

    Args:
        prompt_embeds_CTD: text embeddings, any length, [C, T, D].

    Returns:
        [C, D], unit rows.

    Raises:
        ValueError: not three axes, a zero prompt, or prompts that cancel.

    Source: CLIP, arXiv 2103.00020, prompt ensembling; CheXzero and TIER use the same recipe.
    """
    if prompt_embeds_CTD.ndim != 3 or prompt_embeds_CTD.shape[1] == 0:
        raise ValueError(f"prompt embeddings must be [C, T, D], got {list(prompt_embeds_CTD.shape)}")
    # An average of unit vectors is shorter than 1, the more so the more its prompts disagree.
    return unit(unit(prompt_embeds_CTD).mean(dim=1))


def class_scores(image_embeds_BD: Tensor, class_embeds_CD: Tensor) -> Tensor:
    """Cosine of every image with every class, [B, C]; both inputs hold unit rows."""
    return image_embeds_BD @ class_embeds_CD.T


def difference_score(positive_BC: Tensor, negative_BC: Tensor) -> Tensor:
    """Cosine with the positive prompts minus cosine with the negative ones, [B, C] in [-2, 2].

    Source: TIER, arXiv 2212.06710, evaluation code.
    """
    return positive_BC - negative_BC


def softmax_score(positive_BC: Tensor, negative_BC: Tensor) -> Tensor:
    """exp(c+) / (exp(c+) + exp(c-)) on raw cosines, [B, C] in (0, 1).

    Ranks the images of one model exactly as `difference_score`; averages over several models and
    thresholds differ. Source: CheXzero (Nature BME 2022), evaluation code, which has no logit scale.
    """
    return torch.sigmoid(positive_BC - negative_BC)


MULTI_LABEL_SCORES: Final[dict[str, Callable[[Tensor, Tensor], Tensor]]] = {
    "difference": difference_score,
    "softmax": softmax_score,
}


def multi_label_scores(
    image_embeds_BD: Tensor, positive_CD: Tensor, negative_CD: Tensor, *, score: str = "difference"
) -> Tensor:
    """Presence score of every label in every image.

    Args:
        image_embeds_BD: unit rows.
        positive_CD: unit embedding of each label's positive prompts.
        negative_CD: the same for the negative prompts; [1, D] when all labels share them.
        score: a key of `MULTI_LABEL_SCORES`.

    Returns:
        [B, C], higher means present.

    Raises:
        ValueError: unknown score, or numbers of positive and negative rows that do not match.
    """
    if score not in MULTI_LABEL_SCORES:
        raise ValueError(f"unknown multi-label score '{score}'; choose from {', '.join(MULTI_LABEL_SCORES)}")
    if negative_CD.shape[0] not in (1, positive_CD.shape[0]):
        raise ValueError(
            f"{positive_CD.shape[0]} labels need 1 or {positive_CD.shape[0]} negative embeddings, "
            f"got {negative_CD.shape[0]}"
        )
    positive_BC = class_scores(image_embeds_BD, positive_CD)
    negative_BC = class_scores(image_embeds_BD, negative_CD).expand_as(positive_BC)
    return MULTI_LABEL_SCORES[score](positive_BC, negative_BC)
