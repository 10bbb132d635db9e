"""A small prepared table and encoders that know, or do not know, what is in its images."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from pipelines.evaluation.encoder import ImageEncodings
from pipelines.schemas import PREPARED

CONCEPTS = ["cat", "dog", "sun", "tree", "boat", "key", "drum"]
GRID = 4
SIZE = 8
WIDTH = 9
BACKGROUND = 7
NOTHING = 8


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The attributes of the evaluation settings, with few resamples."""

    templates: list[str] = field(default_factory=lambda: ["{}", "a photo of a {}"])
    positive_templates: list[str] = field(default_factory=lambda: ["{}"])
    negative_templates: list[str] = field(default_factory=lambda: ["no {}"])
    negative_texts: list[str] = field(default_factory=list)
    multi_label_score: str = "difference"
    labels: list[str] | None = None
    ignore_labels: list[str] = field(default_factory=list)
    recall_at: list[int] = field(default_factory=lambda: [1, 5, 10])
    resamples: int = 100
    confidence: float = 0.95


def make_row(number: int, source: str, generator: np.random.Generator) -> dict:
    """One to three concepts in cells of a 4 x 4 grid; a cell's red value names its concept."""
    present = generator.choice(len(CONCEPTS), size=1 + number % 3, replace=False)
    cells = generator.choice(GRID * GRID, size=len(present), replace=False)
    board = np.zeros((GRID, GRID), dtype=np.uint8)
    board.flat[cells] = present + 1
    image = np.zeros((SIZE, SIZE, 3), dtype=np.uint8)
    image[..., 0] = board.repeat(SIZE // GRID, 0).repeat(SIZE // GRID, 1)
    # Lets an encoder treat the sources differently.
    image[..., 1] = ord(source[0])
    labels = [CONCEPTS[c] for c in present]
    return {
        "row_id": f"{source}-{number}",
        "image": image.tobytes(),
        "caption_tokens": [[1, 2]],
        "sentence_tokens": [],
        "captions": [" and ".join(sorted(labels)), "another text"],
        "sentences": [],
        "labels": labels,
        "class_name": labels[0] if len(labels) == 1 else None,
        "group_id": None,
        "source": source,
        "split": "test",
        "boxes": [
            {"label": label, "x": (cell % GRID) / GRID, "y": (cell // GRID) / GRID, "w": 0.25, "h": 0.25}
            for label, cell in zip(labels, cells, strict=True)
        ],
    }


def make_rows(num_rows: int = 120, source: str = "alpha", seed: int = 0) -> list[dict]:
    generator = np.random.default_rng(seed)
    return [make_row(i, source, generator) for i in range(num_rows)]


def make_table(rows: list[dict]) -> pa.Table:
    return pa.Table.from_pylist(rows, schema=PREPARED)


def unit(vectors: np.ndarray) -> np.ndarray:
    return (vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).astype(np.float32)


class OracleEncoder:
    """Reads concepts out of pixels and words; each concept is one axis of the embedding."""

    def __init__(self) -> None:
        self.image_batches: list[int] = []
        self.texts: list[str] = []

    def concepts(self, images: np.ndarray) -> np.ndarray:
        """Concept + 1 of every cell, 0 for background, [B, P]."""
        step = SIZE // GRID
        return images[:, ::step, ::step, 0].reshape(len(images), -1).astype(int)

    def encode_images(self, images: np.ndarray) -> ImageEncodings:
        assert images.flags.writeable
        self.image_batches.append(len(images))
        cells = self.concepts(images)
        patches = np.eye(WIDTH)[np.where(cells > 0, cells - 1, BACKGROUND)]
        whole = np.where((cells > 0)[..., None], patches, 0.0).sum(1)
        return ImageEncodings(image_embeds=unit(whole), patch_embeds=unit(patches))

    def encode_texts(self, texts: list[str]) -> np.ndarray:
        self.texts.extend(texts)
        return unit(np.stack([self._text(text) for text in texts]))

    def _text(self, text: str) -> np.ndarray:
        vector = np.zeros(WIDTH)
        for i, concept in enumerate(CONCEPTS):
            if concept in text.split():
                vector[i] = -1.0 if text.startswith("no ") else 1.0
        vector[NOTHING] = 0.0 if vector.any() else 1.0
        return vector


class BlindEncoder(OracleEncoder):
    """Gives every image the embedding of another one, drawn at random."""

    def encode_images(self, images: np.ndarray) -> ImageEncodings:
        order = np.random.default_rng(0).permutation(len(images))
        found = super().encode_images(images[order])
        assert found.patch_embeds is not None
        cells = np.random.default_rng(1).permuted(found.patch_embeds, axis=1)
        return ImageEncodings(image_embeds=found.image_embeds, patch_embeds=cells)


class PartialEncoder(OracleEncoder):
    """Mistakes every concept of the sources that start with 'b' for the next one."""

    def concepts(self, images: np.ndarray) -> np.ndarray:
        cells = super().concepts(images)
        wrong = np.where(cells > 0, cells % len(CONCEPTS) + 1, 0)
        return np.where(images[:, :1, 0, 1] == ord("b"), wrong, cells)


class DroppedPatchEncoder(OracleEncoder):
    """Encodes a kept part of the patches, so it has no complete grid to offer."""

    def encode_images(self, images: np.ndarray) -> ImageEncodings:
        found = super().encode_images(images)
        return ImageEncodings(image_embeds=found.image_embeds, patch_embeds=None)
