"""Real packs through the same commands: emoji of several styles, chest X-rays with findings, photographs."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from pipelines import storage
from pipelines.cli import app
from pipelines.leaderboard import leaderboards
from pipelines.results import Store
from tests.pipeline_fixture import SMALL

pytestmark = [pytest.mark.ray, pytest.mark.shared_data]

TINY = (*SMALL, "data.image_size=32", "data.vocab_size=400", "train.steps=4", "train.evaluate_every=4")

STYLES = ("noto", "twemoji")
GROUPS = ("Activities", "Food & Drink", "Animals & Nature")


def clipfleet(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200", "TERM": "dumb"})


def succeed(*arguments: str) -> str:
    result = clipfleet(*arguments)
    assert result.exit_code == 0, f"{result.output}\n{result.exception!r}"
    return result.stdout


def places(folder: Path) -> tuple[str, str]:
    return f"prepared={folder / 'prepared'}", f"output={folder / 'root'}"


def num_test_rows(shared_data: Path) -> Counter[str]:
    """Test rows of the chosen groups by style."""
    file = str(shared_data / "emoji.parquet")
    rows = storage.read_table(file, columns=["source", "class", "split"]).to_pylist()
    wanted = [row for row in rows if row["split"] == "test" and row["class"] in GROUPS]
    return Counter(row["source"] for row in wanted if row["source"] in STYLES)


def test_emoji_styles_are_scored_apart(ray_session: None, shared_data: Path, tmp_path: Path):
    arguments = (
        "--source",
        f"parquet:{shared_data / 'emoji.parquet'}",
        *TINY,
        *places(tmp_path),
        f"data.where={{source: [{', '.join(STYLES)}], class: [{', '.join(GROUPS)}]}}",
    )
    for method in ("clip", "softclip"):
        assert "complete" in succeed("pretrain", "--local", *arguments, "--method", method)
    store = Store(str(tmp_path / "root"))
    found = {(r["dataset"], r["task"], r["clipfleet"]["method"]): r for r in store.results()}
    assert {key[0] for key in found} == {"emoji/noto", "emoji/twemoji"}
    for method in ("clip", "softclip"):
        for style in (f"emoji/{style}" for style in STYLES):
            tasks = {task for dataset, task, made_by in found if (dataset, made_by) == (style, method)}
            assert tasks == {"zeroshot_classification", "zeroshot_multi_label", "zeroshot_retrieval"}
    # Nothing says how both styles together were classified.
    rows = {
        dataset: result["clipfleet"]["n"]
        for (dataset, task, method), result in found.items()
        if (task, method) == ("zeroshot_classification", "clip")
    }
    assert rows == {f"emoji/{style}": number for style, number in num_test_rows(shared_data).items()}
    assert [board.dataset for board in leaderboards(store)] == ["emoji/noto", "emoji/twemoji"]


def test_chest_x_rays_are_ranked_by_the_auroc_of_their_findings(
    ray_session: None, shared_data: Path, tmp_path: Path
):
    shown = succeed(
        "sweep",
        "--source",
        f"parquet:{shared_data / 'cxr.parquet'}",
        *TINY,
        *places(tmp_path),
        "--methods",
        "clip,softclip",
        "data.where={source: [nih256]}",
        "evaluation.main_metric=zeroshot_multi_label.auroc_macro",
        "evaluation.ignore_labels=[No Finding]",
        "evaluation.positive_templates=['{}']",
        "sweep.num_trials=1",
        "sweep.seeds=[5]",
        "sweep.num_default_seeds=0",
    )
    assert "auroc" in shown.lower()
    store = Store(str(tmp_path / "root"))
    assert {run["state"] for run in store.runs()} == {"complete"}
    assert {run["selection"]["metric"] for run in store.runs()} == {"zeroshot_multi_label.auroc_macro"}
    (board,) = leaderboards(store)
    assert (board.dataset, board.task, board.metric) == ("cxr/nih256", "zeroshot_multi_label", "auroc_macro")
    assert [row.method for row in board.rows if row.rank is not None] != []
    for result in store.results():
        if result["task"] == "zeroshot_multi_label":
            findings = {label["name"]: label for label in result["clipfleet"]["labels"]}
            assert "No Finding" not in findings
            assert findings["Pneumonia"]["n_pos"] == 96
            assert 0 < findings["Pneumonia"]["low"] < findings["Pneumonia"]["auroc"] < 1
            # Three training positives, none to test on: undefined, not 0.
            assert findings["Hernia"]["auroc"] is None
    assert (tmp_path / "root" / "report" / "index.html").exists()


def test_photographs_without_a_selection_split(ray_session: None, shared_data: Path, tmp_path: Path):
    arguments = (
        "--source",
        f"parquet:{shared_data / 'coco_photos_mini.parquet'}",
        *TINY,
        *places(tmp_path),
        "train.batch_size=16",
    )
    refused = clipfleet("pretrain", "--local", *arguments)
    assert refused.exit_code == 2
    message = " ".join(refused.stderr.split())
    assert "evaluation.select_on=selection: the data has no rows in that split" in message
    assert "selection 0, test 27, train 56" in message
    assert "data.columns.split=null" in message

    divided = ("data.columns={split: null, source: null}", "evaluation.main_metric=text_retrieval_recall@1")
    assert "complete" in succeed("pretrain", "--local", *arguments, *divided)
    store = Store(str(tmp_path / "root"))
    (run,) = store.runs()
    assert run["selection"]["metric"] == "zeroshot_retrieval.text_retrieval_recall@1"
    assert "zeroshot_retrieval" in {result["task"] for result in store.results()}
