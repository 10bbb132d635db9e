"""Local mutual information: a sentence is scored against its best-matching image region.

Row-wise InfoNCE on the region maximum in both directions; the paper's other estimators are one
override away (`method.estimator.kind=dv` or `jsd`). Deviation: cosine similarity instead of the
concatenated critic. A weighted global table beside it keeps the class token trained, since zero-shot
classification reads the global feature.
"""

from __future__ import annotations

from models.recipe import Features, MethodRecipe, RegionPool, TableRecipe

LOCAL_MI = MethodRecipe(
    name="local_mi",
    source="Liao et al. 2021, arXiv 2103.04537",
    evidence="derived",
    features=Features(text="sentence"),
    region_pool=RegionPool(kind="max"),
    extra_tables={"global": TableRecipe(weight=1.0)},
)
