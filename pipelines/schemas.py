"""Arrow schemas of the tables that cross a stage.

A stage checks its input against these before any worker starts. A column is added by raising the version
in the file that lies beside the table (manifest, run record), never by letting a reader guess.
"""

from __future__ import annotations

from typing import Final

import pyarrow as pa

SPLITS: Final = ("train", "selection", "test")

# x, y: top left corner; all four relative to the image (0..1).
BOX: Final = pa.struct(
    [
        ("label", pa.string()),
        ("x", pa.float32()),
        ("y", pa.float32()),
        ("w", pa.float32()),
        ("h", pa.float32()),
    ]
)

_ANNOTATIONS: Final = [
    # Alternative whole texts of one image; training samples one per epoch.
    pa.field("captions", pa.list_(pa.string()), nullable=False),
    # The sentences of a report; empty when the source has none.
    pa.field("sentences", pa.list_(pa.string()), nullable=False),
    pa.field("labels", pa.list_(pa.string()), nullable=False),
    # The one class of a single-label row; null when the row has none or several.
    pa.field("class_name", pa.string()),
    # What must not be divided between splits (patient, study, concept); null when unknown.
    pa.field("group_id", pa.string()),
    # Scores are computed per source and never pooled over sources.
    pa.field("source", pa.string(), nullable=False),
    pa.field("split", pa.string(), nullable=False),
    # Null: nobody drew boxes. Empty: someone looked and there is nothing.
    pa.field("boxes", pa.list_(BOX)),
]

# What a source yields: `image` holds encoded bytes (JPEG, PNG, ...).
PAIRS: Final = pa.schema(
    [
        pa.field("row_id", pa.string(), nullable=False),
        pa.field("image", pa.binary(), nullable=False),
        *_ANNOTATIONS,
    ]
)

# Beside `PAIRS`, only where a source knows that a row cannot be used (a member of an archive that ends too
# early, an image file that is not there). Null: nothing is known against the row.
PROBLEM: Final = pa.field("problem", pa.struct([("reason", pa.string()), ("message", pa.string())]))

# Beside `PAIRS` and `PREPARED`, only where a source leaves labels open: nobody knows whether a row has these,
# and no score counts it for them. Null: every label that `labels` does not list is absent.
UNKNOWN_LABELS: Final = pa.field("unknown_labels", pa.list_(pa.string()))

# What `prepare` writes: `image` holds size x size x 3 raw uint8, RGB, row-major, so that an epoch
# costs a copy instead of a decode. `caption_tokens[i]` and `sentence_tokens[i]` are the token ids of
# `captions[i]` and `sentences[i]`, start and end tokens included, without padding.
PREPARED: Final = pa.schema(
    [
        pa.field("row_id", pa.string(), nullable=False),
        pa.field("image", pa.binary(), nullable=False),
        pa.field("caption_tokens", pa.list_(pa.list_(pa.int32())), nullable=False),
        pa.field("sentence_tokens", pa.list_(pa.list_(pa.int32())), nullable=False),
        *_ANNOTATIONS,
    ]
)

# What `score` adds: whole-image scores of the patches of the scorer's square grid, row-major.
SCORES_VERSION: Final = 1
SCORED: Final = PREPARED.append(pa.field("token_scores", pa.list_(pa.float32()), nullable=False))

QUARANTINE: Final = pa.schema(
    [
        pa.field("row_id", pa.string(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("message", pa.string(), nullable=False),
    ]
)

# Some images of the report split with what the token scorer thinks of them (one file per run).
SAMPLES: Final = pa.schema(
    [
        pa.field("row_id", pa.string(), nullable=False),
        pa.field("image", pa.binary(), nullable=False),  # PNG
        pa.field("caption", pa.string(), nullable=False),
        pa.field("grid", pa.int32(), nullable=False),  # patches per side
        pa.field("token_scores", pa.list_(pa.float32()), nullable=False),  # grid * grid, row-major
        pa.field("is_kept", pa.list_(pa.bool_()), nullable=False),
        pa.field("boxes", pa.list_(BOX)),
    ]
)


def check_schema(found: pa.Schema, expected: pa.Schema, *, where: str) -> None:
    """Refuse a table that lacks a column or holds one of another type.

    Raises:
        ValueError: naming every missing or mistyped column and the place.
    """
    problems = []
    for field in expected:
        index = found.get_field_index(field.name)
        if index < 0:
            problems.append(f"column '{field.name}' is missing")
        elif found.field(index).type != field.type:
            problems.append(f"column '{field.name}' must be {field.type}, found {found.field(index).type}")
    if problems:
        raise ValueError(f"{where}: {'; '.join(problems)}; columns found: {', '.join(found.names)}")
