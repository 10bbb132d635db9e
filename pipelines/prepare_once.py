"""Prepared data at a place that its content decides, made when it is not there yet."""

from __future__ import annotations

import hashlib
import json

from pipelines import storage
from pipelines.config import Config
from pipelines.prepare import Progress, prepare
from pipelines.prepared import MANIFEST_VERSION, read_manifest
from pipelines.sources.open_source import open_source
from pipelines.sources.source import PairSource
from pipelines.sources.source_spec import source_stem


def dataset_name(config: Config) -> str:
    """Short name for results: the design of the scenes, or the file or folder of a source."""
    return source_stem(config.data.source)


def prepared_place(config: Config, source: PairSource) -> str:
    """Location that the source's identity and the data settings decide."""
    content = {
        "version": MANIFEST_VERSION,
        "data": config.tree()["data"],
        "source": source.identity,
    }
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]
    return storage.join(config.prepared, f"{dataset_name(config)}-{digest}")


def ensure_prepared(
    config: Config, *, source: PairSource | None = None, on_progress: Progress | None = None
) -> str:
    """Prepare the data unless the same was prepared before; returns its location.

    Args:
        source: what `config.data` opens, where the caller has it: on object storage opening asks for every
            file.

    Raises:
        ValueError: the source is not there or cannot be used.
    """
    source = source or open_source(config.data)
    place = prepared_place(config, source)
    if read_manifest(place) is None:
        prepare(config.data, place, source=source, on_progress=on_progress)
    return place
