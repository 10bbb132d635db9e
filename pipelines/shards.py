"""A piece of a source -> checked rows -> shards; runs in a task and reports what became of every row."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from pipelines.images import RejectedRowError, crop_boxes, decode_square
from pipelines.schemas import PREPARED, SPLITS, UNKNOWN_LABELS
from pipelines.shard_file import SUFFIX, image_column, pack_shard
from pipelines.storage import join, write_bytes
from pipelines.tokenizer import TextTokenizer

_MESSAGE_CHARS = 200


@dataclass(frozen=True)
class ShardSettings:
    """What the tasks need to know; small, for it travels with each of them."""

    output_uri: str
    image_size: int
    rows_per_shard: int
    max_tokens: int
    tokenizer_json: bytes


@dataclass
class PieceReport:
    """What became of a piece's rows; plain values only, it goes back to the driver as JSON."""

    piece: int
    num_rows: int = 0
    shards: list[dict[str, Any]] = field(default_factory=list)  # split, path, rows, sha256
    quarantined: list[dict[str, str]] = field(default_factory=list)  # schemas.QUARANTINE
    label_counts: dict[str, Counter[str]] = field(default_factory=dict)
    class_names: list[str] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)
    max_caption_tokens: int = 0


class ShardWriter:
    """Gathers the rows of one piece by split and writes a shard whenever one is full.

    Args:
        piece: number of the piece.
        first_shard: number of its first shard in every split; the piece's size reserves the following
            ones, so names never depend on what other tasks do. Numbers may have gaps.
    """

    def __init__(self, settings: ShardSettings, *, piece: int, first_shard: int) -> None:
        self._settings = settings
        self._tokenizer = TextTokenizer.from_bytes(settings.tokenizer_json, max_tokens=settings.max_tokens)
        self._next_shard = dict.fromkeys(SPLITS, first_shard)
        self._waiting: dict[str, list[dict[str, Any]]] = {split: [] for split in SPLITS}
        self.report = PieceReport(piece)

    def add(self, rows: Iterable[dict[str, Any]], *, duplicates: frozenset[int]) -> None:
        """Take rows of `schemas.PAIRS`; `duplicates` are positions in the piece whose id came before."""
        accepted = []
        for row in rows:
            position, self.report.num_rows = self.report.num_rows, self.report.num_rows + 1
            try:
                accepted.append(
                    check_row(row, is_repeated=position in duplicates, image_size=self._settings.image_size)
                )
            except RejectedRowError as error:
                message = str(error)[:_MESSAGE_CHARS]
                self.report.quarantined.append(
                    {"row_id": row["row_id"], "reason": error.reason, "message": message}
                )
        _add_tokens(accepted, tokenizer=self._tokenizer)
        for row in accepted:
            waiting = self._waiting[row["split"]]
            waiting.append(row)
            if len(waiting) == self._settings.rows_per_shard:
                self._flush(row["split"])

    def close(self) -> PieceReport:
        for split, rows in self._waiting.items():
            if rows:
                self._flush(split)
        self.report.class_names.sort()
        self.report.sources.sort()
        return self.report

    def _flush(self, split: str) -> None:
        rows, self._waiting[split] = self._waiting[split], []
        path = f"shards/{split}-{self._next_shard[split]:05d}{SUFFIX}"
        self._next_shard[split] += 1
        leaves_open = any(UNKNOWN_LABELS.name in row for row in rows)
        schema = PREPARED.append(UNKNOWN_LABELS) if leaves_open else PREPARED
        data = pack_shard(_table(rows, schema))
        # A task that is run again after its worker died writes the same bytes to the same place.
        write_bytes(join(self._settings.output_uri, path), data)
        sha = hashlib.sha256(data).hexdigest()
        self.report.shards.append({"split": split, "path": path, "rows": len(rows), "sha256": sha})
        self._count(split, rows)

    def _count(self, split: str, rows: list[dict[str, Any]]) -> None:
        report = self.report
        report.label_counts.setdefault(split, Counter()).update(
            label for row in rows for label in row["labels"]
        )
        classes = {row["class_name"] for row in rows} - {None}
        report.class_names = list(classes.union(report.class_names))
        report.sources = list({row["source"] for row in rows}.union(report.sources))
        lengths = [len(t) for row in rows for t in row["caption_tokens"] + row["sentence_tokens"]]
        report.max_caption_tokens = max(report.max_caption_tokens, *lengths)


def check_row(row: dict[str, Any], *, is_repeated: bool, image_size: int) -> dict[str, Any]:
    """A row of `schemas.PAIRS` as one of `schemas.PREPARED`, still without tokens; `image` is an array.

    Raises:
        RejectedRowError: with the first reason that applies, of the source's own (`schemas.PROBLEM`),
            missing_row_id, duplicate_row_id, unknown_split, empty_caption, those of `decode_square`,
            invalid_box.
    """
    if problem := row.get("problem"):
        raise RejectedRowError(problem["reason"], problem["message"])
    if not row["row_id"]:
        raise RejectedRowError("missing_row_id", "the row has no id")
    if is_repeated:
        raise RejectedRowError("duplicate_row_id", "an earlier row has the same id")
    if row["split"] not in SPLITS:
        raise RejectedRowError("unknown_split", f"split must be one of {list(SPLITS)}, got '{row['split']}'")
    captions = clean_texts(row["captions"])
    if not captions:
        raise RejectedRowError("empty_caption", "the row has no caption with a visible character")
    image = decode_square(row["image"], size=image_size)
    return {
        **row,
        "image": image.pixels,
        "captions": captions,
        "sentences": clean_texts(row["sentences"]),
        "boxes": None if row["boxes"] is None else crop_boxes(row["boxes"], image=image),
    }


def clean_texts(texts: list[str]) -> list[str]:
    """Without white space at the ends, empty texts and repeats; in the order given."""
    return [text for text in dict.fromkeys(text.strip() for text in texts) if text]


def _table(rows: list[dict[str, Any]], schema: pa.Schema) -> pa.Table:
    place = schema.get_field_index("image")
    annotations = pa.Table.from_pylist(rows, schema=schema.remove(place))
    return annotations.add_column(place, schema.field(place), image_column([row["image"] for row in rows]))


def _add_tokens(rows: list[dict[str, Any]], *, tokenizer: TextTokenizer) -> None:
    for texts, tokens in (("captions", "caption_tokens"), ("sentences", "sentence_tokens")):
        encoded = iter(tokenizer.encode([text for row in rows for text in row[texts]]))
        for row in rows:
            row[tokens] = [next(encoded) for _ in row[texts]]
