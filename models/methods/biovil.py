"""BioViL-style: a global contrast on the mean of projected patches, with masked language modelling kept on.

The image feature is the mean of patches projected by a two-layer head, so patches and whole image share
one space and a heat map is a cosine. Training code is not released: temperature .5 and masked-token weight
.1 are from memory of the paper (arXiv 2204.09817). Pretraining of the text tower on its own is not here;
start from one with `model.pretrained`. The padding token stands for a masked one.
"""

from __future__ import annotations

from models.recipe import MethodRecipe
from models.table_slots import Temperature
from models.training_slots import Features, Heads, MaskedTokensHead

BIOVIL = MethodRecipe(
    name="biovil",
    source="Boecking et al. 2022, arXiv 2204.09817",
    evidence="paper-unverified",
    features=Features(image="patch_mean", projection="mlp", text_attention="full"),
    temperature=Temperature(policy="fixed", init=0.5),
    heads=Heads(masked_tokens=MaskedTokensHead(weight=0.1)),
)

RECIPES = (BIOVIL,)
