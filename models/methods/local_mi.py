"""Local mutual information: a sentence is scored against its best-matching image region.

`local_mi` scores by cosine and takes row-wise InfoNCE of the region maximum in both directions.
`local_mi_critic` is the paper's form: a perceptron on the concatenated features (hidden widths of the code
in proportion), the Donsker-Varadhan bound, pairs of one study left out of the negatives.
`local_mi_global` is the released code: the critic on whole features, no regions. The released "infonce" is
not offered: its gradients are those of Donsker-Varadhan.

Warning: `local_mi_select` and `local_mi_pmi` read the paper's caption literally (the region is chosen on the
own pair and reused for every sentence). Both lose clearly in the planted test (`python -m
tests.benchmarks.planted`): the model can win by region identity, which breaks when a prompt takes its
maximum. They are here as ablations.

A global table beside each keeps the class token and its cosines trained, since zero-shot classification
reads those; the critic is not used there.
"""

from __future__ import annotations

from dataclasses import replace

from models.estimators import DonskerVaradhan
from models.recipe import MethodRecipe, TableRecipe
from models.table_slots import Candidates, RegionPool, Score, Temperature
from models.training_slots import Features

LOCAL_MI = MethodRecipe(
    name="local_mi",
    source="Liao et al. 2021, arXiv 2103.04537",
    evidence="derived",
    features=Features(text="sentence"),
    region_pool=RegionPool(kind="max"),
    extra_tables={"global": TableRecipe()},
)

LOCAL_MI_CRITIC = replace(
    LOCAL_MI,
    name="local_mi_critic",
    score=Score(kind="concat"),
    candidates=Candidates(exclude="same_group"),
    estimator=DonskerVaradhan(),
    # A critic has a scale of its own.
    temperature=Temperature(policy="fixed", init=1.0),
)

LOCAL_MI_GLOBAL = replace(
    LOCAL_MI_CRITIC, name="local_mi_global", evidence="official", region_pool=RegionPool()
)

LOCAL_MI_SELECT = replace(LOCAL_MI, name="local_mi_select", region_pool=RegionPool(kind="select"))

LOCAL_MI_PMI = replace(LOCAL_MI, name="local_mi_pmi", region_pool=RegionPool(kind="pmi"))

RECIPES = (LOCAL_MI, LOCAL_MI_CRITIC, LOCAL_MI_GLOBAL, LOCAL_MI_SELECT, LOCAL_MI_PMI)
