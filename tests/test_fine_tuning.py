"""Starting from an earlier run's weights: what is taken, what is refused, and what belongs to the run."""

from __future__ import annotations

import hashlib
import io
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from models.methods.catalogue import METHODS
from models.pair_model import PairModel
from pipelines import storage
from pipelines.checkpoint import about_checkpoint, drop_checkpoints, find_checkpoint, load_checkpoint
from pipelines.config import Config
from pipelines.config_tree import load_config
from pipelines.fine_tuning import (
    check_start,
    pin_start,
    start_summary,
    start_trainer,
    take_over_,
    tokenizer_sha256,
)
from pipelines.job import Job, identity
from pipelines.launch import run_here
from pipelines.port import LocalPort
from pipelines.prepared import Prepared
from pipelines.pretrain import build_trainer, run_job
from pipelines.results import Store
from pipelines.stages import pretrain_stage, sweep_stage
from pipelines.tokenizer import load_tokenizer
from tests.pair_fixture import build_model
from tests.pipeline_fixture import small_config, small_job


def weights_of(model: PairModel) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_parameters_of_the_same_name_and_shape_are_taken():
    start, model = build_model(METHODS["slip"], seed=1), build_model(METHODS["aclip"])
    before = weights_of(model)
    found = take_over_(model, weights_of(start), where="there")
    parameters = dict(model.named_parameters())
    assert set(found.taken) | set(found.new) == set(parameters)
    theirs = dict(start.named_parameters())
    for name in found.taken:
        assert torch.equal(parameters[name], theirs[name]), name
        # The comparison sees that they were replaced; some start as zeros or ones in any model.
    assert sum(not torch.equal(parameters[name], before[name]) for name in found.taken) > 20
    # SLIP has SimCLR's head and a temperature, but nothing of BYOL's.
    assert any("simclr" in name for name in found.taken)
    assert any(name.endswith("log_inverse_temperature") for name in found.taken)
    assert found.new
    assert all("byol" in name for name in found.new)
    assert (found.reshaped, found.unused) == ((), ())


def test_what_a_method_remembers_of_its_data_stays_behind():
    start, model = build_model(METHODS["pcl"], seed=1), build_model(METHODS["pcl"])
    remembered = [name for name in weights_of(start) if name not in dict(start.named_parameters())]
    assert remembered
    weights = {name: tensor + 1 for name, tensor in weights_of(start).items()}
    before = weights_of(model)
    found = take_over_(model, weights, where="there")
    assert set(found.unused) == set(remembered)
    assert all(torch.equal(weights_of(model)[name], before[name]) for name in remembered)


def test_heads_of_another_shape_stay_fresh_and_are_reported():
    slip = METHODS["slip"]
    wider = replace(slip, heads=replace(slip.heads, simclr=replace(slip.heads.simclr, hidden_ratio=6.0)))
    model = build_model(slip)
    before = weights_of(model)
    found = take_over_(model, weights_of(build_model(wider, seed=1)), where="there")
    assert found.reshaped
    assert all("simclr" in name for name in found.reshaped)
    assert all(torch.equal(weights_of(model)[name], before[name]) for name in found.reshaped)
    assert found.as_dict() == {
        "num_taken": len(found.taken),
        "new": [],
        "reshaped": list(found.reshaped),
        "unused": [],
    }


@pytest.mark.parametrize("start_policy", ["learned", "fixed"])
def test_a_kept_temperature_is_that_of_the_start_and_a_fixed_one_is_not(start_policy):
    temperature = replace(METHODS["clip"].temperature, policy=start_policy, init=0.3)
    start = build_model(replace(METHODS["clip"], temperature=temperature), seed=1)
    kept, fixed = METHODS["relaxed"], replace(METHODS["relaxed"], temperature=temperature)
    fixed = replace(fixed, temperature=replace(temperature, policy="fixed", init=0.05))
    like = torch.zeros((), dtype=torch.float64)
    for recipe, expected in ((kept, 1 / 0.3), (fixed, 1 / 0.05)):
        model = build_model(recipe)
        take_over_(model, weights_of(start), where="there")
        scale = model.objective.scale("main", like)
        assert float(scale.inverse_temperature) == pytest.approx(expected, rel=1e-6)
    assert not any(name.endswith("log_inverse_temperature") for name, _ in kept_model().named_parameters())


