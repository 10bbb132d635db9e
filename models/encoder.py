"""Both towers and what leads from them into the joint space.

B images or texts, V views, M texts of a pair, P patches, T tokens, D joint width, H width of a tower.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.attention_pool import AttentionPool
from models.crops import crop_images
from models.keyed_noise import Draw, keyed_uniform
from models.outputs import MaskedImage, MaskedText, PairBatch, PairOutputs, at_least_float32
from models.projections import MIBlock, MLPProjection
from models.recipe import MethodRecipe
from models.text_heads import mask_tokens
from models.token_selection import keep_random
from models.towers import TextTower, VisionTower
from models.training_slots import Features

_POOL_HEADS = 4


class Encoder(nn.Module):
    """From pixels and token ids to unit embeddings, patches and words in the joint space."""

    def __init__(self, clip: Any, features: Features) -> None:
        """Wrap a transformers CLIP model; its own temperature is not used."""
        super().__init__()
        self.features = features
        self.vision = VisionTower(clip.vision_model)
        self.text = TextTower(clip.text_model)
        widths = clip.visual_projection.in_features, clip.text_projection.in_features
        self.vision_width, self.text_width = widths
        # A block may not be narrower than what it takes in, and both must end in one space.
        self.width = max(widths) if features.projection == "mi_block" else clip.visual_projection.out_features
        self.vocab_size = int(clip.config.text_config.vocab_size)
        self.pad_id = int(clip.config.text_config.pad_token_id)
        if features.projection == "linear":
            self.visual_projection, self.text_projection = clip.visual_projection, clip.text_projection
        else:
            self.visual_projection, self.text_projection = (self._projection(width) for width in widths)
        self.patch_pool = (
            AttentionPool(self.vision_width, _POOL_HEADS) if features.image == "attention" else None
        )
        self.report_pool = AttentionPool(self.width, _POOL_HEADS) if features.report == "attention" else None

    def _projection(self, width: int) -> nn.Module:
        if self.features.projection == "mlp":
            return MLPProjection(width, hidden=max(width, self.width), out=self.width)
        return MIBlock(width, units=self.width)

    def embed_images(
        self, images: Tensor, *, kept: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        """Encode grey levels 0..255, float [B, 3, S, S].

        Args:
            kept: indices of the patches the tower sees, int64 [B, K].

        Returns:
            Unit embeddings [B, D], patches in the joint space [B, P, D], the pooled feature [B, H] and the
            patches [B, P, H] before the projection, and the attention pool's weights [B, P] or None.
        """
        tokens = self.vision(images, kept=kept)
        patches = self.visual_projection(tokens.patches)
        pooled, weights = tokens.pooled, None
        if self.patch_pool is not None:
            pooled, weights = self.patch_pool(tokens.patches)
        if self.features.image == "patch_mean":
            pooled, embeds = tokens.patches.mean(1), at_least_float32(patches).mean(1)
        else:
            embeds = at_least_float32(self.visual_projection(pooled))
        return F.normalize(embeds, dim=1), patches, pooled, tokens.patches, weights

    def embed_texts(self, token_ids: Tensor, is_real_token: Tensor) -> tuple[Tensor, Tensor]:
        """Unit embeddings [B, D] and every position in the joint space [B, T, D]."""
        pooled, tokens = self.text(token_ids, is_real_token, attention=self.features.text_attention)
        embeds = at_least_float32(self.text_projection(pooled))
        return F.normalize(embeds, dim=1), self.text_projection(tokens)

    def embed_reports(self, text_embeds: Tensor, is_text: Tensor) -> tuple[Tensor, Tensor | None]:
        """One unit embedding per pair [B, D] from those of its texts, and the pool's weights [B, M].

        Args:
            text_embeds: unit, [M, B, D].
            is_text: False at texts a pair does not have, [M, B].
        """
        if self.report_pool is not None:
            pooled, weights = self.report_pool(text_embeds.transpose(0, 1), is_text.T)
            return F.normalize(pooled, dim=1), weights
        if self.features.report == "mean":
            return F.normalize((text_embeds * is_text[:, :, None]).sum(0), dim=1), None
        return text_embeds[0], None

    def forward(self, batch: PairBatch, kept: Tensor | None) -> PairOutputs:
        """Encode every view and every text; `kept` is [V, B, K] or None."""
        views = [
            self.embed_images(crop_images(batch.images, boxes), kept=None if kept is None else kept[view])
            for view, boxes in enumerate(batch.view_boxes)
        ]
        embeds, patches, pooled, features, weights = zip(*views, strict=True)
        num_texts, num_pairs = batch.is_text.shape
        token_ids, is_real_token = batch.token_ids.flatten(0, 1), batch.is_real_token.flatten(0, 1)
        text_embeds, words = self.embed_texts(token_ids, is_real_token)
        text_embeds = text_embeds.view(num_texts, num_pairs, -1)
        report_embeds, text_weights = self.embed_reports(text_embeds, batch.is_text)
        return PairOutputs(
            image_embeds=torch.stack(embeds),
            text_embeds=text_embeds,
            report_embeds=report_embeds,
            is_text=batch.is_text,
            image_tokens=torch.stack(patches),
            text_tokens=words[:num_pairs],
            is_real_token=batch.is_real_token[0],
            image_features=torch.stack(pooled),
            patch_features=torch.stack(features),
            patch_weights=None if weights[0] is None else torch.stack(weights),
            text_weights=text_weights,
        )

    def encode_masked_text(self, batch: PairBatch, share: float) -> MaskedText:
        """Text 0 with some tokens masked, through the text tower alone.

        The padding token stands for a mask: full attention never sees it elsewhere.
        """
        token_ids, is_real = batch.token_ids[0], batch.is_real_token[0]
        length = token_ids.shape[1]
        # As many draws per row as the tower has positions: a row's draws must not depend on the padding.
        positions = self.text.text.config.max_position_embeddings
        noise = keyed_uniform(batch.draw_keys, Draw.MASKED_TOKENS, 3 * positions).view(-1, positions, 3)
        corrupted, is_target = mask_tokens(
            token_ids,
            is_real,
            noise[:, :length],
            mask_id=self.pad_id,
            vocab_size=self.vocab_size,
            share=share,
        )
        _, states = self.text(corrupted, is_real, attention="full")
        return MaskedText(states, token_ids, is_target)

    def encode_masked_image(self, batch: PairBatch, keep_ratio: float) -> MaskedImage:
        """View 0 with patches removed at random, through the vision tower alone."""
        noise = keyed_uniform(batch.draw_keys, Draw.MASKED_PATCHES, self.vision.grid**2)
        kept = keep_random(noise, keep_ratio=keep_ratio)
        tokens = self.vision(crop_images(batch.images, batch.view_boxes[0]), kept=kept)
        return MaskedImage(tokens.patches, kept)


def encode_pairs(
    encoder: Encoder, recipe: MethodRecipe, batch: PairBatch, kept: Tensor | None
) -> PairOutputs:
    """Everything the recipe's objective reads of a batch."""
    outputs: PairOutputs = encoder(batch, kept)
    heads = recipe.heads
    if heads.masked_tokens.weight:
        outputs = replace(outputs, masked_text=encoder.encode_masked_text(batch, heads.masked_tokens.share))
    if heads.masked_distillation.weight:
        masked = encoder.encode_masked_image(batch, heads.masked_distillation.keep_ratio)
        outputs = replace(outputs, masked_image=masked)
    return outputs
