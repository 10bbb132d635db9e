"""Evaluating stored runs, and finding out before training whether the data can answer the question."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from pipelines import storage
from pipelines.check_data import check_data
from pipelines.checkpoint import CheckpointError, latest_place
from pipelines.evaluate import sample_images, selection_value
from pipelines.evaluation.preflight import check_main_metric, check_report_split
from pipelines.launch import run_here
from pipelines.prepared import Prepared
from pipelines.pretrain import build_trainer
from pipelines.results import Store
from pipelines.stages import evaluate_stage
from tests.evaluation_fixture import SIZE, Settings, make_rows, make_table
from tests.pipeline_fixture import small_config, small_job


@pytest.fixture(scope="module")
def root(small_prepared: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A root with a finished run that keeps its weights and a trial that does not."""
    config = small_config(tmp_path_factory.mktemp("evaluated"), "method=aclip")
    for run_id, kind in (("aclip-s0", "single"), ("aclip-t000", "trial")):
        job = small_job(config, small_prepared, run_id, kind=kind)
        job.write()
        run_here(job)
    return config.output


def evaluate(run: str, *overrides: str, split: str = "test", dry_run: bool = False) -> str:
    console = Console(width=200, file=io.StringIO(), record=True)
    evaluate_stage(run, overrides, console, split=split, dry_run=dry_run, as_json=False)
    return console.export_text()


@pytest.mark.ray
def test_the_only_run_with_weights_of_a_root_is_found(root: str):
    shown = evaluate(root)
    assert "aclip-s0 on test" in shown
    assert shown == evaluate(storage.join(root, "runs", "aclip-s0"))
    # Both ways of using a model that drops patches.
    assert "classification (kept)" in shown
    stored = next(r for r in Store(root).results() if r["task"] == "zeroshot_classification")
    assert f"{stored['metrics']['acc1']:.3f}" in shown


@pytest.mark.ray
def test_a_dry_run_names_the_checkpoint_and_scores_nothing(root: str):
    shown = evaluate(root, dry_run=True)
    assert "step_000000006" in shown
    assert "acc1" not in shown


@pytest.mark.ray
def test_other_evaluation_settings_do_not_touch_the_store(root: str):
    before = {r["pretrained"]: r["clipfleet"]["prompts_sha"] for r in Store(root).results()}
    assert "text_retrieval_recall@3" in evaluate(root, "evaluation.recall_at=[3]")
    assert {r["pretrained"]: r["clipfleet"]["prompts_sha"] for r in Store(root).results()} == before
    with pytest.raises(ValueError, match="only values below 'evaluation' can be overridden here"):
        evaluate(root, "train.steps=3")
    with pytest.raises(
        ValueError, match=r"unknown config key 'evaluation\.resample'; did you mean 'resamples'"
    ):
        evaluate(root, "evaluation.resample=3")


@pytest.mark.ray
def test_what_is_no_run_with_weights_is_refused(root: str, tmp_path: Path):
    with pytest.raises(ValueError, match="trials of a sweep keep none"):
        evaluate(storage.join(root, "runs", "aclip-t000"))
    with pytest.raises(ValueError, match=r"one run's folder, or a root with one run .* found 0: none"):
        evaluate(str(tmp_path))
    with pytest.raises(ValueError, match="--split must be selection or test, got 'train'"):
        evaluate(root, split="train")


@pytest.mark.ray
def test_a_root_with_several_runs_names_them(root: str, small_prepared: str, tmp_path: Path):
    config = small_config(tmp_path)
    for seed in (0, 1):
        job = small_job(config, small_prepared, f"clip-s{seed}")
        job.write()
        storage.write_bytes(storage.join(job.folder, "checkpoints", "step_000000001", "state.pt"), b"")
    with pytest.raises(ValueError, match="found 2: clip-s0, clip-s1"):
        evaluate(config.output)


@pytest.mark.ray
def test_damaged_weights_are_refused(small_prepared: str, tmp_path: Path):
    config = small_config(tmp_path, "train.steps=1", "train.warmup_steps=0")
    job = small_job(config, small_prepared, "clip-s0")
    job.write()
    run_here(job)
    place = latest_place(storage.join(job.folder, "checkpoints"))
    assert place is not None
    state = storage.join(place, "state.pt")
    storage.write_bytes(state, storage.read_bytes(state)[:-1] + b"x")
    with pytest.raises(CheckpointError, match="is damaged"):
        evaluate(config.output)


