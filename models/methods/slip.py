"""SLIP: CLIP on one view of an image and SimCLR between two others.

Defaults of the paper: SimCLR weight 1 at temperature .1, projector 768-4096-4096-256 in proportion to the
tower (arXiv 2112.12750). Deviations: LayerNorm in the projector, and the views are crops alone (colour
jitter, blur and flips are not there); with `train.min_crop_area=1` they are one and the same.
"""

from __future__ import annotations

from models.recipe import MethodRecipe
from models.training_slots import Features, Heads, SimCLRHead

SLIP = MethodRecipe(
    name="slip",
    source="Mu et al. 2022, arXiv 2112.12750",
    evidence="official",
    features=Features(num_views=3),
    views="first",
    heads=Heads(simclr=SimCLRHead(weight=1.0)),
)

RECIPES = (SLIP,)
