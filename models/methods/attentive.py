"""Attentive token removal alone: CLIP whose tower sees the patches the EMA teacher attends to.

A-CLIP without its heads, one view or two (`attentive_2views`), keep ratio .5 (arXiv 2212.08653). Which
patches stay: the best (`attentive`; the paper's "low" strategy removes the lowest), the worst
(`attentive_high`), a mixture with random ones (`attentive_mixed`, our rule: the release has none), or as
many drawn at random (`attentive_random`, which needs no teacher).
"""

from __future__ import annotations

from dataclasses import replace

from models.recipe import MethodRecipe
from models.training_slots import Features, TokenSelection

ATTENTIVE = MethodRecipe(
    name="attentive",
    source="Yang et al. 2023, arXiv 2212.08653, token removal alone",
    evidence="official",
    selection=TokenSelection(kind="attentive", keep_ratio=0.5),
)

ATTENTIVE_2VIEWS = replace(ATTENTIVE, name="attentive_2views", features=Features(num_views=2))

ATTENTIVE_HIGH = replace(
    ATTENTIVE, name="attentive_high", selection=replace(ATTENTIVE.selection, kind="high")
)

ATTENTIVE_MIXED = replace(
    ATTENTIVE,
    name="attentive_mixed",
    evidence="derived",
    selection=replace(ATTENTIVE.selection, kind="mixed"),
)

ATTENTIVE_RANDOM = replace(
    ATTENTIVE, name="attentive_random", selection=replace(ATTENTIVE.selection, kind="random")
)

RECIPES = (ATTENTIVE, ATTENTIVE_2VIEWS, ATTENTIVE_HIGH, ATTENTIVE_MIXED, ATTENTIVE_RANDOM)
