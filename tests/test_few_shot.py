"""Prompts fitted on a few training images of a run: what is scored, what stays untouched, refusals."""

from __future__ import annotations

import copy
import dataclasses
import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from rich.console import Console

from models.prompt_learning import ClassNames, PromptLearner
from pipelines.check_data import check_data
from pipelines.config import Config
from pipelines.encode import ModelEncoder
from pipelines.evaluate import evaluate_trained, publish_evaluation, selection_value, split_table
from pipelines.evaluation import encoder as encoding
from pipelines.few_shot import first_context, plan_few_shot, prompt_fitter, training_images
from pipelines.job import identity
from pipelines.launch import run_here
from pipelines.prepared import Prepared
from pipelines.pretrain import build_trainer
from pipelines.prompt_fitter import PromptTower
from pipelines.results import Store
from pipelines.stages import evaluate_stage
from pipelines.train_step import Trainer
from tests.pipeline_fixture import small_config, small_job

FEW_SHOT = "fewshot_classification"
SHORT = ("evaluation.shots=4", "evaluation.prompts.num_steps=3")


@dataclasses.dataclass(frozen=True)
class Run:
    """An untrained model on the prepared scenes."""

    config: Config
    prepared: Prepared
    trainer: Trainer

    def records(self, *, split: str = "test") -> list[dict[str, Any]]:
        job = small_job(self.config, self.prepared.uri, "run")
        found = evaluate_trained(job, self.config, self.prepared, self.trainer, split=split)
        for record in found:
            del record["clipfleet"]["seconds"]
        return found

    def few_shot(self) -> dict[str, Any]:
        (found,) = (r for r in self.records() if r["task"] == FEW_SHOT and is_whole(r))
        return found


def is_whole(record: dict[str, Any]) -> bool:
    return record["clipfleet"]["keep_rule"] == "all"


def make_run(prepared_uri: str, folder: Path, *overrides: str) -> Run:
    config = small_config(folder, *overrides)
    prepared = Prepared.open(prepared_uri)
    return Run(config, prepared, build_trainer(config, prepared))


@pytest.fixture
def run(small_prepared: str, tmp_path: Path) -> Run:
    return make_run(small_prepared, tmp_path, *SHORT)


@pytest.mark.ray
def test_the_result_stands_beside_the_others_and_says_what_it_rests_on(run: Run):
    records = {record["task"]: record for record in run.records()}
    found, zero_shot = records[FEW_SHOT], records["zeroshot_classification"]
    assert found["clipfleet"]["fitted_on"] == "train"
    assert [r["task"] for r in records.values() if "fitted_on" in r["clipfleet"]] == [FEW_SHOT]
    metrics = found["metrics"]
    assert metrics["main_metric"] == metrics["acc1"]
    assert metrics["acc1_zero_shot"] == zero_shot["metrics"]["acc1"]
    assert metrics["num_shots"] == 4
    assert metrics["chance"] == 0.1
    assert found["clipfleet"]["n"] == zero_shot["clipfleet"]["n"]
    intervals = found["clipfleet"]["ci"]
    assert intervals["acc1_zero_shot"] == zero_shot["clipfleet"]["ci"]["acc1"]
    for name in ("acc1", "mean_per_class_recall", "acc1_no_counterfactual"):
        assert intervals[name]["low"] <= metrics[name] <= intervals[name]["high"]
    labels = found["clipfleet"]["labels"]
    assert [label["name"] for label in labels] == run.prepared.manifest["class_names"]
    assert sum(label["n"] for label in labels) == found["clipfleet"]["n"]
    assert all({"recall", "num_shots"} <= set(label) for label in labels)


