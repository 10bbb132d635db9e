"""A run that starts from the weights of an earlier one: where they are, whether they fit, what is taken.

Parameters are taken by name. What a method remembers of its data (queue, memory bank, prototypes) stays
behind, and so do the optimiser and the step.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from models.table_state import TableState
from models.teacher import EmaTeacher
from models.towers import TextTower, TowerSettings, VisionTower
from pipelines import storage
from pipelines.checkpoint import CheckpointError, about_checkpoint, find_checkpoint, load_checkpoint
from pipelines.config import Config, TrainConfig
from pipelines.prepared import Prepared
from pipelines.train_step import Trainer

_START_FILE = "start.json"


@dataclass(frozen=True)
class TakenOver:
    """What became of the parameters of a run and of its start, by name.

    Attributes:
        taken: had the same name and shape in the start.
        new: not in the start; they keep their fresh values.
        reshaped: in the start with another shape; they keep their fresh values too.
        unused: in the start only, and parameters or buffers there.
    """

    taken: tuple[str, ...]
    new: tuple[str, ...]
    reshaped: tuple[str, ...]
    unused: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """How many were taken, and the names of what was not."""
        rest = {"new": self.new, "reshaped": self.reshaped, "unused": self.unused}
        return {"num_taken": len(self.taken), **{key: list(names) for key, names in rest.items()}}


def pin_start(config: Config, *, recorded: Mapping[str, Any] | None = None) -> Config:
    """The configuration with the sha256 of its start, which makes the weights part of a run's identity.

    Args:
        recorded: configuration of the same run when it can continue from its own checkpoint; what it says
            holds when the start is gone by now.

    Raises:
        ValueError: `train.start_from` holds no checkpoint, those of several runs, or another one than
            `train.start_sha256` or the recorded run says.
    """
    train = config.train
    if train.start_from is None:
        return config
    before = (recorded or {}).get("train", {}).get("start_sha256")
    try:
        found, _ = about_checkpoint(find_checkpoint(train.start_from))
    except CheckpointError as error:
        if before is None:
            raise ValueError(f"train.start_from: {error}") from error
        found = before
    _refuse_other_weights(found, before or train.start_sha256 or found, where=train.start_from)
    return config.model_copy(update={"train": train.model_copy(update={"start_sha256": found})})


def _refuse_other_weights(found: str, expected: str, *, where: str) -> None:
    if found != expected:
        raise ValueError(
            f"train.start_from={where} holds the weights {found[:12]}, this run starts from {expected[:12]}; "
            "name the checkpoint it started from, or another output for a new run"
        )


def check_start(config: Config, prepared: Prepared) -> None:
    """Refuse a start whose towers or words are not those of this run, without reading its weights.

    Raises:
        ValueError: no checkpoint, towers of another shape, or another tokenizer.
    """
    uri = config.train.start_from
    if uri is None:
        return
    _, about = about_checkpoint(find_checkpoint(uri))
    _refuse_other_towers(config.model, about.get("model", {}), uri)
    if about and about["tokenizer_sha256"] != tokenizer_sha256(prepared):
        raise ValueError(
            f"train.start_from={uri} was trained with another tokenizer, to which the same token is another "
            f"word; set data.tokenizer={about['prepared']}"
        )


def describe_run(config: Config, prepared: Prepared) -> dict[str, Any]:
    """What a run that starts from this one's weights must know; written beside them."""
    return {
        "model": asdict(config.model),
        "tokenizer_sha256": tokenizer_sha256(prepared),
        "prepared": prepared.uri,
    }


def tokenizer_sha256(prepared: Prepared) -> str:
    """Hash of the data's tokenizer file."""
    file = storage.join(prepared.uri, prepared.manifest["tokenizer"])
    return hashlib.sha256(storage.read_bytes(file)).hexdigest()


def start_trainer(trainer: Trainer, train: TrainConfig) -> TakenOver:
    """Give a fresh trainer the weights of `train.start_from`; every worker reads the same.

    Raises:
        ValueError: no checkpoint, a damaged one, another one than `train.start_sha256`, or one that does
            not fit.
    """
    assert train.start_from is not None
    assert train.start_sha256 is not None, "pin_start comes first"
    place = find_checkpoint(train.start_from)
    _refuse_other_weights(about_checkpoint(place)[0], train.start_sha256, where=train.start_from)
    weights = load_checkpoint(place)["trainer"]["model"]
    found = take_over_(trainer.model, weights, where=train.start_from)
    if trainer.teacher is not None:
        # It began as a copy of the weights that were just replaced.
        trainer.teacher = EmaTeacher(trainer.model).to(trainer.device)
    return found


