"""A method's loss from features alone: its tables, regularisers and heads, and what they hold.

Towers are elsewhere, so the same objective serves any encoder that fills `PairOutputs`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.auxiliary import AuxiliaryHeads
from models.cross_attention import SymmetricCrossAttention
from models.features import PairFeatures
from models.gather import Gather
from models.outputs import PairBatch, PairOutputs, TeacherOutputs
from models.penalties import Penalties
from models.recipe import MethodRecipe, TableRecipe
from models.remembered import MemoryUpdate, remembers
from models.similarities import retrieval_diagnostics
from models.table_state import TableState
from models.table_targets import IMAGE_TO_TEXT, TEXT_TO_IMAGE
from models.tables import Direction, Scale, estimate, table_loss
from models.targets import spatial_log_targets
from models.widths import Widths
from models.within_sample import within_sample_tables


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


class Objective(nn.Module):
    """Everything a method's loss holds besides the towers."""

    def __init__(self, recipe: MethodRecipe, widths: Widths) -> None:
        super().__init__()
        self.recipe, self.grid = recipe, widths.grid
        # Rows of a table that exist at once; None decides by its size.
        self.max_table_rows: int | None = None
        self.tables = nn.ModuleDict(
            {
                name: TableState(
                    table,
                    width=widths.joint,
                    num_patches=widths.grid**2,
                    num_rows=widths.num_rows,
                )
                for name, table in recipe.tables.items()
            }
        )
        within = any(table.is_within_sample for table in recipe.tables.values())
        self.cross_attention = SymmetricCrossAttention(widths.joint) if within else None
        self.heads = AuxiliaryHeads(recipe.heads, widths)
        self.penalties = Penalties(recipe.regularisers, width=widths.vision)
        self._updates: list[MemoryUpdate] = []

    def forward(
        self, outputs: PairOutputs, batch: PairBatch, teacher: TeacherOutputs | None, gather: Gather
    ) -> LossReport:
        """Loss of the global batch this worker's batch is a part of."""
        features = PairFeatures(outputs, batch, teacher, gather)
        terms: dict[str, Tensor] = {}
        diagnostics: dict[str, Tensor] = {}
        self._updates = []
        for name, table in self.recipe.tables.items():
            terms[name] = table.weight * self._table_loss(name, table, features, diagnostics)
        penalties, watched = self.penalties(features)
        terms |= penalties | self.heads(features)
        diagnostics |= watched
        total = torch.stack(list(terms.values())).sum()
        return LossReport(total, {name: term.detach() for name, term in terms.items()}, diagnostics)

    def state_of(self, name: str) -> TableState:
        """What a table holds."""
        state = self.tables[name]
        assert isinstance(state, TableState)
        return state

    def scale(self, name: str, like: Tensor) -> Scale:
        """A table's temperature and bias."""
        shares = self.recipe.tables[name].temperature.policy == "shared"
        owner = self.state_of("main" if shares else name)
        return Scale(owner.inverse_temperature(like), self.state_of(name).bias_of(like))

    @torch.no_grad()
    def finish_step(self) -> None:
        """After the optimiser's step: clamp temperatures and remember the step's features."""
        for name in self.recipe.tables:
            self.state_of(name).clamp_temperature()
        for update in self._updates:
            update.apply_()
        self._updates = []

    def _table_loss(
        self, name: str, table: TableRecipe, features: PairFeatures, diagnostics: dict[str, Tensor]
    ) -> Tensor:
        scale = self.scale(name, features.report)
        diagnostics[f"temperature/{name}"] = 1 / scale.inverse_temperature.detach()
        if table.is_within_sample:
            return self._within_sample_loss(table, features, scale)
        state = self.state_of(name)
        if remembers(state):
            self._updates.append(MemoryUpdate(state, features))
        diagnostics |= retrieval_diagnostics(table, features)
        views = range(len(features.outputs.image_embeds))
        if table.views == "first" or table.between in ("image_views", "texts"):
            views = range(1)
        losses = [
            table_loss(table, state, features, view=view, scale=scale, max_rows=self.max_table_rows)
            for view in views
        ]
        return torch.stack(losses).mean()

    def _within_sample_loss(self, table: TableRecipe, features: PairFeatures, scale: Scale) -> Tensor:
        """LoVT's local terms: a sample's patches or texts against what they find in the other modality."""
        outputs = features.outputs
        assert self.cross_attention is not None
        patches, sentences = outputs.image_tokens[0], outputs.text_embeds.transpose(0, 1)
        is_text = outputs.is_text.T
        attended = self.cross_attention(patches, sentences, is_text)
        if table.between == "regions":
            radius = table.targets.radius
            weights = None if outputs.patch_weights is None else outputs.patch_weights[0].detach()
            both = within_sample_tables(
                patches,
                attended.sentences_at_regions,
                inverse_temperature=scale.inverse_temperature,
                row_weights_BK=weights,
                log_targets_KK=spatial_log_targets((self.grid, self.grid), relative_threshold=radius),
            )
        else:
            both = within_sample_tables(
                sentences,
                attended.regions_at_sentences,
                inverse_temperature=scale.inverse_temperature,
                row_weights_BK=None if outputs.text_weights is None else outputs.text_weights.detach(),
                is_real_BK=is_text,
            )
        weights_of = {name: getattr(table.directions, name) for name in (IMAGE_TO_TEXT, TEXT_TO_IMAGE)}
        losses = [
            weight * estimate(table, Direction.of(rows), features, max_rows=self.max_table_rows)
            for weight, rows in zip(weights_of.values(), both, strict=True)
            if weight
        ]
        return torch.stack(losses).sum()
