"""From the setting `data.source` to a source of pairs."""

from __future__ import annotations

from pipelines.sources.parquet import ParquetSource
from pipelines.sources.scenes import SceneSource
from pipelines.sources.source import PairSource, SourceSettings


def open_source(settings: SourceSettings) -> PairSource:
    """Open the source a config names and check it, without starting a Ray task.

    Raises:
        ValueError: unknown kind or design, absent file, missing or mistyped column, unknown split, or a row
            filter that no row passes.
    """
    kind, colon, rest = settings.source.partition(":")
    if colon and kind == "scenes":
        return SceneSource(settings, design=rest)
    if colon and kind == "parquet" and rest:
        return ParquetSource(settings, uri=rest)
    raise ValueError(
        "data.source must be scenes:quick, scenes:tokens or parquet:<file or folder, local or s3://...>, "
        f"got '{settings.source}'"
    )


def source_identity(settings: SourceSettings) -> str:
    """What the rows of a source depend on, as text: for addressing what is made from them by content."""
    return open_source(settings).identity