@pytest.mark.ray
def test_classes_with_fewer_training_images_are_reported(
    small_prepared: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    many = make_run(small_prepared, tmp_path, "evaluation.shots=9", "evaluation.prompts.num_steps=1")
    found = many.few_shot()
    short = [label["name"] for label in found["clipfleet"]["labels"] if label["num_shots"] < 9]
    assert 0 < len(short) < 10
    assert found["metrics"]["num_short_classes"] == len(short)
    line = next(line for line in capsys.readouterr().err.splitlines() if "have fewer training rows" in line)
    assert line.startswith(f"evaluation.shots=9, but {len(short)} classes")
    assert all(name in line for name in short)


@pytest.mark.ray
def test_the_same_seed_gives_the_same_numbers_and_another_other_images(
    run: Run, small_prepared: str, tmp_path: Path
):
    first = run.few_shot()
    torch.rand(3)
    assert run.few_shot() == first
    table = split_table(small_prepared, "test")
    draws = {
        seed: plan_few_shot(run.config.evaluation, run.prepared, table, seed=seed).shots.at.tolist()
        for seed in (0, 1)
    }
    assert draws[0] != draws[1]
    # The same weights, other shots: other prompts.
    other = dataclasses.replace(run, trainer=copy.copy(run.trainer))
    other.trainer.seed = 1
    assert not torch.equal(fitted_scores(other)[0], fitted_scores(run)[0])


def fitted_scores(run: Run, *, num_images: int = 20) -> list[torch.Tensor]:
    """Scores of some reported images by both fits."""
    table = split_table(run.prepared.uri, "test")
    plan = plan_few_shot(run.config.evaluation, run.prepared, table, seed=run.trainer.seed)
    fitter = prompt_fitter(plan, run.trainer, run.prepared, run.config.evaluation)
    shots = embeds_of(run, training_images(run.prepared, plan.shots.at))
    labels = torch.from_numpy(plan.shots.labels)
    images = embeds_of(run, table["image"].slice(0, num_images))
    return [torch.from_numpy(fitter.scores(fit, images)) for fit in fitter.fit(shots, labels)]


def embeds_of(run: Run, images: pa.ChunkedArray) -> torch.Tensor:
    encoder = ModelEncoder(run.trainer.model, run.prepared.tokenizer())
    found = encoding.encode_images(encoder, images, image_size=run.prepared.image_size)
    return torch.from_numpy(found.image_embeds)


@pytest.mark.ray
def test_the_counterfactual_term_takes_part_and_images_do_not_depend_on_their_company(
    run: Run, small_prepared: str, tmp_path: Path
):
    with_term, without = fitted_scores(run)
    assert with_term.shape == (20, 10)
    assert (with_term - without).abs().max() > 1e-6
    fewer = fitted_scores(run, num_images=7)[0]
    torch.testing.assert_close(fewer, with_term[:7], atol=1e-6, rtol=0)
    weightless = make_run(small_prepared, tmp_path, *SHORT, "evaluation.prompts.counterfactual=0")
    torch.testing.assert_close(fitted_scores(weightless)[0], without, atol=1e-6, rtol=0)


@pytest.mark.ray
def test_fitted_images_are_training_images_of_their_class_and_never_reported_ones(
    run: Run, monkeypatch: pytest.MonkeyPatch
):
    encoded: list[list[bytes]] = []

    def spy(encoder: Any, images: pa.ChunkedArray, **kwargs: Any) -> encoding.EncodedImages:
        encoded.append(images.to_pylist())
        return encoding.encode_images(encoder, images, **kwargs)

    monkeypatch.setattr("pipelines.few_shot.encode_images", spy)
    run.records()
    fitted_on, scored = encoded
    train, test = (split_table(run.prepared.uri, split) for split in ("train", "test"))
    assert scored == test["image"].to_pylist()
    assert not set(fitted_on) & set(scored)
    class_of = dict(zip(train["image"].to_pylist(), train["class_name"].to_pylist(), strict=True))
    shots = plan_few_shot(run.config.evaluation, run.prepared, test, seed=0).shots
    names = run.prepared.manifest["class_names"]
    assert len(fitted_on) == len(shots.at) > 30
    assert [class_of[image] for image in fitted_on] == [names[label] for label in shots.labels]


@pytest.mark.ray
def test_nothing_else_moves(run: Run, small_prepared: str, tmp_path: Path):
    without = make_run(small_prepared, tmp_path, "evaluation.shots=0")
    weights = {name: value.clone() for name, value in run.trainer.model.state_dict().items()}
    draws = torch.get_rng_state()
    records = run.records()
    assert torch.equal(torch.get_rng_state(), draws)
    assert run.trainer.model.training
    state = run.trainer.model.state_dict()
    assert state.keys() == weights.keys()
    assert all(torch.equal(state[name], value) for name, value in weights.items())
    assert all(parameter.grad is None for parameter in run.trainer.model.parameters())
    assert [record for record in records if record["task"] != FEW_SHOT] == without.records()


@pytest.mark.ray
def test_nothing_is_selected_on_it(run: Run, small_prepared: str, tmp_path: Path):
    without = make_run(small_prepared, tmp_path, "evaluation.shots=0")
    found = [selection_value(r.config, r.prepared, r.trainer) for r in (run, without)]
    assert found[0] == found[1]
    wanted = make_run(small_prepared, tmp_path, *SHORT, "evaluation.main_metric=fewshot_classification.acc1")
    with pytest.raises(ValueError, match=r"unknown main metric 'fewshot_classification\.acc1'"):
        selection_value(wanted.config, wanted.prepared, wanted.trainer)


@pytest.mark.ray
@pytest.mark.parametrize(
    ("overrides", "readouts"),
    [(["method=aclip"], ["all", "kept"]), (["method.heads.hash.weight=1.0"], ["all"])],
)
def test_readouts_whose_gradients_reach_the_prompts_are_scored(
    overrides: list[str], readouts: list[str], small_prepared: str, tmp_path: Path
):
    run = make_run(small_prepared, tmp_path, *SHORT, *overrides)
    blocks = [record["clipfleet"] for record in run.records() if record["task"] == FEW_SHOT]
    assert [block["keep_rule"] for block in blocks] == readouts


@pytest.mark.ray
def test_it_is_published_with_its_row_values(run: Run):
    job = small_job(run.config, run.prepared.uri, "run")
    job.write()
    publish_evaluation(job, run.config, run.prepared, run.trainer)
    # A store wants a run record; its reader of row values does not.
    store = object.__new__(Store)
    store.root_uri = job.root
    found = run.few_shot()
    rows = store.row_values(found)
    assert rows is not None
    values: dict[str, list[float]] = {}
    for row in rows.to_pylist():
        values.setdefault(row["metric"], []).append(row["value"])
    names = ["acc1", "acc1_no_counterfactual", "acc1_zero_shot", "mean_per_class_recall"]
    assert sorted(values) == names
    for name in names:
        assert np.mean(values[name]) == pytest.approx(found["metrics"][name], abs=1e-12)


@pytest.mark.ray
@pytest.mark.parametrize("method", ["clip", "lovt"])
def test_the_prompt_tower_encodes_as_the_model_does(method: str, small_prepared: str, tmp_path: Path):
    run = make_run(small_prepared, tmp_path, f"method={method}", "evaluation.shots=1")
    plan = plan_few_shot(run.config.evaluation, run.prepared, split_table(small_prepared, "test"), seed=0)
    tokenizer = run.prepared.tokenizer()
    table = run.trainer.model.encoder.text.text.embeddings.token_embedding
    ids = {"start_id": int(tokenizer.start_id), "end_id": int(tokenizer.end_id)}
    names = ClassNames.from_ids(table, plan.name_ids, **ids)
    width = run.trainer.model.encoder.width
    prompts = PromptLearner(names, table.weight[plan.context_ids], joint_width=width, seed=0)
    with torch.no_grad():
        found = prompts(torch.eye(width)[:2], PromptTower(run.trainer.model.encoder))[1]
    classes = run.prepared.manifest["class_names"]
    encoder = ModelEncoder(run.trainer.model, tokenizer)
    expected = torch.from_numpy(encoder.encode_texts([f"{plan.context} {name}" for name in classes]))
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    assert (found - expected.roll(1, 0)).abs().max() > 1e-3


@pytest.mark.ray
def test_long_fits_say_how_far_they_are(
    run: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    run.records()
    assert "batches" not in capsys.readouterr().err
    monkeypatch.setattr("pipelines.prompt_fitter._QUIET_S", 0.0)
    run.records()
    shown = capsys.readouterr()
    assert "batches" not in shown.out
    lines = [line for line in shown.err.splitlines() if "batches" in line]
    assert lines[0].strip().startswith("few-shot prompts: 1 of ")
    done, total = lines[-1].split()[2:5:2]
    assert done == total == str(len(lines))


@pytest.mark.parametrize(
    ("overrides", "context"),
    [
        ([], "a picture of a"),
        (["evaluation.templates=['{}', 'a photo of {}', 'seen: {} here']"], "a photo of"),
        (["evaluation.templates=['{}']"], "a photo of a"),
        (["evaluation.prompts.context=the number"], "the number"),
    ],
)
def test_prompts_start_from_the_words_of_the_templates(overrides: list[str], context: str, tmp_path: Path):
    assert first_context(small_config(tmp_path, *overrides).evaluation) == context


@pytest.mark.ray
def test_data_that_cannot_be_classified_is_refused(run: Run, small_prepared: str, tmp_path: Path):
    settings, table = run.config.evaluation, split_table(small_prepared, "test")
    manifest = {**run.prepared.manifest, "class_names": []}
    unnamed = dataclasses.replace(run, prepared=Prepared(small_prepared, manifest))
    with pytest.raises(ValueError, match=r"evaluation\.shots=4 needs rows of at least 2 classes"):
        unnamed.records()
    place = table.schema.get_field_index("class_name")
    unclassed = table.set_column(place, "class_name", pa.nulls(len(table), pa.string()))
    with pytest.raises(
        ValueError, match=r"evaluation\.shots=4: nothing to classify \('.*': no row has a class"
    ):
        plan_few_shot(settings, run.prepared, unclassed, seed=0)
    long = small_config(tmp_path, *SHORT, f"evaluation.prompts.context={'word ' * 80}").evaluation
    with pytest.raises(ValueError, match=r"at most 77 .*shorten evaluation\.prompts\.context"):
        plan_few_shot(long, run.prepared, table, seed=0)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("evaluation.shots=-1", r"evaluation\.shots: .*greater than or equal to 0"),
        ("evaluation.prompts.num_steps=0", r"evaluation\.prompts\.num_steps: .*greater than or equal to 1"),
        ("evaluation.prompts.contxt=a", r"unknown config key 'evaluation\.prompts\.contxt'; did you mean"),
    ],
)
def test_settings_are_checked_when_built(override: str, message: str, tmp_path: Path):
    with pytest.raises(ValueError, match=message):
        small_config(tmp_path, override)


