"""Where the texts of radiographs come from: report files, a CSV of their sections, or labels put into words.

Report files and sections are read inside tasks; the driver only learns where each record of a CSV starts.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.reports import ReportSections, report_sections
from pipelines.sentences import report_sentences
from pipelines.sources.chest_labels import LabelPolicy, caption_of, sentences_of
from pipelines.sources.csv_records import Record, csv_records
from pipelines.sources.files import files_named
from pipelines.sources.image_files import ImageFiles
from pipelines.sources.remote import open_unzipped
from pipelines.sources.rows import Problem, UnusableError, decoded, problem
from pipelines.sources.text_columns import header_of, refuse_absent

Key = TypeVar("Key")


@dataclass(frozen=True)
class Texts:
    """What a row says of its image, or why it says nothing."""

    captions: tuple[str, ...] = ()
    sentences: tuple[str, ...] = ()
    problem: Problem | None = None


class TextReader(Protocol):
    def read(self, rows: Sequence[Mapping[str, Any]]) -> list[Texts]:
        """The texts of rows of an index, `report` naming the one that belongs to each."""
        ...


@dataclass(frozen=True)
class LabelTexts:
    """No report: labels in words."""

    policy: LabelPolicy
    template: str

    def read(self, rows: Sequence[Mapping[str, Any]]) -> list[Texts]:
        return [
            Texts(
                (caption_of(row, self.policy, template=self.template),),
                tuple(sentences_of(row, self.policy)),
            )
            for row in rows
        ]


@dataclass(frozen=True)
class ReportFiles:
    """One file per study below a folder; `report` is its name."""

    files: ImageFiles
    wanted: str

    def read(self, rows: Sequence[Mapping[str, Any]]) -> list[Texts]:
        names = _distinct(row["report"] for row in rows)
        contents, problems = self.files.read(names)
        found = {
            name: _missing(wrong) if wrong else self._texts(data, name=name)
            for name, data, wrong in zip(names, contents, problems, strict=True)
        }
        return [found[row["report"]] for row in rows]

    def _texts(self, data: bytes, *, name: str) -> Texts:
        try:
            report = decoded(data, what=f"report '{name}'")
        except UnusableError as error:
            return Texts(problem=error.problem)
        return texts_of(report_sections(report), wanted=self.wanted)


@dataclass(frozen=True)
class ReportTable:
    """A CSV with the sections of one report per record; `report` is the byte a record starts at, or null.

    Args:
        columns: of the file, in order.
        sections: the column of each section of `ReportSections` that the file has.
    """

    uri: str
    columns: tuple[str, ...]
    sections: Mapping[str, str]
    wanted: str

    def read(self, rows: Sequence[Mapping[str, Any]]) -> list[Texts]:
        # In the order of the file: a packed one can only be read forwards.
        starts = sorted(_distinct(row["report"] for row in rows if row["report"] is not None))
        found: dict[int | None, Texts] = {}
        with open_unzipped(self.uri) as file:
            for start in starts:
                file.seek(start)
                found[start] = self._texts(next(csv_records(file, delimiter=",", start=start)))
        found[None] = Texts(problem=problem("missing_report", f"no report in '{self.uri}'"))
        return [found[row["report"]] for row in rows]

    def _texts(self, record: Record) -> Texts:
        if fault := _fault(record, num_columns=len(self.columns)):
            return Texts(problem=fault)
        cells = dict(zip(self.columns, record.fields, strict=True))
        named = {section: cells[column].strip() for section, column in self.sections.items()}
        return texts_of(ReportSections(**named), wanted=self.wanted)


def texts_of(report: ReportSections, *, wanted: str) -> Texts:
    """The wanted text of a report as one caption and as sentences."""
    text = report.text(wanted)
    if not text.strip():
        named = "no findings and no impression" if wanted == "both" else f"no {wanted}"
        return Texts(problem=problem("empty_section", f"the report has {named}"))
    return Texts((" ".join(text.split()),), tuple(report_sentences(text)))


@dataclass(frozen=True)
class ScannedReports:
    """The records of a CSV of reports: whose each is, where it starts, and what is wrong with others."""

    reader: ReportTable
    keys: list[str]
    starts: list[int]
    faults: list[Problem]

    def starts_of(self, wanted: pa.ChunkedArray, *, keys: pa.Array) -> tuple[pa.Array, list[str]]:
        """For each wanted key the start of its record, null where there is none, and what to know about it.

        `keys` are those of the records, as the wanted ones are written; the first of equal ones counts.
        """
        starts = pa.array(self.starts, pa.int64()).take(pc.index_in(wanted, value_set=keys))
        starts = starts.combine_chunks() if isinstance(starts, pa.ChunkedArray) else starts
        found = len(starts) - starts.null_count
        notes = [f"texts: {self.reader.wanted} of '{self.reader.uri}', for {found} of {len(starts)} images"]
        if self.faults:
            notes.append(f"{len(self.faults)} reports cannot be read; the first: {self.faults[0]['message']}")
        return starts, notes


def scan_report_table(uri: str, *, key: str, sections: Mapping[str, str], wanted: str) -> ScannedReports:
    """Find the records of a CSV of reports.

    Args:
        key: the column that says whose report it is.
        sections: the column that may hold each section of `ReportSections`.

    Raises:
        ValueError: no such file, no `key` column, or no column of a section.
    """
    if not files_named([uri])[0]:
        raise ValueError(f"data.reports: '{uri}' is no file")
    columns = header_of(uri)
    named = {section: column for section, column in sections.items() if column in columns}
    refuse_absent([key, *([] if named else sections.values())], columns, where=uri)
    scanned = ScannedReports(ReportTable(uri, tuple(columns), named, wanted), [], [], [])
    place = columns.index(key)
    with open_unzipped(uri) as file:
        for record in itertools.islice(csv_records(file, delimiter=","), 1, None):
            if fault := _fault(record, num_columns=len(columns)):
                scanned.faults.append(fault)
            else:
                scanned.keys.append(record.fields[place])
                scanned.starts.append(record.start)
    return scanned


def _fault(record: Record, *, num_columns: int) -> Problem | None:
    if record.fault is not None or len(record.fields) == num_columns:
        return record.fault
    counted = f"{len(record.fields)} fields, the header has {num_columns}"
    return problem("malformed_row", f"line {record.line}: {counted}")


def _missing(found: Problem) -> Texts:
    reason = "missing_report" if found["reason"] == "missing_image" else "unreadable_report"
    return Texts(problem={**found, "reason": reason})


def _distinct(values: Iterable[Key]) -> list[Key]:
    return list(dict.fromkeys(values))
