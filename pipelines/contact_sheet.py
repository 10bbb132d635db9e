"""Some rows as one picture: image, boxes, kept patches, caption."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

_CELL, _TEXT_LINES, _LINE_HEIGHT, _MARGIN = 192, 4, 14, 8
_CHARS_PER_LINE = 32
_BOX_COLOUR, _TEXT_COLOUR, _PAPER = (220, 38, 38), (17, 24, 39), (255, 255, 255)
# A removed patch is mostly veiled, so that it can be told from a dark one.
_VEIL, _VEIL_SHARE = (120, 130, 150), 0.7


@dataclass(frozen=True)
class SheetRow:
    """One picture of a sheet.

    Attributes:
        pixels: uint8 [S, S, 3].
        caption: written below.
        title: above the caption; cut to a line.
        boxes: dictionaries with label, x, y, w, h relative to the square image.
        is_kept: False at patches a token selection removes, bool [grid, grid]; None draws all.
    """

    pixels: NDArray[np.uint8]
    caption: str
    title: str
    boxes: Sequence[dict[str, Any]] = ()
    is_kept: NDArray[np.bool_] | None = None


def contact_sheet(rows: Sequence[SheetRow], *, num_columns: int = 6) -> bytes:
    """A PNG of the rows, left to right and down.

    Raises:
        ValueError: no rows.
    """
    if not rows:
        raise ValueError("a contact sheet needs at least one row, got none")
    columns = min(num_columns, len(rows))
    height = _CELL + (_TEXT_LINES + 1) * _LINE_HEIGHT + _MARGIN
    num_lines = -(-len(rows) // columns)
    size = (columns * (_CELL + _MARGIN) + _MARGIN, num_lines * (height + _MARGIN) + _MARGIN)
    sheet = Image.new("RGB", size, _PAPER)
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(11)
    for number, row in enumerate(rows):
        left = _MARGIN + number % columns * (_CELL + _MARGIN)
        top = _MARGIN + number // columns * (height + _MARGIN)
        sheet.paste(_picture(row), (left, top))
        text = top + _CELL + 3
        title = textwrap.shorten(row.title, _CHARS_PER_LINE, placeholder=" …")
        draw.text((left, text), title, fill=_BOX_COLOUR, font=font)
        for line, words in enumerate(textwrap.wrap(row.caption, _CHARS_PER_LINE)[:_TEXT_LINES]):
            draw.text((left, text + (line + 1) * _LINE_HEIGHT), words, fill=_TEXT_COLOUR, font=font)
    buffer = io.BytesIO()
    sheet.save(buffer, format="PNG")
    return buffer.getvalue()


def _picture(row: SheetRow) -> Image.Image:
    pixels = row.pixels
    if row.is_kept is not None:
        side = pixels.shape[0]
        patch = np.arange(side) * len(row.is_kept) // side
        kept = row.is_kept[patch][:, patch]
        veiled = pixels * (1 - _VEIL_SHARE) + np.array(_VEIL) * _VEIL_SHARE
        pixels = np.where(kept[:, :, None], pixels, veiled.astype(np.uint8))
    # Single pixels of small images are to be seen as such.
    way = Image.Resampling.NEAREST if pixels.shape[0] < _CELL else Image.Resampling.LANCZOS
    picture = Image.fromarray(pixels).resize((_CELL, _CELL), way)
    draw = ImageDraw.Draw(picture)
    for box in row.boxes:
        x, y = box["x"] * _CELL, box["y"] * _CELL
        draw.rectangle((x, y, x + box["w"] * _CELL, y + box["h"] * _CELL), outline=_BOX_COLOUR, width=2)
        label, font = str(box["label"]), ImageFont.load_default(10)
        # On a plate of its own: a label must be read on any picture.
        draw.rectangle(draw.textbbox((x + 3, y + 1), label, font=font), fill=_PAPER)
        draw.text((x + 3, y + 1), label, fill=_BOX_COLOUR, font=font)
    return picture
