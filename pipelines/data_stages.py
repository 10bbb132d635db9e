"""`clipfleet data`: check a source, count what was prepared, show rows as a picture."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from pipelines import storage
from pipelines.config import Config
from pipelines.contact_sheet import SheetRow, contact_sheet
from pipelines.data_check import DataReport, check_source
from pipelines.prepare_once import ensure_prepared, prepared_place
from pipelines.prepared import Prepared, image_array, read_manifest
from pipelines.sources.open_source import open_source

_QUANTILES = (0.0, 0.5, 0.95, 1.0)
_MOST_LABELS = 12


def check_stage(config: Config, console: Console, *, max_rows: int, as_json: bool) -> int:
    """Look at a source and say what is wrong with it; returns the exit code, 1 with a problem."""
    report = check_source(config, max_rows=max_rows)
    if as_json:
        print(json.dumps(report.as_dict(), indent=1))
    else:
        console.print(_report_table(report))
        for text in report.warnings:
            console.print(f"[yellow]note:[/yellow] {text}", highlight=False)
        for text in report.problems:
            console.print(f"[bold red]problem:[/bold red] {text}", highlight=False)
        console.print("[green]usable[/green]" if report.is_usable else "[red]not usable as it is[/red]")
    return 0 if report.is_usable else 1


def _report_table(report: DataReport) -> Table:
    table = _table(f"{report.source}: {report.num_sampled:,} of {report.num_rows:,} rows looked at")
    table.add_row("pieces", f"{report.num_pieces:,}")
    table.add_row("splits of the sample", _counts(report.splits))
    table.add_row("unusable", _counts(report.unusable) or "none")
    table.add_row("shorter image side, pixels", _spread(report.image_sides))
    table.add_row("image modes", _counts(report.image_modes))
    table.add_row("captions per row", _spread(report.captions_per_row))
    table.add_row("words per caption", _spread(report.words_per_caption))
    table.add_row("sentences per row", _spread(report.sentences_per_row))
    table.add_row("labels", _counts(report.labels))
    table.add_row(
        "repeated in the sample",
        f"{report.num_repeated_images} images, {report.num_repeated_captions} captions",
    )
    table.add_row(
        "pixels once prepared", f"{report.memory_gb:.2f} GiB on disk; local shards are mapped, not held"
    )
    table.add_row("preparing", f"about {report.prepare_minutes:.1f} CPU minutes")
    return table


def stats_stage(config: Config, console: Console, *, as_json: bool) -> None:
    """Prepare the data unless it is there, and count it.

    Raises:
        ValueError: as `prepare`.
    """
    place = _prepared(config)
    prepared = Prepared.open(place)
    found = {split: _split_stats(prepared, split) for split in prepared.manifest["splits"]}
    if as_json:
        print(json.dumps({"prepared": place, "splits": found, "manifest": prepared.manifest}, indent=1))
        return
    table = Table(title=place, title_justify="left", box=None, pad_edge=False)
    table.add_column("")
    for split in found:
        table.add_column(split, justify="right")
    for key in next(iter(found.values())):
        table.add_row(key, *(str(stats[key]) for stats in found.values()))
    console.print(table)
    for key in ("quarantine", "sources"):
        console.print(f"{key}: {prepared.manifest[key] or 'none'}", highlight=False)


def _split_stats(prepared: Prepared, split: str) -> dict[str, Any]:
    columns = ["captions", "sentences", "caption_tokens", "labels", "group_id", "boxes"]
    table = prepared.table(split, columns=columns)
    lengths = [len(tokens) for texts in table["caption_tokens"].to_pylist() for tokens in texts]
    groups = table["group_id"].to_pylist()
    labels = prepared.manifest["label_counts"].get(split, {})
    most = sorted(labels.items(), key=lambda item: -item[1])[:_MOST_LABELS]
    return {
        "rows": len(table),
        "captions": sum(map(len, table["captions"].to_pylist())),
        "sentences": sum(map(len, table["sentences"].to_pylist())),
        "tokens per caption (min, median, 95 %, max)": _numbers(lengths),
        "groups": len({group for group in groups if group is not None}),
        "rows with boxes": sum(bool(boxes) for boxes in table["boxes"].to_pylist()),
        "labels": len(labels),
        "most frequent": ", ".join(f"{name} {count}" for name, count in most),
    }


def show_stage(
    config: Config, console: Console, *, output: str, split: str, num_rows: int, run: str | None
) -> None:
    """Write a contact sheet of prepared rows, with the patches a finished run keeps.

    Raises:
        ValueError: no rows in the split, or no run with weights at `run`.
    """
    prepared = Prepared.open(_prepared(config))
    table = prepared.table(split)
    # Spread over the split, so that neighbours of one source do not fill the sheet.
    at = (
        np.unique(np.linspace(0, len(table) - 1, min(num_rows, len(table))).astype(int)) if len(table) else []
    )
    chosen = table.take(at)
    images = image_array(chosen["image"], size=prepared.image_size)
    kept = _kept_patches(run, prepared, images) if run is not None else [None] * len(images)
    rows = [
        SheetRow(
            pixels=images[number],
            caption=row["captions"][0],
            title=row["class_name"] or ", ".join(row["labels"]) or row["row_id"],
            boxes=row["boxes"] or (),
            is_kept=kept[number],
        )
        for number, row in enumerate(chosen.drop_columns(["image"]).to_pylist())
    ]
    storage.write_bytes(output, contact_sheet(rows))
    console.print(f"{len(rows)} rows of '{split}': {output}", highlight=False, soft_wrap=True)


def _kept_patches(run: str, prepared: Prepared, images: Any) -> list[Any]:
    from pipelines.encode import ModelEncoder
    from pipelines.finished_run import find_run

    config, trainer = find_run(run).load()
    if config.data.image_size != prepared.image_size:
        raise ValueError(
            f"'{run}' was trained at {config.data.image_size} px, the data is prepared at "
            f"{prepared.image_size} px; set data.image_size={config.data.image_size}"
        )
    encoder = ModelEncoder(trainer.model, prepared.tokenizer(), teacher=trainer.teacher, readout="kept")
    grid = trainer.model.encoder.vision.grid
    return list(encoder.kept_mask(np.array(images)).reshape(-1, grid, grid))


def _prepared(config: Config) -> str:
    from pipelines.cluster import connect

    source = open_source(config.data)
    if read_manifest(prepared_place(config, source)) is None:
        connect(address=config.ray_address)
    return ensure_prepared(config, source=source)


def _numbers(values: list[int]) -> str:
    return ", ".join(f"{value:g}" for value in np.quantile(values, _QUANTILES)) if values else "none"


def _spread(quantiles: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in quantiles.items()) or "none"


def _counts(counts: dict[str, int]) -> str:
    ordered = sorted(counts.items(), key=lambda item: -item[1])
    shown = ", ".join(f"{name} {count:,}" for name, count in ordered[:_MOST_LABELS])
    return shown + (f" and {len(ordered) - _MOST_LABELS} more" if len(ordered) > _MOST_LABELS else "")


def _table(title: str) -> Table:
    table = Table(title=title, title_justify="left", show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    return table
