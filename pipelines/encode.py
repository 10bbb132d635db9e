"""The trained towers as the encoder evaluation asks for."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.hashing import HashHead, binary_codes
from models.pair_model import PairModel
from models.teacher import EmaTeacher, select_tokens
from models.token_scores import class_attention_scores, map_scores_to_view
from models.towers import VisionTower
from pipelines.evaluation.encoder import ImageEncodings
from pipelines.keyed_random import Purpose, keyed_uniform
from pipelines.tokenizer import TextTokenizer

Readout = Literal["all", "kept", "codes"]

_TEXTS_PER_BATCH = 256


class ModelEncoder:
    """Encodes images and texts with a model that is no longer trained.

    A model can be read in several ways. `all`: its tower sees every patch. `kept`: it sees the patches the
    method would have kept, chosen by the EMA teacher on the whole image; a model trained on kept patches
    answers differently to both. `codes`: the hash head's bits as unit vectors, whose cosines rank as Hamming
    distances do.
    """

    def __init__(
        self,
        model: PairModel,
        tokenizer: TextTokenizer,
        *,
        teacher: EmaTeacher | None = None,
        readout: Readout = "all",
    ) -> None:
        self._model, self._tokenizer, self._teacher = model, tokenizer, teacher
        self._readout = readout
        self._device = next(model.parameters()).device

    @torch.inference_mode()
    def encode_images(self, images: NDArray[np.uint8]) -> ImageEncodings:
        """uint8 [B, S, S, 3] -> unit embeddings [B, D] and unit patch embeddings [B, P, D]."""
        pixels = self._pixels(images)
        self._model.eval()
        if self._readout == "kept":
            embeds = self._model.encoder.embed_images(pixels, kept=self.kept(pixels))[0]
            return ImageEncodings(image_embeds=embeds.cpu().numpy(), patch_embeds=None)
        embeds, patches = self._model.encoder.embed_images(pixels)[:2]
        if self._readout == "codes":
            codes = _unit_codes(self._hash_head.image(embeds))
            return ImageEncodings(image_embeds=codes.cpu().numpy(), patch_embeds=None)
        unit_patches = torch.nn.functional.normalize(patches.float(), dim=2)
        return ImageEncodings(image_embeds=embeds.cpu().numpy(), patch_embeds=unit_patches.cpu().numpy())

    @torch.inference_mode()
    def encode_texts(self, texts: list[str]) -> NDArray[np.float32]:
        """Unit embeddings of texts, float32 [B, D]."""
        self._model.eval()
        parts = []
        for start in range(0, len(texts), _TEXTS_PER_BATCH):
            ids, is_real = self._tokenizer.pad(
                self._tokenizer.encode(texts[start : start + _TEXTS_PER_BATCH])
            )
            is_real_token = torch.as_tensor(is_real, device=self._device)
            embeds, _ = self._model.encoder.embed_texts(
                torch.as_tensor(ids, device=self._device), is_real_token
            )
            # A prompt is a report of one text.
            embeds, _ = self._model.encoder.embed_reports(embeds[None], is_real_token[None, :, 0])
            if self._readout == "codes":
                embeds = _unit_codes(self._hash_head.text(embeds))
            parts.append(embeds.cpu().numpy())
        return np.concatenate(parts)

    @torch.inference_mode()
    def token_scores(self, images: NDArray[np.uint8]) -> Tensor:
        """Score of every patch, [B, P]: the EMA teacher's class attention, or the model's own."""
        return self._scores(self._pixels(images))

    @torch.inference_mode()
    def kept(self, pixels: Tensor) -> Tensor | None:
        """Patches the method's rule keeps, [B, K]; None keeps all."""
        selection = self._model.recipe.selection
        grid = self._model.encoder.vision.grid
        # Evaluation draws are keyed by position: the same images in the same order give the same masks.
        noise = keyed_uniform(
            np.arange(len(pixels)), seed=0, epoch=0, purpose=Purpose.SELECTION, count=grid * grid
        )
        return select_tokens(
            selection,
            scores=self._scores(pixels) if selection.needs_teacher else None,
            noise=torch.as_tensor(noise, dtype=torch.float32, device=self._device),
            grid=grid,
        )

    def kept_mask(self, images: NDArray[np.uint8]) -> NDArray[np.bool_]:
        """True at patches the method's rule keeps, [B, P]."""
        kept = self.kept(self._pixels(images))
        grid = self._model.encoder.vision.grid
        mask = np.zeros((len(images), grid * grid), bool)
        if kept is None:
            return ~mask
        np.put_along_axis(mask, kept.cpu().numpy(), True, axis=1)
        return mask

    def _scores(self, pixels: Tensor) -> Tensor:
        if self._teacher is None:
            return _class_attention(self._model.encoder.vision, pixels)
        scores = _class_attention(self._teacher.vision, self._teacher.shrunk(pixels))
        if scores.shape[1] == self._model.encoder.vision.grid**2:
            return scores
        # The whole image, seen at the teacher's resolution and wanted at the model's.
        whole = torch.tensor([0.0, 0.0, *pixels.shape[2:]], device=self._device).repeat(len(pixels), 1)
        return map_scores_to_view(scores, whole, whole, out_side=self._model.encoder.vision.grid)

    @property
    def _hash_head(self) -> HashHead:
        head = self._model.objective.heads.hash
        if head is None:
            raise ValueError("only a method with heads.hash.weight > 0 has codes to be read")
        return head

    def _pixels(self, images: NDArray[np.uint8]) -> Tensor:
        return torch.as_tensor(images, device=self._device).permute(0, 3, 1, 2).float()


def _class_attention(vision: VisionTower, pixels: Tensor) -> Tensor:
    return class_attention_scores(vision(pixels, with_class_attention=True).class_attention)


def _unit_codes(pre_activations: Tensor) -> Tensor:
    """Bits as +-1 / sqrt(number of bits), float32 [B, L]."""
    bits = binary_codes(pre_activations).float() * 2 - 1
    return bits / pre_activations.shape[1] ** 0.5
