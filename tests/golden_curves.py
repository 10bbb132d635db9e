"""Ten steps of every method, kept as numbers: a change that moves them is seen and must give its reason.

`python -m tests.golden_curves` writes tests/golden/curves.json anew; say in the commit why it moved. The
curves are ours (no authors' code), in float64 on the hand-made batches of tests/pair_fixture.py. Memories
and queues fill as they do in a run; prototypes come after five steps, as between two epochs.
"""

from __future__ import annotations

import json
from pathlib import Path

from pipelines.config import TrainConfig
from tests.recipe_fixture import NUM_PAIRS, RECIPES, batch_of, float64, set_prototypes, trainer_of

FILE = Path(__file__).parent / "golden" / "curves.json"
NUM_STEPS, EPOCH_STEPS = 10, 5


def curve(method: str, *, lr: float = 1e-3, num_steps: int = NUM_STEPS) -> list[float]:
    """Losses of the first steps; another batch each step."""
    recipe, losses = RECIPES[method], []
    with float64():
        trainer = trainer_of(recipe, TrainConfig(steps=NUM_STEPS, lr=lr, batch_size=NUM_PAIRS))
        for step in range(num_steps):
            if step == EPOCH_STEPS:
                set_prototypes(trainer)
            losses.append(trainer.run_step(batch_of(recipe, seed=step)).loss.item())
    return losses


if __name__ == "__main__":
    FILE.write_text(json.dumps({method: curve(method) for method in RECIPES}, indent=1) + "\n")
