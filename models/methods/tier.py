"""TIER: CLIP whose words and patches are pushed to attend to few partners.

The image feature is the mean of the projected patches, as in the authors' code, so the regulariser and
the contrastive loss act on the same projection. `tier` leaves padding out of both entropies;
`tier_release` counts it as words up to the longest text of the global batch, as the authors' code does on one
process. Deviation of both: the learned temperature is clamped. The authors draw both weights from
U(0, 0.5); the published pair is not verified. At the code's entropy temperature of 1 the entropies can fall
by about 12 % only, so it is searched too.
"""

from __future__ import annotations

from dataclasses import replace

from models.recipe import MethodRecipe
from models.training_slots import Features, Regularisers, TokenEntropy

TIER = MethodRecipe(
    name="tier",
    source="Palepu and Beam 2023, TIER-regularised CLIP, CHIL",
    evidence="official",
    features=Features(image="patch_mean"),
    regularisers=Regularisers(token_entropy=TokenEntropy(token_over_patches=0.1, patch_over_tokens=0.2)),
)

TIER_RELEASE = replace(
    TIER,
    name="tier_release",
    regularisers=Regularisers(token_entropy=replace(TIER.regularisers.token_entropy, padding="counted")),
)

RECIPES = (TIER, TIER_RELEASE)
