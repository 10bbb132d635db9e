"""CLIP: symmetric InfoNCE on the global features with a learned, clamped temperature."""

from __future__ import annotations

from models.recipe import MethodRecipe

# Every slot keeps its default: those are CLIP's.
CLIP = MethodRecipe(name="clip", source="Radford et al. 2021, arXiv 2103.00020", evidence="official")
