"""One optimiser step on one worker: teacher, token selection, loss, backward, step.

No Ray here: this is what the parity tests drive with plain processes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from models.gather import Gather, ProcessGroupGather, SingleProcess
from models.objective import LossReport
from models.outputs import PairBatch, TeacherOutputs
from models.pair_model import PairModel
from models.prototypes import Prototypes
from models.recipe import MethodRecipe
from models.schedules import cosine_with_warmup
from models.teacher import EmaTeacher
from models.token_selection import kept_iou
from models.towers import TowerSettings, build_clip
from pipelines.config import TrainConfig
from pipelines.scoring import ScoringConfig, ScoringPolicy, predicts_teacher
from pipelines.step_meter import StepMeter
from pipelines.token_choice import choose_tokens, select_views


class NonFiniteLossError(RuntimeError):
    """A loss or gradient is no finite number; training on would destroy the weights."""


@dataclass(frozen=True)
class TextSpec:
    """What the text tower must know of the tokenizer."""

    vocab_size: int
    pad_id: int
    start_id: int
    end_id: int


@dataclass(frozen=True)
class StepReport:
    """What one step did; tensors are read only when a line is logged."""

    loss: Tensor
    terms: Mapping[str, Tensor]
    diagnostics: Mapping[str, Tensor]
    grad_norm: Tensor
    lr: float

    def as_line(self) -> dict[str, Any]:
        """Plain numbers for the run record."""
        return {
            "loss": float(self.loss),
            "terms": {name: float(value) for name, value in self.terms.items()},
            "diagnostics": {name: float(value) for name, value in self.diagnostics.items()},
            "grad_norm": float(self.grad_norm),
            "lr": self.lr,
        }


class Trainer:
    """A method's model, teacher and optimiser, and the step that moves them."""

    def __init__(
        self,
        recipe: MethodRecipe,
        towers: TowerSettings,
        text: TextSpec,
        train: TrainConfig,
        *,
        seed: int,
        num_rows: int,
        scoring: ScoringConfig | None = None,
        gather: Gather | None = None,
        device: torch.device | None = None,
    ) -> None:
        """Build everything from a seed; every worker builds the same weights.

        Args:
            num_rows: of the training split.
            scoring: how old scores from outside may be.
            gather: over the workers of a process group; None for one process.
        """
        self.recipe, self.train, self.seed = recipe, train, seed
        self.gather: Gather = gather or SingleProcess()
        self.device = device or torch.device("cpu")
        self.step = 0
        self.policy = ScoringPolicy(
            scoring or ScoringConfig(), recipe, train.steps, train.batch_size // self.gather.world
        )
        self.meter = StepMeter()
        # Initial weights come from the seed alone, not from what ran before in this process.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            clip = build_clip(
                towers,
                vocab_size=text.vocab_size,
                pad_id=text.pad_id,
                start_id=text.start_id,
                end_id=text.end_id,
            )
            self.model = PairModel(clip, recipe, num_rows=num_rows).to(self.device)
        self.model.objective.max_table_rows = train.table_rows_per_chunk
        self.teacher = EmaTeacher(self.model).to(self.device) if recipe.needs_teacher else None
        self._teacher_step: int | None = None
        self.optimizer = torch.optim.AdamW(
            _decay_groups(self.model, train.weight_decay),
            lr=train.lr,
            betas=train.betas,
            eps=train.eps,
            fused=True,
        )
        self._parallel: nn.Module = self.model
        if isinstance(self.gather, ProcessGroupGather) and self.gather.world > 1:
            self._parallel = DistributedDataParallel(self.model, forward_sync_buffers=False)

    def run_step(self, batch: PairBatch) -> StepReport:
        """One step on this worker's part of the global batch.

        Raises:
            NonFiniteLossError: naming step, method and each term.
        """
        lr = cosine_with_warmup(
            self.step + 1,
            total_steps=self.train.steps + 1,
            warmup_steps=self.train.num_warmup_steps,
            base=self.train.lr,
            final=self.train.lr * self.train.final_lr_share,
        )
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        report = self.backward(batch)
        grad_norm = self._clip()
        self._refuse_non_finite(report, grad_norm)
        self.optimizer.step()
        self.model.objective.finish_step()
        self.step += 1
        return StepReport(report.loss.detach(), report.terms, report.diagnostics, grad_norm, lr)

    def outdated_prototypes(self, epoch: int) -> dict[str, Prototypes]:
        """Prototypes that must be found before a step of this epoch is taken, by table.

        None are left right after a resume in the middle of an epoch: the checkpoint holds them.
        """
        found = {}
        for name, table in self.recipe.tables.items():
            memory = self.model.objective.state_of(name).memory
            if not isinstance(memory, Prototypes) or epoch < table.candidates.first_epoch:
                continue
            if int(memory.epoch) != epoch:
                found[name] = memory
        return found

    def backward(self, batch: PairBatch) -> LossReport:
        """Gradients of the global loss in the model's parameters, averaged over workers."""
        batch = batch.to(self.device)
        teacher = self._teach(batch)
        grid = self.model.encoder.vision.grid
        kept = choose_tokens(self.policy, batch, teacher, step=self.step, grid=grid, meter=self.meter)
        self.optimizer.zero_grad(set_to_none=True)
        with autocast(self.device, self.train.precision):
            report: LossReport = self._parallel(batch, kept, teacher, self.gather)
        report.loss.backward()
        return report

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs to take the same next step."""
        return {
            "step": self.step,
            "model": self.model.state_dict(),
            "teacher": None if self.teacher is None else self.teacher.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        if self.teacher is not None:
            self.teacher.load_state_dict(state["teacher"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self._teacher_step = int(state["step"]), None

    def follow_teacher(self) -> None:
        """Bring the teacher to this step's version, unless it is there already.

        A-CLIP's order: the teacher follows at the start of a step, then scores, then the model trains.
        """
        if self.teacher is not None and self._teacher_step != self.step:
            self.teacher.follow(self.model, step=self.step, total_steps=self.train.steps)
            self._teacher_step = self.step

    def overlap_with_own_scores(self, batch: PairBatch) -> float | None:
        """Mean intersection over union of what a batch's scores keep with what the teacher would keep now.

        None when the batch does not bring what to keep.
        """
        if self.teacher is None or batch.scored is None or batch.scored.kept is None:
            return None
        self.follow_teacher()
        batch, grid = batch.to(self.device), self.model.encoder.vision.grid
        assert batch.scored is not None
        assert batch.scored.kept is not None
        with autocast(self.device, self.train.precision):
            scores, _ = self.teacher.scorer()(batch)
        own = select_views(self.policy, batch, scores, grid=grid).flatten(0, 1)
        return float(kept_iou(batch.scored.kept.long().flatten(0, 1), own, grid**2).mean())

    def _teach(self, batch: PairBatch) -> TeacherOutputs | None:
        if self.teacher is None:
            return None
        self.follow_teacher()
        if batch.scored is not None:
            features = batch.scored.features
            return None if features is None else TeacherOutputs(token_scores=None, features=features)
        if not self._asks_teacher():
            return None
        with autocast(self.device, self.train.precision):
            outputs: TeacherOutputs = self.teacher(batch)
        return outputs

    def _asks_teacher(self) -> bool:
        """Whether a step needs anything of the teacher that the batch does not bring."""
        recipe = self.recipe
        if predicts_teacher(recipe) or recipe.heads.masked_distillation.weight or recipe.needs_joint_teacher:
            return True
        return self.policy.scoring.mode != "offline" and self.policy.phase(self.step) == "scored"

    def _clip(self) -> Tensor:
        limit = self.train.max_grad_norm if self.train.max_grad_norm is not None else float("inf")
        # The prior's discriminator works against the encoder: its gradient must not shrink the encoder's.
        ours = [p for name, p in self.model.named_parameters() if "discriminator" not in name]
        return nn.utils.clip_grad_norm_(ours, limit)

    def _refuse_non_finite(self, report: LossReport, grad_norm: Tensor) -> None:
        # One number to read: each read waits for the device.
        if torch.isfinite(report.loss.detach() + grad_norm):
            return
        terms = ", ".join(f"{name}={float(value):g}" for name, value in report.terms.items())
        raise NonFiniteLossError(
            f"step {self.step} of method '{self.recipe.name}': loss {float(report.loss.detach()):g}, "
            f"gradient norm {float(grad_norm):g}; terms: {terms}. Lower train.lr or raise the temperature"
        )


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager[Any]:
    """The number format of the towers: `fp32` or `bf16`."""
    if precision == "bf16":
        return torch.autocast(device.type, torch.bfloat16)
    return contextlib.nullcontext()


def _decay_groups(model: PairModel, weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay on matrices only: not on biases, norms, temperatures, class and position embeddings."""
    decayed, plain = [], []
    for name, parameter in model.named_parameters():
        is_matrix = parameter.ndim >= 2 and "position_embedding" not in name and "token_embedding" not in name
        (decayed if is_matrix else plain).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
