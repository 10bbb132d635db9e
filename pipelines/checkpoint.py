"""Checkpoints of a run: written whole, trusted only with their manifest, the newest few kept.

Weights are the same on every worker and the data order is a function of the step, so rank 0's state is
the whole state. They live in the run's folder (local or S3), which is also where a restarted worker
group looks.
"""

from __future__ import annotations

import hashlib
import io
from typing import Any

import torch

from pipelines import storage

_STATE = "state.pt"
_MANIFEST = "MANIFEST.json"
_KEEP = 2


class CheckpointError(ValueError):
    """A checkpoint does not belong to this run or is not whole."""


def save_checkpoint(folder: str, state: dict[str, Any], *, identity: str) -> str:
    """Write the state of a step below `folder` and drop all but the newest checkpoints.

    Args:
        folder: `<root>/runs/<run id>/checkpoints`.
        state: what `load_latest` returns; must hold an integer `step`.
        identity: hash of the configuration; a resume with another one is refused.

    Returns:
        The checkpoint's location.
    """
    place = storage.join(folder, f"step_{state['step']:09d}")
    buffer = io.BytesIO()
    torch.save(state, buffer)
    data = buffer.getvalue()
    storage.write_bytes(storage.join(place, _STATE), data)
    digest = hashlib.sha256(data).hexdigest()
    # Last: without it the checkpoint does not exist for a reader.
    storage.write_json(
        storage.join(place, _MANIFEST),
        {"schema_version": 1, "step": state["step"], "identity": identity, "sha256": {_STATE: digest}},
    )
    for old in _steps(folder)[:-_KEEP]:
        storage.delete_folder(storage.join(folder, old))
    return place


def load_latest(folder: str, *, identity: str) -> dict[str, Any] | None:
    """The newest whole checkpoint below `folder`, or None.

    Raises:
        CheckpointError: it was written by a run with another configuration.
    """
    steps = _steps(folder)
    return load_checkpoint(storage.join(folder, steps[-1]), identity=identity) if steps else None


def load_checkpoint(place: str, *, identity: str | None = None) -> dict[str, Any]:
    """The state at one location.

    Raises:
        CheckpointError: no manifest, content that does not match it, or another configuration.
    """
    manifest_uri = storage.join(place, _MANIFEST)
    if not storage.exists(manifest_uri):
        raise CheckpointError(f"no checkpoint at '{place}': {_MANIFEST} is absent")
    manifest = storage.read_json(manifest_uri)
    if identity is not None and manifest["identity"] != identity:
        raise CheckpointError(
            f"the checkpoint at '{place}' was written with another configuration; name another output or "
            "delete it"
        )
    data = storage.read_bytes(storage.join(place, _STATE))
    found = hashlib.sha256(data).hexdigest()
    if found != manifest["sha256"][_STATE]:
        raise CheckpointError(f"the checkpoint at '{place}' is damaged: {_STATE} has sha256 {found}")
    state: dict[str, Any] = torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")
    return state


def latest_place(folder: str) -> str | None:
    """Location of the newest whole checkpoint below `folder`."""
    steps = _steps(folder)
    return storage.join(folder, steps[-1]) if steps else None


def drop_checkpoints(folder: str) -> None:
    """Remove a run's checkpoints; a sweep whose trials kept their weights would fill the disk."""
    if storage.exists(folder):
        storage.delete_folder(folder)


def _steps(folder: str) -> list[str]:
    manifests = storage.list_files(folder, suffix=_MANIFEST)
    return sorted(path.split("/")[0] for path in manifests)