def write_start(folder: str, config: Config, found: TakenOver) -> None:
    """Put what a run took of its start into the run's folder."""
    about = {"start_from": config.train.start_from, "sha256": config.train.start_sha256}
    storage.write_json(storage.join(folder, _START_FILE), {**about, **found.as_dict()})


def start_summary(folder: str) -> str | None:
    """One line about a run's start; None for a run with fresh weights."""
    uri = storage.join(folder, _START_FILE)
    if not storage.exists(uri):
        return None
    found = storage.read_json(uri)
    parts = [f"started from {found['start_from']}: {found['num_taken']} parameters taken"]
    for key in ("new", "reshaped", "unused"):
        if found[key]:
            # The modules they belong to; every name is in the file.
            modules = dict.fromkeys(".".join(name.split(".")[:3]) for name in found[key])
            parts.append(f"{len(found[key])} {key} ({', '.join(modules)})")
    return "; ".join(parts)


@torch.no_grad()
def take_over_(model: nn.Module, weights: Mapping[str, Tensor], *, where: str) -> TakenOver:
    """Copy every parameter that has the same name and shape in `weights`, in place.

    A temperature that the method keeps from its start is taken too, though nothing trains it.

    Args:
        where: the start, for messages.

    Raises:
        ValueError: nothing fits, or a parameter of the towers does not; then nothing is changed.
    """
    parameters = dict(model.named_parameters()) | _kept_temperatures(model)
    there = [name for name in parameters if name in weights]
    reshaped = [name for name in there if weights[name].shape != parameters[name].shape]
    found = TakenOver(
        taken=tuple(name for name in there if name not in reshaped),
        new=tuple(name for name in parameters if name not in weights),
        reshaped=tuple(reshaped),
        unused=tuple(name for name in weights if name not in parameters),
    )
    if not found.taken:
        raise ValueError(
            f"train.start_from={where} has none of this method's {len(parameters)} parameters; it must be a "
            "checkpoint of this program"
        )
    _refuse_reshaped_towers(model, found, weights, where=where)
    for name in found.taken:
        parameters[name].copy_(weights[name])
    return found


def _kept_temperatures(model: nn.Module) -> dict[str, Tensor]:
    return {
        f"{name}.log_inverse_temperature": module.log_inverse_temperature
        for name, module in model.named_modules()
        if isinstance(module, TableState) and module.recipe.temperature.policy == "kept"
    }


def _refuse_reshaped_towers(
    model: nn.Module, found: TakenOver, weights: Mapping[str, Tensor], *, where: str
) -> None:
    parameters = dict(model.named_parameters())
    towers = tuple(
        f"{name}." for name, module in model.named_modules() if isinstance(module, VisionTower | TextTower)
    )
    unlike = [name for name in (*found.new, *found.reshaped) if name.startswith(towers)]
    if not unlike:
        return
    name = unlike[0]
    there = f"shape {tuple(weights[name].shape)}" if name in weights else "absent"
    raise ValueError(
        f"train.start_from={where} has other towers: {len(unlike)} of their parameters do not fit, {name} is "
        f"{there} there and has shape {tuple(parameters[name].shape)} here; set model and data.tokenizer as "
        "in the run that was trained there"
    )


def _refuse_other_towers(ours: TowerSettings, theirs: Mapping[str, Any], where: str) -> None:
    # A pretrained folder decides the shapes; only the weights themselves can tell whether they fit.
    if ours.pretrained or theirs.get("pretrained"):
        return
    unlike = [f.name for f in fields(ours) if f.name in theirs and theirs[f.name] != getattr(ours, f.name)]
    if not unlike:
        return
    here = ", ".join(f"model.{name}={getattr(ours, name)}" for name in unlike)
    there = " ".join(f"{_setting(name)}={theirs[name]}" for name in unlike)
    raise ValueError(f"train.start_from={where} has other towers than {here}; set {there}")


def _setting(name: str) -> str:
    """Where a tower's setting is to be changed: the data decides what both share."""
    return f"data.{name}" if name in ("image_size", "max_tokens") else f"model.{name}"
