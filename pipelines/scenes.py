"""Embedded default data: scenes of real handwritten digits with captions, made from scikit-learn's digits.

A scene is a grid of cells. One to three cells hold a digit, some hold scribbles (a digit whose 2 x 2 blocks
were moved about: the same ink and contrast, no identity), the rest is noise. Every scene is a function of
(seed, design, split, index) alone, so any subset in any order and batch gives the same rows.

Digits: Alpaydin and Kaynak, Optical Recognition of Handwritten Digits, UCI (CC BY 4.0), the part that
scikit-learn ships. Writer ids are not shipped; the label sequence shows contiguous forms, and the splits
are whole forms, the best available stand-in for disjoint writers.
"""

from __future__ import annotations

import bisect
import functools
import hashlib
import importlib.util
import io
import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
from PIL import Image

from pipelines.captions import DIGIT_NAMES, object_sentences, place_phrase, scene_captions
from pipelines.schemas import PAIRS

# Raised when the same (seed, index) starts to give another scene: it is part of the data's identity.
SCENES_VERSION: Final = 1

# Rows of the digits per split: forms 1-10, 11 and 12-14 of the label sequence.
SPLIT_ROWS: Final = {"train": range(0, 1287), "selection": range(1287, 1415), "test": range(1415, 1797)}

# Chance of 0, 1, 2 and 3 digits. No digit is the "no finding" of the scenes; single digits make up the
# rows of single-label zero-shot classification.
DIGIT_COUNT_CHANCES: Final = (0.06, 0.44, 0.25, 0.25)

_AT_MOST: Final = tuple(itertools.accumulate(DIGIT_COUNT_CHANCES))[:-1]

_LAYOUT, _NOISE = 0, 1


@dataclass(frozen=True)
class SceneDesign:
    """Geometry of a scene, in pixels and cells.

    `digit_px` smaller than `cell_px` leaves room for jitter, so that a digit straddles patches.
    """

    name: str
    number: int
    grid: int
    cell_px: int
    digit_px: int
    num_scribbles: tuple[int, int]  # fewest and most
    noise: float = 0.12  # standard deviation, of a brightness of 0..1

    @property
    def size(self) -> int:
        return self.grid * self.cell_px


DESIGNS: Final = {
    # One native digit is one 8 x 8 patch: learnt within half a minute of CPU.
    "quick": SceneDesign("quick", 0, grid=4, cell_px=8, digit_px=8, num_scribbles=(3, 5)),
    # A digit spans four patches: for localisation, sparsity and masking.
    "tokens": SceneDesign("tokens", 1, grid=3, cell_px=16, digit_px=14, num_scribbles=(2, 4)),
}


@dataclass(frozen=True)
class Mark:
    """Something drawn: row `digit` of the digits, its top left corner in pixels, its cell."""

    digit: int
    x: int
    y: int
    cell: int


@dataclass(frozen=True)
class Scene:
    """What is where; `scribbles` pairs a mark with the order of its 16 blocks."""

    split: str
    index: int
    digits: tuple[Mark, ...]
    scribbles: tuple[tuple[Mark, tuple[int, ...]], ...]
    captions: tuple[str, ...]
    sentences: tuple[str, ...]


def make_scenes(design: SceneDesign, *, split: str, indices: Iterable[int], seed: int) -> pa.Table:
    """Rows of `schemas.PAIRS` for some indices of a split; images are grey PNG."""
    scenes = [lay_out(design, split=split, index=index, seed=seed) for index in indices]
    rows = [_row(scene, design=design, seed=seed) for scene in scenes]
    return pa.Table.from_pylist(rows, schema=PAIRS)


def make_scene_texts(design: SceneDesign, *, split: str, indices: Iterable[int], seed: int) -> pa.Table:
    """`make_scenes` without drawing: every column but `image`."""
    scenes = [lay_out(design, split=split, index=index, seed=seed) for index in indices]
    schema = PAIRS.remove(PAIRS.get_field_index("image"))
    return pa.Table.from_pylist([_annotations(scene, design=design) for scene in scenes], schema=schema)


def lay_out(design: SceneDesign, *, split: str, index: int, seed: int) -> Scene:
    """Decide what a scene shows and what is said about it, without drawing it."""
    rng = _generator(design, split=split, index=index, seed=seed, stream=_LAYOUT)
    num_digits = bisect.bisect(_AT_MOST, rng.random())
    num_scribbles = int(rng.integers(design.num_scribbles[0], design.num_scribbles[1] + 1))
    cells = rng.permutation(design.grid**2)[: num_digits + num_scribbles]
    offsets = rng.integers(0, design.cell_px - design.digit_px + 1, size=(len(cells), 2))
    # Distinct digits: "a seven and a seven" says nothing, and labels are a set.
    rows_of = _rows_by_digit()[split]
    names = rng.permutation(len(DIGIT_NAMES))[:num_digits].tolist()
    drawn = [rows_of[name][rng.integers(len(rows_of[name]))] for name in names]
    drawn += (SPLIT_ROWS[split].start + rng.integers(len(SPLIT_ROWS[split]), size=num_scribbles)).tolist()
    marks = [
        Mark(row, *_corner(int(cell), offset, design=design), cell=int(cell))
        for row, cell, offset in zip(drawn, cells, offsets.tolist(), strict=True)
    ]
    digits = tuple(marks[:num_digits])
    objects = [(digit_name(mark), _place(mark, design=design)) for mark in digits]
    return Scene(
        split=split,
        index=index,
        digits=digits,
        scribbles=tuple((mark, _scramble(rng)) for mark in marks[num_digits:]),
        captions=tuple(scene_captions(objects, rng=rng)),
        sentences=tuple(object_sentences(objects)),
    )