def kept_model() -> PairModel:
    return build_model(METHODS["relaxed"])


def test_without_a_start_a_kept_temperature_is_the_recipes():
    scale = kept_model().objective.scale("main", torch.zeros((), dtype=torch.float64))
    assert float(scale.inverse_temperature) == pytest.approx(1 / 0.07, rel=1e-6)


def test_nothing_in_common_is_refused():
    model = build_model(METHODS["clip"])
    with pytest.raises(ValueError, match=r"start_from=there has none of this method's \d+ parameters"):
        take_over_(model, {"other": torch.zeros(3)}, where="there")


def test_other_towers_are_refused_before_anything_is_changed():
    model, weights = build_model(METHODS["clip"]), weights_of(build_model(METHODS["clip"], seed=1))
    name = next(name for name in weights if "token_embedding" in name)
    weights[name] = weights[name][:-1]
    before = weights_of(model)
    with pytest.raises(
        ValueError, match=r"has other towers: 1 of their parameters do not fit, .*token_embed"
    ):
        take_over_(model, weights, where="there")
    assert all(torch.equal(tensor, before[key]) for key, tensor in weights_of(model).items())
    del weights[name]
    with pytest.raises(ValueError, match=r"token_embedding\.weight is absent there"):
        take_over_(model, weights, where="there")


def test_a_hash_without_a_start_is_refused():
    with pytest.raises(ValueError, match="name them with start_from"):
        load_config(overrides=["train.start_sha256=abc"])


def test_a_local_start_means_the_same_in_every_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert load_config(overrides=["train.start_from=runs/a"]).train.start_from == str(tmp_path / "runs/a")
    assert load_config(overrides=["train.start_from=s3://b/a"]).train.start_from == "s3://b/a"
    assert load_config().train.start_from is None


