"""Reading what `prepare` wrote: manifest, shards, tokenizer. No Ray."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import pyarrow as pa

from pipelines.schemas import PREPARED, SCORED, SCORES_VERSION, UNKNOWN_LABELS, check_schema
from pipelines.shard_cache import ShardCache
from pipelines.shard_file import read_shard
from pipelines.storage import exists, is_local, join, read_bytes, read_json
from pipelines.tokenizer import TextTokenizer

MANIFEST: Final = "manifest.json"
# Version 2: shards are Arrow files; squares are cut before they are resized.
MANIFEST_VERSION: Final = 2


def read_manifest(uri: str) -> dict[str, Any] | None:
    """The manifest of prepared data at `uri`; None when there is none (nothing there, or half written).

    Raises:
        ValueError: it was written by another version of this program.
    """
    place = join(uri, MANIFEST)
    if not exists(place):
        return None
    manifest: dict[str, Any] = read_json(place)
    found = manifest.get("schema_version")
    if found != MANIFEST_VERSION:
        raise ValueError(
            f"'{place}': schema_version must be {MANIFEST_VERSION}, found {found}; prepare the data again"
        )
    return manifest


@dataclass(frozen=True)
class Prepared:
    """A folder of prepared data; only what its manifest lists is read."""

    uri: str
    manifest: dict[str, Any]

    @classmethod
    def open(cls, uri: str) -> Prepared:
        """Raises ValueError when there is no manifest."""
        manifest = read_manifest(uri)
        if manifest is None:
            raise ValueError(f"no prepared data at '{uri}': {MANIFEST} is absent; run prepare first")
        return cls(uri, manifest)

    @property
    def image_size(self) -> int:
        return int(self.manifest["image_size"])

    @property
    def schema(self) -> pa.Schema:
        """`schemas.PREPARED`, or `schemas.SCORED` where a finished run has scored the images' patches.

        Raises:
            ValueError: the scores are of another version of this program.
        """
        about = self.manifest.get("token_scores")
        if about is None:
            return PREPARED
        if about["schema_version"] != SCORES_VERSION:
            raise ValueError(
                f"'{self.uri}': token_scores.schema_version must be {SCORES_VERSION}, found "
                f"{about['schema_version']}; score the data again"
            )
        return SCORED

    def num_rows(self, split: str) -> int:
        return int(self._split(split)["rows"])

    def table(self, split: str, *, columns: list[str] | None = None) -> pa.Table:
        """All rows of a split in their fixed order, in `schema` or some of its columns.

        Whole rows have `schemas.UNKNOWN_LABELS` too where the data leaves labels open.

        Raises:
            ValueError: the split is unknown, or a shard does not hold what the manifest says.
        """
        names = columns if columns is not None else self.schema.names
        schema = pa.schema([self.schema.field(name) for name in names])
        extra = [UNKNOWN_LABELS] if columns is None else []
        tables = [self._shard(shard, schema=schema, extra=extra) for shard in self._split(split)["shards"]]
        return pa.concat_tables(tables, promote_options="default") if tables else schema.empty_table()

    def shard(self, split: str, number: int, *, cache: ShardCache | None = None) -> pa.Table:
        """Rows of one shard in `schema`; `number` is its place in the manifest's list.

        Args:
            cache: where a shard of an object store is kept on this machine.

        Raises:
            ValueError: the split is unknown, or the shard does not hold what the manifest says.
        """
        shard = self._split(split)["shards"][number]
        place = join(self.uri, shard["path"])
        if cache is not None and not is_local(place):
            place = cache.local_copy(place, sha256=shard["sha256"]) or place
        return self._shard(shard, schema=self.schema, place=place)

    def images(self, split: str) -> np.ndarray:
        """Pixels of a split, uint8 [N, S, S, 3]; read-only (a view into Arrow memory for a single shard)."""
        return image_array(self.table(split, columns=["image"])["image"], size=self.image_size)

    def tokenizer(self) -> TextTokenizer:
        place = join(self.uri, self.manifest["tokenizer"])
        max_tokens = int(self.manifest["config"]["max_tokens"])
        return TextTokenizer.from_bytes(read_bytes(place), max_tokens=max_tokens, where=f"'{place}'")

    def _split(self, split: str) -> dict[str, Any]:
        splits: dict[str, Any] = self.manifest["splits"]
        if split not in splits:
            raise ValueError(f"split must be one of {sorted(splits)}, got '{split}'")
        found: dict[str, Any] = splits[split]
        return found

    def _shard(
        self,
        shard: dict[str, Any],
        *,
        schema: pa.Schema,
        extra: Sequence[pa.Field] = (),
        place: str | None = None,
    ) -> pa.Table:
        """A shard in `schema`, with those extra columns that it has; read from a copy at `place` if given."""
        place = place or join(self.uri, shard["path"])
        table = read_shard(place, columns=[*schema.names, *(field.name for field in extra)])
        for field in extra:
            schema = schema.append(field) if field.name in table.column_names else schema
        check_schema(table.schema, schema, where=place)
        if len(table) != shard["rows"]:
            raise ValueError(f"'{place}': the manifest says {shard['rows']} rows, found {len(table)}")
        return table.select(schema.names)


def image_array(column: pa.ChunkedArray, *, size: int) -> np.ndarray:
    """A column of raw pixels as uint8 [N, size, size, 3], read-only; no copy for a single chunk.

    Raises:
        ValueError: an image has another number of bytes.
    """
    parts = [_pixels(chunk, size=size) for chunk in column.chunks if len(chunk)]
    if len(parts) == 1:
        return parts[0]
    joined = np.concatenate([np.empty((0, size, size, 3), np.uint8), *parts])
    joined.flags.writeable = False
    return joined


def _pixels(chunk: pa.Array, *, size: int) -> np.ndarray:
    num_bytes = size * size * 3
    _, offsets, data = chunk.buffers()
    ends = np.frombuffer(offsets, dtype=np.int32)[chunk.offset : chunk.offset + len(chunk) + 1]
    if not (np.diff(ends) == num_bytes).all():
        raise ValueError(
            f"every image must hold {size} x {size} x 3 = {num_bytes} bytes, found {set(np.diff(ends))}"
        )
    pixels = np.frombuffer(data, dtype=np.uint8)[ends[0] : ends[-1]]
    return pixels.reshape(len(chunk), size, size, 3)