def draw(scene: Scene, *, design: SceneDesign, seed: int) -> np.ndarray:
    """The pixels of a scene, uint8 [size, size]: black sheet, white ink, noise over both."""
    canvas = np.zeros((design.size, design.size), dtype=np.float32)
    pixels = _digits()[0]
    for mark in scene.digits:
        _put(canvas, pixels[mark.digit], mark=mark, design=design)
    for mark, order in scene.scribbles:
        _put(canvas, _move_blocks(pixels[mark.digit], order), mark=mark, design=design)
    rng = _generator(design, split=scene.split, index=scene.index, seed=seed, stream=_NOISE)
    canvas += rng.standard_normal(canvas.shape, dtype=np.float32) * design.noise
    return np.rint(canvas.clip(0, 1) * 255).astype(np.uint8)


def digits_sha() -> str:
    """Identity of the digits the scenes are made of."""
    pixels, names = _digits()
    return hashlib.sha256(pixels.tobytes() + names.tobytes()).hexdigest()


def digit_name(mark: Mark) -> str:
    return DIGIT_NAMES[_digits()[1][mark.digit]]


def _row(scene: Scene, *, design: SceneDesign, seed: int) -> dict[str, Any]:
    file = io.BytesIO()
    Image.fromarray(draw(scene, design=design, seed=seed)).save(file, format="PNG", compress_level=1)
    return {"image": file.getvalue(), **_annotations(scene, design=design)}


def _annotations(scene: Scene, *, design: SceneDesign) -> dict[str, Any]:
    names = [digit_name(mark) for mark in scene.digits]
    side = design.digit_px / design.size
    return {
        "row_id": f"{design.name}-{scene.split}-{scene.index:06d}",
        "captions": list(scene.captions),
        "sentences": list(scene.sentences),
        "labels": sorted(names),
        "class_name": names[0] if len(names) == 1 else None,
        "group_id": None,  # the digits of one scene come from several writers
        "source": f"scenes-{design.name}",
        "split": scene.split,
        "boxes": [
            {"label": name, "x": mark.x / design.size, "y": mark.y / design.size, "w": side, "h": side}
            for name, mark in zip(names, scene.digits, strict=True)
        ],
    }


def _generator(design: SceneDesign, *, split: str, index: int, seed: int, stream: int) -> np.random.Generator:
    return np.random.default_rng([seed, design.number, list(SPLIT_ROWS).index(split), index, stream])


def _corner(cell: int, offset: list[int], *, design: SceneDesign) -> tuple[int, int]:
    row, column = divmod(cell, design.grid)
    return column * design.cell_px + offset[0], row * design.cell_px + offset[1]


def _place(mark: Mark, *, design: SceneDesign) -> str:
    row, column = divmod(mark.cell, design.grid)
    return place_phrase(row, column, grid=design.grid)


def _scramble(rng: np.random.Generator) -> tuple[int, ...]:
    """An order of the 16 blocks in which every block moves: one cycle through all of them."""
    cycle = rng.permutation(16).tolist()
    source_of = {cycle[i]: cycle[i - 1] for i in range(16)}
    return tuple(source_of[block] for block in range(16))


def _move_blocks(digit: np.ndarray, order: tuple[int, ...]) -> np.ndarray:
    blocks = digit.reshape(4, 2, 4, 2).swapaxes(1, 2).reshape(16, 2, 2)[list(order)]
    return blocks.reshape(4, 4, 2, 2).swapaxes(1, 2).reshape(8, 8)


def _put(canvas: np.ndarray, digit: np.ndarray, *, mark: Mark, design: SceneDesign) -> None:
    enlarge = _enlarging(design.digit_px)
    canvas[mark.y : mark.y + design.digit_px, mark.x : mark.x + design.digit_px] = enlarge @ digit @ enlarge.T


@functools.cache
def _enlarging(size: int) -> np.ndarray:
    """Bilinear interpolation from 8 to `size` pixels as a matrix, [size, 8]; the identity for 8."""
    centres = ((np.arange(size) + 0.5) * 8 / size - 0.5).clip(0, 7)
    return np.maximum(0, 1 - np.abs(centres[:, None] - np.arange(8))).astype(np.float32)


@functools.cache
def _digits() -> tuple[np.ndarray, np.ndarray]:
    """Brightness float32 [1797, 8, 8] in 0..1, and which digit each row is.

    Read from the file that `sklearn.datasets.load_digits` reads: calling it would import scikit-learn,
    1.6 s of CPU time in every worker.
    """
    spec = importlib.util.find_spec("sklearn")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    file = Path(spec.submodule_search_locations[0]) / "datasets" / "data" / "digits.csv.gz"
    table = np.loadtxt(file, delimiter=",", dtype=np.uint8)
    return (table[:, :64].reshape(-1, 8, 8) / 16).astype(np.float32), table[:, 64]


@functools.cache
def _rows_by_digit() -> dict[str, list[list[int]]]:
    target = _digits()[1]
    return {
        split: [[row for row in rows if target[row] == name] for name in range(len(DIGIT_NAMES))]
        for split, rows in SPLIT_ROWS.items()
    }
