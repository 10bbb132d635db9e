"""A look at a source before anything is prepared: what is there, what is wrong, what it will cost.

Rows are read in this process, without Ray, from pieces spread evenly over the source.
"""

from __future__ import annotations

import hashlib
import io
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from pipelines.config import Config
from pipelines.images import RejectedRowError
from pipelines.shards import check_row
from pipelines.sources.open_source import open_source
from pipelines.sources.source import PairSource, Piece

_QUANTILES = (0.0, 0.5, 0.95, 1.0)
_LISTED = 5


@dataclass
class DataReport:
    """What a sample of a source looks like; plain values, printed as a table or as JSON.

    Attributes:
        num_rows: of the source, as its files say (of tars an estimate); a row filter may leave fewer.
        num_pieces: tasks that read it.
        num_sampled: rows looked at.
        problems: what keeps the data from being used, or would spoil a result.
        warnings: what the user should know.
    """

    source: str
    num_rows: int = 0
    num_pieces: int = 0
    num_sampled: int = 0
    splits: dict[str, int] = field(default_factory=dict)
    unusable: dict[str, int] = field(default_factory=dict)
    image_sides: dict[str, float] = field(default_factory=dict)
    image_modes: dict[str, int] = field(default_factory=dict)
    captions_per_row: dict[str, float] = field(default_factory=dict)
    words_per_caption: dict[str, float] = field(default_factory=dict)
    sentences_per_row: dict[str, float] = field(default_factory=dict)
    labels: dict[str, int] = field(default_factory=dict)
    num_repeated_images: int = 0
    num_repeated_captions: int = 0
    memory_gb: float = 0.0
    prepare_minutes: float = 0.0
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def is_usable(self) -> bool:
        return not self.problems

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "is_usable": self.is_usable}


def check_source(config: Config, *, max_rows: int) -> DataReport:
    """Look at up to `max_rows` rows of the configured source.

    Raises:
        ValueError: the source cannot be opened at all.
    """
    source = open_source(config.data)
    pieces = source.pieces()
    report = DataReport(config.data.source, sum(piece.likely_rows for piece in pieces), len(pieces))
    report.warnings += source.notes
    started = time.process_time()
    rows = _look_at(source, pieces, config, report, max_rows=max_rows)
    seconds_per_row = (time.process_time() - started) / max(1, report.num_sampled)
    _find_leaks(rows, report)
    _find_repeats(rows, report)
    _judge(config, report, seconds_per_row=seconds_per_row)
    return report


@dataclass(frozen=True)
class _Row:
    split: str
    group: str | None
    image_sha: bytes
    captions: list[str]


def _look_at(
    source: PairSource, pieces: list[Piece], config: Config, report: DataReport, *, max_rows: int
) -> list[_Row]:
    seen: list[_Row] = []
    sides: list[int] = []
    counts: dict[str, list[int]] = defaultdict(list)
    for raw in _sampled(source, pieces, max_rows=max_rows):
        report.num_sampled += 1
        try:
            row = check_row(raw, is_repeated=False, image_size=config.data.image_size)
        except RejectedRowError as error:
            report.unusable[error.reason] = report.unusable.get(error.reason, 0) + 1
            continue
        width, height, mode = _shape(raw["image"])
        sides.append(min(width, height))
        _count(report.image_modes, mode)
        _count(report.splits, row["split"])
        for label in row["labels"]:
            _count(report.labels, label)
        counts["captions"].append(len(row["captions"]))
        counts["words"] += [len(caption.split()) for caption in row["captions"]]
        counts["sentences"].append(len(row["sentences"]))
        sha = hashlib.blake2b(raw["image"], digest_size=16).digest()
        seen.append(_Row(row["split"], row["group_id"], sha, row["captions"]))
    report.image_sides = _quantiles(sides)
    report.captions_per_row = _quantiles(counts["captions"])
    report.words_per_caption = _quantiles(counts["words"])
    report.sentences_per_row = _quantiles(counts["sentences"])
    return seen


