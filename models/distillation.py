"""Distillation from a teacher that gets no gradient: mutual information, and codes of removed patches."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.outputs import at_least_float32

# B pairs of this worker, P patches of the grid, K kept patches, D feature width, H student width,
# C codes


def jsd_rows(positive_B: Tensor, negative_B: Tensor) -> Tensor:
    """Jensen-Shannon objective with one negative per positive, [B] in nats.

    softplus(-positive) + softplus(negative); 2 log 2 where the critic says nothing. The published form
    without the constant, so that it is 0 at best.

    Raises:
        ValueError: the shapes differ.

    Source: CLIP-Lite, arXiv 2112.07133; Deep InfoMax, arXiv 1808.06670, subtracts 2 log 2.
    """
    if positive_B.shape != negative_B.shape:
        raise ValueError(
            f"positives and negatives must have equal shapes, got {list(positive_B.shape)} "
            f"and {list(negative_B.shape)}"
        )
    return F.softplus(-at_least_float32(positive_B)) + F.softplus(at_least_float32(negative_B))


class DistilCritic(nn.Module):
    """Scaled cosine of small projections of the student's and the teacher's features.

    Source: MIMKD, arXiv 2110.15946; projections (linear, LayerNorm, ReLU, linear) and the scale
        e^theta with theta = log(1/.07) at the start are ours, after the same authors' CLIP-Lite.
        Like theirs the scale is learned and not clamped.
    """

    def __init__(self, student_width: int, teacher_width: int, *, width: int = 128) -> None:
        """Args:
            width: hidden and output width of both projections.

        Raises:
            ValueError: a width < 1.
        """
        if min(student_width, teacher_width, width) < 1:
            raise ValueError(f"critic widths must be >= 1, got {student_width}, {teacher_width} and {width}")
        super().__init__()
        self.student, self.teacher = (
            nn.Sequential(nn.Linear(side, width), nn.LayerNorm(width), nn.ReLU(), nn.Linear(width, width))
            for side in (student_width, teacher_width)
        )
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """[..., student width] and [..., teacher width] with axes that broadcast -> [...]."""
        mine = F.normalize(at_least_float32(self.student(student)), dim=-1)
        other = F.normalize(at_least_float32(self.teacher(teacher)), dim=-1)
        return self.log_scale.exp() * (mine * other).sum(-1)


def distil_jsd_rows(student: Tensor, teacher: Tensor, negatives: Tensor, *, critic: DistilCritic) -> Tensor:
    """Mutual information between student and teacher features of the same image, as a loss per image.

    Args:
        student: global features [B, D], or patches [B, P, D], whose loss is the mean over patches.
        teacher: global features [B, D'], or patches [B, P, D'] matched to the student's one by one.
            No gradient reaches them; the critic's projection of them is trained.
        negatives: the teacher's features of another image for each row, shaped like `teacher`. The
            caller rolls them over the global batch, so that the pairs do not depend on the workers.

    Returns:
        [B] in nats, >= 0. The mean over the rows of all workers is the loss of the global batch.

    Raises:
        ValueError: shapes that do not fit.

    Source: MIMKD, arXiv 2110.15946 (global-global, patches against the global feature, matched maps);
        no code was released.
    """
    if teacher.shape != negatives.shape or len(student) != len(teacher) or student.ndim not in (2, 3):
        raise ValueError(
            f"student must be [B, D] or [B, P, D] and teacher and negatives alike with the same B, got "
            f"{list(student.shape)}, {list(teacher.shape)} and {list(negatives.shape)}"
        )
    if teacher.ndim == 3 and student.shape[:2] != teacher.shape[:2]:
        raise ValueError(
            f"patches are matched one by one, got {list(student.shape)} of the student "
            f"and {list(teacher.shape)} of the teacher"
        )
    positive_side, negative_side = teacher.detach(), negatives.detach()
    if student.ndim > teacher.ndim:
        positive_side, negative_side = positive_side[:, None], negative_side[:, None]
    # one call, so that the student's patches are projected once
    positive, negative = critic(student[None], torch.stack([positive_side, negative_side]))
    rows = jsd_rows(positive, negative)
    return rows.mean(1) if rows.ndim == 2 else rows


def removed_patches(kept_BK: Tensor, num_patches: int) -> Tensor:
    """True where a patch of the grid was not kept, bool [B, P].

    Args:
        kept_BK: indices of the kept patches, int64 [B, K].
    """
    everything_BP = torch.ones(len(kept_BK), num_patches, dtype=torch.bool, device=kept_BK.device)
    return everything_BP.scatter(1, kept_BK, False)


class MaskedDistillationHead(nn.Module):
    """Predicts the teacher's patch features where the student's patches were removed, as soft codes.

    A decoder sees the student's kept patches and, for each removed one, a learned token; all carry the
    decoder's own positions. A code book shared by student and teacher turns a feature into scores.

    Source: MaskCLIP (Dong et al.), CVPR 2023; no code was released and the details are from memory:
        evidence paper-unverified. The cosine code book on layer-normed features is ours. Nothing in the
        loss keeps the codes apart, so it belongs beside a contrastive loss, with a small weight (.05).
    """

    def __init__(
        self,
        width: int,
        teacher_width: int,
        *,
        grid: int,
        num_codes: int = 256,
        num_layers: int = 1,
        num_heads: int = 4,
    ) -> None:
        """Args:
            width: of the student's patches and of the decoder.
            teacher_width: of the features to predict.
            grid: patches per side.
            num_codes: rows of the code book.
            num_layers: of the decoder.

        Raises:
            ValueError: `num_heads` does not divide `width`, fewer than 2 codes, or no layer.
        """
        if width % num_heads:
            raise ValueError(f"num_heads must divide the width of the head, got {num_heads} and {width}")
        if num_codes < 2 or num_layers < 1:
            raise ValueError(
                f"a code book needs num_codes >= 2 and a decoder num_layers >= 1, "
                f"got {num_codes} and {num_layers}"
            )
        super().__init__()
        self.mask_token = nn.Parameter(0.02 * torch.randn(width))
        self.positions = nn.Parameter(0.02 * torch.randn(grid * grid, width))
        # not nn.TransformerEncoder, which would start all layers from one copy
        self.decoder = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width,
                num_heads,
                dim_feedforward=4 * width,
                dropout=0.0,
                activation="gelu",
                batch_first=True,
                norm_first=True,
            )
            for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(width)
        self.prediction = nn.Linear(width, teacher_width)
        self.codes = nn.Parameter(torch.randn(num_codes, teacher_width))

    @property
    def num_patches(self) -> int:
        """Patches of the whole grid."""
        return len(self.positions)

    def forward(self, kept_tokens_BKH: Tensor, kept_BK: Tensor) -> Tensor:
        """Predicted teacher features of every patch, [B, P, D]; only those of removed ones mean anything.

        Args:
            kept_tokens_BKH: the student's patches, [B, K, H].
            kept_BK: their indices in the grid, in any order, int64 [B, K].

        Raises:
            ValueError: tokens and indices disagree.
        """
        if kept_tokens_BKH.shape[:2] != kept_BK.shape:
            raise ValueError(
                f"kept tokens {list(kept_tokens_BKH.shape)} and indices {list(kept_BK.shape)} must agree"
            )
        width = kept_tokens_BKH.shape[2]
        blank_BPH = self.mask_token.to(kept_tokens_BKH.dtype).expand(len(kept_BK), self.num_patches, width)
        states = blank_BPH.scatter(1, kept_BK[:, :, None].expand(-1, -1, width), kept_tokens_BKH)
        states = states + self.positions
        for layer in self.decoder:
            states = layer(states)
        predicted: Tensor = self.prediction(self.norm(states))
        return predicted

    def code_scores(self, features: Tensor) -> Tensor:
        """Cosine of the layer-normed features with each code, [..., D] -> [..., C]."""
        features, codes = at_least_float32(features), at_least_float32(self.codes)
        normed = F.layer_norm(features, features.shape[-1:])
        return F.normalize(normed, dim=-1) @ F.normalize(codes, dim=-1).to(normed.dtype).T

    def rows(
        self,
        kept_tokens_BKH: Tensor,
        kept_BK: Tensor,
        teacher_BPD: Tensor,
        *,
        student_temperature: float = 0.1,
        teacher_temperature: float = 0.04,
    ) -> Tensor:
        """`soft_code_rows` of this head's prediction, [B, 2].

        Args:
            teacher_BPD: the teacher's features of all patches of the same crop, [B, P, D].

        Raises:
            ValueError: as `forward` and `soft_code_rows`.
        """
        return soft_code_rows(
            self.code_scores(self(kept_tokens_BKH, kept_BK)),
            self.code_scores(teacher_BPD.detach()),
            removed_patches(kept_BK, self.num_patches),
            student_temperature=student_temperature,
            teacher_temperature=teacher_temperature,
        )


def soft_code_rows(
    student_BPC: Tensor,
    teacher_BPC: Tensor,
    is_removed_BP: Tensor,
    *,
    student_temperature: float = 0.1,
    teacher_temperature: float = 0.04,
) -> Tensor:
    """Cross-entropy of the student's code distribution with the teacher's, at removed patches.

    Args:
        student_BPC: the student's code scores, [B, P, C].
        teacher_BPC: the teacher's; no gradient flows into them.
        is_removed_BP: True at the patches to predict, bool [B, P].
        student_temperature: divides the student's scores, > 0.
        teacher_temperature: divides the teacher's, > 0; below the student's it sharpens the target.

    Returns:
        [B, 2]: sum in nats and number of removed patches. Gather the rows, then
        `models.text_heads.reduce_counted`.

    Raises:
        ValueError: a temperature <= 0, or shapes that do not fit.
    """
    if not (student_temperature > 0 and teacher_temperature > 0):
        raise ValueError(
            f"temperatures must be > 0, got student {student_temperature} and teacher {teacher_temperature}"
        )
    if student_BPC.shape != teacher_BPC.shape or is_removed_BP.shape != student_BPC.shape[:2]:
        raise ValueError(
            f"code scores {list(student_BPC.shape)} and {list(teacher_BPC.shape)} must agree and the mask "
            f"must be [B, P], got {list(is_removed_BP.shape)}"
        )
    student, teacher = at_least_float32(student_BPC), at_least_float32(teacher_BPC.detach())
    target_BPC = (teacher / teacher_temperature).softmax(2)
    losses_BP = -(target_BPC * (student / student_temperature).log_softmax(2)).sum(2)
    losses_BP = torch.where(is_removed_BP, losses_BP, 0.0)
    return torch.stack([losses_BP.sum(1), is_removed_BP.sum(1).to(losses_BP.dtype)], dim=1)
