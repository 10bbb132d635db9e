"""Checkpoints: whole or absent, of this run or refused, the newest two kept."""

from __future__ import annotations

import hashlib
import pickle
from pathlib import Path

import pytest
import torch

from pipelines import storage
from pipelines.checkpoint import (
    CheckpointError,
    about_checkpoint,
    find_checkpoint,
    latest_place,
    load_checkpoint,
    load_latest,
    save_checkpoint,
)


def state_of(step: int) -> dict:
    return {
        "step": step,
        "trainer": {"weight": torch.full((3,), float(step), dtype=torch.float64), "optimizer": {"lr": 1e-3}},
        "seconds": 1.5 * step,
        "selection": {"metric": "acc1", "value": None, "step": step},
    }


@pytest.fixture
def folder(tmp_path) -> Path:
    """Checkpoints of steps 5 and 10."""
    for step in (5, 10):
        save_checkpoint(str(tmp_path / "checkpoints"), state_of(step), identity="me")
    return tmp_path / "checkpoints"


def assert_state(found: dict | None, step: int) -> None:
    expected = state_of(step)
    assert found is not None
    torch.testing.assert_close(
        found["trainer"].pop("weight"), expected["trainer"].pop("weight"), rtol=0, atol=0
    )
    assert found == expected


def test_what_is_saved_is_loaded(folder):
    assert_state(load_latest(str(folder), identity="me"), 10)
    assert_state(load_checkpoint(str(folder / "step_000000005")), 5)
    assert latest_place(str(folder)) == str(folder / "step_000000010")
    # The comparison sees another step.
    with pytest.raises(AssertionError):
        assert_state(load_latest(str(folder), identity="me"), 5)


def test_nothing_there(tmp_path):
    assert load_latest(str(tmp_path / "none"), identity="me") is None
    assert latest_place(str(tmp_path / "none")) is None
    with pytest.raises(CheckpointError, match=r"no checkpoint at '.*none': MANIFEST\.json is absent"):
        load_checkpoint(str(tmp_path / "none"))


def test_the_newest_two_are_kept(folder):
    save_checkpoint(str(folder), state_of(100), identity="me")
    assert sorted(path.name for path in folder.iterdir()) == ["step_000000010", "step_000000100"]
    assert_state(load_latest(str(folder), identity="me"), 100)


def test_without_a_manifest_it_does_not_exist(folder):
    """A process killed between state and manifest leaves this."""
    storage.write_bytes(str(folder / "step_000000015" / "state.pt"), b"half")
    assert_state(load_latest(str(folder), identity="me"), 10)
    (folder / "step_000000010" / "MANIFEST.json").unlink()
    assert_state(load_latest(str(folder), identity="me"), 5)


def test_the_manifest_is_written_last(tmp_path, monkeypatch):
    written = []
    real = storage.write_bytes

    def write_bytes(uri: str, data: bytes) -> None:
        written.append(Path(uri).name)
        real(uri, data)

    monkeypatch.setattr(storage, "write_bytes", write_bytes)
    save_checkpoint(str(tmp_path), state_of(1), identity="me")
    assert written == ["state.pt", "MANIFEST.json"]


@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: data[:50] + b"x" + data[51:]])
def test_a_damaged_state_is_refused(folder, damage):
    file = folder / "step_000000010" / "state.pt"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(CheckpointError, match=r"step_000000010' is damaged: state\.pt has sha256"):
        load_latest(str(folder), identity="me")


def test_another_configuration_is_refused(folder):
    with pytest.raises(CheckpointError, match="written with another configuration; name another output"):
        load_latest(str(folder), identity="you")
    # Looking at one without resuming it needs no identity.
    assert_state(load_checkpoint(str(folder / "step_000000010")), 10)


def test_the_same_step_can_be_written_again(folder):
    """A resumed run reaches the step of a checkpoint that was not trusted."""
    save_checkpoint(str(folder), {**state_of(10), "seconds": 99.0}, identity="me")
    found = load_latest(str(folder), identity="me")
    assert found is not None
    assert found["seconds"] == 99.0


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    """Checkpoints come from buckets others can write to: weights and plain values only."""
    save_checkpoint(str(tmp_path), {"step": 1, "trainer": Path("/")}, identity="me")
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        load_latest(str(tmp_path), identity="me")


def test_what_a_run_says_about_its_weights_is_read_without_them(folder):
    place = save_checkpoint(str(folder), state_of(20), identity="me", about={"model": {"width": 8}})
    data = storage.read_bytes(storage.join(place, "state.pt"))
    (folder / "step_000000020" / "state.pt").unlink()
    assert about_checkpoint(place) == (hashlib.sha256(data).hexdigest(), {"model": {"width": 8}})
    assert about_checkpoint(str(folder / "step_000000010"))[1] == {}
    with pytest.raises(CheckpointError, match=r"MANIFEST\.json is absent"):
        about_checkpoint(str(folder))


def test_the_newest_checkpoint_of_a_run_is_found_from_anywhere_above(tmp_path):
    run = tmp_path / "root" / "runs" / "clip-s0"
    for step in (999, 1000):
        place = save_checkpoint(str(run / "checkpoints"), state_of(step), identity="me")
    for uri in (tmp_path / "root", tmp_path / "root" / "runs", run, run / "checkpoints", Path(place)):
        assert find_checkpoint(str(uri)) == place
    older = run / "checkpoints" / "step_000000999"
    assert find_checkpoint(str(older)) == str(older)


def test_checkpoints_of_several_runs_are_named(tmp_path):
    for run_id in ("clip-s1", "clip-s0"):
        save_checkpoint(str(tmp_path / "runs" / run_id / "checkpoints"), state_of(5), identity="me")
    with pytest.raises(
        CheckpointError, match="checkpoints of 2 runs; name one of them: runs/clip-s0, runs/clip-s1"
    ):
        find_checkpoint(str(tmp_path))
    assert find_checkpoint(str(tmp_path / "runs" / "clip-s1")).endswith("clip-s1/checkpoints/step_000000005")


def test_no_checkpoint_is_said(tmp_path):
    for uri in (tmp_path, tmp_path / "none"):
        with pytest.raises(CheckpointError, match=f"'{uri}' holds no checkpoint; name a run root"):
            find_checkpoint(str(uri))
