"""CLOOB: InfoLOOB on features retrieved from the batch by a modern Hopfield network, and its 2x2 grid.

Each direction has its own memory: image anchors and keys are retrieved from the images, text anchors
and keys from the texts. Retrieval is for training only; embeddings are compared raw afterwards. The
authors' loss is 2 * temperature times ours. Defaults are those of Conceptual Captions: beta 8 at a global
batch of 512, inverse temperature 30, fixed.

The grid {InfoNCE, InfoLOOB} x {no retrieval, retrieval} of the paper's ablation: `clip` is its corner
without either, `clip_loob` has the estimator alone, `clip_hopfield` the retrieval alone.
"""

from __future__ import annotations

from dataclasses import replace

from models.estimators import InfoLOOB, InfoNCE
from models.recipe import MethodRecipe
from models.table_slots import Temperature, Transform

CLOOB = MethodRecipe(
    name="cloob",
    source="Fuerst et al. 2022, arXiv 2110.11316",
    evidence="official",
    transform=Transform(kind="hopfield", beta=8.0),
    estimator=InfoLOOB(),
    temperature=Temperature(policy="fixed", init=1 / 30),
)

CLIP_LOOB = replace(CLOOB, name="clip_loob", transform=Transform())

CLIP_HOPFIELD = replace(CLOOB, name="clip_hopfield", evidence="derived", estimator=InfoNCE())

RECIPES = (CLOOB, CLIP_LOOB, CLIP_HOPFIELD)
