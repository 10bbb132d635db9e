"""Fitting prompts on a trained run's towers: the towers as a function of prompts, and how far the fit is."""

# S shots, N rows of a split, M context tokens, D joint width

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from models.encoder import Encoder
from models.outputs import at_least_float32
from models.prompt_learning import ClassNames, FittedPrompts, PromptSettings, fit_prompts
from pipelines.config import PromptConfig
from pipelines.tokenizer import TextTokenizer
from pipelines.train_step import Trainer

# Every image has class embeddings of its own: texts are images times classes.
_IMAGES_AT_ONCE, _TEXTS_AT_ONCE = 64, 4096
_QUIET_S = 5.0


class PromptFitter:
    """Fits and applies prompts on one model, telling how far it is."""

    def __init__(
        self,
        trainer: Trainer,
        tokenizer: TextTokenizer,
        settings: PromptConfig,
        *,
        context_ids: Sequence[int],
        name_ids: Sequence[Sequence[int]],
        row_counts: Sequence[int],
    ) -> None:
        """Args:
        context_ids, name_ids: tokens of the first context and of each class name, without start and end.
        row_counts: sizes of the sets of images that will be scored, to know how much there is to do.
        """
        self._device, encoder = trainer.device, trainer.model.encoder
        table = encoder.text.text.embeddings.token_embedding
        self._context_MW = table.weight[list(context_ids)].detach()
        self._names = ClassNames.from_ids(
            table, name_ids, start_id=tokenizer.start_id, end_id=tokenizer.end_id
        )
        self._images_at_once = max(1, min(_IMAGES_AT_ONCE, _TEXTS_AT_ONCE // len(name_ids)))
        self._settings = PromptSettings(
            scale=trainer.model.objective.scale("main", table.weight).inverse_temperature.item(),
            counterfactual=settings.counterfactual,
            num_steps=settings.num_steps,
            batch_size=min(PromptSettings.batch_size, self._images_at_once),
            learning_rate=settings.learning_rate,
            seed=trainer.seed,
        )
        num_chunks = sum(math.ceil(count / self._images_at_once) for count in row_counts)
        # The first batch of a fit finds the hardest classes.
        num_batches = 2 * (1 + self._settings.num_steps + num_chunks)
        self._encode = PromptTower(encoder, _Progress("few-shot prompts", num_batches))

    def fit(self, images_SD: Tensor, labels_S: Tensor) -> tuple[FittedPrompts, FittedPrompts]:
        """Prompts with the counterfactual term, and without."""
        with_term, without = (
            fit_prompts(
                images_SD.to(self._device),
                labels_S.to(self._device),
                self._names,
                context_MW=self._context_MW,
                encode_prompts=self._encode,
                settings=settings,
            )
            for settings in (
                self._settings,
                replace(self._settings, counterfactual=0.0, intervention_norm=0.0),
            )
        )
        return with_term, without

    def scores(self, prompts: FittedPrompts, images_ND: Tensor) -> NDArray[np.float32]:
        """Scores of images and classes, [N, C]."""
        parts = torch.split(images_ND.to(self._device), self._images_at_once)
        found: NDArray[np.float32] = torch.cat([prompts.scores(part) for part in parts]).cpu().numpy()
        return found


class PromptTower:
    """The frozen text tower with its projection, as `models.prompt_learning.PromptEncoder`."""

    def __init__(self, encoder: Encoder, on_batch: _Progress | None = None) -> None:
        self._encoder, self._on_batch = encoder, on_batch

    def __call__(self, embeddings: Tensor, lengths: Tensor) -> Tensor:
        """Unit embeddings of prompts, as `Encoder.embed_texts` and `embed_reports` give them for tokens."""
        if self._on_batch is not None:
            self._on_batch()
        encoder = self._encoder
        is_real = torch.arange(embeddings.shape[1], device=embeddings.device) < lengths[:, None]
        pooled, _ = encoder.text(
            None, is_real, attention=encoder.features.text_attention, inputs_embeds=embeddings
        )
        embeds = F.normalize(at_least_float32(encoder.text_projection(pooled)), dim=1)
        return encoder.embed_reports(embeds[None], is_real[None, :, 0])[0]


class _Progress:
    """A line every few seconds of long work, on the error stream: the output may be going into a file."""

    def __init__(self, what: str, total: int) -> None:
        self._what, self._done, self._total = what, 0, total
        self._last = time.monotonic()

    def __call__(self) -> None:
        self._done += 1
        now = time.monotonic()
        if now - self._last >= _QUIET_S:
            self._last = now
            print(f"  {self._what}: {self._done:,} of {self._total:,} batches", file=sys.stderr)
