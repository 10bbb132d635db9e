"""A caption file in one of COCO's layouts -> entries, one per image. Parsed once per process.

The official one lists images and annotations apart; the one with the split of Karpathy and Fei-Fei keeps the
sentences and the split with each image.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pipelines.sources.files import SourceFile, stem_of
from pipelines.sources.remote import read_range
from pipelines.sources.rows import Problem, UnusableError, as_text, decoded, problem


@dataclass
class Entry:
    """An image with its captions, or something in the file that is none."""

    id: str
    file: str | None = None
    captions: list[str] = field(default_factory=list)
    split: str | None = None
    problem: Problem | None = None


@functools.lru_cache(maxsize=2)
def read_captions(file: SourceFile) -> list[Entry]:
    """The images of a caption file in its order, then what belongs to none of them.

    Raises:
        ValueError: no JSON, or not of such a layout.
    """
    try:
        content = json.loads(decoded(read_range(file.uri, 0, file.size), what="the file"))
    except (ValueError, RecursionError, UnusableError) as error:
        raise ValueError(f"data.source: '{file.uri}' is not valid JSON: {error}") from error
    images = content.get("images") if isinstance(content, Mapping) else None
    if not isinstance(images, list):
        raise ValueError(f"data.source: '{file.uri}' must hold a list 'images'; {_keys(content)}")
    if any(isinstance(image, Mapping) and "sentences" in image for image in images[:100]):
        return [_with_sentences(image, number) for number, image in enumerate(images)]
    annotations = content.get("annotations")
    if not isinstance(annotations, list):
        raise ValueError(f"data.source: '{file.uri}' must hold a list 'annotations'; {_keys(content)}")
    if not any(isinstance(each, Mapping) and "caption" in each for each in annotations):
        raise ValueError(
            f"data.source: '{file.uri}': no annotation has a caption; the first has "
            f"{_keys(annotations[0]) if annotations else 'nothing'}. Name the file of captions "
            f"(captions_train2017.json), not '{stem_of(file.uri)}'"
        )
    return _joined(images, annotations)


def _joined(images: list[Any], annotations: list[Any]) -> list[Entry]:
    entries = [_image(image, number) for number, image in enumerate(images)]
    # Of images that share an id the first keeps the captions; prepare sets the others aside.
    by_id = {entry.id: entry for entry in reversed(entries) if entry.problem is None}
    for number, annotation in enumerate(annotations):
        try:
            image_id = as_text(_get(annotation, "image_id"), what="image_id")
            caption = as_text(_get(annotation, "caption"), what="caption")
            if image_id not in by_id:
                raise UnusableError("missing_image", f"no image has the id {image_id}")
            by_id[image_id].captions.append(caption)
        except UnusableError as error:
            entries.append(_broken(f"annotation {number}", error))
    return entries


def _image(image: Any, number: int) -> Entry:
    try:
        return Entry(
            as_text(_get(image, "id"), what="id"), as_text(_get(image, "file_name"), what="file_name")
        )
    except UnusableError as error:
        return _broken(f"image {number}", error)


def _with_sentences(image: Any, number: int) -> Entry:
    try:
        name = as_text(_get(image, "filename"), what="filename")
        folder = _get(image, "filepath")
        identity = next(
            (_get(image, key) for key in ("cocoid", "imgid") if _get(image, key) is not None), name
        )
        sentences = _get(image, "sentences")
        if not isinstance(sentences, list):
            raise UnusableError("mistyped_text", "sentences must be a list")
        split = _get(image, "split")
        return Entry(
            as_text(identity, what="id"),
            f"{as_text(folder, what='filepath')}/{name}" if folder else name,
            [as_text(_get(sentence, "raw"), what="raw") for sentence in sentences],
            None if split is None else as_text(split, what="split"),
        )
    except UnusableError as error:
        return _broken(f"image {number}", error)


def _broken(name: str, error: UnusableError) -> Entry:
    reason = "malformed_row" if error.reason == "mistyped_text" else error.reason
    return Entry(name, problem=problem(reason, f"{name}: {error}"))


def _get(value: Any, key: str) -> Any:
    return value.get(key) if isinstance(value, Mapping) else None


def _keys(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"keys found: {', '.join(map(str, value)) or 'none'}"
    return f"found {type(value).__name__}"
