"""LoVT: a global contrast, and within each pair patches and sentences against what they find in the other.

Patches attend to the sentences and sentences to the patches through one shared attention; each is then
told from the others of its own image, respectively report. Nearby patches share targets, and the weights
of the attention pools say which positions count. Values of the released losses: global .75 / .25 at
temperature .1, local terms at .3 with weight .375 each (arXiv 2112.02889). Deviations: sentences are encoded
one by one (released: jointly), LayerNorm, padding leaves every mean; at most eight sentences.
"""

from __future__ import annotations

from models.recipe import MethodRecipe, TableRecipe
from models.table_slots import Directions, Targets, Temperature
from models.training_slots import Features

_BOTH = Directions(image_to_text=1.0, text_to_image=1.0)
_LOCAL = Temperature(policy="fixed", init=0.3)

LOVT = MethodRecipe(
    name="lovt",
    source="Mueller et al. 2022, arXiv 2112.02889",
    evidence="official",
    features=Features(image="attention", text="sentence", num_texts=8, report="attention", projection="mlp"),
    directions=Directions(image_to_text=0.75, text_to_image=0.25),
    temperature=Temperature(policy="fixed", init=0.1),
    extra_tables={
        "regions": TableRecipe(
            weight=0.375,
            between="regions",
            targets=Targets(kind="spatial"),
            directions=_BOTH,
            temperature=_LOCAL,
        ),
        "sentences": TableRecipe(weight=0.375, between="sentences", directions=_BOTH, temperature=_LOCAL),
    },
)

RECIPES = (LOVT,)
