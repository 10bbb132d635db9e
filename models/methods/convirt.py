"""ConVIRT: InfoNCE between an image and one sampled sentence, image to text weighted .75.

Temperature .1, fixed; two-layer projections (arXiv 2010.00747). Values equal the unofficial repository's and
LoVT's global loss. Deviations: text feature from the end token, no frozen layers, crops alone.
"""

from __future__ import annotations

from models.recipe import MethodRecipe
from models.table_slots import Directions, Temperature
from models.training_slots import Features

CONVIRT = MethodRecipe(
    name="convirt",
    source="Zhang et al. 2022, arXiv 2010.00747",
    evidence="official",
    features=Features(text="sentence", projection="mlp"),
    directions=Directions(image_to_text=0.75, text_to_image=0.25),
    temperature=Temperature(policy="fixed", init=0.1),
)

RECIPES = (CONVIRT,)