@pytest.mark.ray
def test_a_run_is_the_same_with_and_without_and_older_runs_can_be_scored(small_prepared: str, tmp_path: Path):
    config, other = small_config(tmp_path), small_config(tmp_path, *SHORT)
    assert identity(config.tree()) == identity(other.tree())
    assert identity(config.tree()) != identity(small_config(tmp_path, "evaluation.resamples=60").tree())
    job = small_job(config, small_prepared, "clip-s0")
    for key in ("shots", "prompts"):
        del job.tree["evaluation"][key]
    job.write()
    run_here(job)
    shown = Console(width=200, file=io.StringIO(), record=True)
    overrides = [*SHORT, "evaluation.resamples=0"]
    evaluate_stage(job.root, overrides, shown, split="test", dry_run=False, as_json=False)
    assert "fewshot classification" in shown.export_text()


@pytest.mark.ray
def test_data_without_classes_is_refused_before_anything_is_trained(run: Run, small_prepared: str):
    check_data(run.config, run.prepared)
    # A class that no training row has.
    manifest = run.prepared.manifest
    manifest = {**manifest, "class_names": [*manifest["class_names"], "zebra"]}
    with pytest.raises(ValueError, match=r"1 of 11 have none: zebra; set evaluation\.shots=0"):
        check_data(run.config, Prepared(small_prepared, manifest))
