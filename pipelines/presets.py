"""Settings that fit a source best; they lie below the user's own."""

from __future__ import annotations

from typing import Any, Final

# What the embedded scenes' captions say of one digit, and of none.
_DIGIT_PROMPTS: Final = {
    "templates": ["a {}", "a picture of a {}", "the digit {}"],
    "positive_templates": ["a {}", "a picture of a {}", "the digit {}"],
    "negative_texts": ["no digit", "only scribbles"],
}


def _files(kind: str) -> dict[str, Any]:
    """Settings for photographs and drawings of any kind of file."""
    return {
        "output": f"runs/{kind}",
        "data": {"image_size": 48},
        "train": {"min_crop_area": 0.6, "steps": 300},
    }


# By source, or by its scheme.
PRESETS: Final[dict[str, dict[str, Any]]] = {
    "scenes:quick": {"output": "runs/quick", "evaluation": _DIGIT_PROMPTS},
    "scenes:tokens": {
        "output": "runs/tokens",
        "data": {"image_size": 48},
        "train": {"steps": 600},
        "evaluation": _DIGIT_PROMPTS,
    },
    **{kind: _files(kind) for kind in ("parquet", "webdataset", "csv", "hf", "coco", "mixture")},
    # Prompts say what the captions say.
    "folder": {**_files("folder"), "evaluation": {"templates": ["a photo of a {}"]}},
}


def preset_of(source: str) -> dict[str, Any]:
    """The preset of a source such as `scenes:quick` or `parquet:pairs.parquet`; empty when there is none."""
    return PRESETS.get(source, PRESETS.get(source.partition(":")[0], {}))
