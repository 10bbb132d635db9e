"""CLIP-Lite: Jensen-Shannon bound with one negative text per image, for small batches.

Features pass Deep InfoMax's blocks and are compared by cosine with a learned, practically unclamped
temperature from .07 (arXiv 2112.07133); zero-shot reads the blocks' outputs, so they are part of the
checkpoint. Deviations: the negative is the next pair of an order of the global batch drawn anew each step,
so the pairs do not depend on the number of workers (released: the next row of the worker's shard);
LayerNorm; the released prior term, whose sign is wrong, is off.
"""

from __future__ import annotations

from models.estimators import JensenShannon
from models.recipe import MethodRecipe
from models.table_slots import Candidates, Directions, Temperature
from models.training_slots import Features

CLIP_LITE = MethodRecipe(
    name="clip_lite",
    source="Shrivastava et al. 2023, arXiv 2112.07133",
    evidence="official",
    features=Features(projection="mi_block"),
    candidates=Candidates(kind="roll"),
    estimator=JensenShannon(),
    directions=Directions(image_to_text=1.0, text_to_image=0.0),
    temperature=Temperature(init=0.07, minimum=1e-4),
)

RECIPES = (CLIP_LITE,)
