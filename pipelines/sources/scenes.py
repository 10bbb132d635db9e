"""The embedded scenes as a source: `scenes:quick` and `scenes:tokens`."""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow as pa

from pipelines.scenes import DESIGNS, SCENES_VERSION, digits_sha, make_scene_texts, make_scenes
from pipelines.sources.source import Piece, SourceSettings

_ROWS_PER_TABLE = 256


class SceneSource:
    """Scenes are drawn where they are needed; nothing is stored.

    Raises:
        ValueError: the design is unknown.
    """

    def __init__(self, settings: SourceSettings, *, design: str) -> None:
        if design not in DESIGNS:
            raise ValueError(
                f"data.source must be scenes:<design> with one of {sorted(DESIGNS)}, got '{design}'"
            )
        self._design = DESIGNS[design]
        self._seed = settings.seed
        self._rows_per_piece = settings.rows_per_shard
        self._counts = {
            "train": settings.num_train,
            "selection": settings.num_selection,
            "test": settings.num_test,
        }

    @property
    def notes(self) -> list[str]:
        return []

    @property
    def identity(self) -> str:
        counts = " ".join(f"{split}={count}" for split, count in self._counts.items())
        name, digits = self._design.name, digits_sha()[:16]
        return f"scenes:{name} version={SCENES_VERSION} seed={self._seed} {counts} digits={digits}"

    def pieces(self) -> list[Piece]:
        ranges = [
            (split, start, min(start + self._rows_per_piece, count))
            for split, count in self._counts.items()
            for start in range(0, count, self._rows_per_piece)
        ]
        return [
            Piece(number, stop - start, (split, start, stop))
            for number, (split, start, stop) in enumerate(ranges)
        ]

    def read(self, piece: Piece, *, with_images: bool = True) -> Iterator[pa.Table]:
        split, first, last = piece.spec
        make = make_scenes if with_images else make_scene_texts
        for start in range(first, last, _ROWS_PER_TABLE):
            indices = range(start, min(start + _ROWS_PER_TABLE, last))
            yield make(self._design, split=split, indices=indices, seed=self._seed)
