"""Rows of the planted task's table: combinations of slots, recipes of the catalogue, reference figures."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, Final

from models.estimators import DonskerVaradhan, InfoNCE, JensenShannon
from models.methods.catalogue import METHODS
from models.recipe import MethodRecipe
from models.table_slots import Candidates, RegionPool, Score, Temperature, Transform
from models.training_slots import Features

SENTENCE: Final = MethodRecipe(
    name="combination",
    source="none: slots put together for the planted task",
    evidence="derived",
    features=Features(text="sentence"),
    temperature=Temperature(init=0.1),
)
# A critic has a scale of its own.
CRITIC: Final = replace(
    SENTENCE, score=Score(kind="concat", hidden=(4.0, 2.0)), temperature=Temperature(policy="fixed", init=1.0)
)


def _pooled(kind: Any, *, base: MethodRecipe = SENTENCE, **slots: Any) -> MethodRecipe:
    """A recipe with a region pool and other slots of its main table."""
    return replace(base, region_pool=RegionPool(kind=kind), **slots)


def _critic(kind: Any, **slots: Any) -> MethodRecipe:
    return _pooled(kind, base=CRITIC, **slots)


JSD, DV, ROLL = JensenShannon(), DonskerVaradhan(), Candidates(kind="roll")

COMBINATIONS: Final[dict[str, MethodRecipe]] = {
    "global": SENTENCE,
    "mean of cosines": _pooled("mean"),
    "max": _pooled("max"),
    "lse": _pooled("lse"),
    "attention": _pooled("attention"),
    "noisy-or": _pooled("noisy_or"),
    "lse + cap .5": _pooled("lse", transform=Transform(kind="cap", limit=0.5)),
    "lse + leaky .5": _pooled("lse", transform=Transform(kind="leaky", limit=0.5)),
    "lse + cap all .5": _pooled("lse", transform=Transform(kind="cap_all", limit=0.5)),
    "lse + slack .5": _pooled("lse", estimator=InfoNCE(slack=0.5)),
    "max + jsd": _pooled("max", estimator=JSD),
    "max + jsd, one negative": _pooled("max", estimator=JSD, candidates=ROLL),
    "noisy-or + jsd": _pooled("noisy_or", estimator=JSD),
    "max + dv": _pooled("max", estimator=DV),
    "select": _pooled("select"),
    "pmi": _pooled("pmi"),
    "critic + max": _critic("max"),
    "critic + select": _critic("select"),
    "critic + pmi": _critic("pmi"),
    "critic + max + dv": _critic("max", estimator=DV),
    "critic + select + dv": _critic("select", estimator=DV),
    "critic + pmi + dv": _critic("pmi", estimator=DV),
}
CATALOGUE: Final = (
    *("clip", "siglip", "cloob", "convirt", "clip_lite", "relaxed", "mil_global", "mil_mean", "lovt"),
    *("local_mi", "local_mi_critic", "local_mi_global", "local_mi_select", "local_mi_pmi"),
    *("mil_max", "mil_lse", "mil_noisy_or", "mil_attention", "mil_non_local", "lse_nl", "gloria", "dim"),
)
# AUROC and pointing of an independent implementation of the task, whose noise, temperature and critic are not
# known.
REFERENCE: Final[dict[str, tuple[float, float]]] = {
    "global": (0.841, 0.960),
    "clip": (0.841, 0.966),
    "mean of cosines": (0.769, 0.956),
    "max": (0.950, 0.922),
    "lse": (0.984, 0.981),
    "attention": (0.986, 0.982),
    "noisy-or": (0.986, 0.985),
    "lse + cap .5": (0.984, 0.982),
    "max + jsd": (0.992, 0.996),
    "max + jsd, one negative": (0.979, 0.978),
    "noisy-or + jsd": (0.993, 0.996),
    "max + dv": (0.923, 0.872),
    "critic + max + dv": (0.989, 0.990),
    "critic + max": (0.971, 0.949),
    # Pointing of these four was between .55 and .72.
    "critic + select + dv": (0.725, math.nan),
    "critic + pmi + dv": (0.733, math.nan),
    "critic + select": (0.782, math.nan),
    "critic + pmi": (0.822, math.nan),
    "select": (0.904, 0.82),
    "pmi": (0.913, 0.86),
}
# Best region of every pair, and the own pair's region kept for all texts, all else alike.
PAIRS: Final = tuple(
    (best, best.replace("max", kind) if "max" in best else f"{best}_{kind}")
    for best in ("max", "critic + max", "critic + max + dv", "local_mi")
    for kind in ("select", "pmi")
)


def recipe_of(row: str) -> MethodRecipe:
    """A combination or a recipe of the catalogue.

    Raises:
        ValueError: no such row.
    """
    recipe = COMBINATIONS.get(row, METHODS.get(row))
    if recipe is None:
        raise ValueError(f"no row '{row}'; rows are recipes of the catalogue and {', '.join(COMBINATIONS)}")
    return recipe
