"""TIER: CLIP whose words and patches are pushed to attend to few partners.

The image feature is the mean of the projected patches, as in the authors' code, so the regulariser and
the contrastive loss act on the same projection. Deviations: padding is left out of both entropies
(`padding: counted` restores the code's behaviour) and the learned temperature is clamped.
"""

from __future__ import annotations

from models.recipe import Features, MethodRecipe, Regularisers, TokenEntropy

TIER = MethodRecipe(
    name="tier",
    source="Palepu and Beam 2023, TIER-regularised CLIP, CHIL",
    evidence="official",
    features=Features(image="patch_mean"),
    # The authors draw both weights from U(0, 0.5); the published pair is not verified.
    regularisers=Regularisers(token_entropy=TokenEntropy(token_over_patches=0.1, patch_over_tokens=0.2)),
)
