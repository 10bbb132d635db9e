"""The row filter `data.where`: a row stays when each named column holds one of the listed values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import pyarrow.dataset as ds


def arrow_filter(conditions: Mapping[str, list[str]], schema: pa.Schema, *, where: str) -> Any:
    """A filter as a pyarrow expression, which skips row groups by their statistics; None lets all pass.

    Raises:
        ValueError: an unknown column, or one with several values per row.
    """
    passes = None
    for name, values in conditions.items():
        if name not in schema.names:
            found = ", ".join(schema.names)
            raise ValueError(f"{where}: data.where names the column '{name}'; columns found: {found}")
        column_type = schema.field(name).type
        if pa.types.is_nested(column_type):
            raise ValueError(f"{where}: data.where needs one value per row, '{name}' is {column_type}")
        text = ds.field(name) if pa.types.is_string(column_type) else ds.field(name).cast(pa.string())
        condition = text.isin(pa.array(values, pa.string()))
        passes = condition if passes is None else passes & condition
    return passes
