"""What a table holds between steps: temperature, bias, baseline, critic, and remembered features.

D joint width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from models.critics import ConcatCritic
from models.memory import FeatureQueue, MemoryBank
from models.prototypes import Prototypes
from models.recipe import TableRecipe
from models.region_pooling import neutral_noisy_or_bias


class TableState(nn.Module):
    """Parameters and buffers of one table; its recipe decides which exist."""

    log_inverse_temperature: Tensor

    def __init__(self, recipe: TableRecipe, *, width: int, num_patches: int, num_rows: int) -> None:
        """Args:
        width: of the joint space.
        num_patches: of the vision tower's grid.
        num_rows: of the training split; the memory bank and the prototypes remember each.
        """
        super().__init__()
        self.recipe = recipe
        policy, kind = recipe.temperature.policy, recipe.candidates.kind
        start = torch.tensor(-math.log(recipe.temperature.init))
        if policy == "learned":
            self.log_inverse_temperature = nn.Parameter(start)
        elif policy in ("fixed", "kept"):
            # In the checkpoint too: a run that starts from this one may keep it.
            self.register_buffer("log_inverse_temperature", start)
        start_bias = recipe.bias.init
        if recipe.region_pool.kind == "noisy_or":
            # At zero scores nearly every bag would match and nothing would learn; `init` shifts from there.
            start_bias += neutral_noisy_or_bias(num_patches)
        if recipe.bias.policy == "learned":
            self.bias = nn.Parameter(torch.tensor(start_bias))
        else:
            self.fixed_bias = start_bias
        if recipe.baseline.kind == "learned" and recipe.estimator.kind in ("tuba", "interp"):
            self.baseline = nn.Linear(width, 1)
            nn.init.zeros_(self.baseline.weight)
            nn.init.constant_(self.baseline.bias, recipe.baseline.value)
        if recipe.score.kind == "concat":
            first, second = (max(8, round(ratio * width)) for ratio in recipe.score.hidden)
            self.critic = ConcatCritic(width, hidden=(first, second))
        if recipe.region_pool.kind == "non_local":
            self.non_local = nn.Parameter(torch.eye(width))
        self.memory = self._memory(kind, width=width, num_rows=num_rows)

    def _memory(self, kind: str, *, width: int, num_rows: int) -> nn.Module | None:
        candidates = self.recipe.candidates
        if kind == "queue":
            return nn.ModuleDict({side: FeatureQueue(candidates.size, width) for side in ("images", "texts")})
        if kind == "memory":
            return MemoryBank(num_rows, width, momentum=candidates.momentum)
        if kind == "prototypes":
            return Prototypes(num_rows, candidates.num_clusters, width)
        return None

    def inverse_temperature(self, like: Tensor) -> Tensor:
        """1 / temperature, scalar; meaningless for `shared`, which the caller takes from the main table."""
        if self.recipe.temperature.policy in ("learned", "kept"):
            return self.log_inverse_temperature.exp().to(like.dtype)
        return like.new_tensor(1 / self.recipe.temperature.init)

    def bias_of(self, like: Tensor) -> Tensor:
        """Bias added to scaled scores, scalar."""
        if self.recipe.bias.policy == "learned":
            return self.bias.to(like.dtype)
        return like.new_tensor(self.fixed_bias)

    def log_baseline(self, queries_BD: Tensor) -> Tensor | None:
        """Log-baseline of each query, [B]; None for estimators that take none."""
        if self.recipe.estimator.kind not in ("tuba", "interp"):
            return None
        if self.recipe.baseline.kind == "learned":
            learned: Tensor = self.baseline(queries_BD)[:, 0]
            return learned
        return queries_BD.new_full((len(queries_BD),), self.recipe.baseline.value)

    @torch.no_grad()
    def clamp_temperature(self) -> None:
        """Keep a learned temperature in [minimum, 1]."""
        if self.recipe.temperature.policy == "learned":
            self.log_inverse_temperature.clamp_(0.0, -math.log(self.recipe.temperature.minimum))
