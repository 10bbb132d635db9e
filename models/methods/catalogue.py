"""The methods, by name. Adding one: a recipe file, a space file, a line here and one in the spaces."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from models.methods import (
    aclip,
    attentive,
    biovil,
    bounds,
    clip,
    clip_lite,
    cloob,
    cmc,
    components,
    convirt,
    dim,
    flip,
    gloria,
    local_mi,
    lovt,
    maskclip,
    mil,
    pcl,
    relaxed,
    siglip,
    slip,
    softclip,
    tier,
)
from models.recipe import MethodRecipe

# A family: the card, which is the docstring of its file, and its recipes.
_FAMILIES: Final[tuple[tuple[str | None, Iterable[MethodRecipe]], ...]] = (
    (clip.__doc__, clip.RECIPES),
    (siglip.__doc__, siglip.RECIPES),
    (tier.__doc__, tier.RECIPES),
    (cloob.__doc__, cloob.RECIPES),
    (aclip.__doc__, aclip.RECIPES),
    (attentive.__doc__, attentive.RECIPES),
    (flip.__doc__, flip.RECIPES),
    (slip.__doc__, slip.RECIPES),
    (maskclip.__doc__, maskclip.RECIPES),
    (softclip.__doc__, softclip.RECIPES),
    (local_mi.__doc__, local_mi.RECIPES),
    (mil.__doc__, mil.RECIPES),
    (gloria.__doc__, gloria.RECIPES),
    (dim.__doc__, dim.RECIPES),
    (convirt.__doc__, convirt.RECIPES),
    (clip_lite.__doc__, clip_lite.RECIPES),
    (relaxed.__doc__, relaxed.RECIPES),
    (lovt.__doc__, lovt.RECIPES),
    (biovil.__doc__, biovil.RECIPES),
    (cmc.__doc__, cmc.RECIPES),
    (pcl.__doc__, pcl.RECIPES),
    (bounds.__doc__, bounds.RECIPES),
    (components.__doc__, components.RECIPES),
)

METHODS: Final[dict[str, MethodRecipe]] = {
    recipe.name: recipe for _, recipes in _FAMILIES for recipe in recipes
}

CARDS: Final[dict[str, str]] = {recipe.name: card or "" for card, recipes in _FAMILIES for recipe in recipes}
