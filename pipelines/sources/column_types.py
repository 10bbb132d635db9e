"""What a column of an Arrow table can be used as, by its type."""

from __future__ import annotations

import pyarrow as pa

_BOX_NUMBERS = ("x", "y", "w", "h")


def is_bytes(type_: pa.DataType) -> bool:
    return (
        pa.types.is_binary(type_)
        or pa.types.is_large_binary(type_)
        or pa.types.is_fixed_size_binary(type_)
        or pa.types.is_binary_view(type_)
    )


def is_text(type_: pa.DataType) -> bool:
    return pa.types.is_string(type_) or pa.types.is_large_string(type_) or pa.types.is_string_view(type_)


def is_list(type_: pa.DataType) -> bool:
    return pa.types.is_list(type_) or pa.types.is_large_list(type_) or pa.types.is_fixed_size_list(type_)


def prints(type_: pa.DataType) -> bool:
    """One value per row that can be written as text."""
    if pa.types.is_nested(type_) or is_bytes(type_):
        return False
    try:
        pa.nulls(0, type_).cast(pa.string())
    except pa.ArrowNotImplementedError:
        return False
    return True


def holds_texts(type_: pa.DataType) -> bool:
    """One text or number per row, or a list of them."""
    return prints(type_.value_type if is_list(type_) else type_)


def holds_boxes(type_: pa.DataType) -> bool:
    """A list of structs with the fields of `schemas.BOX`; a column of nulls alone holds no box."""
    if pa.types.is_null(type_):
        return True
    if not is_list(type_) or not pa.types.is_struct(type_.value_type):
        return False
    fields = {field.name: field.type for field in type_.value_type}
    return is_text(fields.get("label", pa.null())) and all(
        pa.types.is_integer(kind) or pa.types.is_floating(kind)
        for kind in (fields.get(name, pa.null()) for name in _BOX_NUMBERS)
    )
