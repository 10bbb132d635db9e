"""A small made-up run root: six methods, trials, seed runs, defaults, samples. Nothing is trained."""

from __future__ import annotations

import io
import math
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image, ImageDraw

from pipelines import storage
from pipelines.evaluation.task_result import ROWS
from pipelines.results import publish_result
from pipelines.run_record import RunRecord
from pipelines.schemas import SAMPLES

METHODS = ("clip", "tier", "cloob", "aclip", "softclip", "local_mi")
SKILL = {"clip": 0.70, "tier": 0.74, "cloob": 0.66, "aclip": 0.62, "softclip": 0.715, "local_mi": 0.55}
SPACES: dict[str, dict[str, tuple[float, float]]] = {
    "clip": {"method.temperature.init": (0.01, 0.2)},
    "tier": {
        "method.temperature.init": (0.01, 0.2),
        "method.regularisers.entropy_over_patches": (0.0, 0.5),
        "method.regularisers.entropy_over_words": (0.0, 0.5),
    },
    "cloob": {"method.temperature.init": (0.01, 0.2), "method.transform.beta": (2.0, 32.0)},
    "aclip": {"method.temperature.init": (0.01, 0.2), "method.tokens.keep_ratio": (0.3, 0.8)},
    "softclip": {"method.temperature.init": (0.01, 0.2), "method.targets.mass": (0.05, 0.5)},
    "local_mi": {"method.weight_local": (0.1, 10.0)},
}
SEEDS = (101, 102, 103)
CLASSES = tuple(str(digit) for digit in range(10))
STEPS = 30
NUM_ROWS = 120


def write_root(
    root: str,
    *,
    methods: tuple[str, ...] = METHODS,
    num_trials: int = 4,
    seeds: tuple[int, ...] = SEEDS,
    sources: tuple[str, ...] = ("scenes-quick",),
    is_finished: bool = True,
) -> str:
    """Fabricate a sweep; unfinished: the last method lacks its final runs and one trial still runs."""
    storage.write_json(storage.join(root, "sweep.json"), sweep_record(methods, num_trials, seeds))
    for index, method in enumerate(methods):
        generator = np.random.default_rng(1000 + index)
        is_cut = not is_finished and method == methods[-1]
        chosen = write_trials(root, method, generator=generator, num_trials=num_trials, is_cut=is_cut)
        for kind in ("best", "default"):
            for seed in () if is_cut else seeds:
                params = chosen if kind == "best" else {}
                write_final_run(root, method, kind=kind, seed=seed, sources=sources, params=params)
    return root


def sweep_record(methods: tuple[str, ...], num_trials: int, seeds: tuple[int, ...]) -> dict[str, Any]:
    return {
        "schema_version": 1,
        "name": "demo",
        "identity": "0" * 64,
        "methods": list(methods),
        "main_metric": "acc1",
        "select_on": "selection",
        "report_on": "test",
        "num_trials": num_trials,
        "seeds": list(seeds),
        "config": {"data": {"source": "scenes:quick"}, "sweep": {"num_default_seeds": len(seeds)}},
        "created": "2026-01-01T00:00:00+00:00",
        "dataset": "scenes-quick",
        "data_sha": "abc123def456" * 5,
        "quarantine": {"image cannot be decoded": 2, "caption is empty": 1},
    }


def write_trials(
    root: str, method: str, *, generator: np.random.Generator, num_trials: int, is_cut: bool
) -> dict[str, float]:
    """Write the trials of a method; returns the parameters of its best complete one."""
    scores: list[tuple[float, dict[str, float]]] = []
    for number in range(num_trials):
        params = {
            name: round(low + (high - low) * float(generator.random()), 4)
            for name, (low, high) in SPACES[method].items()
        }
        state = "complete"
        if number == 1:
            state = "pruned"
        if number == 2 and method == "cloob":
            state = "failed"
        if is_cut and number == num_trials - 1:
            state = "running"
        value = SKILL[method] - 0.15 * float(generator.random())
        scores += [(value, params)] if state == "complete" else []
        write_run(
            root,
            f"{method}-t{number:04d}",
            method=method,
            kind="trial",
            number=number,
            seed=0,
            params=params,
            state=state,
            value=value,
        )
    return max(scores, key=lambda pair: pair[0])[1]


