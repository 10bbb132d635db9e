"""The fourteen labels of CheXpert and MIMIC-CXR: what their values mean, and in which words they are said."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import pyarrow as pa
import pyarrow.compute as pc

LABELS: Final = (
    "No Finding",
    "Enlarged Cardiomediastinum",
    "Cardiomegaly",
    "Lung Opacity",
    "Lung Lesion",
    "Edema",
    "Consolidation",
    "Pneumonia",
    "Atelectasis",
    "Pneumothorax",
    "Pleural Effusion",
    "Pleural Other",
    "Fracture",
    "Support Devices",
)
NO_FINDING: Final = LABELS[0]

# As the files write them; blank: the report does not speak of it.
_WRITTEN: Final = {"1.0": 1, "1": 1, "0.0": 0, "0": 0, "-1.0": -1, "-1": -1, "": None}
_WORDS: Final = {"Pleural Other": "other pleural abnormality"}
CAPTION_TEMPLATE: Final = "a chest X-ray with {}"


@dataclass(frozen=True)
class LabelPolicy:
    """What an uncertain label (-1: positive, negative, ignore) and a blank one (negative, ignore) count as.

    Ignored: neither present nor absent, so that it is neither said nor scored. A blank `No Finding` is always
    negative: the labelers write it as 1 or not at all.
    """

    uncertain: str
    blank: str

    def present(self, values: Mapping[str, int | None]) -> list[str]:
        """The labels of a row, in the order of `LABELS`; `values` by label."""
        return [label for label in LABELS if self._counts_as(label, values.get(label)) is True]

    def absent(self, values: Mapping[str, int | None]) -> list[str]:
        """The labels that a row is said not to have."""
        return [label for label in LABELS if self._counts_as(label, values.get(label)) is False]

    def unknown(self, values: Mapping[str, int | None]) -> list[str]:
        """The labels of which nothing is known."""
        return [label for label in LABELS if self._counts_as(label, values.get(label)) is None]

    @property
    def ignores(self) -> bool:
        return "ignore" in (self.uncertain, self.blank)

    def _counts_as(self, label: str, value: int | None) -> bool | None:
        if value in (0, 1):
            return value == 1
        if value is None and label == NO_FINDING:
            return False
        policy = self.blank if value is None else self.uncertain
        return None if policy == "ignore" else policy == "positive"


def parse_label(column: pa.ChunkedArray) -> tuple[pa.Array, pa.Array]:
    """Values as int8, null where blank, and which of them are no values of labels."""
    index = pc.index_in(column, value_set=pa.array(list(_WRITTEN))).combine_chunks()
    return pa.array(list(_WRITTEN.values()), pa.int8()).take(index), index.is_null()


def caption_of(values: Mapping[str, int | None], policy: LabelPolicy, *, template: str) -> str:
    """What an image without a report shows, in one line: its present labels, "no finding", or neither."""
    present = [words_for(label) for label in policy.present(values) if label != NO_FINDING]
    if present:
        listed = " and ".join(filter(None, [", ".join(present[:-1]), present[-1]]))
    else:
        listed = "no finding" if values.get(NO_FINDING) == 1 else "no certain finding"
    return template.format(listed)


def sentences_of(values: Mapping[str, int | None], policy: LabelPolicy) -> list[str]:
    """One sentence per label that is present or was judged absent; blanks were not judged."""
    present = [label for label in policy.present(values) if label != NO_FINDING]
    absent = [label for label in policy.absent(values) if values.get(label) is not None]
    said = [f"there {_verb(label)} {words_for(label)}" for label in present]
    said += [f"there {_verb(label)} no {words_for(label)}" for label in absent if label != NO_FINDING]
    if values.get(NO_FINDING) == 1 and not present:
        said.append("there is no finding")
    return said


def words_for(label: str) -> str:
    return _WORDS.get(label, label.lower())


def _verb(label: str) -> str:
    return "are" if label == "Support Devices" else "is"
