"""Samples of a tar -> rows, by the columns of the data config."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipelines.sources.column_names import PlainColumns
from pipelines.sources.rows import UnusableError, as_boxes, pair_row, unusable_row
from pipelines.sources.splits import SplitRule
from pipelines.sources.tar_samples import USUAL_MEMBERS, Sample, ending_of


@dataclass(frozen=True)
class Shard:
    """One tar: `name` is unique among those read together, `split` what its name says of its rows."""

    uri: str
    name: str
    size: int
    split: str | None = None


@dataclass(frozen=True)
class TarMapper:
    """Where the columns lie in a sample, and what holds where a sample does not say.

    Args:
        references: per column the members or JSON paths that may hold it, the first that is there counts.
        conditions: the row filter, by reference.
        default_source: the source of rows that name none.
        keys_repeat: whether shards count their keys from the start, so that ids need the shard's name.
    """

    references: Mapping[str, Sequence[str]]
    conditions: Mapping[str, Sequence[str]]
    splits: SplitRule
    default_source: str
    caption_template: str | None = None
    keys_repeat: bool = False

    def wants(self, ending: str, *, with_images: bool) -> bool:
        """Whether a member has to be read."""
        refs = [ref for column, refs in self.references.items() if column != "image" for ref in refs]
        if with_images:
            refs += self.references["image"]
        return any(ending_of(reference) == ending for reference in [*refs, *self.conditions])

    def row(self, sample: Sample, shard: Shard, *, number: int) -> dict[str, Any] | None:
        """The row of a sample, the `number`th of its shard; None when the row filter leaves it out."""
        row_id = f"{shard.name}/{sample.key}" if self.keys_repeat else sample.key
        try:
            if not self._passes(sample):
                return None
            row_id = self._row_id(sample, shard, number=number)
            if sample.problem is not None:
                return unusable_row(row_id, sample.problem, source=self.default_source)
            return self._row(sample, shard, row_id=row_id)
        except UnusableError as error:
            return unusable_row(row_id, error.problem, source=self.default_source)

    def _passes(self, sample: Sample) -> bool:
        return all({*sample.texts(ref)} & {*values} for ref, values in self.conditions.items())

    def _row_id(self, sample: Sample, shard: Shard, *, number: int) -> str:
        if "id" not in self.references:
            return f"{shard.name}:{number:09d}"
        row_id = self._first(sample, "id") or ""
        return f"{shard.name}/{row_id}" if row_id and self.keys_repeat else row_id

    def _row(self, sample: Sample, shard: Shard, *, row_id: str) -> dict[str, Any]:
        class_name, group = self._first(sample, "class_name"), self._first(sample, "group")
        captions = self._texts(sample, "captions") + self._texts(sample, "caption")
        if not captions and class_name and self.caption_template:
            captions = [self.caption_template.format(class_name)]
        boxes = self._value(sample, "boxes")
        images = [sample.members.get(reference) for reference in self.references["image"]]
        return pair_row(
            row_id,
            image=next(filter(None, images), b""),
            captions=list(dict.fromkeys(captions)),
            split=self._split(sample, shard, key=group or row_id),
            source=self._first(sample, "source") or self.default_source,
            sentences=self._texts(sample, "sentences"),
            labels=self._texts(sample, "labels"),
            class_name=class_name,
            group_id=group,
            boxes=None if boxes is None else as_boxes(boxes, what="boxes"),
        )

    def _split(self, sample: Sample, shard: Shard, *, key: str) -> str:
        if "split" not in self.references:
            return self.splits.hashed(key)
        said = self._first(sample, "split") or shard.split
        return self.splits.hashed(key) if said is None else self.splits.named(said)

    def _value(self, sample: Sample, column: str) -> Any:
        values = (sample.get(reference) for reference in self.references.get(column, ()))
        return next((value for value in values if value is not None), None)

    def _texts(self, sample: Sample, column: str) -> list[str]:
        """The texts of the first reference that has any with a visible character."""
        for reference in self.references.get(column, ()):
            if texts := [text for text in sample.texts(reference) if text.strip()]:
                return texts
        return []

    def _first(self, sample: Sample, column: str) -> str | None:
        texts = self._texts(sample, column)
        return texts[0].strip() if texts else None


def tar_references(columns: PlainColumns) -> dict[str, list[str]]:
    """Where to look for each column in a sample."""
    found = columns.alternatives(USUAL_MEMBERS)
    return {column: [name for name in names if ";" not in name] for column, names in found.items()}


def check_samples(samples: Sequence[Sample], mapper: TarMapper, *, columns: PlainColumns, where: str) -> None:
    """Refuse columns that none of the first samples has, showing what the first one has.

    Raises:
        ValueError: an image or text that is nowhere, or a column or condition that somebody named.
    """
    absent = [
        f"data.columns.{column}={';'.join(references)}"
        for column, references in mapper.references.items()
        if column in columns.given() | {"image"} and not _anywhere(samples, references)
    ]
    absent += [f"data.where.{ref}" for ref in mapper.conditions if not _anywhere(samples, [ref])]
    texts = [*mapper.references.get("caption", ()), *mapper.references.get("captions", ())]
    has_class = mapper.caption_template and _anywhere(samples, mapper.references.get("class_name", ()))
    if not has_class and not _anywhere(samples, texts) and not {"caption", "captions"} & columns.given():
        absent.append(f"data.columns.caption={';'.join(texts) or 'null'}")
    if absent:
        raise ValueError(
            f"{where}: none of the first {len(samples)} samples has {', nor '.join(dict.fromkeys(absent))}; "
            f"{samples[0].describe()}. Name an ending (txt) or a path into JSON (json.caption); `a;b` names "
            "alternatives"
        )


def _anywhere(samples: Sequence[Sample], references: Sequence[str]) -> bool:
    return any(sample.has(reference) for sample in samples for reference in references)
