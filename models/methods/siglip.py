"""SigLIP: every pair of the global batch is a yes-or-no question, sigmoid with a learned bias.

Defaults of the paper: inverse temperature 10 and bias -10 at the start, both learned (arXiv 2303.15343).
The bias is the log-odds of a matching pair at its batch of 32,768; a batch of 64 has -4, so it is searched.
Both directions of the table have the same value, so one is computed. Deviation: the temperature is clamped.
"""

from __future__ import annotations

from models.bounds import SigmoidPairs
from models.recipe import MethodRecipe
from models.table_slots import Bias, Directions, Temperature

SIGLIP = MethodRecipe(
    name="siglip",
    source="Zhai et al. 2023, arXiv 2303.15343",
    evidence="derived",
    estimator=SigmoidPairs(),
    temperature=Temperature(init=0.1),
    bias=Bias(policy="learned", init=-10.0),
    directions=Directions(image_to_text=1.0, text_to_image=0.0),
)

RECIPES = (SIGLIP,)
