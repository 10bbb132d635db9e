"""Sample images as the page draws them: picture, patch grid, scores and boxes in patch units."""

from __future__ import annotations

import base64
from typing import Any

import pyarrow as pa

from pipelines.results import Json


def sample_views(table: pa.Table) -> list[Json]:
    """One view per sample, schema `schemas.SAMPLES`.

    Returns:
        `uri` (PNG as data URI), `caption`, `row_id`, `grid`, `num_kept`, `drops` (whether any patch was
        removed), `patches` (x, y, `heat` in 0..1 within the image, score, kept) and `boxes`, both in
        units of patches so that the page needs no sizes.

    Raises:
        ValueError: scores or keep flags that do not fill the grid.
    """
    return [_view(row) for row in table.to_pylist()]


def _view(row: dict[str, Any]) -> Json:
    grid, scores, is_kept = row["grid"], row["token_scores"], row["is_kept"]
    if not len(scores) == len(is_kept) == grid * grid:
        raise ValueError(
            f"sample '{row['row_id']}' needs {grid * grid} scores and keep flags for its "
            f"{grid} x {grid} grid, got {len(scores)} and {len(is_kept)}"
        )
    low, high = min(scores), max(scores)
    patches = [
        {
            "x": index % grid,
            "y": index // grid,
            # Equal scores say nothing: no heat rather than full heat.
            "heat": round((score - low) / (high - low), 3) if high > low else 0.0,
            "score": score,
            "is_kept": kept,
        }
        for index, (score, kept) in enumerate(zip(scores, is_kept, strict=True))
    ]
    return {
        "row_id": row["row_id"],
        "uri": "data:image/png;base64," + base64.b64encode(row["image"]).decode("ascii"),
        "caption": row["caption"],
        "grid": grid,
        "num_kept": sum(is_kept),
        "drops": not all(is_kept),
        "patches": patches,
        "boxes": [
            {"label": box["label"], **{key: round(box[key] * grid, 4) for key in ("x", "y", "w", "h")}}
            for box in row["boxes"] or []
        ],
    }
