"""PCL's E-step on two real gloo ranks next to one process, and the small data and towers its tests share.

`python -m tests.prototype_ranks` prints the figures as JSON; tests/test_prototype_step.py reads them. The
ranks are forked before anything is computed.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from models.gather import Gather, ProcessGroupGather, SingleProcess
from models.methods.pcl import PCL
from models.prototypes import Prototypes
from models.towers import TowerSettings
from pipelines import prototype_step
from pipelines.collate import BatchSettings
from pipelines.config import TrainConfig
from pipelines.embed_split import EmbedSettings, WorkerEmbed
from pipelines.feed import MemoryFeed, load_rows, train_order
from pipelines.prepared import Prepared
from pipelines.train_step import TextSpec, Trainer
from tests.prepared_fixture import IMAGE_SIZE, write_prepared

# An odd number of rows: two shares differ.
SHARD_ROWS = (20, 13, 32)
NUM_ROWS = sum(SHARD_ROWS)
BATCH_SIZE = 16
TOWERS = TowerSettings(
    image_size=IMAGE_SIZE,
    patch_size=4,
    vision_width=16,
    vision_layers=1,
    vision_heads=2,
    text_width=16,
    text_layers=1,
    text_heads=2,
    embed_dim=8,
    max_tokens=12,
)
TEXT = TextSpec(vocab_size=800, pad_id=0, start_id=1, end_id=2)
TRAIN = TrainConfig(steps=20, batch_size=BATCH_SIZE, warmup_steps=0, lr=3e-3)
BATCH = BatchSettings(seed=3, text="caption", num_views=1, min_crop_area=0.5, num_patches=4, max_tokens=12)
SETTINGS = EmbedSettings(BATCH, "fp32")
RECIPE = replace(
    PCL,
    extra_tables={
        "prototypes": replace(
            PCL.extra_tables["prototypes"],
            candidates=replace(PCL.extra_tables["prototypes"].candidates, num_clusters=(4, 9)),
        )
    },
)
_TIMEOUT_S, _WORLD = 60, 2


@dataclass(frozen=True)
class Found:
    """What one rank saw.

    Attributes:
        digest: of its prototypes.
        same_assignment: whether they divide the rows as one process does.
        difference: largest of a centroid or concentration to one process.
        loss, single_loss: of the next step, here and in one process.
        epoch_without_copy: of its prototypes when the first rank keeps its own to itself.
    """

    digest: str
    same_assignment: bool
    difference: float
    loss: float
    single_loss: float
    epoch_without_copy: int


def build_trainer(gather: Gather | None = None, *, seed: int = 0) -> Trainer:
    return Trainer(RECIPE, TOWERS, TEXT, TRAIN, seed=seed, num_rows=NUM_ROWS, gather=gather)


def prototypes_of(trainer: Trainer) -> Prototypes:
    memory = trainer.model.objective.state_of("prototypes").memory
    assert isinstance(memory, Prototypes)
    return memory


def feed(uri: str, gather: Gather) -> MemoryFeed:
    order = train_order(Prepared.open(uri), batch_size=BATCH_SIZE, seed=7)
    return MemoryFeed(load_rows(uri, "train"), order, BATCH, rank=gather.rank, world=gather.world)


def first_step_of_epoch_one(uri: str, gather: Gather) -> tuple[Trainer, float]:
    """A trainer after four steps and the E-step, and the loss of its fifth step."""
    trainer = build_trainer(gather)
    batches = feed(uri, gather)
    for batch in batches.batches(0, 4):
        trainer.run_step(batch)
    embed = WorkerEmbed(uri, SETTINGS, gather)
    assert prototype_step.refresh_prototypes(trainer, embed, epoch=1) is not None
    return trainer, trainer.run_step(next(batches.batches(4, 5))).loss.item()


def measure(uri: str) -> Found:
    """Run by every rank."""
    single, single_loss = first_step_of_epoch_one(uri, SingleProcess())
    trainer, loss = first_step_of_epoch_one(uri, ProcessGroupGather())
    here, there = (dict(prototypes_of(t).named_buffers()) for t in (trainer, single))
    values = [name for name in here if here[name].is_floating_point()]
    whole = [name for name in here if name not in values]
    prototype_step.copy_from_first_ = lambda prototypes, gather: None
    alone = build_trainer(ProcessGroupGather())
    prototype_step.refresh_prototypes(alone, WorkerEmbed(uri, SETTINGS, ProcessGroupGather()), epoch=1)
    return Found(
        digest=hashlib.sha256(b"".join(here[name].numpy().tobytes() for name in sorted(here))).hexdigest(),
        same_assignment=all(torch.equal(here[name], there[name]) for name in whole),
        difference=max(float((here[name] - there[name]).abs().max()) for name in values),
        loss=loss,
        single_loss=single_loss,
        epoch_without_copy=int(prototypes_of(alone).epoch),
    )


def _rank(rank: int, folder: str) -> None:
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=_WORLD,
        timeout=timedelta(seconds=_TIMEOUT_S),
    )
    found = measure(f"{folder}/prepared")
    dist.destroy_process_group()
    Path(folder, f"rank-{rank}.json").write_text(json.dumps(asdict(found)))


def main() -> int:
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        write_prepared(Path(folder, "prepared"), shard_rows=SHARD_ROWS)
        ranks = [context.Process(target=_rank, args=(rank, folder)) for rank in range(_WORLD)]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join(2 * _TIMEOUT_S)
        if any(process.exitcode != 0 for process in ranks):
            for process in ranks:
                process.kill()
            return 1
        found = [json.loads(Path(folder, f"rank-{rank}.json").read_text()) for rank in range(_WORLD)]
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
