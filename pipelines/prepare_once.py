"""Prepared data at a place that its content decides, made when it is not there yet."""

from __future__ import annotations

import hashlib
import json

from pipelines import storage
from pipelines.config import Config
from pipelines.prepare import Progress, prepare
from pipelines.prepared import read_manifest
from pipelines.sources.open_source import open_source, source_identity
from pipelines.sources.source_spec import source_stem


def dataset_name(config: Config) -> str:
    """Short name for results: the design of the scenes, or the file or folder of a source."""
    return source_stem(config.data.source)


def prepared_place(config: Config) -> str:
    """Location that the source's identity and the data settings decide.

    Raises:
        ValueError: the source is not there or cannot be used.
    """
    content = {"data": config.tree()["data"], "source": source_identity(config.data)}
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]
    return storage.join(config.prepared, f"{dataset_name(config)}-{digest}")


def source_notes(config: Config) -> list[str]:
    """What the user should know about how the source's rows are read."""
    return open_source(config.data).notes


def ensure_prepared(config: Config, *, on_progress: Progress | None = None) -> str:
    """Prepare the data unless the same was prepared before; returns its location."""
    place = prepared_place(config)
    if read_manifest(place) is None:
        prepare(config.data, place, on_progress=on_progress)
    return place
