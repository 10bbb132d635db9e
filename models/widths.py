"""Sizes that heads and tables must know of the encoder and of the data."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Widths:
    """What an objective is built for.

    Attributes:
        joint: width of the joint space.
        vision, text: widths of the towers.
        grid: patches per side.
        vocab_size: of the tokenizer.
        max_tokens: positions of the text tower.
        num_rows: of the training split.
    """

    joint: int
    vision: int
    text: int
    grid: int
    vocab_size: int
    max_tokens: int
    num_rows: int
