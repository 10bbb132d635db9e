"""What evaluation needs from a model, and how it feeds the model: every image and every text once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipelines.evaluation.grounding import best_patches, grid_of

_BATCH = 256
# float32 towers normalise to a few 1e-7; anything beyond this is not a normalised vector.
_UNIT_TOLERANCE = 1e-3


@dataclass(frozen=True, kw_only=True)
class ImageEncodings:
    """Unit embeddings of B images.

    `patch_embeds` holds all grid * grid patches, row-major; None when patches were dropped, because
    then a patch's number no longer says where it is.
    """

    image_embeds: NDArray[np.float32]  # [B, D]
    patch_embeds: NDArray[np.float32] | None  # [B, P, D]


class PairEncoder(Protocol):
    """A trained model as evaluation sees it; both methods return unit rows."""

    def encode_images(self, images: NDArray[np.uint8]) -> ImageEncodings:
        """Images [B, S, S, 3], RGB 0..255."""
        ...

    def encode_texts(self, texts: list[str]) -> NDArray[np.float32]:
        """Texts to [B, D]."""
        ...


@dataclass(frozen=True, kw_only=True)
class EncodedImages:
    """All images of a table; patches are reduced to the best one per label as they come."""

    image_embeds: NDArray[np.float32]  # [N, D]
    best_patch: NDArray[np.int64] | None  # [N, L]
    grid: int | None


class TextBank:
    """Embeddings of texts, each distinct text encoded once."""

    def __init__(self, encoder: PairEncoder, texts: Sequence[str]) -> None:
        # Similar lengths together: a batch is padded to its longest text.
        ordered = sorted(dict.fromkeys(texts), key=len)
        parts = [encoder.encode_texts(ordered[i : i + _BATCH]) for i in range(0, len(ordered), _BATCH)]
        self._row = {text: i for i, text in enumerate(ordered)}
        self._embeds = np.concatenate(parts) if parts else np.zeros((0, 0), dtype=np.float32)
        _check_unit(self._embeds, len(ordered), "texts")

    def __call__(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Embeddings of `texts`, [len(texts), D], in their order."""
        return self._embeds[[self._row[text] for text in texts]]


def encode_images(
    encoder: PairEncoder,
    images: pa.ChunkedArray,
    *,
    image_size: int,
    point_at: NDArray[np.float32] | None = None,
) -> EncodedImages:
    """Encode the raw uint8 `image` column in batches of 256.

    Args:
        image_size: S; a row holds S * S * 3 bytes.
        point_at: unit label embeddings [L, D]; asks for the best patch per image and label, which stays
            None when the encoder gives no patches.

    Raises:
        ValueError: rows of another size, embeddings that are not unit length or not finite, or patches
            that do not form a square grid.
    """
    embeds, best, grid = [], [], None
    for start in range(0, len(images), _BATCH):
        batch = images.slice(start, _BATCH).to_pylist()
        found = encoder.encode_images(_pixels(batch, image_size, start))
        _check_unit(found.image_embeds, len(batch), "images")
        embeds.append(found.image_embeds)
        if point_at is not None and found.patch_embeds is not None:
            grid = grid_of(found.patch_embeds.shape[1])
            best.append(best_patches(found.patch_embeds, point_at))
    return EncodedImages(
        image_embeds=np.concatenate(embeds),
        best_patch=np.concatenate(best) if best else None,
        grid=grid,
    )


def _pixels(batch: list[bytes], image_size: int, start: int) -> NDArray[np.uint8]:
    expected = image_size * image_size * 3
    for row, image in enumerate(batch):
        if len(image) != expected:
            raise ValueError(
                f"row {start + row}: image holds {len(image)} bytes, "
                f"{image_size} x {image_size} x 3 needs {expected}"
            )
    # bytearray, because torch warns about arrays it may not write to.
    joined = np.frombuffer(bytearray().join(batch), dtype=np.uint8)
    return joined.reshape(-1, image_size, image_size, 3)


def _check_unit(embeds: NDArray[np.float32], num_rows: int, kind: str) -> None:
    if len(embeds) != num_rows:
        raise ValueError(f"the encoder returned {len(embeds)} embeddings for {num_rows} {kind}")
    lengths = np.linalg.norm(embeds, axis=-1)
    is_bad = ~(np.abs(lengths - 1) <= _UNIT_TOLERANCE)
    if is_bad.any():
        raise ValueError(
            f"{int(is_bad.sum())} of {num_rows} embeddings of {kind} are not unit length "
            f"(the first has length {lengths[is_bad][0]:.4g})"
        )
