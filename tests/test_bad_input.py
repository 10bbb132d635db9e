"""Bad input by the command line: refused with a clear message, or counted without losing the run."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import Result
from PIL import Image
from typer.testing import CliRunner

from pipelines import storage
from pipelines.cli import app
from pipelines.results import Store
from tests.pipeline_fixture import SMALL

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 60), "blue": (30, 60, 220), "grey": (128, 128, 128)}
# The files below have these columns and no other.
COLUMNS = (
    "data.columns={id: id, image: image, caption: caption, captions: null, class_name: class, group: null, "
    "labels: null, source: null, split: split, boxes: null}"
)
TINY = (*SMALL, "data.image_size=16", "model.patch_size=8", "train.batch_size=8", "train.steps=2")


def clipfleet(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200", "TERM": "dumb"})


def refusal(*arguments: str) -> str:
    """The message of a command that must be refused with exit code 2 and no trace."""
    result = clipfleet(*arguments)
    assert result.exit_code == 2, f"{result.output}\n{result.exception!r}"
    assert "Traceback" not in result.output
    return " ".join(result.stderr.split())


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: object) -> None:
        raise AssertionError("Ray was started")

    monkeypatch.setattr("pipelines.cluster.connect", refuse)


def picture(colour: Sequence[int], generator: np.random.Generator) -> bytes:
    pixels = np.clip(np.array(colour) + generator.integers(-20, 20, (16, 16, 3)), 0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def rows(num_rows: int = 60) -> list[dict[str, Any]]:
    """Coloured squares: two thirds for training, the rest for selection and test."""
    generator = np.random.default_rng(0)
    names = list(COLOURS)
    splits = ("train", "train", "train", "train", "val", "test")
    made = []
    for number in range(num_rows):
        name = names[number % len(names)]
        made.append(
            {
                "id": f"r{number:03d}",
                "image": picture(COLOURS[name], generator),
                "caption": f"a {name} square, number {number}",
                "class": name,
                "split": splits[number // len(names) % len(splits)],
            }
        )
    return made


def write(folder: Path, content: list[dict[str, Any]]) -> tuple[str, ...]:
    """A Parquet file and the arguments to run a command on it."""
    file = folder / "squares.parquet"
    pq.write_table(pa.Table.from_pylist(content), file)
    places = (f"prepared={folder / 'prepared'}", f"output={folder / 'root'}")
    return ("--source", f"parquet:{file}", *TINY, COLUMNS, *places)


@pytest.mark.ray
def test_unusable_rows_are_counted_by_reason_and_the_run_completes(ray_session: None, tmp_path: Path):
    content = rows()
    content[2]["image"] = b"\x89PNG not really"
    content[3]["image"] = content[3]["image"][:80]
    content[5]["caption"] = "  "
    content[6]["id"] = content[7]["id"]
    arguments = write(tmp_path, content)
    assert "4 of 60 rows are unusable" in refusal("pretrain", *arguments, "--local")

    result = clipfleet("pretrain", *arguments, "--local", "data.max_quarantined_share=0.1")
    assert result.exit_code == 0, result.output
    assert "duplicate_row_id 1, empty_caption 1, undecodable_image 2" in result.stdout
    file = result.stdout.partition("; see ")[2].split()[0]
    assert {row["row_id"] for row in storage.read_table(file).to_pylist()} == {"r002", "r003", "r005", "r007"}
    (run,) = Store(str(tmp_path / "root")).runs()
    assert (run["state"], run["steps"]) == ("complete", 2)

    finished = refusal("pretrain", *arguments, "--local", "data.max_quarantined_share=0.1")
    assert "is a finished run and is never overwritten; name another output or seed" in finished


def test_a_missing_column_names_the_columns_found(tmp_path: Path, no_ray: None):
    arguments = write(tmp_path, [{"text": row.pop("caption"), **row} for row in rows(6)])
    for verb in ("prepare", "pretrain", "sweep"):
        message = refusal(verb, *arguments)
        assert "column 'caption' is missing" in message
        assert "columns found: text, id, image, class, split" in message
        assert "data.columns.<name>=<column>" in message


def test_a_source_that_is_not_there_is_named(tmp_path: Path, no_ray: None):
    absent = tmp_path / "absent.parquet"
    assert f"'{absent}' does not exist" in refusal("prepare", "--source", f"parquet:{absent}")
    assert "got 'parqet:/x'" in refusal("prepare", "--source", "parqet:/x")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.stepz=3", "unknown config key 'train.stepz'; did you mean 'steps'?"),
        ("trian.steps=3", "unknown config key 'trian'; did you mean 'train'?"),
        ("method.temprature.init=1", "unknown config key 'method.temprature'; did you mean 'temperature'?"),
        ("train.steps", "an override must read key.sub=value, got 'train.steps'"),
        ("train.batch_size=1", "train.batch_size: Input should be greater than or equal to 2"),
        ("train.batch_size=banana", "train.batch_size: Input should be a valid integer"),
        ("evaluation.select_on=test", "select_on and report_on must be different splits, both are 'test'"),
        ("train.num_workers=3", "train.batch_size must be a multiple of train.num_workers, got 64 and 3"),
        ("method.temperature.init=-1", "temperature"),
    ],
)
def test_a_bad_setting_is_refused_before_ray_starts(override: str, message: str, no_ray: None):
    for verb in ("sweep", "pretrain", "prepare"):
        assert message in refusal(verb, override)


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ("{method.transform.bta: {uniform: [1, 2]}}", r"method.transform.bta=1"),
        ("{method.temperature.init: {uniform: [-1, 1]}}", "space of 'clip', method.temperature.init=-1"),
        ("{method.temperature.init: {unifrom: [1, 2]}}", "sweep.space, method.temperature.init"),
    ],
)
def test_a_bad_space_is_refused_before_ray_starts(space: str, message: str, tmp_path: Path, no_ray: None):
    found = refusal("sweep", "--methods", "clip", f"sweep.space={space}", f"output={tmp_path / 'root'}")
    assert message in found
    assert not (tmp_path / "root").exists()


def test_a_space_path_that_does_not_exist_names_the_nearest(no_ray: None):
    message = refusal("sweep", "--methods", "clip", "sweep.space={method.transform.bta: {uniform: [1, 2]}}")
    assert "did you mean 'beta'?" in message


def test_an_output_with_another_sweep_is_refused_before_ray_starts(tmp_path: Path, no_ray: None):
    root = tmp_path / "root"
    storage.write_json(str(root / "sweep.json"), {"schema_version": 1, "identity": "another"})
    message = refusal("sweep", f"output={root}")
    assert f"'{root}' holds a sweep with another configuration; name another output" in message


def test_a_running_single_run_is_no_sweep(tmp_path: Path, no_ray: None):
    root = tmp_path / "root"
    storage.write_json(str(root / "runs" / "clip-s0" / "run.json"), {"state": "running"})
    assert "holds single runs, no sweep; name another output" in refusal("sweep", f"output={root}")


@pytest.fixture
def squares(ray_session: None, tmp_path: Path) -> tuple[str, ...]:
    return write(tmp_path, rows())


@pytest.mark.ray
def test_a_main_metric_that_does_not_exist_is_refused_before_training(
    squares: tuple[str, ...], tmp_path: Path
):
    for verb in (("pretrain", "--local"), ("sweep", "--methods", "clip")):
        message = refusal(*verb, *squares, "evaluation.main_metric=foo")
        assert "unknown main metric 'foo'" in message
        assert "This data offers: auto, " in message
        assert "zeroshot_classification.acc1" in message
        near = refusal(*verb, *squares, "evaluation.main_metric=zeroshot_classification.acc_1")
        assert "did you mean 'zeroshot_classification.acc1'?" in near
    assert not (tmp_path / "root").exists()


@pytest.mark.ray
def test_a_main_metric_that_the_data_do_not_define_is_refused(squares: tuple[str, ...], tmp_path: Path):
    message = refusal("pretrain", "--local", *squares, "evaluation.main_metric=auroc_macro")
    assert "main metric 'auroc_macro': the selection split allows no such task" in message
    assert "no row has labels" in message
    # 10 rows: every image is among the first ten.
    certain = refusal("pretrain", "--local", *squares, "evaluation.main_metric=text_retrieval_recall@10")
    assert "is undefined on the selection split" in certain
    assert "choose another evaluation.main_metric" in certain
    assert not (tmp_path / "root").exists()


@pytest.mark.ray
@pytest.mark.parametrize(("absent", "key"), [("val", "select_on"), ("test", "report_on")])
def test_data_without_a_split_are_refused_before_training(
    absent: str, key: str, ray_session: None, tmp_path: Path
):
    arguments = write(tmp_path, [row for row in rows() if row["split"] != absent])
    message = refusal("pretrain", "--local", *arguments)
    split = {"val": "selection", "test": "test"}[absent]
    assert f"evaluation.{key}={split}: the data has no rows in that split (rows: " in message
    assert "data.columns.split=null" in message
    # The advice works.
    result = clipfleet("pretrain", "--local", *arguments, "data.columns.split=null", "train.batch_size=4")
    assert result.exit_code == 0, result.output


@pytest.mark.ray
def test_a_batch_larger_than_the_data_is_refused_before_training(squares: tuple[str, ...], tmp_path: Path):
    message = refusal("pretrain", "--local", *squares, "train.batch_size=64")
    assert "train.batch_size=64 exceeds the 44 training rows; lower it" in message
    assert not (tmp_path / "root").exists()


@pytest.mark.ray
def test_divergence_is_one_message(squares: tuple[str, ...]):
    diverges = ("train.lr=1e30", "train.max_grad_norm=null", "train.warmup_steps=0")
    message = refusal("pretrain", "--local", *squares, *diverges)
    assert "run 'clip-s0' failed: step 1 of method 'clip': loss nan" in message
    assert "Lower train.lr" in message
