"""Tables whose candidates come from earlier batches: a queue, a memory of every row, prototypes.

Directions are named as in `tables.py`; a query of one modality meets what is remembered of the other.
B local pairs, N pairs of all workers, K candidates, D joint width.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from models.features import PairFeatures
from models.keyed_noise import Draw, keyed_uniform
from models.memory import (
    FeatureQueue,
    MemoryBank,
    Side,
    log_normaliser,
    memory_table,
    noise_contrastive_shift,
    queue_table,
)
from models.pair_table import PairTable
from models.prototypes import Prototypes
from models.recipe import TableRecipe
from models.table_state import TableState
from models.table_targets import IMAGE_TO_TEXT, TEXT_TO_IMAGE

_SIDES: dict[str, Side] = {IMAGE_TO_TEXT: "image", TEXT_TO_IMAGE: "text"}


def remembered_tables(
    recipe: TableRecipe,
    state: TableState,
    features: PairFeatures,
    *,
    view: int,
    inverse_temperature: Tensor,
) -> dict[str, list[PairTable]]:
    """The tables of each direction: one, or one per clustering; none before the first clustering."""
    memory = state.memory
    found = {}
    for direction, side in _SIDES.items():
        queries = features.image(view) if side == "image" else features.report
        if isinstance(memory, MemoryBank):
            tables = [
                _memory_table(
                    recipe, memory, features, queries, side, inverse_temperature=inverse_temperature
                )
            ]
        elif isinstance(memory, Prototypes):
            tables = _prototype_tables(recipe, memory, features, queries, side)
        else:
            tables = [_queue_table(memory, features, queries, side, inverse_temperature=inverse_temperature)]
        found[direction] = tables
    return found


def _queue_table(
    memory: nn.Module | None,
    features: PairFeatures,
    queries: Tensor,
    side: Side,
    *,
    inverse_temperature: Tensor,
) -> PairTable:
    images, texts = teacher_embeds(features)
    own, queue = (texts, "texts") if side == "image" else (images, "images")
    assert isinstance(memory, nn.ModuleDict)
    stored = memory[queue]
    assert isinstance(stored, FeatureQueue)
    rows, is_filled = stored.candidates()
    return queue_table(queries, own, rows, is_filled_K=is_filled, inverse_temperature=inverse_temperature)


def _memory_table(
    recipe: TableRecipe,
    memory: MemoryBank,
    features: PairFeatures,
    queries: Tensor,
    side: Side,
    *,
    inverse_temperature: Tensor,
) -> PairTable:
    num_noise, batch = recipe.candidates.size, features.batch
    noise = memory.noise_indices(keyed_uniform(batch.draw_keys, Draw.MEMORY, num_noise))
    # Only the other modality is read: B * K * D numbers each.
    stored = memory.texts if side == "image" else memory.images
    own, drawn = stored[batch.row_index], stored[noise]
    table = memory_table(queries, own, drawn, inverse_temperature=inverse_temperature)
    if recipe.estimator.kind != "sigmoid":
        return table
    # Binary NCE: the score at which data and noise are equally likely becomes 0.
    with torch.no_grad():
        rows = features.gather(table.scores.logsumexp(1))
        estimate = log_normaliser(rows, num_columns=num_noise + 1, num_rows=memory.num_rows)
        log_z = memory.log_normaliser_(side, estimate)
        shift = noise_contrastive_shift(log_z, num_noise=num_noise, num_rows=memory.num_rows)
    return replace(table, scores=table.scores - shift)


def _prototype_tables(
    recipe: TableRecipe, memory: Prototypes, features: PairFeatures, queries: Tensor, side: Side
) -> list[PairTable]:
    if not memory.is_ready:
        return []
    noise = memory.noise(features.all_keys("draw_keys"))
    return [
        memory.table(
            number,
            queries,
            side=side,
            row_index_B=features.batch.row_index,
            row_index_N=features.all_keys("row_index"),
            uniform_K=uniform,
            num_others=recipe.candidates.size,
        )
        for number, uniform in enumerate(noise)
    ]


def teacher_embeds(features: PairFeatures) -> tuple[Tensor, Tensor]:
    """The EMA teacher's embeddings of local images and texts, [B, D] each.

    Raises:
        ValueError: the teacher does not embed pairs.
    """
    teacher = features.teacher
    if teacher is None or teacher.image_embeds is None or teacher.text_embeds is None:
        raise ValueError("a queue needs the EMA teacher's embeddings of both modalities, got none")
    return teacher.image_embeds, teacher.text_embeds


class MemoryUpdate:
    """What a step leaves to remember; applied after the optimiser's step, when no backward needs the old."""

    def __init__(self, state: TableState, features: PairFeatures) -> None:
        """Gather the step's features; every worker remembers those of all."""
        self._memory = state.memory
        if isinstance(self._memory, MemoryBank):
            images, texts = features.all_images(0).detach(), features.all_reports().detach()
            self._rows = features.all_keys("row_index")
        else:
            images, texts = (features.gather(embeds) for embeds in teacher_embeds(features))
        self._images, self._texts = images, texts

    def apply_(self) -> None:
        memory = self._memory
        if isinstance(memory, MemoryBank):
            memory.update_(self._rows, self._images, self._texts)
        elif isinstance(memory, nn.ModuleDict):
            for name, rows in (("images", self._images), ("texts", self._texts)):
                queue = memory[name]
                assert isinstance(queue, FeatureQueue)
                queue.push_(rows)


def remembers(state: TableState) -> bool:
    """Whether a table's state changes with every step."""
    return isinstance(state.memory, MemoryBank | nn.ModuleDict)