def _sampled(source: PairSource, pieces: list[Piece], *, max_rows: int) -> Iterator[dict[str, Any]]:
    """Rows of pieces spread over the source, equally many of each."""
    if not pieces:
        return
    num_pieces = min(len(pieces), max(1, max_rows // 50))
    chosen = [pieces[i] for i in np.unique(np.linspace(0, len(pieces) - 1, num_pieces).astype(int))]
    per_piece = -(-max_rows // len(chosen))
    for piece in chosen:
        left = per_piece
        for table in source.read(piece):
            taken: pa.Table = table.slice(0, left)
            left -= len(taken)
            yield from taken.to_pylist()
            if left == 0:
                break


def _shape(data: bytes) -> tuple[int, int, str]:
    # The row is known to be readable; only its header is looked at.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image = Image.open(io.BytesIO(data))
        return image.width, image.height, image.mode


def _count(counts: dict[str, int], key: str) -> None:
    counts[key] = counts.get(key, 0) + 1


def _quantiles(values: list[int]) -> dict[str, float]:
    if not values:
        return {}
    names = ("min", "median", "p95", "max")
    return dict(zip(names, np.quantile(values, _QUANTILES).tolist(), strict=True))


def _find_leaks(rows: list[_Row], report: DataReport) -> None:
    splits_of: dict[str, set[str]] = defaultdict(set)
    images: dict[bytes, set[str]] = defaultdict(set)
    for row in rows:
        if row.group is not None:
            splits_of[row.group].add(row.split)
        images[row.image_sha].add(row.split)
    leaking = sorted(group for group, splits in splits_of.items() if len(splits) > 1)
    if leaking:
        report.problems.append(
            f"{len(leaking)} groups stand in more than one split ({', '.join(leaking[:_LISTED])}): a model "
            "would be tested on patients or studies it was trained on; mend the split column, or set "
            "data.columns.split=null to divide the rows by the hash of their group"
        )
    same = sum(len(splits) > 1 for splits in images.values())
    if same:
        report.problems.append(f"{same} images are the same, bit for bit, in more than one split")


def _find_repeats(rows: list[_Row], report: DataReport) -> None:
    images = Counter(row.image_sha for row in rows)
    captions = Counter(caption for row in rows for caption in set(row.captions))
    report.num_repeated_images = sum(count - 1 for count in images.values())
    report.num_repeated_captions = sum(count - 1 for count in captions.values())
    if rows and report.num_repeated_captions > 0.05 * len(rows):
        (most, count), *_ = captions.most_common(1)
        report.warnings.append(
            f"{report.num_repeated_captions} captions repeat an earlier one (most often, {count} times: "
            f"'{most[:60]}'): such pairs are each other's false negatives; "
            "method.candidates.exclude=same_text leaves them out"
        )


def _judge(config: Config, report: DataReport, *, seconds_per_row: float) -> None:
    side = config.data.image_size
    report.memory_gb = round(report.num_rows * side * side * 3 / 2**30, 3)
    report.prepare_minutes = round(report.num_rows * seconds_per_row / 60, 2)
    num_bad = sum(report.unusable.values())
    if report.num_sampled == 0:
        report.problems.append("no row could be read")
    elif num_bad > config.data.max_quarantined_share * report.num_sampled:
        reasons = ", ".join(f"{reason} {count}" for reason, count in sorted(report.unusable.items()))
        report.problems.append(
            f"{num_bad} of {report.num_sampled} sampled rows are unusable ({reasons}), more than "
            f"data.max_quarantined_share={config.data.max_quarantined_share}"
        )
    if report.num_rows < config.train.batch_size:
        report.problems.append(
            f"train.batch_size={config.train.batch_size} exceeds the {report.num_rows} rows; lower it"
        )
    if report.num_pieces < config.train.num_workers:
        report.warnings.append(
            f"{report.num_pieces} pieces for {config.train.num_workers} workers: preparing uses no more "
            "tasks than pieces; lower data.rows_per_shard"
        )
    if report.image_sides and report.image_sides["median"] < side:
        report.warnings.append(
            f"half of the images are smaller than data.image_size={side}; they will be enlarged"
        )
