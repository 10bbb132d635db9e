"""Encoded image bytes -> a square of RGB pixels, and where boxes end up on it.

Pillow says what a file is and whether it is whole; JPEG files are decoded by simplejpeg where it is installed
(the extra `fast`), which gives the same pixels in two thirds of the time.
"""

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

try:
    import simplejpeg
except ImportError:
    simplejpeg = None

# Above this a small file can ask for gigabytes; Pillow itself starts to warn here.
MAX_PIXELS = 89_478_485

# A film of many times the size that is kept is decoded at a half, a quarter or an eighth, which JPEG offers
# for little more than reading it; the resampling still starts from at least twice the pixels it gives.
_LEAST_REDUCTION = 2
_LARGEST_DRAFT = 8

# EXIF: how the camera was held, and the value for upright.
_ORIENTATION, _UPRIGHT = 0x0112, 1

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
    side: float


def decode_square(data: bytes, *, size: int) -> SquareImage:
    """Decode wholly, turn upright, convert to RGB, cut the centre square, resize (bicubic, antialiased).

    Cutting before resizing never holds a strip of 1 x 10,000 pixels enlarged. Transparent pixels become
    white; 16-bit grey is divided by 257.

    Raises:
        RejectedRowError: reason missing_image, undecodable_image, image_too_large or unsupported_image_mode.
    """
    if not data:
        raise RejectedRowError("missing_image", "no image bytes")
    pixels, (width, height) = _decode(data, size=size)
    side = min(pixels.shape[:2])
    top, left = (pixels.shape[0] - side) // 2, (pixels.shape[1] - side) // 2
    square = resize_square(pixels[top : top + side, left : left + side], size=size)
    # Of a JPEG decoded at a fraction, measures are those of the whole image.
    scale = min(width, height) / side
    return SquareImage(square, width, height, left * scale, top * scale, side * scale)


def resize_square(pixels: np.ndarray, *, size: int) -> np.ndarray:
    """uint8 [N, N, 3] -> [size, size, 3], bicubic with antialiasing.

    Equal to Pillow's bicubic within one grey level (two where noise is enlarged), in a third of its time.
    """
    if pixels.shape[0] == size:
        return np.ascontiguousarray(pixels)
    # Rows that need no resizing are read without it, and importing it takes longer than reading some hundred.
    import torch

    # Colours stay side by side: as planes the result would have to be turned round once more.
    planes = torch.from_numpy(np.require(pixels, requirements="W"))[None].permute(0, 3, 1, 2)
    resized = torch.nn.functional.interpolate(planes, (size, size), mode="bicubic", antialias=True)
    return np.ascontiguousarray(resized[0].permute(1, 2, 0).numpy())


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


def _decode(data: bytes, *, size: int) -> tuple[np.ndarray, tuple[int, int]]:
    """Upright RGB pixels, [H, W, 3], and width and height of the image at its full resolution."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data))
            full = image.size
            if full[0] * full[1] > MAX_PIXELS:
                raise RejectedRowError("image_too_large", f"{full[0]} x {full[1]} pixels, over {MAX_PIXELS}")
            reduction = _reduction(image, size=size)
            if reduction > 1:
                image.draft(image.mode, (full[0] // reduction, full[1] // reduction))
            elif (pixels := _quick_jpeg(data, image)) is not None:
                return pixels, full
            image.load()
            upright = ImageOps.exif_transpose(image)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise RejectedRowError("image_too_large", str(error)) from error
    except UnidentifiedImageError as error:
        # Pillow's own message holds a memory address, which would differ from run to run.
        raise RejectedRowError("undecodable_image", "not in an image format Pillow knows") from error
    except _DAMAGE as error:
        raise RejectedRowError("undecodable_image", f"{type(error).__name__}: {error}") from error
    try:
        rgb = _to_rgb(upright)
    except ValueError as error:
        raise RejectedRowError("unsupported_image_mode", f"{upright.mode}: {error}") from error
    is_turned = upright.size != image.size
    return np.asarray(rgb), full[::-1] if is_turned else full


def _reduction(image: Image.Image, *, size: int) -> int:
    """By how much a JPEG file may be reduced while it is decoded; 1 for other formats."""
    if image.format != "JPEG":
        return 1
    most = min(image.size) // (_LEAST_REDUCTION * size)
    return min(_LARGEST_DRAFT, 1 << (most.bit_length() - 1)) if most else 1


def _quick_jpeg(data: bytes, image: Image.Image) -> np.ndarray | None:
    """RGB pixels of a plain upright JPEG file; None leaves it to Pillow, whose verdict on damage counts."""
    if simplejpeg is None or image.format != "JPEG" or image.mode not in ("RGB", "L"):
        return None
    if image.getexif().get(_ORIENTATION, _UPRIGHT) != _UPRIGHT:
        return None
    try:
        pixels: np.ndarray = simplejpeg.decode_jpeg(data, colorspace="RGB", strict=True)
    except ValueError:
        return None
    return pixels


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
