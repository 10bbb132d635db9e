"""Encoded image bytes -> a square of RGB pixels, and where boxes end up on it."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

# Above this a small file can ask for gigabytes; Pillow itself starts to warn here.
MAX_PIXELS = 89_478_485

# What Pillow's readers raise on damaged files.
_DAMAGE = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    struct.error,
    zlib.error,
)


class RejectedRowError(Exception):
    """A row that cannot be used; `reason` is a short identifier for the quarantine."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class SquareImage:
    """Pixels uint8 [S, S, 3] and the square they were cut from, in pixels of the upright original."""

    pixels: np.ndarray
    width: int
    height: int
    left: float
    top: float
    side: int


def decode_square(data: bytes, *, size: int) -> SquareImage:
    """Decode wholly, turn upright, convert to RGB, cut the centre square, resize (bicubic, antialiased).

    Cutting before resizing gives the same pixels as resizing the short side first, without ever holding
    a strip of 1 x 10,000 pixels enlarged. Transparent pixels become white; 16-bit grey is divided by 257.

    Raises:
        RejectedRowError: reason missing_image, undecodable_image, image_too_large or unsupported_image_mode.
    """
    if not data:
        raise RejectedRowError("missing_image", "no image bytes")
    image = _open_upright(data)
    try:
        image = _to_rgb(image)
    except ValueError as error:
        raise RejectedRowError("unsupported_image_mode", f"{image.mode}: {error}") from error
    side = min(image.size)
    left, top = (image.width - side) / 2, (image.height - side) / 2
    if image.size != (size, size):
        square = image.resize(
            (size, size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side)
        )
    else:
        square = image
    return SquareImage(np.asarray(square), image.width, image.height, left, top, side)


def crop_boxes(boxes: Sequence[dict[str, Any]], *, image: SquareImage) -> list[dict[str, Any]]:
    """Boxes relative to the original, as boxes relative to the square; those outside it are dropped.

    Raises:
        RejectedRowError: reason invalid_box: not finite, or without area.
    """
    moved = []
    for box in boxes:
        numbers = [box["x"], box["y"], box["w"], box["h"]]
        if any(n is None or not np.isfinite(n) for n in numbers) or box["w"] <= 0 or box["h"] <= 0:
            raise RejectedRowError("invalid_box", f"x, y, w, h must be finite and w, h > 0, got {numbers}")
        left = (box["x"] * image.width - image.left) / image.side
        top = (box["y"] * image.height - image.top) / image.side
        right = min(1.0, left + box["w"] * image.width / image.side)
        bottom = min(1.0, top + box["h"] * image.height / image.side)
        left, top = max(0.0, left), max(0.0, top)
        if right > left and bottom > top:
            moved.append({"label": box["label"], "x": left, "y": top, "w": right - left, "h": bottom - top})
    return moved


def _open_upright(data: bytes) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data))
            if image.width * image.height > MAX_PIXELS:
                raise RejectedRowError(
                    "image_too_large", f"{image.width} x {image.height} pixels, over {MAX_PIXELS}"
                )
            image.load()
            return ImageOps.exif_transpose(image)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise RejectedRowError("image_too_large", str(error)) from error
    except UnidentifiedImageError as error:
        # Pillow's own message holds a memory address, which would differ from run to run.
        raise RejectedRowError("undecodable_image", "not in an image format Pillow knows") from error
    except _DAMAGE as error:
        raise RejectedRowError("undecodable_image", f"{type(error).__name__}: {error}") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I"):
        return _from_16_bit(image)
    if image.mode == "F":
        raise RejectedRowError("unsupported_image_mode", "32-bit float pixels have no agreed range")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def _from_16_bit(image: Image.Image) -> Image.Image:
    """I;16 and I: integers of 0..65535 over the whole range, as PNG and DICOM exports write them."""
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise RejectedRowError(
            "unsupported_image_mode", f"grey values must be 0..65535, found {values.min()}..{values.max()}"
        )
    return Image.fromarray(np.rint(values / 257).astype(np.uint8)).convert("RGB")
