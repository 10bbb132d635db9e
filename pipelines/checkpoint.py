"""Checkpoints of a run: written whole, trusted only with their manifest, the newest few kept.

Weights are the same on every worker and the data order is a function of the step, so rank 0's state is
the whole state. They live in the run's folder (local or S3), which is also where a restarted worker
group looks.
"""

from __future__ import annotations

import hashlib
import io
import posixpath
from collections.abc import Mapping
from typing import Any

import torch

from pipelines import storage

_STATE = "state.pt"
_MANIFEST = "MANIFEST.json"
_KEEP = 2
# Version 1 did not say where in its data the run stood: its weights are good, but nothing can tell whether
# a run that went on from it would see every row once.
_VERSION = 2
_READABLE = (1, 2)


class CheckpointError(ValueError):
    """A checkpoint does not belong to this run or is not whole."""


def save_checkpoint(
    folder: str, state: dict[str, Any], *, identity: str, about: Mapping[str, Any] | None = None
) -> str:
    """Write the state of a step below `folder` and drop all but the newest checkpoints.

    Args:
        folder: `<root>/runs/<run id>/checkpoints`.
        state: what `load_latest` returns; must hold an integer `step`.
        identity: hash of the configuration; a resume with another one is refused.
        about: what a run that starts from these weights must know, plain values for the manifest.

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
        {
            "schema_version": _VERSION,
            "step": state["step"],
            "identity": identity,
            "sha256": {_STATE: digest},
            "about": dict(about or {}),
        },
    )
    for old in _steps(folder)[:-_KEEP]:
        storage.delete_folder(storage.join(folder, old))
    return place


def load_latest(folder: str, *, identity: str) -> dict[str, Any] | None:
    """The newest whole checkpoint below `folder`, or None.

    Raises:
        CheckpointError: it was written by a run with another configuration, or by a version of this program
            that did not keep the run's place in its data.
    """
    steps = _steps(folder)
    return load_checkpoint(storage.join(folder, steps[-1]), identity=identity) if steps else None


def load_checkpoint(place: str, *, identity: str | None = None) -> dict[str, Any]:
    """The state at one location; with an identity, to go on from it.

    Raises:
        CheckpointError: no manifest, one of an unknown version, content that does not match it, another
            configuration, or with an identity a version that does not know its place in the data.
    """
    manifest = _read_manifest(place, identity=identity)
    data = storage.read_bytes(storage.join(place, _STATE))
    found = hashlib.sha256(data).hexdigest()
    if found != manifest["sha256"][_STATE]:
        raise CheckpointError(f"the checkpoint at '{place}' is damaged: {_STATE} has sha256 {found}")
    state: dict[str, Any] = torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")
    return state


def about_checkpoint(place: str, *, identity: str | None = None) -> tuple[str, dict[str, Any]]:
    """The sha256 of the state at one location, and what its run said about it, without reading it.

    Raises:
        CheckpointError: as `load_checkpoint`, the content aside.
    """
    manifest = _read_manifest(place, identity=identity)
    return str(manifest["sha256"][_STATE]), manifest.get("about", {})


def find_checkpoint(uri: str) -> str:
    """The newest checkpoint of a run, by its root, its folder or one of its checkpoints.

    Raises:
        CheckpointError: none there, or those of several runs.
    """
    try:
        found = storage.list_files(uri, suffix=_MANIFEST)
    except NotADirectoryError:  # a file of a checkpoint instead of its folder
        found = []
    places = [posixpath.dirname(path) for path in found]
    runs = {posixpath.dirname(place).removesuffix("checkpoints").rstrip("/") for place in places}
    if len(runs) > 1:
        names = sorted(runs)
        raise CheckpointError(
            f"'{uri}' holds checkpoints of {len(runs)} runs; name one of them: {', '.join(names[:8])}"
        )
    if not places:
        raise CheckpointError(
            f"'{uri}' holds no checkpoint; name a run root, a run's folder below <root>/runs, or a folder "
            "of its checkpoints. Trials of a sweep keep none"
        )
    return storage.join(uri, max(places)) if max(places) else uri


def latest_place(folder: str) -> str | None:
    """Location of the newest whole checkpoint below `folder`."""
    steps = _steps(folder)
    return storage.join(folder, steps[-1]) if steps else None


def drop_checkpoints(folder: str) -> None:
    """Remove a run's checkpoints; a sweep whose trials kept their weights would fill the disk."""
    if storage.exists(folder):
        storage.delete_folder(folder)


def _read_manifest(place: str, *, identity: str | None = None) -> dict[str, Any]:
    uri = storage.join(place, _MANIFEST)
    if not storage.exists(uri):
        raise CheckpointError(f"no checkpoint at '{place}': {_MANIFEST} is absent")
    manifest: dict[str, Any] = storage.read_json(uri)
    version = manifest["schema_version"]
    if version not in _READABLE:
        raise CheckpointError(
            f"the checkpoint at '{place}': schema_version must be one of {_READABLE}, found {version}; use "
            "the version of this program that wrote it"
        )
    if identity is None:
        return manifest
    if manifest["identity"] != identity:
        raise CheckpointError(
            f"the checkpoint at '{place}' was written with another configuration; name another output or "
            "delete it"
        )
    if version != _VERSION:
        raise CheckpointError(
            f"the checkpoint at '{place}' (schema_version {version}) does not say where in its data the run "
            "stood; finish the run with the version of this program that wrote it, or name another output "
            f"and take its weights: train.start_from={place}"
        )
    return manifest


def _steps(folder: str) -> list[str]:
    manifests = storage.list_files(folder, suffix=_MANIFEST)
    return sorted(path.split("/")[0] for path in manifests)
