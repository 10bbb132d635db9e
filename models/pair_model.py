"""Towers and objective of one method, and its loss on a batch.

The forward is the whole loss, so that wrapping this module for data parallelism covers every parameter.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.encoder import Encoder, encode_pairs
from models.gather import Gather
from models.objective import LossReport, Objective
from models.outputs import PairBatch, TeacherOutputs
from models.recipe import MethodRecipe
from models.widths import Widths


class PairModel(nn.Module):
    """Everything a method trains."""

    def __init__(self, clip: Any, recipe: MethodRecipe, *, num_rows: int) -> None:
        """Wrap a transformers CLIP model.

        Args:
            clip: a `transformers.CLIPModel`; its own temperature is not used.
            recipe: the method.
            num_rows: of the training split; a memory bank and prototypes remember each.
        """
        super().__init__()
        self.recipe = recipe
        self.encoder = Encoder(clip, recipe.features)
        text = clip.config.text_config
        self.objective = Objective(
            recipe,
            Widths(
                joint=self.encoder.width,
                vision=self.encoder.vision_width,
                text=self.encoder.text_width,
                grid=self.encoder.vision.grid,
                vocab_size=self.encoder.vocab_size,
                max_tokens=int(text.max_position_embeddings),
                num_rows=num_rows,
            ),
        )

    def forward(
        self, batch: PairBatch, kept: Tensor | None, teacher: TeacherOutputs | None, gather: Gather
    ) -> LossReport:
        """Loss of the global batch this worker's batch is a part of.

        Args:
            kept: patches every view's tower sees, int64 [V, B, K]; None for all.
        """
        if self.recipe.regularisers.token_entropy.counts_padding:
            batch = _as_long_as_the_longest(batch, gather, pad_id=self.encoder.pad_id)
        outputs = encode_pairs(self.encoder, self.recipe, batch, kept)
        # Half precision moves a similarity by up to 0.17 at an inverse temperature of 100.
        with torch.autocast(batch.images.device.type, enabled=False):
            report: LossReport = self.objective(outputs.float(), batch, teacher, gather)
        return report


def _as_long_as_the_longest(batch: PairBatch, gather: Gather, *, pad_id: int) -> PairBatch:
    """Texts padded to the longest of all workers: where padding counts, workers must not differ in it."""
    length = batch.token_ids.shape[2]
    longest = int(gather(torch.tensor([length], device=batch.token_ids.device)).max())
    missing = (0, longest - length)
    return replace(
        batch,
        token_ids=F.pad(batch.token_ids, missing, value=pad_id),
        is_real_token=F.pad(batch.is_real_token, missing),
    )
