"""What every source of pairs offers: a plan of pieces, read inside Ray tasks.

The plan is made on the driver from sizes alone and never depends on how many workers there are; that is
what makes everything downstream independent of parallelism.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import pyarrow as pa
import ray.data

from pipelines.sources.column_names import ColumnNames

# Reading waits for storage most of the time, and a whole core per task would starve the stages that
# share the machine.
READ_CPUS = 0.5

# Decoding keeps a core busy, and a job of one stage has no other to starve: half a core per task would
# start twice the worker processes for the same work.
_PIECE_CPUS = 1


class PartSettings(Protocol):
    """One source of a mixture; None: as the data config says for all of them."""

    @property
    def source(self) -> str: ...
    @property
    def name(self) -> str | None: ...
    @property
    def weight(self) -> float: ...
    @property
    def columns(self) -> ColumnNames | None: ...
    @property
    def where(self) -> Mapping[str, list[str]] | None: ...
    @property
    def split_names(self) -> Mapping[str, str] | None: ...
    @property
    def split(self) -> str | None: ...
    @property
    def image_root(self) -> str | None: ...
    @property
    def caption_template(self) -> str | None: ...


class SourceSettings(Protocol):
    """The part of the data config that sources read."""

    @property
    def source(self) -> str: ...
    @property
    def columns(self) -> ColumnNames: ...
    @property
    def where(self) -> Mapping[str, list[str]]: ...
    @property
    def split_names(self) -> Mapping[str, str]: ...
    @property
    def seed(self) -> int: ...
    @property
    def num_train(self) -> int: ...
    @property
    def num_selection(self) -> int: ...
    @property
    def num_test(self) -> int: ...
    @property
    def rows_per_shard(self) -> int: ...
    @property
    def split(self) -> str | None: ...
    @property
    def image_root(self) -> str | None: ...
    @property
    def caption_template(self) -> str | None: ...
    @property
    def views(self) -> str: ...
    @property
    def sections(self) -> str: ...
    @property
    def reports(self) -> str | None: ...
    @property
    def uncertain(self) -> str: ...
    @property
    def blank(self) -> str: ...
    @property
    def mixture(self) -> Sequence[PartSettings]: ...


@dataclass(frozen=True)
class Piece:
    """One task's worth of input, about `rows_per_shard` rows in the order of the input.

    `num_rows` is an upper bound: a row filter may leave fewer. `spec` is the source's own business.
    `estimate` is how many rows to expect where the bound is far off, as for a tar, which does not say.
    """

    number: int
    num_rows: int
    spec: Any
    estimate: int | None = None

    @property
    def likely_rows(self) -> int:
        """Rows to show to the user and to reckon time and memory with."""
        return self.num_rows if self.estimate is None else self.estimate


class PairSource(Protocol):
    """Rows of `schemas.PAIRS`, in pieces. Sent to workers whole, so it holds no open file.

    What cannot be read is a row too: with `schemas.PROBLEM` beside the others, so that it is counted.
    """

    @property
    def identity(self) -> str:
        """Changes whenever the rows may have changed; part of the address of what is made from them."""
        ...

    @property
    def notes(self) -> list[str]:
        """What the user should know about how the rows are read."""
        ...

    def pieces(self) -> list[Piece]: ...

    def read(self, piece: Piece, *, with_images: bool = True) -> Iterator[pa.Table]:
        """The rows of a piece, some hundred at a time, always cut the same way.

        Without images the column `image` is absent and no pixel is read.
        """
        ...


def map_pieces(pieces: list[Piece], task: Callable[[Piece], pa.Table]) -> Iterator[pa.Table]:
    """Run a task per piece on Ray; yields its tables, of one row each, in the order they get done.

    The pieces may be some of a source's.
    """
    by_number = {piece.number: piece for piece in pieces}

    def run(batch: pa.Table) -> Iterator[pa.Table]:
        for number in batch["piece"].to_pylist():
            yield task(by_number[number])

    dataset = _piece_dataset(pieces).map_batches(
        run, batch_size=1, batch_format="pyarrow", num_cpus=_PIECE_CPUS
    )
    # A dataset has its own copy of the context. Reserving memory for other operators keeps cores idle when
    # there is only one.
    dataset.context.op_resource_reservation_enabled = False
    for batch in dataset.iter_batches(batch_size=None, batch_format="pyarrow"):
        for row in range(len(batch)):
            yield batch.slice(row, 1)


def _piece_dataset(pieces: list[Piece]) -> ray.data.Dataset:
    """A dataset with one block per piece, column `piece` holding its number."""
    return ray.data.from_items([{"piece": piece.number} for piece in pieces], override_num_blocks=len(pieces))


def pair_dataset(source: PairSource) -> ray.data.Dataset:
    """The pairs of a source as a Ray dataset in `schemas.PAIRS`, one read task per piece."""
    pieces = source.pieces()

    def read(batch: pa.Table) -> Iterator[pa.Table]:
        for number in batch["piece"].to_pylist():
            yield from source.read(pieces[number])

    return _piece_dataset(pieces).map_batches(read, batch_size=1, batch_format="pyarrow", num_cpus=READ_CPUS)
