"""Sentences of medical prose, by rules: abbreviations, measurements, numbered lists, blanks for names.

A sentence ends at a full stop unless what follows starts in lower case or the word before it is one that is
never last ("Dr.", "e.g."). Paragraphs and list items are sentences of their own.
"""

from __future__ import annotations

import re

# Words with a full stop that belong to what follows.
_BINDING = re.compile(r"drs?|mrs?|ms|prof|st|pt|rt|lt|r|l|vs|e\.?g|i\.?e|cf|ca|approx|resp|figs?|ser|incl")
# Those that do so before a number only: elsewhere "no." says no, and "sat." ends a sentence.
_BEFORE_NUMBER = re.compile(
    r"\d+|nos?|se|img?|vol|jan|feb|mar|apr|jun|jul|aug|sept?|oct|nov|dec|mon|tues?|wed|thu|thurs|fri"
)
_TITLE = re.compile(r"(?:drs?|mrs?|ms|prof)\.?|[a-z]\.", re.IGNORECASE)
_ITEM = re.compile(r"\(?(\d{1,2})[.)]")
_BULLET = re.compile(r"[-–•*·]+|\(?[a-z]\)")
_HOUR = re.compile(r"(?:\d|^)[ap]\.?m")
_OPENING, _CLOSING = "([{\"'“‘", ")]}\"'”’"
_PARAGRAPH, _LINE, _SPACE = 2, 1, 0


def split_sentences(text: str) -> list[str]:
    """Every word of a text in order, divided into sentences; white space becomes single spaces.

    A sentence splits into itself, and sentences joined by blank lines into the same again.
    """
    words = [match.group() for match in re.finditer(r"\S+", text)]
    gaps = [min(gap.count("\n"), _PARAGRAPH) for gap in re.split(r"\S+", text)]
    sentences: list[list[str]] = []
    item = 0
    for place, word in enumerate(words):
        # The last word of a paragraph has none after it.
        following = words[place + 1] if gaps[place + 1] < _PARAGRAPH and place + 1 < len(words) else ""
        current = sentences[-1] if sentences else []
        if (
            not current
            or gaps[place] == _PARAGRAPH
            or _ends(current, following=word)
            or _starts_item(word, following, current[-1], item=item, starts_line=gaps[place] == _LINE)
        ):
            sentences.append([])
            item = _item_number(word) or item
        sentences[-1].append(word)
    return [" ".join(sentence) for sentence in sentences]


def report_sentences(text: str, *, min_tokens: int = 3) -> list[str]:
    """The sentences of a section without list marks, in order, those with fewer words left out.

    A blank that stands for a name or a date is no word.
    """
    kept = []
    for sentence in split_sentences(text):
        words = sentence.split(" ")
        while words and (_item_number(words[0]) or _BULLET.fullmatch(words[0])):
            words = words[1:]
        if sum(any(map(str.isalnum, word)) for word in words) >= min_tokens:
            kept.append(" ".join(words))
    return kept


def _ends(sentence: list[str], *, following: str) -> bool:
    """Whether a sentence is over before the word that follows it."""
    word = sentence[-1].rstrip(_CLOSING)
    begin = next((char for char in following if char.isalnum() or char == "_"), "")
    if word[-1:] not in (".", "!", "?") or begin.islower():
        return False
    if word[-1] != ".":
        return True
    if len(sentence) == 1 and _item_number(sentence[-1]):
        return False
    written = word[:-1].lstrip(_OPENING)
    stem = written.lower()
    if _BINDING.fullmatch(stem) or (begin.isdigit() and _BEFORE_NUMBER.fullmatch(stem)):
        return False
    if _HOUR.search(stem) and stem.endswith("m"):
        # "5:15 P.M. ON ___" against "at 5 p.m. No change."
        return begin.isupper() and (not written.isupper() or not following.isupper())
    # "Dr. J. Smith" against "hepatitis C. No change."
    is_initial = len(stem) == 1 and stem.isalpha() and len(sentence) > 1
    return not (is_initial and _TITLE.fullmatch(sentence[-2]))


def _starts_item(word: str, following: str, before: str, *, item: int, starts_line: bool) -> bool:
    """Whether a word is the mark of a list item, though no sentence ended before it."""
    if not following or following[0].islower() or following[0].isdigit():
        return starts_line and bool(following) and _BULLET.fullmatch(word) is not None
    number = _item_number(word)
    if number is None:
        return starts_line and _BULLET.fullmatch(word) is not None
    # The first of a list stands on a new line or after a colon, the next ones anywhere.
    return (number == 1 and (starts_line or before.endswith(":"))) or (number == item + 1 > 1)


def _item_number(word: str) -> int | None:
    match = _ITEM.fullmatch(word)
    return int(match.group(1)) if match else None
