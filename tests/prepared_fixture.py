"""Small prepared data by hand: random pixels and token ids, no stage and no tokenizer needed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa

from pipelines import storage
from pipelines.prepared import MANIFEST, MANIFEST_VERSION
from pipelines.schemas import PREPARED
from pipelines.shard_file import SUFFIX, pack_shard

IMAGE_SIZE = 8


def prepared_table(num_rows: int, *, num_sentences: int = 2, seed: int = 0) -> pa.Table:
    """Rows in `schemas.PREPARED` with three captions each; every other row has sentences.

    The first caption of row i is [1, 100 + i, 2] and its sentence j is [1, 400 + 100 j + i, 2]; captions
    differ in length, rows 0 and 1 share a group, row i has the first i % 3 of two labels.
    """
    generator = np.random.default_rng(seed)
    rows = []
    for i in range(num_rows):
        captions = [[1, 100 + i, 2], [1, 200 + i, 5, 2], [1, 300 + i, *range(3, 3 + i % 5), 2]]
        sentences = [[1, 400 + 100 * j + i, 2] for j in range(num_sentences if i % 2 else 0)]
        rows.append(
            {
                "row_id": f"seed{seed}-row{i}",
                "image": generator.integers(0, 256, IMAGE_SIZE**2 * 3, dtype=np.uint8).tobytes(),
                "caption_tokens": captions,
                "sentence_tokens": sentences,
                "captions": [str(tokens) for tokens in captions],
                "sentences": [str(tokens) for tokens in sentences],
                "labels": ["seen", f"colour{i % 4}"][: i % 3],
                "class_name": None,
                "group_id": "together" if i < 2 else None,
                "source": "hand",
                "split": "train",
                "boxes": None,
            }
        )
    return pa.Table.from_pylist(rows, schema=PREPARED)


def write_prepared(folder: Path, *, shard_rows: tuple[int, ...]) -> str:
    """A train split in shards of these sizes; its location."""
    uri = str(folder)
    table = prepared_table(sum(shard_rows))
    shards, first = [], 0
    for number, rows in enumerate(shard_rows):
        path = f"shards/train-{number:05d}{SUFFIX}"
        storage.write_bytes(storage.join(uri, path), pack_shard(table.slice(first, rows)))
        shards.append({"path": path, "rows": rows})
        first += rows
    manifest = {
        "schema_version": MANIFEST_VERSION,
        "image_size": IMAGE_SIZE,
        "splits": {"train": {"rows": first, "shards": shards}},
    }
    storage.write_json(storage.join(uri, MANIFEST), manifest)
    return uri
