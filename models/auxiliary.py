"""Auxiliary heads of a method and their losses.

Each head leaves a few numbers per local pair; the rows of all workers are gathered and reduced.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.distillation import DistilCritic, MaskedDistillationHead, distil_jsd_rows
from models.features import PairFeatures
from models.hashing import HashHead, hash_loss
from models.heads import Predictor, Projector, SimCLRProjector, byol_rows, simclr_rows
from models.outputs import TeacherOutputs
from models.text_heads import CaptionHead, MaskedTokenHead, caption_rows, reduce_counted
from models.training_slots import Heads
from models.widths import Widths


def _scaled(width: int, ratio: float) -> int:
    return max(8, round(width * ratio))


class AuxiliaryHeads(nn.Module):
    """The heads a recipe switches on; the others do not exist."""

    def __init__(self, heads: Heads, widths: Widths) -> None:
        super().__init__()
        self.settings = heads
        vision = widths.vision
        simclr, byol = heads.simclr, heads.byol
        self.simclr = self.byol_projector = self.byol_predictor = None
        self.masked_tokens = self.caption = self.hash = None
        self.distil_global = self.distil_local = self.masked_distillation = None
        if simclr.weight:
            hidden, out = _scaled(vision, simclr.hidden_ratio), _scaled(vision, simclr.out_ratio)
            self.simclr = SimCLRProjector(vision, hidden=hidden, out=out)
        if byol.weight:
            hidden, out = _scaled(vision, byol.hidden_ratio), _scaled(vision, byol.out_ratio)
            self.byol_projector = Projector(vision, hidden=hidden, out=out)
            self.byol_predictor = Predictor(out, hidden=hidden)
        if heads.masked_tokens.weight:
            self.masked_tokens = MaskedTokenHead(widths.text, widths.vocab_size)
        if heads.caption.weight:
            self.caption = CaptionHead(
                widths.joint,
                widths.text,
                widths.vocab_size,
                num_layers=heads.caption.num_layers,
                num_heads=heads.caption.num_heads,
                max_tokens=widths.max_tokens,
            )
        if heads.distil.weight:
            target = vision if self.byol_projector is None else _scaled(vision, byol.out_ratio)
            self.distil_global, self.distil_local = (DistilCritic(vision, target) for _ in range(2))
        if heads.masked_distillation.weight:
            masked = heads.masked_distillation
            self.masked_distillation = MaskedDistillationHead(
                vision,
                vision,
                grid=widths.grid,
                num_codes=masked.num_codes,
                num_layers=masked.num_layers,
                num_heads=masked.num_heads,
            )
        if heads.hash.weight:
            self.hash = HashHead(widths.joint, heads.hash.num_bits)

    def forward(self, features: PairFeatures) -> dict[str, Tensor]:
        """Weighted terms by name, scalars of the global batch."""
        terms: dict[str, Tensor] = {}
        self._add_image_heads(features, terms)
        self._add_text_heads(features, terms)
        self._add_distillation(features, terms)
        if self.hash is not None:
            images, texts = self.hash(features.image(0), features.report)
            total, _ = hash_loss(features.gather(images), features.gather(texts), self.settings.hash)
            terms["hash"] = self.settings.hash.weight * total
        return terms

    def _add_image_heads(self, features: PairFeatures, terms: dict[str, Tensor]) -> None:
        gather, pooled = features.gather, features.outputs.image_features
        if self.simclr is not None:
            # The last two: with a third view, the first is the tables' own.
            first, second = (self.simclr(view) for view in pooled[-2:])
            rows = simclr_rows(first, second, gather=gather, temperature=self.settings.simclr.temperature)
            terms["simclr"] = self.settings.simclr.weight * gather(rows).mean()
        if self.byol_projector is not None and self.byol_predictor is not None:
            target = _teacher(features, "heads.byol").features
            rows = torch.stack(
                [byol_rows(self.byol_predictor(self.byol_projector(view)), target) for view in pooled]
            ).mean(0)
            terms["byol"] = self.settings.byol.weight * gather(rows).mean()

    def _add_text_heads(self, features: PairFeatures, terms: dict[str, Tensor]) -> None:
        gather, outputs, batch = features.gather, features.outputs, features.batch
        if self.masked_tokens is not None:
            masked = outputs.masked_text
            assert masked is not None
            rows = self.masked_tokens.rows(masked.states, masked.token_ids, masked.is_target)
            terms["masked_tokens"] = self.settings.masked_tokens.weight * reduce_counted(gather(rows)).sum()
        if self.caption is not None:
            token_ids, is_real = batch.token_ids[0], batch.is_real_token[0]
            logits = self.caption(outputs.image_tokens[0], token_ids, is_real)
            rows = caption_rows(logits, token_ids, is_real)
            terms["caption"] = self.settings.caption.weight * reduce_counted(gather(rows)).sum()

    def _add_distillation(self, features: PairFeatures, terms: dict[str, Tensor]) -> None:
        gather, settings = features.gather, self.settings
        if self.distil_global is not None and self.distil_local is not None:
            target, share = _teacher(features, "heads.distil").features, settings.distil.global_share
            negatives = gather(target)[features.rolled()]
            whole = distil_jsd_rows(
                features.outputs.image_features[0], target, negatives, critic=self.distil_global
            )
            patches = distil_jsd_rows(
                features.outputs.patch_features[0], target, negatives, critic=self.distil_local
            )
            rows = share * whole + (1 - share) * patches
            terms["distil"] = settings.distil.weight * gather(rows).mean()
        if self.masked_distillation is not None:
            masked = features.outputs.masked_image
            targets = _teacher(features, "heads.masked_distillation").patches
            assert masked is not None
            assert targets is not None
            rows = self.masked_distillation.rows(
                masked.patches,
                masked.kept,
                targets,
                student_temperature=settings.masked_distillation.student_temperature,
                teacher_temperature=settings.masked_distillation.teacher_temperature,
            )
            weight = settings.masked_distillation.weight
            terms["masked_distillation"] = weight * reduce_counted(gather(rows)).sum()


def _teacher(features: PairFeatures, head: str) -> TeacherOutputs:
    if features.teacher is None:
        raise ValueError(f"{head} needs the EMA teacher's features, got none")
    return features.teacher
