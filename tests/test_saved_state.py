"""What methods remember is in the checkpoint: memories, constants, queues, prototypes, discriminators."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from models.methods.catalogue import METHODS
from pipelines.checkpoint import load_latest, save_checkpoint
from pipelines.config import TrainConfig
from pipelines.prototype_step import refresh_prototypes
from pipelines.train_step import Trainer
from tests.pair_fixture import NUM_ROWS, TEXT, TOWERS, generator, make_batch

TRAIN = TrainConfig(steps=10, batch_size=8, warmup_steps=0, lr=3e-3)
STEPS_PER_EPOCH, SAVED_AT, LAST = 2, 3, 6
# What each method holds beside towers and optimiser.
HELD = {
    "cmc_memory": (".memory.images", ".memory.texts"),
    "cmc_nce": (".memory.image_log_normaliser", ".memory.text_log_normaliser"),
    "pcl": (".memory.images.", ".memory.texts.", ".memory.sets."),
    "dim": ("discriminator",),
}


def build(method: str, *, seed: int = 0) -> Trainer:
    return Trainer(METHODS[method], TOWERS, TEXT, TRAIN, seed=seed, num_rows=NUM_ROWS)


def features_of(epoch: int) -> Tensor:
    """What a teacher would say of every row, another in every epoch."""
    features = torch.randn(2, NUM_ROWS, TOWERS.embed_dim, generator=generator(100 + epoch))
    return torch.nn.functional.normalize(features, dim=2)


def train(trainer: Trainer, stop: int) -> list[float]:
    """Losses of the steps up to `stop`; memories and noise change with every one."""
    features, found = trainer.recipe.features, []
    while trainer.step < stop:
        epoch = trainer.step // STEPS_PER_EPOCH
        refresh_prototypes(trainer, lambda _, epoch=epoch: features_of(epoch), epoch=epoch)
        batch = make_batch(num_views=features.num_views, num_texts=features.num_texts, seed=trainer.step)
        found.append(trainer.run_step(batch).loss.item())
    return found


def resume(
    method: str, folder: Path, change: Callable[[dict[str, Any]], None] | None = None
) -> tuple[Trainer, list[float]]:
    """A trainer with other initial weights that continues from what is in the folder."""
    state = load_latest(str(folder), identity="me")
    assert state is not None
    if change is not None:
        change(state["trainer"]["model"])
    trainer = build(method, seed=1)
    # Of the run, which decides where the clustering starts.
    trainer.seed = 0
    trainer.load_state_dict(state["trainer"])
    return trainer, train(trainer, LAST)


@pytest.mark.parametrize("method", HELD)
def test_a_resumed_method_takes_the_same_steps(tmp_path, method):
    whole, first = build(method), build(method)
    expected = train(whole, LAST)
    assert train(first, SAVED_AT) == expected[:SAVED_AT]
    save_checkpoint(str(tmp_path), {"step": SAVED_AT, "trainer": first.state_dict()}, identity="me")
    resumed, losses = resume(method, tmp_path)
    assert losses == expected[SAVED_AT:]
    ours, theirs = resumed.model.state_dict(), whole.model.state_dict()
    assert all(torch.equal(ours[name].nan_to_num(), theirs[name].nan_to_num()) for name in theirs)

    # The control: every held thing matters to the next loss, so a checkpoint without it is told apart.
    fresh = build(method).model.state_dict()
    for part in HELD[method]:
        names = [name for name in fresh if part in name]
        assert names, part

        def forget(state: dict[str, Tensor], names: list[str] = names) -> None:
            state.update({name: fresh[name] for name in names})

        assert resume(method, tmp_path, forget)[1] != losses, part
