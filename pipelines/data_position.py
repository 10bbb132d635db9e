"""Where in its data a run stands: written with every checkpoint, compared before the run goes on.

Which rows a step takes follows from the shards, the batch size and the seed. Were any of them another one
after a resume, some rows would be seen twice in an epoch and others never, and no loss would tell.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from pipelines.checkpoint import CheckpointError, about_checkpoint, latest_place
from pipelines.feed import train_order
from pipelines.job import Job, identity
from pipelines.order import StepOrder
from pipelines.prepared import Prepared

# What must be equal, and how a message names it.
_NAMES = {
    "train_shards_sha256": "training shards",
    "batch_size": "train.batch_size",
    "seed": "seed",
    "epoch_rows": "rows of an epoch",
    "epoch": "epoch",
    "slice": "slice",
    "offset": "offset in the slice",
}


def data_position(order: StepOrder, prepared: Prepared, *, step: int) -> dict[str, Any]:
    """Where the batch of a step begins, and what decides that; plain values."""
    shards = prepared.manifest["splits"]["train"]["shards"]
    listed = json.dumps([[shard["rows"], shard["sha256"], shard.get("weight", 1)] for shard in shards])
    return {
        "step": step,
        **asdict(order.cursor(step)),
        "epoch_rows": order.epoch_rows,
        "batch_size": order.batch_size,
        "seed": order.seed,
        "train_shards_sha256": hashlib.sha256(listed.encode()).hexdigest(),
    }


def check_position(before: Mapping[str, Any], order: StepOrder, prepared: Prepared, *, where: str) -> None:
    """Refuse to go on from a checkpoint in another order of rows; the number of workers is no part of it.

    Args:
        before: what `data_position` said when the checkpoint was written.
        where: the checkpoints, for the message.

    Raises:
        CheckpointError: the rows that come next are not those the run would have seen.
    """
    now = data_position(order, prepared, step=before["step"])
    changed = [
        f"{name} {_short(before[key])} -> {_short(now[key])}"
        for key, name in _NAMES.items()
        if before[key] != now[key]
    ]
    if changed:
        raise CheckpointError(
            f"the run in '{where}' stands at epoch {before['epoch']}, slice {before['slice']}, offset "
            f"{before['offset']} of its data and must go on in the same order of rows, or an epoch would "
            f"hold some twice and others never; '{prepared.uri}' has another: {', '.join(changed)}. Bring "
            "back the data and settings it was started with, or name another output for a new run"
        )


def check_resume(job: Job) -> None:
    """Refuse a job whose newest checkpoint it could not go on from, before its record or workers know of it.

    Raises:
        CheckpointError: that checkpoint is of another configuration, version or order of rows.
    """
    place = latest_place(job.checkpoints)
    if place is None:
        return
    _, about = about_checkpoint(place, identity=identity(job.tree))
    config, prepared = job.config, Prepared.open(job.prepared)
    order = train_order(prepared, batch_size=config.train.batch_size, seed=config.seed)
    check_position(about["position"], order, prepared, where=job.checkpoints)


def _short(value: Any) -> str:
    return value[:12] if isinstance(value, str) else str(value)