@pytest.mark.ray
def test_selection_uses_the_keep_rule_and_the_named_metric(small_prepared: str, tmp_path: Path):
    prepared = Prepared.open(small_prepared)
    values = {}
    for ratio in (0.3, 1.0):
        overrides = (f"method.selection.keep_ratio={ratio}", "evaluation.main_metric=auroc_macro")
        config = small_config(tmp_path, "method=aclip", *overrides)
        name, values[ratio] = selection_value(config, prepared, build_trainer(config, prepared))
        assert name == "zeroshot_multi_label.auroc_macro"
    # The same weights, which see other patches.
    assert values[0.3] != values[1.0]
    config = small_config(tmp_path, "evaluation.main_metric=zeroshot_retrieval.image_retrieval_recall@1")
    name, value = selection_value(config, prepared, build_trainer(config, prepared))
    assert name == "zeroshot_retrieval.image_retrieval_recall@1"
    assert value is not None


@pytest.mark.ray
def test_samples_show_what_the_method_keeps(small_prepared: str, tmp_path: Path):
    prepared = Prepared.open(small_prepared)
    config = small_config(tmp_path, "method=aclip", "evaluation.num_samples=3")
    samples = sample_images(config, prepared, build_trainer(config, prepared))
    kept = np.array(samples["is_kept"].to_pylist())
    scores = np.array(samples["token_scores"].to_pylist())
    assert kept.shape == scores.shape == (3, 16)
    # The kept patches are those with the highest scores.
    for row in range(3):
        assert scores[row][kept[row]].min() >= scores[row][~kept[row]].max()


@pytest.mark.ray
def test_prepared_scenes_pass_the_check(small_prepared: str, tmp_path: Path):
    prepared = Prepared.open(small_prepared)
    for metric in ("auto", "acc1", "auroc_macro", "mean_recall@5", "pointing_game.pointing_accuracy"):
        check_data(small_config(tmp_path, f"evaluation.main_metric={metric}"), prepared)
    with pytest.raises(ValueError, match="unknown label 'sevn'; did you mean 'seven'"):
        check_data(small_config(tmp_path, "evaluation.labels=[sevn]"), prepared)


def check(name: str, rows: list[dict], **settings) -> None:
    labels = {label: 1 for row in rows for label in row["labels"]}
    check_main_metric(
        make_table(rows),
        name,
        image_size=SIZE,
        settings=Settings(resamples=0, **settings),
        class_names=sorted(labels),
        label_counts=labels,
    )


def test_a_metric_that_the_rows_define_passes():
    rows = make_rows(40)
    for name in ("auto", "acc1", "zeroshot_multi_label.auroc_macro", "text_retrieval_recall@1"):
        check(name, rows)


def test_a_metric_without_its_task_gives_the_reason():
    rows = [{**row, "labels": [], "class_name": None, "boxes": None} for row in make_rows(20)]
    check("auto", rows)
    with pytest.raises(
        ValueError, match=r"allows no such task \(zeroshot_multi_label of 'alpha': no row has"
    ):
        check("auroc_macro", rows)


def test_an_undefined_metric_gives_the_reason_of_every_source():
    rows = [*make_rows(4), *make_rows(4, source="beta")]
    with pytest.raises(ValueError, match=r"undefined on the selection split \('alpha': any order .* 'beta'"):
        check("text_retrieval_recall@10", rows)
    # Control: enough rows in one of the sources are enough.
    check("text_retrieval_recall@10", [*make_rows(4), *make_rows(60, source="beta")])


def test_a_report_split_without_any_task_is_refused():
    rows = [{**row, "labels": [], "class_name": None, "boxes": None} for row in make_rows(6)]
    check_report_split(make_table(rows), settings=Settings(), class_names=[], label_counts={})
    same = [{**row, "captions": ["the same"]} for row in rows]
    with pytest.raises(ValueError, match=r"allows no evaluation .*at least 2 different texts, found 1"):
        check_report_split(make_table(same), settings=Settings(), class_names=[], label_counts={})


@pytest.mark.ray
def test_json_holds_the_whole_records(root: str, capsys: pytest.CaptureFixture[str]):
    console = Console(file=io.StringIO())
    evaluate_stage(root, [], console, split="selection", dry_run=False, as_json=True)
    assert {r["clipfleet"]["split"] for r in json.loads(capsys.readouterr().out)} == {"selection"}
