"""FLIP: CLIP on half of the patches, drawn at random, with a short unmasked tuning at the end.

Defaults of the paper: half of the patches kept; the unmasked tuning is 1 % of its samples (arXiv
2212.00794), here the last 5 % of the steps, since runs are short. Deviations: the class token is the
image feature where FLIP averages all tokens, positions are learned, the tuning shares the learning-rate
schedule of the run.
"""

from __future__ import annotations

from models.recipe import MethodRecipe
from models.training_slots import TokenSelection

FLIP = MethodRecipe(
    name="flip",
    source="Li et al. 2023, arXiv 2212.00794",
    evidence="official",
    selection=TokenSelection(kind="tokens", keep_ratio=0.5, unmasked_share=0.05),
)

RECIPES = (FLIP,)
