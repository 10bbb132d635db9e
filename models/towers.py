"""Vision and text towers over the CLIP modules of transformers, with every token exposed.

The modules (and so the weights, their names and the export) are those of `transformers.CLIPModel`;
the forward is ours because token dropping, class-row scoring and word tokens need its inside.
B images or texts, P patches, T tokens, H tower width, D joint width, A attention heads, E head width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig

from models.outputs import at_least_float32
from models.token_scores import class_query_attention

# One fused kernel; CLIP's x * sigmoid(1.702 x) takes three and a sixth of a small step's time.
_ACTIVATION = "gelu"

# Pixel statistics of the original CLIP training set.
PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True, kw_only=True)
class TowerSettings:
    """Shape of both towers.

    Attributes:
        pretrained: folder of a local Hugging Face CLIP model; it then decides every shape below.
        image_size: pixels per side.
        patch_size: pixels per side of one patch; must divide `image_size`.
        vision_width, vision_layers, vision_heads: of the vision transformer.
        text_width, text_layers, text_heads: of the causal text transformer.
        embed_dim: width of the joint space.
        max_tokens: positions of the text tower, start and end tokens included.
    """

    pretrained: str | None = None
    image_size: int = 32
    patch_size: int = 8
    vision_width: int = 96
    vision_layers: int = 3
    vision_heads: int = 4
    text_width: int = 64
    text_layers: int = 2
    text_heads: int = 4
    embed_dim: int = 64
    max_tokens: int = 77

    def __post_init__(self) -> None:
        if self.image_size % self.patch_size:
            raise ValueError(
                f"patch_size must divide image_size, got {self.patch_size} and {self.image_size}"
            )
        for tower in ("vision", "text"):
            width, heads = getattr(self, f"{tower}_width"), getattr(self, f"{tower}_heads")
            if width % heads:
                raise ValueError(f"{tower}_heads must divide {tower}_width, got {heads} and {width}")

    @property
    def name(self) -> str:
        """Short name for result files."""
        if self.pretrained:
            return self.pretrained.rstrip("/").rpartition("/")[2]
        return f"vit-p{self.patch_size}-w{self.vision_width}-l{self.vision_layers}-px{self.image_size}"


@dataclass(frozen=True)
class VisionTokens:
    """Output of the vision tower before the joint projection, after the last layer norm.

    Attributes:
        pooled: class token, [B, H].
        patches: patch tokens that were kept, [B, P, H].
        class_attention: per layer the class query's attention [B, A, 1 + P]; empty unless asked for.
    """

    pooled: Tensor
    patches: Tensor
    class_attention: tuple[Tensor, ...] = ()


def build_clip(
    settings: TowerSettings, *, vocab_size: int, pad_id: int, start_id: int, end_id: int
) -> CLIPModel:
    """A CLIP model with random weights, or the one in `settings.pretrained`.

    Raises:
        ValueError: the pretrained folder's image size, vocabulary or text length does not fit the
            prepared data.
    """
    if settings.pretrained:
        clip = CLIPModel.from_pretrained(settings.pretrained, local_files_only=True)
        vision, text = clip.config.vision_config, clip.config.text_config
        if vision.image_size != settings.image_size:
            raise ValueError(
                f"{settings.pretrained} takes {vision.image_size} px images, the data is prepared at "
                f"{settings.image_size} px; set data.image_size={vision.image_size}"
            )
        if text.vocab_size < vocab_size:
            raise ValueError(
                f"{settings.pretrained} has {text.vocab_size} tokens, the data's tokenizer {vocab_size}; "
                f"set data.tokenizer={settings.pretrained}"
            )
        if text.max_position_embeddings < settings.max_tokens:
            raise ValueError(
                f"{settings.pretrained} takes {text.max_position_embeddings} text positions, texts may have "
                f"{settings.max_tokens}; set data.max_tokens={text.max_position_embeddings}"
            )
        return clip
    special = {"pad_token_id": pad_id, "bos_token_id": start_id, "eos_token_id": end_id}
    return CLIPModel(
        CLIPConfig(
            vision_config=CLIPVisionConfig(
                image_size=settings.image_size,
                patch_size=settings.patch_size,
                hidden_size=settings.vision_width,
                intermediate_size=4 * settings.vision_width,
                num_hidden_layers=settings.vision_layers,
                num_attention_heads=settings.vision_heads,
                hidden_act=_ACTIVATION,
            ),
            text_config=CLIPTextConfig(
                vocab_size=vocab_size,
                hidden_size=settings.text_width,
                intermediate_size=4 * settings.text_width,
                num_hidden_layers=settings.text_layers,
                num_attention_heads=settings.text_heads,
                max_position_embeddings=settings.max_tokens,
                hidden_act=_ACTIVATION,
                **special,
            ),
            projection_dim=settings.embed_dim,
        )
    )


def transformer_block(
    layer: nn.Module,
    tokens_BTH: Tensor,
    *,
    is_causal: bool = False,
    is_key: Tensor | None = None,
    with_class_row: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """One pre-norm block of transformers' CLIP encoder.

    Args:
        layer: a `CLIPEncoderLayer`.
        is_causal: a token sees itself and those before it.
        is_key: False at tokens that no token may see, bool [B, T]; not together with `is_causal`.
        with_class_row: also return the attention of token 0 over all tokens, [B, A, T]. Computing this
            one row beside fused attention is exact and holds no [T, T] map.
    """
    attention: Any = layer.self_attn
    normed = layer.layer_norm1(tokens_BTH)  # type: ignore[operator]
    split = (*normed.shape[:2], attention.num_heads, attention.head_dim)
    query, key, value = (
        projection(normed).view(split).transpose(1, 2)
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    mixed = F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=None if is_key is None else is_key[:, None, None, :],
        is_causal=is_causal,
        scale=attention.scale,
    )
    mixed = attention.out_proj(mixed.transpose(1, 2).reshape(normed.shape))
    tokens_BTH = tokens_BTH + mixed
    tokens_BTH = tokens_BTH + layer.mlp(layer.layer_norm2(tokens_BTH))  # type: ignore[operator]
    return tokens_BTH, class_query_attention(query[:, :, 0], key) if with_class_row else None


class VisionTower(nn.Module):
    """Patch transformer with a class token; patches can be dropped after positions are added."""

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(self, vision: Any) -> None:
        super().__init__()
        self.vision = vision
        self.register_buffer("pixel_mean", torch.tensor(PIXEL_MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(PIXEL_STD).view(1, 3, 1, 1), persistent=False)

    @property
    def grid(self) -> int:
        """Patches per side of a full-size image."""
        return int(self.vision.config.image_size // self.vision.config.patch_size)

    def _patch_positions(self, images: Tensor) -> Tensor:
        """Position embeddings of the patches of images of this size, [P, H]."""
        positions: Tensor = self.vision.embeddings.position_embedding.weight[1:]
        patch_size = int(self.vision.config.patch_size)
        height, width = images.shape[2:]
        if height % patch_size or width % patch_size:
            raise ValueError(
                f"sides of an image must be multiples of the patch size {patch_size}, got {height} x {width}"
            )
        size = (height // patch_size, width // patch_size)
        if size == (self.grid, self.grid):
            return positions
        map_1HGG = at_least_float32(positions).T.reshape(1, -1, self.grid, self.grid)
        resized = F.interpolate(map_1HGG, size=size, mode="bicubic", align_corners=False)
        return resized.flatten(2)[0].T.to(positions.dtype)

    def forward(
        self, images: Tensor, *, kept: Tensor | None = None, with_class_attention: bool = False
    ) -> VisionTokens:
        """Encode images.

        Args:
            images: grey levels 0..255 as float, [B, 3, S, S]; S may be any multiple of the patch size.
                At another size than the tower's own, its grid of position embeddings is resized
                bicubically.
            kept: indices of the patches to keep in the images' own grid, ascending, int64 [B, K]; None
                keeps all. A kept patch keeps the position it has in that grid.
            with_class_attention: also return every layer's class row.

        Raises:
            ValueError: a side that is no multiple of the patch size.

        Source: other sizes after A-CLIP's half-resolution scorer, arXiv 2212.08653, whose code is not
            released; bicubic without antialiasing is what CLIP code commonly does with positions.
        """
        embeddings = self.vision.embeddings
        patch_positions = self._patch_positions(images)
        pixels = (images / 255.0 - self.pixel_mean) / self.pixel_std
        patches = embeddings.patch_embedding(pixels).flatten(2).transpose(1, 2) + patch_positions
        if kept is not None:
            patches = patches.gather(1, kept[:, :, None].expand(-1, -1, patches.shape[2]))
        class_position = embeddings.position_embedding.weight[0]
        class_token = (embeddings.class_embedding + class_position).expand(patches.shape[0], 1, -1)
        tokens = self.vision.pre_layrnorm(torch.cat([class_token.to(patches.dtype), patches], 1))
        rows = []
        for layer in self.vision.encoder.layers:
            tokens, row = transformer_block(layer, tokens, with_class_row=with_class_attention)
            if row is not None:
                rows.append(row)
        tokens = self.vision.post_layernorm(tokens)
        return VisionTokens(tokens[:, 0], tokens[:, 1:], tuple(rows))


class TextTower(nn.Module):
    """Text transformer, causal unless asked; the state at the last real token is the text's feature."""

    def __init__(self, text: Any) -> None:
        super().__init__()
        self.text = text

    def forward(
        self,
        token_ids: Tensor | None,
        is_real_token: Tensor,
        *,
        attention: Literal["causal", "full"] = "causal",
        inputs_embeds: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Encode texts that are padded on the right to the longest of the batch.

        Args:
            token_ids: int64 [B, T]; None when `inputs_embeds` is given.
            is_real_token: bool [B, T]; the last True of a row is its end token.
            attention: "causal" is CLIP's own. "full" lets every token see all real tokens, as masked
                language modelling needs; the weights are the same.
            inputs_embeds: token embeddings before positions are added, [B, T, H], for learned prompts.

        Returns:
            Feature [B, H] and every position's state [B, T, H]. No real position depends on padding.
            States at padding mean nothing: when causal they see padding, when full all real tokens.

        Raises:
            ValueError: not exactly one of ids and embeddings, a mask of another shape, more tokens than
                the tower has positions, or another attention.
        """
        if attention not in ("causal", "full"):
            raise ValueError(f"attention must be 'causal' or 'full', got {attention!r}")
        tokens = self._embed(token_ids, inputs_embeds, is_real_token)
        is_key = is_real_token if attention == "full" else None
        for layer in self.text.encoder.layers:
            tokens, _ = transformer_block(layer, tokens, is_causal=is_key is None, is_key=is_key)
        tokens = self.text.final_layer_norm(tokens)
        end = is_real_token.sum(1) - 1
        return tokens[torch.arange(len(tokens), device=tokens.device), end], tokens

    def _embed(self, token_ids: Tensor | None, inputs_embeds: Tensor | None, is_real: Tensor) -> Tensor:
        """Token embeddings with positions, [B, T, H]."""
        if (token_ids is None) == (inputs_embeds is None):
            raise ValueError("the text tower takes either token_ids or inputs_embeds")
        embeddings = self.text.embeddings
        tokens: Tensor = embeddings.token_embedding(token_ids) if inputs_embeds is None else inputs_embeds
        if tokens.shape[:2] != is_real.shape:
            raise ValueError(
                f"is_real_token has shape {tuple(is_real.shape)}, texts are {tuple(tokens.shape[:2])}"
            )
        positions: Tensor = embeddings.position_embedding.weight
        if tokens.shape[1] > len(positions):
            raise ValueError(f"texts have {tokens.shape[1]} tokens, the tower {len(positions)} positions")
        return tokens + positions[: tokens.shape[1]]
