"""Both embeddings of every training pair as one pass of Ray Data: tasks read shards, actors embed them.

Actors get the encoder through the object store; row numbers and embeddings come back to rank 0.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.encoder import Encoder
from pipelines.embed_split import ROWS_PER_BATCH, EmbedSettings, embed_pairs
from pipelines.pair_rows import PairRows
from pipelines.prepared import Prepared

# Shards that are read at the same time.
_READERS = 2
# Label that Ray gives each node.
_NODE_ID = "ray.io/node-id"
Columns = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class StreamEmbed:
    """One pass over the shards, driven by rank 0 while the other workers wait for its result.

    Nothing here asks for a CPU. All workers of the run wait, so theirs are idle; and a pass that asked for
    one would wait for ever on a cluster that the run and its feed fill.

    Attributes:
        num_actors: that embed; without a GPU of their own they share rank 0's node.
        gpus_per_actor: share of a GPU for each, which the cluster must have beside the workers'.
    """

    prepared_uri: str
    settings: EmbedSettings
    rank: int
    num_actors: int = 1
    gpus_per_actor: float = 0.0

    def __call__(self, encoder: Encoder) -> Tensor | None:
        if self.rank != 0:
            return None
        num_rows = Prepared.open(self.prepared_uri).num_rows("train")
        found = np.empty((2, num_rows, encoder.width), np.float32)
        is_there = np.zeros(num_rows, bool)
        # The worker owns the object: it lives as long as the pass.
        weights = ray.put(copy.deepcopy(encoder).cpu())
        for columns in self._dataset(weights).iter_batches(batch_size=None, batch_format="numpy"):
            rows = columns["row_index"]
            found[0, rows], found[1, rows] = columns["image_embeds"], columns["text_embeds"]
            is_there[rows] = True
        assert is_there.all(), f"{int((~is_there).sum())} of {num_rows} rows were not embedded"
        return torch.from_numpy(found).to(next(encoder.parameters()).device)

    def _dataset(self, weights: ray.ObjectRef[Encoder]) -> ray.data.Dataset:
        shards = Prepared.open(self.prepared_uri).manifest["splits"]["train"]["shards"]
        firsts = np.cumsum([0, *(shard["rows"] for shard in shards)])
        here = ray.get_runtime_context().get_node_id()
        items = [{"shard": number, "first": int(firsts[number])} for number in range(len(shards))]
        return (
            ray.data.from_items(items, override_num_blocks=len(items))
            .map_batches(
                _read_shards,
                fn_args=(self.prepared_uri,),
                batch_size=1,
                # Ray warns of a pool that is larger than its work.
                compute=ray.data.TaskPoolStrategy(size=min(_READERS, len(items))),
                num_cpus=0,
            )
            .map_batches(
                _Embedder,
                fn_constructor_args=([weights], self),
                batch_size=ROWS_PER_BATCH,
                batch_format="pyarrow",
                compute=ray.data.ActorPoolStrategy(size=min(self.num_actors, len(items))),
                num_cpus=0,
                num_gpus=self.gpus_per_actor,
                # Actors without resources would be placed anywhere, on a head node that computes nothing too.
                label_selector=None if self.gpus_per_actor else {_NODE_ID: here},
            )
        )


def _read_shards(items: Columns, prepared_uri: str) -> Iterator[pa.Table]:
    """Ray Data task: the rows of some shards with their positions in the split."""
    for shard, first in zip(items["shard"].tolist(), items["first"].tolist(), strict=True):
        table = Prepared.open(prepared_uri).shard("train", shard)
        positions = np.arange(first, first + len(table))
        yield table.append_column("row_index", pa.array(positions))


class _Embedder:
    """Ray Data actor: holds the encoder of one pass."""

    def __init__(self, weights: list[ray.ObjectRef[Encoder]], pass_: StreamEmbed) -> None:
        # Ray shows all GPUs to an actor that asked for none.
        device = "cuda" if pass_.gpus_per_actor and torch.cuda.is_available() else "cpu"
        self._encoder = ray.get(weights[0]).to(device)
        self._size = Prepared.open(pass_.prepared_uri).image_size
        self._settings = pass_.settings

    def __call__(self, table: pa.Table) -> Columns:
        rows = PairRows(table, self._size)
        images, texts = embed_pairs(self._encoder, rows, np.arange(len(rows)), self._settings)
        return {
            "row_index": table["row_index"].to_numpy(),
            "image_embeds": images.cpu().numpy(),
            "text_embeds": texts.cpu().numpy(),
        }
