"""GLoRIA: every word attends to the patches it names, beside a global contrast.

The reference local term: softmax over words, then over patches (4), cosine of each word with what it
attends to, log-sum-exp over words (5), logits times 10, both directions with weight 1; the same for the
global features. Values of the released code. Deviations: words are the text tower's tokens (released:
clinical BERT, last four layers summed), padding leaves both softmaxes. A known property of the reference:
its score grows with the length of the caption.
"""

from __future__ import annotations

from models.recipe import MethodRecipe, TableRecipe
from models.table_slots import Directions, RegionPool, Temperature

_BOTH = Directions(image_to_text=1.0, text_to_image=1.0)

GLORIA = MethodRecipe(
    name="gloria",
    source="Huang et al. 2021, GLoRIA, ICCV",
    evidence="official",
    region_pool=RegionPool(kind="words", sharpness=5.0),
    directions=_BOTH,
    temperature=Temperature(policy="fixed", init=0.1),
    extra_tables={"global": TableRecipe(directions=_BOTH, temperature=Temperature(policy="shared"))},
)

RECIPES = (GLORIA,)