def write_final_run(
    root: str, method: str, *, kind: str, seed: int, sources: tuple[str, ...], params: dict[str, float]
) -> None:
    run_id = f"{method}-{kind}-s{seed}"
    value = SKILL[method] - (0.05 if kind == "default" else 0.0) + 0.01 * (seed % 3)
    write_run(root, run_id, method=method, kind=kind, seed=seed, params=params, state="complete", value=value)
    if kind == "best":
        uri = storage.join(root, "runs", run_id, "samples.parquet")
        storage.write_table(uri, sample_table(seed, keeps_all=method != "aclip"))
    for source in sources:
        publish_class_result(root, run_id, method=method, kind=kind, seed=seed, dataset=source, value=value)
        publish_retrieval_result(
            root, run_id, method=method, kind=kind, seed=seed, dataset=source, value=value
        )


def write_run(
    root: str,
    run_id: str,
    *,
    method: str,
    kind: str,
    seed: int,
    params: dict[str, float],
    state: str,
    value: float,
    number: int | None = None,
) -> None:
    record = RunRecord(root, run_id)
    record.start(
        method=method,
        kind=kind,
        seed=seed,
        params=params,
        number=number,
        config={
            "method": {"name": method, "temperature": {"init": 0.07}},
            "train": {"seed": seed, "lr": 5e-4},
        },
        versions={"torch": "2.13.0"},
    )
    steps = {"complete": STEPS, "pruned": STEPS // 3, "failed": 4, "running": STEPS // 2}[state]
    write_curve(record, steps=steps, value=value, seed=seed + len(run_id))
    if state == "running":
        return
    has_value = state != "failed"
    record.finish(
        state,
        seconds=1.5 * steps,
        steps=steps,
        samples_seen=64 * steps,
        selection={"metric": "acc1", "value": value if has_value else None, "step": steps},
        error=None if has_value else "loss is not finite at step 4: contrastive = nan",
    )


def write_curve(record: RunRecord, *, steps: int, value: float, seed: int) -> None:
    generator = np.random.default_rng(seed)
    for step in range(1, steps + 1):
        loss = 4.1 * math.exp(-step / 15) + 0.6 + 0.1 * float(generator.standard_normal())
        record.log(
            {
                "step": step,
                "epoch": step // 10,
                "samples_seen": 64 * step,
                "loss": loss,
                "terms": {"contrastive": loss},
                "temperature": 0.07,
                "lr": 5e-4,
                "grad_norm": 1.0,
                "seconds": 1.5,
            }
        )
        if step % 10 == 0:
            score = 0.1 + (value - 0.1) * (1 - math.exp(-3 * step / STEPS)) / (1 - math.exp(-3))
            record.log({"step": step, "selection": {"metric": "acc1", "value": score}})
            record.flush()
    record.flush()


def publish_class_result(
    root: str, run_id: str, *, method: str, kind: str, seed: int, dataset: str, value: float
) -> None:
    """Row i is right when its difficulty (shared by all methods) is below the run's skill."""
    difficulty = np.random.default_rng(7).random(NUM_ROWS)
    noise = 0.05 * np.random.default_rng(seed).standard_normal(NUM_ROWS)
    is_right = (difficulty + noise < value).astype(float)
    per_class = [is_right[c::10] for c in range(10)]
    metrics = {
        "acc1": is_right.mean(),
        "mean_per_class_recall": float(np.mean([c.mean() for c in per_class])),
        "main_metric": is_right.mean(),
        "chance": 1 / len(CLASSES),
    }
    result = result_record(
        run_id, method=method, kind=kind, seed=seed, dataset=dataset, task="zeroshot_classification"
    )
    result["metrics"] = metrics
    result["clipfleet"]["labels"] = [
        {"name": name, "n": len(hits), "recall": hits.mean()}
        for name, hits in zip(CLASSES, per_class, strict=True)
    ]
    result["clipfleet"]["ci"] = {"acc1": interval(is_right)}
    publish_result(root, result, rows_table("acc1", is_right))
    if method == "aclip":
        kept = {**result, "clipfleet": {**result["clipfleet"], "keep_rule": "kept"}}
        publish_result(root, kept, rows_table("acc1", is_right))


def publish_retrieval_result(
    root: str, run_id: str, *, method: str, kind: str, seed: int, dataset: str, value: float
) -> None:
    hits = (np.random.default_rng(seed + 5).random(NUM_ROWS) < value / 2).astype(float)
    result = result_record(
        run_id, method=method, kind=kind, seed=seed, dataset=dataset, task="zeroshot_retrieval"
    )
    result["metrics"] = {
        "image_retrieval_recall@1": hits.mean(),
        "text_retrieval_recall@1": None,
        "mean_recall@5": hits.mean(),
        "main_metric": hits.mean(),
        "num_distinct_texts": 40.0,
        "chance": 0.05,
    }
    result["clipfleet"]["undefined"] = {"text_retrieval_recall@1": "any order of the candidates hits at 1"}
    result["clipfleet"]["ci"] = {"mean_recall@5": interval(hits)}
    publish_result(root, result, rows_table("mean_recall@5", hits))


def result_record(
    run_id: str, *, method: str, kind: str, seed: int, dataset: str, task: str
) -> dict[str, Any]:
    return {
        "dataset": dataset,
        "model": "vit-tiny",
        "pretrained": run_id,
        "task": task,
        "language": "en",
        "metrics": {},
        "clipfleet": {
            "schema_version": 1,
            "sweep": "demo",
            "run_id": run_id,
            "kind": kind,
            "method": method,
            "seed": seed,
            "params": {},
            "step": STEPS,
            "samples_seen": 64 * STEPS,
            "select_on": "selection",
            "report_on": "test",
            "split": "test",
            "source": dataset.rpartition("/")[2],
            "keep_rule": "all",
            "n": NUM_ROWS,
            "labels": [],
            "ci": {},
            "undefined": {},
            "prompts_sha": "p" * 8,
            "data_sha": "d" * 8,
            "seconds": 0.5,
            "device": "cpu",
            "code": "0.1.0",
        },
    }


def interval(values: np.ndarray) -> dict[str, Any]:
    half = 1.96 * float(values.std()) / math.sqrt(len(values))
    mean = float(values.mean())
    return {
        "low": mean - half,
        "high": mean + half,
        "level": 0.95,
        "method": "bootstrap",
        "resamples": 1000,
        "seed": 0,
    }


def rows_table(metric: str, values: np.ndarray) -> pa.Table:
    rows = [
        {"row_id": f"test-{i:05d}", "metric": metric, "value": float(v)}
        for i, v in enumerate(values.tolist())
    ]
    return pa.Table.from_pylist(rows, schema=ROWS)


def sample_table(seed: int, *, keeps_all: bool, num_images: int = 6, grid: int = 4) -> pa.Table:
    generator = np.random.default_rng(seed)
    rows = []
    for index in range(num_images):
        cell = int(np.random.default_rng(index).integers(grid * grid))
        scores = generator.random(grid * grid)
        scores[cell] += 1.0
        is_kept = scores >= np.median(scores)
        rows.append(
            {
                "row_id": f"test-{index:05d}",
                "image": scene_png(index, cell=cell, grid=grid),
                "caption": f"a handwritten {index} in the picture, 'cell <{cell}>'",
                "grid": grid,
                "token_scores": scores.tolist(),
                "is_kept": [True] * grid**2 if keeps_all else is_kept.tolist(),
                "boxes": [box_of(str(index), cell=cell, grid=grid)],
            }
        )
    return pa.Table.from_pylist(rows, schema=SAMPLES)


def box_of(label: str, *, cell: int, grid: int) -> dict[str, Any]:
    row, column = divmod(cell, grid)
    return {"label": label, "x": column / grid, "y": row / grid, "w": 1 / grid, "h": 1 / grid}


def scene_png(index: int, *, cell: int, grid: int, size: int = 32) -> bytes:
    noise = np.random.default_rng(index).integers(0, 40, size=(size, size, 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    row, column = divmod(cell, grid)
    side = size // grid
    ImageDraw.Draw(image).ellipse(
        (column * side + 1, row * side + 1, (column + 1) * side - 2, (row + 1) * side - 2),
        fill=(240, 240, 240),
    )
    sink = io.BytesIO()
    image.save(sink, format="PNG")
    return sink.getvalue()
