"""Radiology reports: their sections and their sentences, by rules. No files and no Ray here.

A section starts at a header that is known by name, so that headings inside the findings ("LUNGS:") end
nothing. What is said beside the report (addenda, wet reads, notifications) belongs to neither section.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

# What `ReportSections.text` may be asked for.
WANTED: Final = ("findings", "impression", "both")

_FINDINGS, _IMPRESSION, _MIXED, _VIEWS = "findings", "impression", "findings and impression", "views"
_CONTEXT, _ASIDE, _UNNAMED = "context", "aside", ""

# Longer names come first: the first that fits is taken.
_HEADERS: Final = {
    _MIXED: r"FINDINGS? ?(?:AND|&|/|,) ?IMPRESSIONS?|IMPRESSIONS? ?(?:AND|&|/|,) ?FINDINGS?",
    _ASIDE: r"(?:FINAL )?ADDENDUM|WET READ(?:ING)?|PRELIMINARY (?:REPORT|READ|FINDINGS|IMPRESSION)|"
    r"PROVISIONAL FINDINGS(?: IMPRESSION)?|PFI|NOTIFICATIONS?|RECOMMENDATIONS?|RECOMMENDATION\(S\)|"
    r"END OF IMPRESSION|SUMMARY(?: \d+)?|ACCESSION NUMBER|ATTENDING(?: PHYSICIAN)?",
    _CONTEXT: r"(?:TYPE OF )?EXAM(?:INATION)?S?|STUDY|PROCEDURE(?: COMMENTS)?|TECHNIQUE|DOSE|NARRATIVE|"
    r"(?:CLINICAL )?INDICATIONS?|REASON FOR (?:THIS )?(?:EXAM(?:INATION)?|STUDY)|"
    r"(?:CLINICAL |PATIENT |MEDICAL )?HISTORY|CLINICAL (?:INFORMATION|DATA|STATEMENT)|"
    r"(?:UNDERLYING )?MEDICAL CONDITION|COMPARISONS?(?: (?:STUDY|STUDIES|FILMS?|EXAMS?))?",
    _FINDINGS: r"(?:CHEST )?FINDINGS?(?: OF THE CHEST)?",
    _IMPRESSION: r"(?:FINAL )?IMPRESSIONS?(?: AND RECOMMENDATIONS?)?|IMPRESSON|CONCLUSIONS?|OPINION",
}
_NAMES = "|".join(f"(?P<h{number}>{names})" for number, names in enumerate(_HEADERS.values()))
_QUALIFIER = r"(?: ?\([^()\n]{1,40}\))?"
# At the start of a line with a capital and with a colon or alone; within a line in capitals and with a colon.
_LINE_HEADER = re.compile(
    rf"^[ \t]*(?:[*#•]+[ \t]*)?(?=[A-Z])(?i:{_NAMES}){_QUALIFIER}[ \t]*(?::|(?=\n|\Z))", re.MULTILINE
)
_INLINE_HEADER = re.compile(rf"(?<=[\s.])(?:{_NAMES}){_QUALIFIER}[ \t]*:")
# "PORTABLE AP VIEW OF THE CHEST: The lungs are clear."
_VIEW_HEADER = re.compile(
    r"^[ \t]*(?=[^\n:]*\b(?:CHEST|VIEWS?|RADIOGRAPHS?)\b)[A-Z][A-Z0-9 ,/()_-]{3,60}:", re.MULTILINE
)
# A ruled line, longer than the blank that stands for a name or a date.
_RULE = re.compile(r"^[ \t]*(?:_{5,}|={5,}|-{5,}|\*{5,}|FINAL REPORT)[ \t]*$", re.MULTILINE)
_PARAGRAPH_GAP = re.compile(r"\n\s*\n")
_MIN_PROSE_WORDS = 8


@dataclass(frozen=True)
class ReportSections:
    """Texts of a report with their line breaks, empty where there is none.

    `mixed` stands under a header that announces both sections; `body` is what a report says that has neither.
    """

    findings: str = ""
    impression: str = ""
    mixed: str = ""
    body: str = ""

    def text(self, wanted: str) -> str:
        """One of `WANTED`. Free text of a report without sections counts as findings, never as impression."""
        findings, impression = self.findings, self.impression
        if wanted == "impression":
            return _joined(impression, self.mixed)
        if wanted == "findings":
            return _joined(findings, self.mixed) or ("" if impression else self.body)
        return _joined(findings, self.mixed, impression) or self.body


def report_sections(report: str) -> ReportSections:
    """Find findings and impression; a section that comes twice is joined in order."""
    report = report.replace("\r\n", "\n").replace("\r", "\n")
    parts = [(name, text) for name, text in _parts(report) if text]
    findings, impression, mixed = (
        _joined(*(text for name, text in parts if name in names))
        for names in ((_FINDINGS, _VIEWS), (_IMPRESSION,), (_MIXED,))
    )
    has_none = not (findings or impression or mixed)
    return ReportSections(findings, impression, mixed, _joined(*_free_text(parts)) if has_none else "")


def _joined(*texts: str) -> str:
    return "\n\n".join(filter(None, texts))


def _parts(report: str) -> Iterator[tuple[str, str]]:
    """Name and text between one header and the next, in order; what has no header has no name."""
    start, name = 0, _UNNAMED
    for first, last, header in _boundaries(report):
        yield name, report[start:first].strip()
        start, name = last, header
    yield name, report[start:].strip()


def _boundaries(report: str) -> list[tuple[int, int, str]]:
    """Start, end and name of headers and ruled lines, none inside another."""
    kinds = list(_HEADERS)
    found = [
        (match.start(), match.end(), kinds[int((match.lastgroup or "h0")[1:])])
        for pattern in (_LINE_HEADER, _INLINE_HEADER)
        for match in pattern.finditer(report)
    ]
    found += [(match.start(), match.end(), _UNNAMED) for match in _RULE.finditer(report)]
    names = {name for *_, name in found}
    if not names & {_FINDINGS, _MIXED}:
        limit = min((first for first, _, name in found if name == _IMPRESSION), default=len(report))
        views = [(match.start(), match.end(), _VIEWS) for match in _VIEW_HEADER.finditer(report)]
        found += [view for view in views if view[0] < limit]
    found.sort(key=lambda boundary: (boundary[0], boundary[2] == _VIEWS, -boundary[1]))
    kept: list[tuple[int, int, str]] = []
    for boundary in found:
        if not kept or boundary[0] >= kept[-1][1]:
            kept.append(boundary)
    return kept


def _free_text(parts: list[tuple[str, str]]) -> Iterator[str]:
    """Paragraphs under no header, and those after the first under one of context; titles left out."""
    for name, text in parts:
        if name in (_UNNAMED, _CONTEXT):
            paragraphs = _PARAGRAPH_GAP.split(text)
            for paragraph in paragraphs[name == _CONTEXT :]:
                if paragraph != paragraph.upper() or len(paragraph.split()) >= _MIN_PROSE_WORDS:
                    yield paragraph.strip()
