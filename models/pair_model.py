"""Towers, heads and temperatures of one method, and its loss on a batch.

The forward is the whole loss, so that wrapping this module for data parallelism covers every
parameter. B local pairs, V views, P patches, D joint width, H width of the vision tower.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.crops import crop_images
from models.gather import Gather
from models.heads import Predictor, Projector, SimCLRProjector, byol_rows, simclr_rows
from models.outputs import PairBatch, PairOutputs, TeacherOutputs, at_least_float32
from models.recipe import MethodRecipe, TableRecipe
from models.regularisers import TokenEntropies, matched_similarities, token_entropies
from models.similarities import PairFeatures, gather_features, pair_tables, retrieval_diagnostics
from models.towers import TextTower, VisionTower


@dataclass(frozen=True)
class LossReport:
    """A global loss, the same number on every worker.

    Attributes:
        loss: scalar with gradient.
        terms: the weighted parts it is the sum of, detached scalars.
        diagnostics: values to watch that are no part of the loss, detached scalars.
    """

    loss: Tensor
    terms: dict[str, Tensor]
    diagnostics: dict[str, Tensor]


class PairModel(nn.Module):
    """Everything a method trains."""

    def __init__(self, clip: nn.Module, recipe: MethodRecipe) -> None:
        """Wrap a transformers CLIP model.

        Args:
            clip: a `transformers.CLIPModel`; its own temperature is not used.
            recipe: the method.
        """
        super().__init__()
        self.recipe = recipe
        self.vision = VisionTower(clip.vision_model)
        self.text = TextTower(clip.text_model)
        self.visual_projection = clip.visual_projection
        self.text_projection = clip.text_projection
        self.log_inverse_temperatures = nn.ParameterDict()
        for name, table in recipe.tables.items():
            if table.temperature.policy == "learned":
                start = torch.tensor(-math.log(table.temperature.init))
                self.log_inverse_temperatures[name] = nn.Parameter(start)
        width = int(clip.visual_projection.in_features)  # type: ignore[union-attr,arg-type]
        simclr, byol = recipe.heads.simclr, recipe.heads.byol
        self.simclr = (
            SimCLRProjector(
                width, hidden=_scaled(width, simclr.hidden_ratio), out=_scaled(width, simclr.out_ratio)
            )
            if simclr.weight
            else None
        )
        hidden, out = _scaled(width, byol.hidden_ratio), _scaled(width, byol.out_ratio)
        self.byol_projector = Projector(width, hidden=hidden, out=out) if byol.weight else None
        self.byol_predictor = Predictor(out, hidden=hidden) if byol.weight else None

    def encode_images(self, images: Tensor, *, kept: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Unit embeddings [B, D], patch tokens in the joint space [B, P, D], pooled feature [B, H].

        Args:
            images: grey levels 0..255, float [B, 3, S, S].
            kept: indices of the patches the tower sees, int64 [B, K].
        """
        tokens = self.vision(images, kept=kept)
        patches = self.visual_projection(tokens.patches)  # type: ignore[operator]
        if self.recipe.features.image == "patch_mean":
            pooled = tokens.patches.mean(1)
            return F.normalize(at_least_float32(patches).mean(1), dim=1), patches, pooled
        embeds = self.visual_projection(tokens.pooled)  # type: ignore[operator]
        return F.normalize(at_least_float32(embeds), dim=1), patches, tokens.pooled

    def encode_texts(self, token_ids: Tensor, is_real_token: Tensor) -> tuple[Tensor, Tensor]:
        """Unit embeddings [B, D] and every position in the joint space [B, T, D]."""
        pooled, tokens = self.text(token_ids, is_real_token)
        embeds = self.text_projection(pooled)  # type: ignore[operator]
        return F.normalize(at_least_float32(embeds), dim=1), self.text_projection(tokens)  # type: ignore[operator]

    def encode(self, batch: PairBatch, kept: Tensor | None) -> PairOutputs:
        """Encode every view of a batch; `kept` is [V, B, K] or None."""
        views = [
            self.encode_images(crop_images(batch.images, boxes), kept=None if kept is None else kept[view])
            for view, boxes in enumerate(batch.view_boxes)
        ]
        image_embeds, image_tokens, image_features = (torch.stack(part) for part in zip(*views, strict=True))
        text_embeds, text_tokens = self.encode_texts(batch.token_ids, batch.is_real_token)
        return PairOutputs(
            image_embeds=image_embeds,
            text_embeds=text_embeds,
            image_tokens=image_tokens,
            text_tokens=text_tokens,
            is_real_token=batch.is_real_token,
            image_features=image_features,
        )

    def forward(
        self, batch: PairBatch, kept: Tensor | None, teacher: TeacherOutputs | None, gather: Gather
    ) -> LossReport:
        """Loss of the global batch this worker's batch is a part of."""
        outputs = self.encode(batch, kept)
        # Half precision moves a similarity by up to 0.17 at an inverse temperature of 100.
        with torch.autocast(batch.images.device.type, enabled=False):
            return self.loss(outputs.float(), batch, teacher, gather)

    def loss(
        self, outputs: PairOutputs, batch: PairBatch, teacher: TeacherOutputs | None, gather: Gather
    ) -> LossReport:
        """Sum of the recipe's tables, regularisers and heads, from features alone."""
        terms: dict[str, Tensor] = {}
        diagnostics: dict[str, Tensor] = {}
        views = gather_features(outputs, gather)
        for name, table in self.recipe.tables.items():
            inverse_temperature = self.inverse_temperature(name, outputs.text_embeds)
            losses = [
                table_loss(table, view, batch, gather=gather, inverse_temperature=inverse_temperature)
                for view in views
            ]
            terms[name] = table.weight * torch.stack(losses).mean()
            diagnostics[f"temperature/{name}"] = 1 / inverse_temperature.detach()
            diagnostics |= retrieval_diagnostics(table, views[0])
        self._add_token_entropy(outputs, gather, terms, diagnostics)
        self._add_heads(outputs, teacher, gather, terms)
        total = torch.stack(list(terms.values())).sum()
        return LossReport(total, {name: term.detach() for name, term in terms.items()}, diagnostics)

    def inverse_temperature(self, table: str, like: Tensor) -> Tensor:
        """1 / temperature of a table, scalar."""
        temperature = self.recipe.tables[table].temperature
        name = "main" if temperature.policy == "shared" else table
        if name in self.log_inverse_temperatures:
            logarithm: Tensor = self.log_inverse_temperatures[name]
            return logarithm.exp().to(like.dtype)
        return like.new_tensor(1 / self.recipe.tables[name].temperature.init)

    @torch.no_grad()
    def clamp_temperatures(self) -> None:
        """Keep learned temperatures in [minimum, 1]; called after each optimiser step."""
        for name, parameter in self.log_inverse_temperatures.items():
            parameter.clamp_(0.0, -math.log(self.recipe.tables[name].temperature.minimum))

    def _add_token_entropy(
        self,
        outputs: PairOutputs,
        gather: Gather,
        terms: dict[str, Tensor],
        diagnostics: dict[str, Tensor],
    ) -> None:
        settings = self.recipe.regularisers.token_entropy
        if not settings.is_on:
            return
        is_real = outputs.is_real_token if settings.padding == "masked" else None
        per_view = []
        for patches in outputs.image_tokens:
            similarities = matched_similarities(outputs.text_tokens, patches)
            entropies = token_entropies(similarities, temperature=settings.temperature, is_real_token=is_real)
            per_view.append(TokenEntropies.from_tensor(gather(entropies.as_tensor())).reduce())
        over_patches = torch.stack([means.over_patches for means in per_view]).mean()
        over_tokens = torch.stack([means.over_tokens for means in per_view]).mean()
        terms["token_over_patches"] = settings.token_over_patches * over_patches
        terms["patch_over_tokens"] = settings.patch_over_tokens * over_tokens
        diagnostics["entropy_over_patches"] = per_view[0].normalised_over_patches.detach()
        diagnostics["entropy_over_tokens"] = per_view[0].normalised_over_tokens.detach()

    def _add_heads(
        self,
        outputs: PairOutputs,
        teacher: TeacherOutputs | None,
        gather: Gather,
        terms: dict[str, Tensor],
    ) -> None:
        heads = self.recipe.heads
        if self.simclr is not None:
            first, second = (self.simclr(features) for features in outputs.image_features)
            rows = simclr_rows(first, second, gather=gather, temperature=heads.simclr.temperature)
            terms["simclr"] = heads.simclr.weight * gather(rows).mean()
        if self.byol_projector is not None and self.byol_predictor is not None:
            if teacher is None:
                raise ValueError("heads.byol needs the EMA teacher's features, got none")
            rows = torch.stack(
                [
                    byol_rows(self.byol_predictor(self.byol_projector(features)), teacher.features)
                    for features in outputs.image_features
                ]
            ).mean(0)
            terms["byol"] = heads.byol.weight * gather(rows).mean()


def table_loss(
    recipe: TableRecipe,
    features: PairFeatures,
    batch: PairBatch,
    *,
    gather: Gather,
    inverse_temperature: Tensor,
) -> Tensor:
    """Loss of one view's table before its weight: directions weighted, rows of all workers reduced."""
    tables = pair_tables(recipe, features, batch, gather=gather, inverse_temperature=inverse_temperature)
    losses = [
        getattr(recipe.directions, direction) * recipe.estimator.reduce(gather(recipe.estimator.rows(table)))
        for direction, table in tables.items()
    ]
    return torch.stack(losses).sum()


def _scaled(width: int, ratio: float) -> int:
    return max(8, round(width * ratio))
