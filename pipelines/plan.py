"""What a command is about to do and what it will cost, measured on this machine before it starts."""

from __future__ import annotations

import os
import time
from typing import Any

import torch
from rich.table import Table

from models.outputs import NUM_TAGS, PairBatch
from pipelines.config import Config
from pipelines.config_tree import validate_tree
from pipelines.spaces import method_tree, space_of
from pipelines.train_step import TextSpec, Trainer
from tune_spaces.domains import describe

# Pairs of the timing batch; the cost of a step is taken as proportional to its pairs.
_TIMED_PAIRS = 32
_TIMED_TOKENS = 16
_HARMLESS_LR = 1e-9
# Share of a trial's steps that is taken on average when some are stopped early.
_TRIAL_SHARE = 0.9


def pretrain_plan(config: Config) -> Table:
    """Table of one run: data, batch, negatives, parameters, time."""
    table = _table("one run")
    _add_common(table, config)
    trainer = stand_in_trainer(config)
    table.add_row("method", f"{config.method.name} ({config.method.source})")
    table.add_row(
        "parameters", f"{sum(p.numel() for p in trainer.model.parameters()):,} beside the word table"
    )
    seconds = seconds_per_step(config) * config.train.steps / config.train.num_workers
    table.add_row("expected", f"about {_duration(seconds)} of training on this machine")
    return table


def sweep_plan(config: Config) -> Table:
    """Table of a sweep: methods with their spaces, runs, time.

    Raises:
        ValueError: a bad method, path or value in a space.
    """
    table = _table("sweep")
    _add_common(table, config)
    sweep = config.sweep
    num_finals = len(sweep.seeds) + min(sweep.num_default_seeds, len(sweep.seeds))
    seconds = 0.0
    for method in sweep.methods:
        space = space_of(config, method)
        table.add_row(
            method, ", ".join(f"{_short(path)} {describe(domain)}" for path, domain in space.items())
        )
        per_run = seconds_per_step(validate_tree(method_tree(config, method))) * config.train.steps
        seconds += per_run * (sweep.num_trials * _TRIAL_SHARE + num_finals)
    runs = len(sweep.methods) * (sweep.num_trials + num_finals)
    table.add_row(
        "runs",
        f"{runs}: per method {sweep.num_trials} trials, {len(sweep.seeds)} seeds of the best, "
        f"{num_finals - len(sweep.seeds)} of the untuned defaults",
    )
    cores = os.cpu_count() or 1
    at_once = max(1, int(cores / (config.train.cpus_per_worker * config.train.num_workers)))
    at_once = min(at_once, sweep.max_concurrent or at_once)
    if config.ray_address is None:
        table.add_row(
            "expected",
            f"about {_duration(seconds / at_once)} of training, {at_once} runs at once on this machine",
        )
    return table


def seconds_per_step(config: Config) -> float:
    """Seconds of one optimiser step of the global batch in one process here, timed on random pixels."""
    trainer = stand_in_trainer(config)
    num_pairs = min(_TIMED_PAIRS, config.train.batch_size)
    batch = random_batch(config, trainer, num_pairs)
    torch.set_num_threads(max(1, int(config.train.cpus_per_worker)))
    trainer.run_step(batch)
    start = time.perf_counter()
    trainer.run_step(batch)
    return (time.perf_counter() - start) * config.train.batch_size / num_pairs


def stand_in_trainer(config: Config) -> Trainer:
    """The method's trainer with a stand-in vocabulary: the tokenizer may not exist yet."""
    text = TextSpec(vocab_size=512, pad_id=0, start_id=1, end_id=3)
    # A rate that diverges on random pixels is for the run to refuse, not for its plan.
    train = config.train.model_copy(update={"lr": _HARMLESS_LR})
    # The data may not be prepared yet; how many rows a method remembers hardly changes a step's time.
    clusters = [n for table in config.method.tables.values() for n in table.candidates.num_clusters]
    num_rows = max(config.data.num_train, *clusters)
    return Trainer(config.recipe, config.model, text, train, seed=config.seed, num_rows=num_rows)


def random_batch(config: Config, trainer: Trainer, num_pairs: int) -> PairBatch:
    """Pairs of noise in the configuration's shapes, to time a step with."""
    generator = torch.Generator().manual_seed(0)
    side, features = config.data.image_size, config.method.features
    views, texts = features.num_views, features.num_texts
    box = torch.tensor([0.0, 0.0, side, side]).expand(num_pairs, 4)
    length = min(_TIMED_TOKENS, config.data.max_tokens)
    return PairBatch(
        images=torch.randint(0, 256, (num_pairs, side, side, 3), dtype=torch.uint8, generator=generator),
        view_boxes=box.expand(views, num_pairs, 4),
        teacher_boxes=box,
        token_ids=torch.randint(4, 512, (texts, num_pairs, length), generator=generator),
        is_real_token=torch.ones(texts, num_pairs, length, dtype=torch.bool),
        is_text=torch.ones(texts, num_pairs, dtype=torch.bool),
        selection_noise=torch.rand(
            views, num_pairs, trainer.model.encoder.vision.grid**2, generator=generator
        ),
        row_keys=torch.arange(num_pairs),
        group_keys=torch.arange(num_pairs),
        text_keys=torch.arange(num_pairs),
        draw_keys=torch.arange(num_pairs),
        row_index=torch.arange(num_pairs),
        tags=torch.zeros(num_pairs, NUM_TAGS),
    )


def _add_common(table: Table, config: Config) -> None:
    train = config.train
    table.add_row("data", config.data.source)
    table.add_row("output", config.output)
    workers = "1 worker" if train.num_workers == 1 else f"{train.num_workers} workers"
    table.add_row(
        "training",
        f"{train.steps} steps of {train.batch_size} pairs on {workers}, {train.steps * train.batch_size:,} "
        f"samples; every pair is contrasted with {train.batch_size - 1} others",
    )
    table.add_row(
        "evaluation",
        f"selected on '{config.evaluation.select_on}', reported on '{config.evaluation.report_on}'",
    )


def _table(title: str) -> Table:
    table = Table(title=title, title_justify="left", show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    return table


def _short(path: str) -> str:
    return ".".join(path.removeprefix("method.").split(".")[-2:])


def _duration(seconds: float) -> Any:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
