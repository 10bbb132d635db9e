"""First look at a source, texts only: repeated ids, words for the tokenizer, rows to train on."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from pipelines.shards import clean_texts
from pipelines.sources.source import PairSource, Piece, map_pieces
from pipelines.tokenizer import word_counts

# Called as (stage, rows done, rows in all).
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Survey:
    """Rows in all, usable training rows, repeats (piece -> positions in it), words of the training texts."""

    num_rows: int
    num_train: int
    duplicates: dict[int, list[int]]
    words: Counter[str]


def survey_texts(source: PairSource, *, pieces: list[Piece], on_progress: Progress) -> Survey:
    """Read every piece without its images; ids and word counts come to the driver, texts do not."""
    words: Counter[str] = Counter()
    row_ids: dict[int, pa.Array] = {}
    num_train = num_seen = 0
    for found in map_pieces(pieces, lambda piece: _piece_texts(source, piece)):
        number = found["piece"][0].as_py()
        row_ids[number] = found["row_ids"].combine_chunks().flatten()
        words.update(json.loads(found["words"][0].as_py()))
        num_train += found["num_train"][0].as_py()
        num_seen += pieces[number].likely_rows
        on_progress("reading texts", num_seen, sum(piece.likely_rows for piece in pieces))
    num_rows = sum(len(ids) for ids in row_ids.values())
    return Survey(num_rows, num_train, find_duplicates([row_ids[piece.number] for piece in pieces]), words)


def find_duplicates(row_ids: list[pa.Array]) -> dict[int, list[int]]:
    """Per piece, the positions of rows whose id came before, in this piece or an earlier one."""
    joined = pa.chunked_array(row_ids, pa.large_string()).combine_chunks()
    codes = joined.dictionary_encode().indices.to_numpy()
    # Codes count up in the order of first appearance, so a row is the first of its id exactly when its
    # code is higher than every code before it.
    highest_before = np.maximum.accumulate(np.concatenate([[-1], codes[:-1]]))
    ends = np.cumsum([len(ids) for ids in row_ids])
    parts = np.split(codes <= highest_before, ends[:-1])
    return {number: np.flatnonzero(part).tolist() for number, part in enumerate(parts) if part.any()}


def _piece_texts(source: PairSource, piece: Piece) -> pa.Table:
    """One row: the ids of a piece, and the words and number of its usable training rows."""
    words: Counter[str] = Counter()
    row_ids: list[str] = []
    num_train = 0
    for table in source.read(piece, with_images=False):
        row_ids += table["row_id"].to_pylist()
        for row in table.select(["split", "captions", "sentences"]).to_pylist():
            captions = clean_texts(row["captions"])
            if row["split"] == "train" and captions:
                num_train += 1
                words.update(word_counts(captions + clean_texts(row["sentences"])))
    values = [[piece.number], [row_ids], [json.dumps(words, sort_keys=True)], [num_train]]
    types = [pa.int64(), pa.large_list(pa.large_string()), pa.large_string(), pa.int64()]
    arrays = [pa.array(value, type_) for value, type_ in zip(values, types, strict=True)]
    return pa.table(arrays, names=["piece", "row_ids", "words", "num_train"])
