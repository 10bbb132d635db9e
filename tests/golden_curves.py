"""Ten steps of every method, kept as numbers: a change that moves them is seen and must give its reason.

`python -m tests.golden_curves` writes tests/golden/curves.json anew; say in the commit why it moved. The
curves are ours (no authors' code), in float64 on the hand-made batches of tests/pair_fixture.py.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

from models.methods.catalogue import METHODS
from pipelines.config import TrainConfig
from pipelines.train_step import Trainer
from tests.pair_fixture import TEXT, TOWERS, make_batch

FILE = Path(__file__).parent / "golden" / "curves.json"
NUM_STEPS = 10


def curve(method: str, *, lr: float = 1e-3) -> list[float]:
    """Losses of the first steps; another batch each step."""
    recipe = METHODS[method]
    torch.set_default_dtype(torch.float64)
    try:
        trainer = Trainer(recipe, TOWERS, TEXT, TrainConfig(steps=NUM_STEPS, lr=lr, batch_size=8), seed=0)
        return [
            trainer.run_step(make_batch(num_views=recipe.features.num_views, seed=step)).loss.item()
            for step in range(NUM_STEPS)
        ]
    finally:
        torch.set_default_dtype(torch.float32)


if __name__ == "__main__":
    FILE.write_text(json.dumps({method: curve(method) for method in METHODS}, indent=1) + "\n")
