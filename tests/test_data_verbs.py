"""`clipfleet data`: what a look at a source finds, and the picture of its rows."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

from pipelines.cli import app
from pipelines.config import Config
from pipelines.config_tree import load_config
from pipelines.contact_sheet import SheetRow, contact_sheet
from pipelines.data_check import check_source
from pipelines.data_stages import show_stage, stats_stage
from pipelines.sources.open_source import KINDS
from pipelines.stages import prepare_stage
from tests.pipeline_fixture import small_config


def png(seed: int, size: tuple[int, int] = (20, 12)) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def pairs(tmp_path: Path, changes: dict[int, dict], *, num_rows: int = 20) -> Config:
    rows = [
        {
            "id": f"r{i}",
            "image": png(i),
            "caption": f"number {i}",
            "split": ("train", "test")[i % 2],
            "group": f"patient {i}",
            **changes.get(i, {}),
        }
        for i in range(num_rows)
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "pairs.parquet")
    return load_config(
        overrides=[
            f"data.source=parquet:{tmp_path / 'pairs.parquet'}",
            "train.batch_size=4",
            "data.image_size=8",
        ]
    )


def test_a_clean_source_is_usable_and_counted(tmp_path):
    report = check_source(pairs(tmp_path, {}), max_rows=100)
    assert report.is_usable
    assert (report.num_rows, report.num_sampled, report.splits) == (20, 20, {"train": 10, "test": 10})
    assert report.image_sides == {"min": 12, "median": 12, "p95": 12, "max": 12}
    assert report.words_per_caption["median"] == 2
    assert (report.num_repeated_images, report.num_repeated_captions) == (0, 0)
    assert report.memory_gb == round(20 * 8 * 8 * 3 / 2**30, 3)


def test_patients_and_images_in_two_splits_are_problems(tmp_path):
    config = pairs(tmp_path, {0: {"group": "same"}, 1: {"group": "same", "image": png(0)}})
    found = check_source(config, max_rows=100)
    assert not found.is_usable
    assert "1 groups stand in more than one split (same)" in found.problems[0]
    assert "1 images are the same, bit for bit, in more than one split" in found.problems[1]
    # The same patient twice in one split is no leak.
    assert check_source(pairs(tmp_path, {0: {"group": "same"}, 2: {"group": "same"}}), max_rows=100).is_usable


def test_unusable_rows_are_counted_and_too_many_are_a_problem(tmp_path):
    found = check_source(pairs(tmp_path, {3: {"image": b"x"}}), max_rows=100)
    assert (found.unusable, found.is_usable) == ({"undecodable_image": 1}, True)
    worse = check_source(pairs(tmp_path, {i: {"caption": " "} for i in range(4)}), max_rows=100)
    assert "4 of 20 sampled rows are unusable (empty_caption 4)" in worse.problems[0]


def test_repeated_captions_name_the_setting_that_helps(tmp_path):
    found = check_source(pairs(tmp_path, {i: {"caption": "normal chest"} for i in range(10)}), max_rows=100)
    assert found.num_repeated_captions == 9
    assert any("method.candidates.exclude=same_text" in text for text in found.warnings)


def test_a_batch_larger_than_the_data_is_a_problem(tmp_path):
    config = pairs(tmp_path, {})
    config = config.model_copy(update={"train": config.train.model_copy(update={"batch_size": 64})})
    assert "train.batch_size=64 exceeds the 20 rows" in check_source(config, max_rows=100).problems[0]


def test_a_sample_is_spread_over_the_source(tmp_path):
    config = load_config(overrides=["data.rows_per_shard=500"])
    found = check_source(config, max_rows=750)
    assert found.num_rows == 7500
    assert 750 <= found.num_sampled <= 765
    assert set(found.splits) == {"train", "selection", "test"}


def test_the_verb_s_exit_code_says_whether_the_data_is_usable(tmp_path):
    source = f"parquet:{tmp_path / 'pairs.parquet'}"
    pairs(tmp_path, {})
    command = ["data", "check", "--source", source, "train.batch_size=4", "--json"]
    good = CliRunner().invoke(app, command)
    assert (good.exit_code, json.loads(good.stdout)["is_usable"]) == (0, True)
    pairs(tmp_path, {0: {"group": "same"}, 1: {"group": "same"}})
    bad = CliRunner().invoke(app, command[:-1])
    assert bad.exit_code == 1
    assert "problem: 1 groups stand in more than one split" in " ".join(bad.stdout.split())
    assert CliRunner().invoke(app, ["data", "check", "--source", "parquet:none"]).exit_code == 2


@pytest.mark.ray
def test_prepared_data_is_counted_by_split(small_prepared, tmp_path, capsys):
    config = small_config(tmp_path)
    config = config.model_copy(update={"prepared": str(Path(small_prepared).parent)})
    stats_stage(config, Console(), as_json=True)
    found = json.loads(capsys.readouterr().out)["splits"]
    assert {split: stats["rows"] for split, stats in found.items()} == {
        "train": 192,
        "selection": 64,
        "test": 64,
    }
    assert found["train"]["captions"] > 192


@pytest.mark.ray
def test_a_sheet_shows_prepared_rows(small_prepared, tmp_path):
    config = small_config(tmp_path).model_copy(update={"prepared": str(Path(small_prepared).parent)})
    place = tmp_path / "sheet.png"
    show_stage(config, Console(file=io.StringIO()), output=str(place), split="test", num_rows=7, run=None)
    assert Image.open(place).size == (6 * 200 + 8, 2 * 278 + 8)


def test_boxes_and_removed_patches_are_drawn():
    grey = np.full((8, 8, 3), 200, np.uint8)
    plain = SheetRow(grey, "a text", "title")
    kept = SheetRow(grey, "a text", "title", is_kept=np.eye(2, dtype=bool))
    boxed = SheetRow(
        grey, "a text", "title", boxes=[{"label": "x", "x": 0.5, "y": 0.5, "w": 0.25, "h": 0.25}]
    )
    pictures = [np.asarray(Image.open(io.BytesIO(contact_sheet([row])))) for row in (plain, kept, boxed)]
    at = {"kept": (8 + 48, 8 + 48), "removed": (8 + 48, 8 + 144), "edge": (8 + 96, 8 + 120)}
    # A veil, not a shade: a removed patch of a black image is seen too.
    assert [int(pictures[1][at[key]][0]) for key in ("kept", "removed")] == [200, 144]
    black = SheetRow(np.zeros((8, 8, 3), np.uint8), "", "t" * 99, is_kept=np.eye(2, dtype=bool))
    dark = np.asarray(Image.open(io.BytesIO(contact_sheet([black]))))
    assert [int(dark[at[key]][0]) for key in ("kept", "removed")] == [0, 84]
    assert int(pictures[0][at["removed"]][0]) == 200
    assert tuple(pictures[2][at["edge"]]) == (220, 38, 38)
    with pytest.raises(ValueError, match="at least one row"):
        contact_sheet([])


@pytest.mark.ray
def test_a_verb_opens_its_source_once(tmp_path, small_prepared, monkeypatch):
    """On object storage every opening asks for each file."""
    opened = []
    opener, example = KINDS["scenes"]
    monkeypatch.setitem(KINDS, "scenes", (lambda *args: opened.append(args) or opener(*args), example))
    console, here = Console(quiet=True), f"prepared={Path(small_prepared).parent}"
    for config in (small_config(tmp_path), small_config(tmp_path, here)):
        opened.clear()
        prepare_stage(config, console, dry_run=False)
        assert len(opened) == 1
        stats_stage(config, console, as_json=False)
        assert len(opened) == 2
