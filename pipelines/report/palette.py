"""One look per method: colour, dash and symbol, so that colour never carries the meaning alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

# Contrast of at least 3 : 1 on both page backgrounds; hues after Okabe and Ito, told apart with the
# common colour-vision deficiencies.
COLOURS = ("#1F7FC4", "#D55E00", "#00936B", "#C4679A", "#B0841A", "#7B6FD0", "#6F7782", "#A8592F")
BACKGROUNDS = ("#ffffff", "#15181d")  # light and dark page; report.css holds the same two
_DASHES = ("solid", "dash", "dashdot", "dot")
_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "triangle-down", "cross", "pentagon", "hexagon")


@dataclass(frozen=True, kw_only=True)
class Look:
    colour: str
    dash: str
    symbol: str


def looks(methods: Sequence[str]) -> dict[str, Look]:
    """A look per method in the given order; past eight methods colours repeat with another dash."""
    return {
        method: Look(
            colour=COLOURS[index % len(COLOURS)],
            dash=_DASHES[index // len(COLOURS) % len(_DASHES)],
            symbol=_SYMBOLS[index % len(_SYMBOLS)],
        )
        for index, method in enumerate(methods)
    }
