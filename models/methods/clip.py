"""CLIP: symmetric InfoNCE on the global features with a learned, clamped temperature.

Every slot keeps its default: those are CLIP's. Default temperature .07, clamped at .01 (arXiv 2103.00020).
`clip_uniform` adds the uniformity of both modalities' embeddings, log mean exp(-2 d^2) (arXiv
2005.10242), as a regulariser that any recipe takes.
"""

from __future__ import annotations

from dataclasses import replace

from models.recipe import MethodRecipe
from models.training_slots import Regularisers, Uniformity

CLIP = MethodRecipe(name="clip", source="Radford et al. 2021, arXiv 2103.00020", evidence="official")

CLIP_UNIFORM = replace(
    CLIP,
    name="clip_uniform",
    source="Wang and Isola 2020, arXiv 2005.10242, on CLIP",
    evidence="derived",
    regularisers=Regularisers(uniformity=Uniformity(weight=0.1)),
)

RECIPES = (CLIP, CLIP_UNIFORM)
