"""CLOOB: InfoLOOB on features retrieved from the batch by a modern Hopfield network.

Each direction has its own memory: image anchors and keys are retrieved from the images, text anchors
and keys from the texts. Retrieval is for training only; embeddings are compared raw afterwards. The
authors' loss is 2 * temperature times ours.
"""

from __future__ import annotations

from models.estimators import InfoLOOB
from models.recipe import MethodRecipe, Temperature, Transform

CLOOB = MethodRecipe(
    name="cloob",
    source="Fuerst et al. 2022, arXiv 2110.11316",
    evidence="official",
    # Conceptual Captions settings: beta 8 at a global batch of 512, inverse temperature 30.
    transform=Transform(kind="hopfield", beta=8.0),
    estimator=InfoLOOB(),
    temperature=Temperature(policy="fixed", init=1 / 30),
)
