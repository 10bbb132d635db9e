"""Contrastive multiview coding: an image's two views and a report's two sentences as four views.

`cmc_core` contrasts the first image view with each of the others, `cmc_graph` every pair of views; a report
with one sentence has no edges to a second. `cmc_memory` contrasts an image with a memory of every training
text and the other way round (softmax over one positive and random draws), `cmc_nce` with the paper's binary
noise-contrastive loss, whose constant Z is frozen at the first batch. Temperature .07, memory momentum .5
(arXiv 1906.05849; 16,384 draws there).
"""

from __future__ import annotations

from dataclasses import replace

from models.bounds import SigmoidPairs
from models.recipe import MethodRecipe, TableRecipe
from models.table_slots import Candidates, Directions, Temperature
from models.training_slots import Features

_BOTH = Directions(image_to_text=1.0, text_to_image=1.0)
_TAU = Temperature(policy="fixed", init=0.07)
# Every edge has the temperature of the first.
_SAME = Temperature(policy="shared")
_SOURCE = "Tian et al. 2020, arXiv 1906.05849"

CMC_CORE = MethodRecipe(
    name="cmc_core",
    source=_SOURCE,
    evidence="derived",
    features=Features(text="sentence", num_texts=2, num_views=2),
    views="first",
    directions=_BOTH,
    temperature=_TAU,
    extra_tables={
        "second_text": TableRecipe(between="image_text2", views="first", directions=_BOTH, temperature=_SAME),
        "image_views": TableRecipe(between="image_views", directions=_BOTH, temperature=_SAME),
    },
)

# A table averages over the image views, the graph sums over its edges.
CMC_GRAPH = replace(
    CMC_CORE,
    name="cmc_graph",
    views="all",
    weight=2.0,
    extra_tables={
        "second_text": TableRecipe(weight=2.0, between="image_text2", directions=_BOTH, temperature=_SAME),
        "image_views": TableRecipe(between="image_views", directions=_BOTH, temperature=_SAME),
        "texts": TableRecipe(between="texts", directions=_BOTH, temperature=_SAME),
    },
)

CMC_MEMORY = MethodRecipe(
    name="cmc_memory",
    source=_SOURCE,
    evidence="official",
    candidates=Candidates(kind="memory", size=512),
    directions=_BOTH,
    temperature=_TAU,
)

CMC_NCE = replace(CMC_MEMORY, name="cmc_nce", estimator=SigmoidPairs())

RECIPES = (CMC_CORE, CMC_GRAPH, CMC_MEMORY, CMC_NCE)
