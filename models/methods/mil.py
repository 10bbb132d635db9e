"""Multiple-instance scores: an image is a bag of patches, a report a bag of sentences.

Symmetric InfoNCE on a score that does not depend on the order in either bag. One recipe per way of pooling
patches: `mil_max`, `mil_mean`, `mil_lse` (sharpness 10), `mil_noisy_or` (log-odds that any patch matches,
its bias started where a bag is a coin's toss), `mil_attention` (softmax of the scores), `mil_non_local`
(patches that resemble the best one; our reading of "NL") and `mil_global` (cosine of the mean patch).
Sentences are averaged; `sentence_pool.kind` offers sum, max and lse. `lse_nl` adds the losses of `lse` and
`non_local`. The paper's weights, sharpness and temperature are not known here, so they are searched.

The image feature that zero-shot classification reads is the mean of the projected patches, which are what
these tables train. At most eight sentences of a report are encoded.
"""

from __future__ import annotations

from dataclasses import replace

from models.recipe import MethodRecipe, TableRecipe
from models.table_slots import Bias, RegionPool, SentencePool
from models.training_slots import Features

MIL_LSE = MethodRecipe(
    name="mil_lse",
    source="Wang et al. 2023, arXiv 2212.05561",
    evidence="derived",
    features=Features(image="patch_mean", text="sentence", num_texts=8, report="mean"),
    region_pool=RegionPool(kind="lse"),
    sentence_pool=SentencePool(kind="mean"),
)

MIL_MAX = replace(MIL_LSE, name="mil_max", region_pool=RegionPool(kind="max"))

MIL_MEAN = replace(MIL_LSE, name="mil_mean", region_pool=RegionPool(kind="mean"))

MIL_NOISY_OR = replace(
    MIL_LSE,
    name="mil_noisy_or",
    region_pool=RegionPool(kind="noisy_or"),
    bias=Bias(policy="learned", init=0.0),
)

MIL_ATTENTION = replace(MIL_LSE, name="mil_attention", region_pool=RegionPool(kind="attention"))

MIL_NON_LOCAL = replace(MIL_LSE, name="mil_non_local", region_pool=RegionPool(kind="non_local"))

MIL_GLOBAL = replace(MIL_LSE, name="mil_global", region_pool=RegionPool(kind="mean_region"))

LSE_NL = replace(
    MIL_LSE,
    name="lse_nl",
    extra_tables={
        "non_local": TableRecipe(
            region_pool=RegionPool(kind="non_local"), sentence_pool=SentencePool(kind="mean")
        )
    },
)

RECIPES = (MIL_MAX, MIL_MEAN, MIL_LSE, MIL_NOISY_OR, MIL_ATTENTION, MIL_NON_LOCAL, MIL_GLOBAL, LSE_NL)
