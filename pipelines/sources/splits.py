"""Which split a row belongs to: the setting, a column, the name of its file, or a hash. No Ray here."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from pipelines.schemas import SPLITS

BY_HASH = "rows are divided 80/10/10 by a hash"


@dataclass(frozen=True)
class SplitRule:
    """How a source finds the split of a row.

    Args:
        names: what data may say, mapped to `schemas.SPLITS` (`data.split_names`).
        fixed: the split of every row whatever the data says, None to look (`data.split`).
    """

    names: Mapping[str, str]
    fixed: str | None = None

    def named(self, value: str | None) -> str:
        """The split a value of the data stands for; empty when it stands for none."""
        return self.fixed or self.names.get(value or "", "")

    def hashed(self, key: str) -> str:
        """The split of a row whose data names none; rows with the same key stay together."""
        return self.fixed or hashed_split(key)

    def word_in(self, name: str) -> str | None:
        """The first word of a file name that means a split: `train` of captions_train2017.json."""
        return next((word for word in re.findall(r"[a-z]+", name.lower()) if word in self.names), None)

    def check(self, found: Iterable[str | None], *, where: str, column: str) -> None:
        """Raise ValueError when the data says something that means no split."""
        unknown = sorted({value for value in found if value is not None} - set(self.names))
        if unknown and self.fixed is None:
            raise ValueError(
                f"{where}: unknown split {unknown} in column '{column}'; data.split_names maps "
                f"{sorted(self.names)} to {list(SPLITS)}. Add them there, or leave those rows "
                "out with data.where"
            )


def split_rule(names: Mapping[str, str], fixed: str | None) -> SplitRule:
    """The rule of a data config.

    Raises:
        ValueError: `fixed` means no split.
    """
    if fixed is not None and fixed not in names and fixed not in SPLITS:
        raise ValueError(f"data.split must be one of {sorted({*names, *SPLITS})}, got '{fixed}'")
    return SplitRule(dict(names), None if fixed is None else names.get(fixed, fixed))


def hashed_split(key: str) -> str:
    """A split for data that names none: 80 % train, 10 % selection, 10 % test, by the hash of the group."""
    share = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64
    return "train" if share < 0.8 else "selection" if share < 0.9 else "test"
