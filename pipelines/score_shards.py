"""Scores of whole images beside the data: every prepared row is scored once by a finished run.

One Ray Data job over the shards; each shard is written inside an actor, with all its columns and one more.
A shard that is there already is not scored again, so a killed job continues.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import torch
from numpy.typing import NDArray

from models.teacher import TokenScorer
from models.token_scores import grid_side
from pipelines.prepared import MANIFEST, Prepared, image_array
from pipelines.schemas import PREPARED, SCORED, SCORES_VERSION, check_schema
from pipelines.scoring import ScoringConfig
from pipelines.shard_file import pack_shard, read_shard
from pipelines.storage import (
    exists,
    join,
    publish_json,
    read_bytes,
    read_json,
    refuse_existing,
    write_bytes,
    write_json,
)
from pipelines.train_step import autocast

# What an unfinished output is being filled with.
_BEGUN = "scoring.json"
_ROWS_PER_PASS = 256

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class ScoreSource:
    """Who scores.

    Attributes:
        scorer: its modules.
        precision: `fp32` or `bf16`.
        about: run, step and hash of the weights, for the manifest; they name the scores.
    """

    scorer: TokenScorer
    precision: str
    about: dict[str, Any]


def score_prepared(
    prepared: Prepared,
    output: str,
    source: ScoreSource,
    *,
    pool: ScoringConfig,
    on_progress: Progress | None = None,
) -> dict[str, Any]:
    """Write prepared data once more, with the column `token_scores`.

    Args:
        pool: size and resources of the actors.

    Returns:
        The new manifest, which is written last.

    Raises:
        AlreadyExistsError: the output is complete.
        ValueError: the output was begun with other weights or data, or a shard is not as its manifest says.
    """
    refuse_existing(join(output, MANIFEST))
    about = {"schema_version": SCORES_VERSION, **source.about}
    _begin(output, {**about, "data_sha": prepared.manifest["data_sha"]})
    splits: dict[str, Any] = prepared.manifest["splits"]
    shards = [
        {"split": split, "path": shard["path"], "rows": shard["rows"]}
        for split, found in splits.items()
        for shard in found["shards"]
    ]
    hashes: dict[str, str] = {}
    num_rows = {shard["path"]: int(shard["rows"]) for shard in shards}
    for row in _dataset(shards, prepared, output, source, pool).iter_rows():
        hashes[row["path"]] = row["sha256"]
        if on_progress is not None:
            done = sum(num_rows[path] for path in hashes)
            on_progress("scoring", done, sum(num_rows.values()))
    for name in ("tokenizer.json", "quarantine.parquet"):
        if exists(join(prepared.uri, name)):
            write_bytes(join(output, name), read_bytes(join(prepared.uri, name)))
    scored = {
        split: {**found, "shards": [{**s, "sha256": hashes[s["path"]]} for s in found["shards"]]}
        for split, found in splits.items()
    }
    manifest = {**prepared.manifest, "splits": scored, "token_scores": about}
    publish_json(join(output, MANIFEST), manifest)
    return manifest


def _begin(output: str, content: dict[str, Any]) -> None:
    place = join(output, _BEGUN)
    if not exists(place):
        write_json(place, content)
    elif read_json(place) != content:
        raise ValueError(
            f"'{output}' holds unfinished scores of other weights or data ('{place}'); name another output"
        )


def _dataset(
    shards: list[dict[str, Any]], prepared: Prepared, output: str, source: ScoreSource, pool: ScoringConfig
) -> ray.data.Dataset:
    modules = ray.put(source.scorer.cpu())
    most = len(shards)
    return ray.data.from_items(shards, override_num_blocks=most).map_batches(
        _ShardScorer,
        fn_constructor_args=([modules], prepared.uri, output, source.precision, pool),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(
            min_size=min(pool.min_actors, most), max_size=min(pool.max_actors, most)
        ),
        num_cpus=pool.cpus_per_actor,
        num_gpus=pool.gpus_per_actor,
        label_selector=pool.node_labels or None,
    )


class _ShardScorer:
    """Ray Data actor: holds the scorer, writes shards."""

    def __init__(
        self,
        modules: list[ray.ObjectRef[TokenScorer]],
        prepared_uri: str,
        output: str,
        precision: str,
        pool: ScoringConfig,
    ) -> None:
        torch.set_num_threads(max(1, int(pool.cpus_per_actor)))
        # Ray shows all GPUs to an actor that asked for none.
        self._device = torch.device("cuda" if pool.gpus_per_actor and torch.cuda.is_available() else "cpu")
        self._scorer = ray.get(modules[0]).to(self._device)
        self._prepared, self._output, self._precision = Prepared.open(prepared_uri), output, precision

    def __call__(self, items: dict[str, NDArray[Any]]) -> dict[str, list[str]]:
        paths = items["path"].tolist()
        hashes = [self._score(path, int(rows)) for path, rows in zip(paths, items["rows"], strict=True)]
        return {"path": paths, "sha256": hashes}

    def _score(self, path: str, num_rows: int) -> str:
        target = join(self._output, path)
        # Files appear whole, and what is in them depends on the weights and the shard alone.
        if exists(target):
            data = read_bytes(target)
        else:
            place = join(self._prepared.uri, path)
            table = read_shard(place)
            check_schema(table.schema, PREPARED, where=place)
            if len(table) != num_rows:
                raise ValueError(f"'{place}': the manifest says {num_rows} rows, found {len(table)}")
            images = image_array(table["image"], size=self._prepared.image_size)
            scores = image_scores(self._scorer, images, precision=self._precision)
            data = pack_shard(with_scores(table, scores))
            write_bytes(target, data)
        return hashlib.sha256(data).hexdigest()


@torch.no_grad()
def image_scores(scorer: TokenScorer, images: NDArray[np.uint8], *, precision: str) -> NDArray[np.float32]:
    """Scores of the patches of whole images, uint8 [N, S, S, 3] -> [N, patches of the scorer's grid]."""
    device = next(scorer.parameters()).device
    found = []
    for first in range(0, len(images), _ROWS_PER_PASS):
        part = torch.tensor(images[first : first + _ROWS_PER_PASS], device=device)
        with autocast(device, precision):
            found.append(scorer.whole_images(part.permute(0, 3, 1, 2).float()).float().cpu().numpy())
    return np.concatenate(found)


def with_scores(table: pa.Table, scores: NDArray[np.float32]) -> pa.Table:
    """A prepared table with its column of scores, replacing an earlier one."""
    grid_side(scores.shape[1])
    field = SCORED.field("token_scores")
    if field.name in table.column_names:
        table = table.drop_columns([field.name])
    return table.append_column(field, pa.array(list(scores), field.type))