@pytest.fixture(scope="module")
def start(small_prepared: str, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """A finished run to start from, with a head that CLIP has not."""
    config = small_config(tmp_path_factory.mktemp("start"), "method=slip", "train.checkpoint_every=3")
    job = small_job(config, small_prepared, "slip-s0")
    job.write()
    run_here(job)
    return job


def tuned(folder: Path, start: str, *overrides: str) -> Config:
    """A fine-tuning configuration that keeps everything but the start and the method's defaults."""
    return pin_start(small_config(folder, "train.lr=1e-4", f"train.start_from={start}", *overrides))


def losses(job: Job) -> list[float]:
    return [line["loss"] for line in Store(job.root).curve(job.run_id) if "loss" in line]


def newest(job: Job) -> dict[str, torch.Tensor]:
    return load_checkpoint(find_checkpoint(job.folder))["trainer"]["model"]


@pytest.mark.ray
def test_the_first_step_is_taken_from_the_starts_weights(tmp_path: Path, start: Job, small_prepared: str):
    config = tuned(tmp_path, start.root)
    job = small_job(config, small_prepared, "run")
    run_here(job)
    trainer = build_trainer(config, Prepared.open(small_prepared))
    fresh = losses_of_fresh(tmp_path, small_prepared)
    found = start_trainer(trainer, config.train)
    state = newest(start)
    assert all(torch.equal(p, state[name]) for name, p in trainer.model.named_parameters())
    assert losses(job)[0] != pytest.approx(fresh[0], rel=1e-3)
    about = storage.read_json(storage.join(job.folder, "start.json"))
    assert about["start_from"] == start.root
    assert about["sha256"] == config.train.start_sha256
    assert about["num_taken"] == len(found.taken) == len(list(trainer.model.parameters()))
    assert about["unused"] == list(found.unused)
    assert start_summary(job.folder) == (
        f"started from {start.root}: {len(found.taken)} parameters taken; {len(found.unused)} unused "
        "(objective.heads.simclr)"
    )
    assert all("simclr" in name for name in found.unused)
    # It trains on from there: a small rate moves the weights a little.
    moved = newest(job)
    name = "encoder.visual_projection.weight"
    assert 0 < (moved[name] - state[name]).abs().max() < 0.01


def losses_of_fresh(folder: Path, prepared: str) -> list[float]:
    job = small_job(small_config(folder, f"output={folder / 'fresh'}"), prepared, "run")
    run_here(job)
    assert start_summary(job.folder) is None
    return losses(job)


@pytest.mark.ray
def test_the_teacher_starts_as_a_copy_of_the_starts_weights(tmp_path: Path, start: Job, small_prepared: str):
    config = tuned(tmp_path, start.root, "method=aclip")
    trainer = build_trainer(config, Prepared.open(small_prepared))
    start_trainer(trainer, config.train)
    assert trainer.teacher is not None
    online = dict(trainer.model.encoder.vision.named_parameters())
    copied = dict(trainer.teacher.vision.named_parameters())
    assert all(torch.equal(copied[name], online[name]) for name in online)
    state = newest(start)
    assert any(torch.equal(tensor, state["encoder.vision." + name]) for name, tensor in copied.items())


@pytest.mark.ray
def test_a_root_a_run_and_a_checkpoint_name_the_same_start(tmp_path: Path, start: Job):
    place = find_checkpoint(start.root)
    assert place.endswith("step_000000006")
    assert find_checkpoint(start.folder) == place == find_checkpoint(start.checkpoints)
    hashes = {tuned(tmp_path, uri).train.start_sha256 for uri in (start.root, start.folder, place)}
    assert hashes == {about_checkpoint(place)[0]}
    # An older one is another start.
    older = storage.join(start.checkpoints, "step_000000003")
    assert tuned(tmp_path, older).train.start_sha256 not in hashes


@pytest.mark.ray
def test_the_starts_weights_belong_to_the_run_and_their_place_does_not(tmp_path: Path, start: Job):
    older = storage.join(start.checkpoints, "step_000000003")
    same, again, other = (tuned(tmp_path, uri) for uri in (start.root, start.folder, older))
    assert identity(same.tree()) == identity(again.tree())
    assert identity(same.tree()) != identity(other.tree())
    assert identity(same.tree()) != identity(small_config(tmp_path, "train.lr=1e-4").tree())
    chunked = small_config(tmp_path, "train.table_rows_per_chunk=8")
    assert identity(chunked.tree()) == identity(small_config(tmp_path).tree())


class Killed(BaseException):
    """Stands for a signal."""


class KillingPort(LocalPort):
    def report(self, metrics):
        if metrics["step"] == 4:
            raise Killed


@pytest.mark.ray
def test_a_run_that_continues_takes_its_own_checkpoint(tmp_path: Path, start: Job, small_prepared: str):
    whole = small_job(tuned(tmp_path, start.root, f"output={tmp_path / 'whole'}"), small_prepared, "run")
    run_here(whole)
    # A copy of the start that can be taken away.
    gone = tmp_path / "gone"
    step = storage.join(str(gone), "checkpoints", "step_000000006")
    for file in storage.list_files(find_checkpoint(start.root)):
        data = storage.read_bytes(storage.join(find_checkpoint(start.root), file))
        storage.write_bytes(storage.join(step, file), data)
    job = small_job(tuned(tmp_path, str(gone)), small_prepared, "run")
    with pytest.raises(Killed):
        run_job(job, KillingPort())
    drop_checkpoints(str(gone))
    run_here(job)
    assert losses(job) == pytest.approx(losses(whole), rel=1e-6)


def stage(config: Config, *, dry_run: bool = False) -> str:
    console = Console(width=200, file=io.StringIO(), record=True)
    pretrain_stage(config, console, local=True, dry_run=dry_run)
    return console.export_text()


@pytest.mark.ray
def test_the_command_says_what_was_taken_and_refuses_another_start(
    tmp_path: Path, start: Job, small_prepared: str, monkeypatch: pytest.MonkeyPatch
):
    config = small_config(
        tmp_path, f"prepared={Path(small_prepared).parent}", f"train.start_from={start.root}", "method=cloob"
    )
    monkeypatch.setattr("pipelines.launch.LocalPort", KillingPort)
    with pytest.raises(Killed):
        stage(config)
    monkeypatch.undo()
    # The same command with another start must not pass for the rest of this run.
    train = config.train.model_copy(update={"start_from": storage.join(start.checkpoints, "step_000000003")})
    with pytest.raises(ValueError, match=r"holds the weights \w{12}, this run starts from \w{12}; name"):
        stage(config.model_copy(update={"train": train}))
    # One that is gone does no harm: the run has its own weights.
    gone = config.train.model_copy(update={"start_from": str(tmp_path / "gone")})
    shown = stage(config.model_copy(update={"train": gone}))
    taken = storage.read_json(storage.join(config.output, "runs", "cloob-s0", "start.json"))["num_taken"]
    assert f"started from {start.root}: {taken} parameters taken; " in shown
    # CLOOB's temperature is its own.
    assert re.search(r"\d+ unused \(objective.tables.main, objective.heads.simclr\)", shown)
    record = Store(config.output).runs()[0]
    assert record["config"]["train"]["start_sha256"] == about_checkpoint(find_checkpoint(start.root))[0]
    assert (record["state"], record["attempts"]) == ("complete", 2)


def test_a_start_that_is_not_there_is_refused_before_anything_else(tmp_path: Path):
    config = small_config(tmp_path, f"train.start_from={tmp_path / 'none'}")
    console = Console(file=io.StringIO())
    with pytest.raises(ValueError, match=r"train\.start_from: '.*none' holds no checkpoint; name a run root"):
        stage(config, dry_run=True)
    with pytest.raises(ValueError, match=r"train\.start_from: '.*none' holds no checkpoint"):
        sweep_stage(config, console, dry_run=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="holds no checkpoint"):
        pin_start(small_config(tmp_path, f"train.start_from={tmp_path / 'file'}"))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.ray
def test_other_towers_and_other_words_are_refused_by_name(tmp_path: Path, start: Job, small_prepared: str):
    prepared = Prepared.open(small_prepared)
    check_start(tuned(tmp_path, start.root), prepared)
    other = tuned(tmp_path, start.root, "model.vision_width=64", "model.vision_heads=2", "data.max_tokens=40")
    with pytest.raises(
        ValueError,
        match=r"has other towers than model.vision_width=64, model.vision_heads=2, model.max_tokens=40; set "
        r"model.vision_width=32 model.vision_heads=4 data.max_tokens=77",
    ):
        check_start(other, prepared)
    # Other words: the vocabulary may even have the same size.
    storage.write_bytes(str(tmp_path / "words" / "tokenizer.json"), b"{}")
    elsewhere = Prepared(str(tmp_path / "words"), prepared.manifest)
    with pytest.raises(ValueError, match=f"another tokenizer.*set data.tokenizer={small_prepared}"):
        check_start(tuned(tmp_path, start.root), elsewhere)
    # The advice works: the tokenizer named there is written again byte for byte.
    again = load_tokenizer(small_prepared, max_tokens=77).to_bytes()
    assert hashlib.sha256(again).hexdigest() == tokenizer_sha256(prepared)


@pytest.mark.ray
def test_a_start_that_changes_under_a_run_is_refused(tmp_path: Path, start: Job, small_prepared: str):
    config = tuned(tmp_path, start.root)
    older = config.train.model_copy(update={"start_from": storage.join(start.checkpoints, "step_000000003")})
    trainer = build_trainer(config, Prepared.open(small_prepared))
    with pytest.raises(ValueError, match="this run starts from"):
        start_trainer(trainer, older)
