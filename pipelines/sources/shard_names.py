"""Lists of shards as people write them: `{00000..00127}`, `{a,b}`, and `::` between several. No Ray here."""

from __future__ import annotations

import itertools
import re

# A typing error such as {0..99999999} would otherwise fill the memory with names.
MAX_SHARDS = 1_000_000

_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")


def expand(spec: str) -> list[str]:
    """The names a list of shards stands for, in its order.

    Raises:
        ValueError: an unclosed or empty brace, a range that runs backwards, or more than `MAX_SHARDS` names.
    """
    names = [name for part in spec.split("::") for name in _expand_one(part.strip(), spec=spec)]
    if not all(names):
        raise ValueError(f"data.source: '{spec}' has nothing between two ::")
    return names


def _expand_one(part: str, *, spec: str) -> list[str]:
    pieces = _BRACES.split(part)
    if any(mark in literal for literal in pieces[::2] for mark in "{}"):
        raise ValueError(f"data.source: '{spec}' has a brace without its partner, or one inside another")
    choices = [
        [piece] if position % 2 == 0 else _choices(piece, spec=spec) for position, piece in enumerate(pieces)
    ]
    count = 1
    for options in choices:
        count *= len(options)
    if count > MAX_SHARDS:
        raise ValueError(f"data.source: '{spec}' stands for {count} names, more than {MAX_SHARDS}")
    return ["".join(combined) for combined in itertools.product(*choices)]


def _choices(inside: str, *, spec: str) -> list[str]:
    """`a,b` or `000..127`; the range keeps the leading zeros of its start."""
    found = _RANGE.fullmatch(inside.strip())
    if found is None:
        options = [option.strip() for option in inside.split(",")]
        if not all(options) or ".." in inside:
            raise ValueError(
                f"data.source: '{{{inside}}}' in '{spec}' must be a range like {{000..127}} or a list like "
                "{a,b}"
            )
        return options
    first, last = found.groups()
    if int(last) < int(first):
        raise ValueError(f"data.source: '{{{inside}}}' in '{spec}' must run upwards")
    if int(last) - int(first) >= MAX_SHARDS:
        raise ValueError(f"data.source: '{spec}' stands for more than {MAX_SHARDS} names")
    width = len(first) if first.startswith("0") or len(first) == len(last) else 0
    return [str(number).zfill(width) for number in range(int(first), int(last) + 1)]
