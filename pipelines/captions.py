"""The words of the embedded scenes: what a person would say about a sheet with some digits on it.

Only digits are spoken of; the scribbles beside them are not, which is what makes a token scorer's work
measurable.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

DIGIT_NAMES: Final = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

NO_DIGIT_CAPTIONS: Final = ("no digit", "only scribbles", "a picture without a digit")
NO_DIGIT_SENTENCES: Final = ("there is no digit",)

# Said of a digit in this share of the phrases that can hold a place.
PLACE_SHARE: Final = 0.6


@dataclass(frozen=True)
class ScenePrompts:
    """What zero-shot evaluation asks about the scenes.

    `class_texts` maps a label to the words that fill `templates`: the article goes with the word ("an
    eight"). `negative_texts` are whole texts of a scene in which the label is absent.
    """

    class_texts: dict[str, str]
    templates: tuple[str, ...]
    negative_texts: tuple[str, ...]


def with_article(name: str) -> str:
    """'an eight', 'a seven'."""
    return f"an {name}" if name == "eight" else f"a {name}"


def default_prompts() -> ScenePrompts:
    return ScenePrompts(
        class_texts={name: with_article(name) for name in DIGIT_NAMES},
        templates=("{}", "a picture of {}", "there is {}"),
        negative_texts=("no digit", "only scribbles"),
    )


def place_phrase(row: int, column: int, *, grid: int) -> str:
    """Where a cell lies, e.g. 'at the top left'; the inner cells of a 4 x 4 grid are 'in the middle'."""
    last = grid - 1
    vertical = {0: "top", last: "bottom"}.get(row, "")
    horizontal = {0: "left", last: "right"}.get(column, "")
    if vertical:
        return f"at the {vertical} {horizontal}".rstrip()
    return f"on the {horizontal}" if horizontal else "in the middle"


def object_sentences(objects: Sequence[tuple[str, str]]) -> list[str]:
    """One sentence per (digit name, place phrase), in the given order."""
    if not objects:
        return list(NO_DIGIT_SENTENCES)
    return [f"there is {with_article(name)} {place}" for name, place in objects]


def scene_captions(objects: Sequence[tuple[str, str]], *, rng: np.random.Generator) -> list[str]:
    """Three wordings of a scene, each with its own order of the digits.

    Args:
        objects: (digit name, place phrase) of every digit; empty when there is none.
        rng: decides order and which places are said.
    """
    if not objects:
        return list(NO_DIGIT_CAPTIONS)
    wordings: tuple[Callable[[list[tuple[str, str]]], str], ...] = (
        lambda ordered: _listing(_phrases(ordered, rng=rng)),
        lambda ordered: f"a picture of {_listing(_phrases(ordered, rng=rng))}",
        lambda ordered: f"the digit{'s' * (len(ordered) > 1)} {_listing([name for name, _ in ordered])}",
    )
    return [wording([objects[i] for i in rng.permutation(len(objects))]) for wording in wordings]


def _phrases(objects: list[tuple[str, str]], *, rng: np.random.Generator) -> list[str]:
    says_place = rng.random(len(objects)) < PLACE_SHARE
    return [
        f"{with_article(name)} {place}" if said else with_article(name)
        for (name, place), said in zip(objects, says_place, strict=True)
    ]


def _listing(parts: list[str]) -> str:
    """'x', 'x and y', 'x, y and z'."""
    return " and ".join(filter(None, [", ".join(parts[:-1]), parts[-1]]))
