"""From the setting `data.source` to a source of pairs."""

from __future__ import annotations

import difflib
from collections.abc import Callable

from pipelines.sources.chexpert import open_chexpert
from pipelines.sources.coco import CocoSource
from pipelines.sources.csv_table import CsvSource
from pipelines.sources.hugging_face import HuggingFaceSource
from pipelines.sources.image_folder import FolderSource
from pipelines.sources.mimic import open_mimic
from pipelines.sources.mixture import MixtureSource
from pipelines.sources.parquet import ParquetSource
from pipelines.sources.scenes import SceneSource
from pipelines.sources.source import PairSource, SourceSettings
from pipelines.sources.webdataset import WebdatasetSource

Opener = Callable[[SourceSettings, str], PairSource]

# By kind: how it is opened with what follows the colon, and an example.
KINDS: dict[str, tuple[Opener, str]] = {
    "scenes": (lambda settings, rest: SceneSource(settings, design=rest), "scenes:quick"),
    "webdataset": (
        lambda settings, rest: WebdatasetSource(settings, spec=rest),
        "webdataset:tars/{00000..00127}.tar",
    ),
    "parquet": (lambda settings, rest: ParquetSource(settings, uri=rest), "parquet:pairs.parquet"),
    "csv": (lambda settings, rest: CsvSource(settings, uri=rest), "csv:captions.tsv"),
    "hf": (lambda settings, rest: HuggingFaceSource(settings, uri=rest), "hf:saved_dataset"),
    "coco": (
        lambda settings, rest: CocoSource(settings, spec=rest),
        "coco:annotations/captions_train2017.json",
    ),
    "mixture": (
        lambda settings, rest: MixtureSource(settings, uri=rest, open_part=open_source),
        "mixture:parts.yaml",
    ),
    "folder": (lambda settings, rest: FolderSource(settings, uri=rest), "folder:images_by_class"),
    "chexpert": (lambda settings, rest: open_chexpert(settings, root=rest), "chexpert:CheXpert-v1.0-small"),
    "mimic-cxr": (lambda settings, rest: open_mimic(settings, root=rest), "mimic-cxr:mimic-cxr-jpg/2.0.0"),
}


def open_source(settings: SourceSettings) -> PairSource:
    """Open the source a config names and check it, without starting a Ray task.

    Raises:
        ValueError: unknown kind or design, absent or unreachable file, missing or mistyped column, unknown
            split, or a row filter that no row passes.
    """
    kind, _, rest = settings.source.partition(":")
    # A mixture may list its parts in the config instead of a file.
    if kind not in KINDS or not (rest or settings.source == "mixture"):
        close = difflib.get_close_matches(kind, KINDS, n=1, cutoff=0.6) if kind not in KINDS else []
        meant = f"; did you mean '{close[0]}:'?" if close else ""
        examples = ", ".join(example for _, example in KINDS.values())
        raise ValueError(
            f"data.source must be <kind>:<place>, one of {examples} (local or s3://...), "
            f"got '{settings.source}'{meant}"
        )
    opener, _ = KINDS[kind]
    try:
        return opener(settings, rest)
    except OSError as error:
        # Wrong credentials, an unknown bucket, a server that is not there, a folder that may not be read.
        raise ValueError(f"data.source: cannot read '{settings.source}': {error}") from error


def source_identity(settings: SourceSettings) -> str:
    """What the rows of a source depend on, as text: for addressing what is made from them by content."""
    return open_source(settings).identity
