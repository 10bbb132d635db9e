"""The first stage: pairs -> checked, squared, tokenised shards, a quarantine and a manifest.

Two passes over the same pieces, each a Ray Data job: the first reads ids and texts (repeated ids, words for
the tokenizer), the second decodes and writes. Shards are written inside tasks, so pixels never pass through
the driver. A piece's shards depend on the piece alone: any number of workers writes the same bytes. A piece
that is written leaves its report beside the shards, so a run that died goes on with the pieces that are left.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import Counter
from typing import Any, Protocol

import pyarrow as pa

from pipelines.finished_pieces import FinishedPieces, settings_digest
from pipelines.prepared import MANIFEST, MANIFEST_VERSION
from pipelines.schemas import QUARANTINE, SPLITS
from pipelines.shards import PieceReport, ShardSettings, ShardWriter
from pipelines.sources.mixture import piece_weights, source_weights
from pipelines.sources.open_source import open_source
from pipelines.sources.source import PairSource, Piece, SourceSettings, map_pieces
from pipelines.storage import join, publish_json, refuse_existing, write_bytes, write_table
from pipelines.survey import Progress, Survey, survey_texts
from pipelines.tokenizer import TextTokenizer, check_vocab_size, load_tokenizer, train_tokenizer

TOKENIZER_FILE = "tokenizer.json"
QUARANTINE_FILE = "quarantine.parquet"


class PrepareSettings(SourceSettings, Protocol):
    """The data config as this stage sees it."""

    @property
    def image_size(self) -> int: ...
    @property
    def max_tokens(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def tokenizer(self) -> str | None: ...
    @property
    def max_quarantined_share(self) -> float: ...


def prepare(
    config: PrepareSettings,
    output_uri: str,
    *,
    source: PairSource | None = None,
    on_progress: Progress | None = None,
) -> dict[str, Any]:
    """Prepare the data a config names, at a location without a manifest.

    Pieces that a run of the same settings finished before it died are not written again. Every input row
    ends in a shard or in `quarantine.parquet`, with its reason.

    Args:
        source: what the config opens, where the caller has it already.

    Returns:
        The manifest, which is also written last as `manifest.json`.

    Raises:
        AlreadyExistsError: there is a manifest already; `read_manifest` opens it.
        ValueError: the source cannot be opened (see `open_source`), the tokenizer cannot be built, more than
            `max_quarantined_share` of the rows are unusable, or fewer than 2 training rows are left.
    """
    refuse_existing(join(output_uri, MANIFEST))
    report_progress = on_progress or (lambda stage, done, total: None)
    tokenizer = _given_tokenizer(config)
    source = source or open_source(config)
    pieces = source.pieces()
    survey = survey_texts(source, pieces=pieces, on_progress=report_progress)
    _check_train_rows(survey.num_train, where=config.source)
    tokenizer = tokenizer or train_tokenizer(
        survey.words, vocab_size=config.vocab_size, max_tokens=config.max_tokens
    )
    settings = ShardSettings(
        output_uri, config.image_size, config.rows_per_shard, config.max_tokens, tokenizer.to_bytes()
    )
    finished = FinishedPieces(output_uri, settings_digest(settings, source.identity, survey))
    reports = _write(
        source,
        pieces=pieces,
        survey=survey,
        settings=settings,
        finished=finished,
        allowed=config.max_quarantined_share,
        on_progress=report_progress,
    )
    quarantine = _write_quarantine(reports, config=config, output_uri=output_uri)
    manifest = _manifest(reports, config=config, source=source, tokenizer=tokenizer, quarantine=quarantine)
    _check_train_rows(manifest["splits"]["train"]["rows"], where=config.source)
    write_bytes(join(output_uri, TOKENIZER_FILE), settings.tokenizer_json)
    publish_json(join(output_uri, MANIFEST), manifest)
    return manifest


def _given_tokenizer(config: PrepareSettings) -> TextTokenizer | None:
    """The tokenizer a config names; None when one is to be trained, whose settings are checked here."""
    if config.tokenizer is not None:
        return load_tokenizer(config.tokenizer, max_tokens=config.max_tokens)
    check_vocab_size(config.vocab_size)
    return None


def _write(
    source: PairSource,
    *,
    pieces: list[Piece],
    survey: Survey,
    settings: ShardSettings,
    finished: FinishedPieces,
    allowed: float,
    on_progress: Progress,
) -> list[PieceReport]:
    first_shards = _first_shards(pieces, rows_per_shard=settings.rows_per_shard)
    duplicates = survey.duplicates

    def write_piece(piece: Piece) -> pa.Table:
        writer = ShardWriter(settings, piece=piece.number, first_shard=first_shards[piece.number])
        repeated = frozenset(duplicates.get(piece.number, []))
        for table in source.read(piece):
            writer.add(table.to_pylist(), duplicates=repeated)
        report = writer.close()
        finished.add(report)
        return pa.table({"report": [json.dumps(vars(report))]})

    reports = finished.read()
    done = {report.piece for report in reports}
    num_seen = sum(report.num_rows for report in reports)
    num_bad = sum(len(report.quarantined) for report in reports)
    left = [piece for piece in pieces if piece.number not in done]
    for found in map_pieces(left, write_piece) if left else ():
        reports.append(PieceReport(**json.loads(found["report"][0].as_py())))
        num_seen += reports[-1].num_rows
        num_bad += len(reports[-1].quarantined)
        on_progress("writing shards", num_seen, survey.num_rows)
        if num_bad > allowed * survey.num_rows:
            # Hours more of the same would end in the same refusal.
            return reports
    if num_seen != survey.num_rows:
        raise ValueError(f"the source changed while it was read: {survey.num_rows} rows, then {num_seen}")
    return sorted(reports, key=lambda report: report.piece)


def _first_shards(pieces: list[Piece], *, rows_per_shard: int) -> list[int]:
    """The shard number each piece starts at: room for all its rows in one split."""
    numbers, number = [], 0
    for piece in pieces:
        numbers.append(number)
        number += -(-piece.num_rows // rows_per_shard)
    return numbers


def _write_quarantine(
    reports: list[PieceReport], *, config: PrepareSettings, output_uri: str
) -> dict[str, int]:
    """Write the unusable rows and return their number per reason."""
    rows = [row for report in sorted(reports, key=lambda report: report.piece) for row in report.quarantined]
    place = join(output_uri, QUARANTINE_FILE)
    write_table(place, pa.Table.from_pylist(rows, schema=QUARANTINE))
    counts = dict(sorted(Counter(row["reason"] for row in rows).items()))
    num_rows = sum(report.num_rows for report in reports)
    if len(rows) > config.max_quarantined_share * num_rows:
        reasons = ", ".join(f"{reason} {count}" for reason, count in counts.items())
        raise ValueError(
            f"{len(rows)} of {num_rows} rows are unusable ({reasons}), more than "
            f"data.max_quarantined_share={config.max_quarantined_share}; they are listed in '{place}'"
        )
    return counts


def _manifest(
    reports: list[PieceReport],
    *,
    config: PrepareSettings,
    source: PairSource,
    tokenizer: TextTokenizer,
    quarantine: dict[str, int],
) -> dict[str, Any]:
    weights = piece_weights(source)
    sources = sorted({name for report in reports for name in report.sources})
    shards = {
        split: [
            {key: shard[key] for key in ("path", "rows", "sha256")} | weights.get(report.piece, {})
            for report in reports
            for shard in report.shards
            if shard["split"] == split
        ]
        for split in SPLITS
    }
    hashes = [f"{shard['path']} {shard['sha256']}" for split in SPLITS for shard in shards[split]]
    return {
        "schema_version": MANIFEST_VERSION,
        "image_size": config.image_size,
        "splits": {
            split: {"rows": sum(shard["rows"] for shard in listed), "shards": listed}
            for split, listed in shards.items()
        },
        "sources": sources,
        "source_weights": source_weights(source, sources),
        "class_names": sorted({name for report in reports for name in report.class_names}),
        "label_counts": {split: _label_counts(reports, split=split) for split in SPLITS},
        "quarantine": quarantine,
        "num_rows_in": sum(report.num_rows for report in reports),
        "tokenizer": TOKENIZER_FILE,
        "vocab_size": tokenizer.vocab_size,
        "max_caption_tokens": max(report.max_caption_tokens for report in reports),
        "config": _plain(config),
        "source_identity": source.identity,
        "data_sha": hashlib.sha256("\n".join(hashes).encode()).hexdigest(),
    }


def _label_counts(reports: list[PieceReport], *, split: str) -> dict[str, int]:
    total: Counter[str] = Counter()
    for report in reports:
        total.update(report.label_counts.get(split, {}))
    return dict(sorted(total.items()))


def _plain(config: Any) -> dict[str, Any]:
    """A pydantic model or a dataclass as plain values."""
    dump = getattr(config, "model_dump", None)
    plain: dict[str, Any] = dump(mode="json") if dump else dataclasses.asdict(config)
    return plain


def _check_train_rows(num_rows: int, *, where: str) -> None:
    if num_rows < 2:
        raise ValueError(
            f"{where}: contrastive training needs at least 2 usable rows in the train split, found {num_rows}"
        )
