"""Regularisers of a method as terms of its loss."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.features import PairFeatures
from models.keyed_noise import Draw, keyed_uniform
from models.prior import PriorDiscriminator, prior_rows
from models.regularisers import (
    TokenEntropies,
    matched_similarities,
    projection_directions,
    sliced_wasserstein,
    token_entropies,
    uniformity,
)
from models.training_slots import Regularisers, TokenEntropy


class Penalties(nn.Module):
    """The regularisers a recipe switches on; the adversarial prior is the one with parameters."""

    def __init__(self, settings: Regularisers, *, width: int) -> None:
        super().__init__()
        self.settings = settings
        self.discriminator = PriorDiscriminator(width) if settings.prior.is_on else None

    def forward(self, features: PairFeatures) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Weighted terms and diagnostics by name, scalars of the global batch."""
        terms: dict[str, Tensor] = {}
        diagnostics: dict[str, Tensor] = {}
        if self.settings.token_entropy.is_on:
            _add_token_entropy(self.settings.token_entropy, features, terms, diagnostics)
        spread, gap = self.settings.uniformity, self.settings.sliced_wasserstein
        if spread.is_on:
            images, texts = features.all_images(0), features.all_reports()
            both = uniformity(images, scale=spread.scale) + uniformity(texts, scale=spread.scale)
            terms["uniformity"] = spread.weight * 0.5 * both
        if gap.is_on:
            images, texts = features.all_images(0), features.all_reports()
            directions = projection_directions(
                features.all_keys("draw_keys").sum(),
                step=0,
                num_directions=gap.num_directions,
                width=images.shape[1],
            )
            terms["sliced_wasserstein"] = gap.weight * sliced_wasserstein(images, texts, directions)
            diagnostics["modality_gap"] = (images.mean(0) - texts.mean(0)).norm().detach()
        if self.discriminator is not None:
            self._add_prior(self.discriminator, features, terms)
        return terms, diagnostics

    def _add_prior(
        self, discriminator: PriorDiscriminator, features: PairFeatures, terms: dict[str, Tensor]
    ) -> None:
        pooled = features.outputs.image_features[0]
        noise = keyed_uniform(features.batch.draw_keys, Draw.PRIOR, pooled.shape[1])
        encoder, opponent = prior_rows(
            discriminator, pooled, noise, gradient_penalty=self.settings.prior.penalty
        )
        terms["prior"] = self.settings.prior.weight * features.gather(encoder).mean()
        terms["prior_discriminator"] = features.gather(opponent).mean()


def _add_token_entropy(
    settings: TokenEntropy,
    features: PairFeatures,
    terms: dict[str, Tensor],
    diagnostics: dict[str, Tensor],
) -> None:
    outputs = features.outputs
    is_real = outputs.is_real_token if settings.padding == "masked" else None
    per_view = []
    for patches in outputs.image_tokens:
        similarities = matched_similarities(outputs.text_tokens, patches)
        entropies = token_entropies(similarities, temperature=settings.temperature, is_real_token=is_real)
        per_view.append(TokenEntropies.from_tensor(features.gather(entropies.as_tensor())).reduce())
    over_patches = torch.stack([means.over_patches for means in per_view]).mean()
    over_tokens = torch.stack([means.over_tokens for means in per_view]).mean()
    terms["token_over_patches"] = settings.token_over_patches * over_patches
    terms["patch_over_tokens"] = settings.patch_over_tokens * over_tokens
    diagnostics["entropy_over_patches"] = per_view[0].normalised_over_patches.detach()
    diagnostics["entropy_over_tokens"] = per_view[0].normalised_over_tokens.detach()
