"""Preparing goes on where it died, stops early when most rows are bad, and survives any row."""

from __future__ import annotations

import io
import random
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import pipelines.prepare
import pipelines.survey
from pipelines.config import DataConfig
from pipelines.prepare import prepare
from pipelines.prepared import Prepared
from tests.test_prepare import png, save_pairs

NUM_ROWS, PER_PIECE = 12, 4


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The stage without Ray; numbers of the pieces whose rows are written, in order."""
    seen: list[int] = []

    def run(pieces, task) -> Iterator[pa.Table]:
        for piece in pieces:
            seen.append(piece.number)
            yield task(piece)

    monkeypatch.setattr(pipelines.prepare, "map_pieces", run)
    monkeypatch.setattr(pipelines.survey, "map_pieces", lambda pieces, task: map(task, pieces))
    return seen


def config_of(tmp_path: Path, **options) -> DataConfig:
    rows = [{} for _ in range(NUM_ROWS)]
    return save_pairs(tmp_path / "pairs.parquet", rows, rows_per_shard=PER_PIECE, **options)


def die_after(monkeypatch: pytest.MonkeyPatch, num_pieces: int) -> None:
    """The driver dies when so many pieces are written."""

    def run(pieces, task) -> Iterator[pa.Table]:
        for piece in pieces[:num_pieces]:
            yield task(piece)
        raise KeyboardInterrupt

    monkeypatch.setattr(pipelines.prepare, "map_pieces", run)


def test_a_run_that_died_writes_only_what_is_left(written, monkeypatch, tmp_path):
    config, out, whole = config_of(tmp_path), str(tmp_path / "out"), str(tmp_path / "whole")
    with monkeypatch.context() as patch:
        die_after(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            prepare(config, out)
    assert not (tmp_path / "out" / "manifest.json").exists()
    manifest = prepare(config, out)
    assert written == [2]
    expected = prepare(config, whole)
    assert written == [2, 0, 1, 2]
    assert manifest == expected
    assert Prepared.open(out).table("train").equals(Prepared.open(whole).table("train"))


@pytest.mark.parametrize("change", [{"image_size": 16}, {"max_tokens": 12}, {"vocab_size": 300}])
def test_other_settings_write_every_piece_again(written, monkeypatch, tmp_path, change):
    config, out = config_of(tmp_path), str(tmp_path / "out")
    with monkeypatch.context() as patch:
        die_after(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            prepare(config, out)
    prepare(config.model_copy(update=change), out)
    # A vocabulary that holds every word twice over is the same vocabulary.
    assert written == ([2] if "vocab_size" in change else [0, 1, 2])


def test_other_rows_write_every_piece_again(written, monkeypatch, tmp_path):
    config, out = config_of(tmp_path), str(tmp_path / "out")
    with monkeypatch.context() as patch:
        die_after(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            prepare(config, out)
    prepare(save_pairs(tmp_path / "pairs.parquet", [{"captions": ["new"]}] * NUM_ROWS, rows_per_shard=4), out)
    assert written == [0, 1, 2]


def test_when_too_much_is_bad_nothing_more_is_read(written, tmp_path):
    rows = [{"image": b"broken"}] * 4 + [{}] * 8
    config = save_pairs(tmp_path / "pairs.parquet", rows, rows_per_shard=PER_PIECE, max_quarantined_share=0.2)
    with pytest.raises(ValueError, match=r"4 of 4 rows are unusable \(undecodable_image 4\)"):
        prepare(config, str(tmp_path / "out"))
    assert written == [0]
    assert len(pq.read_table(tmp_path / "out" / "quarantine.parquet")) == 4


def jpeg(rng: random.Random) -> bytes:
    file = io.BytesIO()
    size = (rng.randint(1, 40), rng.randint(1, 40))
    Image.new(rng.choice(["RGB", "L", "CMYK"]), size).save(file, format="JPEG")
    return file.getvalue()


def mutated(rng: random.Random) -> dict:
    """A row with something wrong, or nothing."""
    image, kind = rng.choice([jpeg(rng), png()]), rng.randrange(9)
    row: dict = {"image": image, "captions": ["a text"]}
    if kind == 0:
        broken = bytearray(image)
        for _ in range(rng.randint(1, 40)):
            broken[rng.randrange(len(broken))] ^= 1 << rng.randrange(8)
        row["image"] = bytes(broken)
    elif kind == 1:
        row["image"] = image[: rng.randrange(len(image))]
    elif kind == 2:
        row["image"] = rng.randbytes(rng.randrange(200))
    elif kind == 3:
        row["image"] = None
    elif kind == 4:
        # What a size field can claim: PNG's width and height are bytes 16 to 24.
        row["image"] = image[:16] + rng.randbytes(8) + image[24:]
    elif kind == 5:
        row["captions"] = rng.choice(
            [[], [""], [" \u200b"], ["\x00"], ["x" * 50_000], ["\ud7ff\uffff"], [None]]
        )
    elif kind == 6:
        # A value that means no split is refused before anything is read; a missing one is a bad row.
        row["split"] = None
    elif kind == 7:
        row["id"] = rng.choice(["", None, "row0"])
    return row


def test_two_thousand_mutated_rows_are_kept_or_set_aside(written, tmp_path):
    rng = random.Random(0)
    rows = [mutated(rng) for _ in range(2000)]
    config = save_pairs(tmp_path / "pairs.parquet", rows, max_quarantined_share=1.0, rows_per_shard=500)
    manifest = prepare(config, str(tmp_path / "out"))
    kept = sum(found["rows"] for found in manifest["splits"].values())
    quarantine = pq.read_table(tmp_path / "out" / "quarantine.parquet")
    assert kept + len(quarantine) == manifest["num_rows_in"] == 2000
    assert sum(manifest["quarantine"].values()) == len(quarantine)
    assert all(reason for reason in quarantine["reason"].to_pylist())
    assert 300 < len(quarantine) < 1700
    assert {"undecodable_image", "missing_image", "empty_caption", "unknown_split"} <= set(
        manifest["quarantine"]
    )
    assert kept == len(Prepared.open(str(tmp_path / "out")).table("train"))
