"""Tokenizer: deterministic training, fixed special tokens, foreign tokenizer files."""

from __future__ import annotations

import gzip
import json
import random
import re

import numpy as np
import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from pipelines.tokenizer import (
    SMALLEST_VOCAB,
    TextTokenizer,
    load_tokenizer,
    train_tokenizer,
    word_counts,
)

TEXTS = ["an eight at the top left", "a seven, a two and an eight", "the digits two and seven"] * 5


def trained(texts=TEXTS, *, vocab_size=400, max_tokens=16) -> TextTokenizer:
    return train_tokenizer(word_counts(texts), vocab_size=vocab_size, max_tokens=max_tokens)


def foreign(*special: str) -> Tokenizer:
    """A word-level tokenizer with the given special tokens, as another project might save it."""
    words = ["a", "cat", "dog", *special]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


def test_start_words_end():
    tokenizer = trained()
    assert (tokenizer.pad_id, tokenizer.start_id, tokenizer.end_id) == (0, 2, 1)
    [tokens] = tokenizer.encode(["an eight"])
    assert tokens[0] == tokenizer.start_id
    assert tokens[-1] == tokenizer.end_id
    assert len(tokens) == 4  # frequent words are one token each
    assert max(tokens) < tokenizer.vocab_size


def test_case_does_not_matter_and_place_in_the_text_neither():
    tokenizer = trained()
    upper, lower = tokenizer.encode(["An EIGHT", "an eight"])
    assert upper == lower
    [eight], [also_eight] = ([t[1:-1][-1]] for t in tokenizer.encode(["eight", "an eight"]))
    assert eight == also_eight
    assert tokenizer.encode(["seven"]) != tokenizer.encode(["eight"])


def test_any_text_can_be_encoded():
    tokenizer = trained()
    tokens = tokenizer.encode(["naïve 漢字 🐈", "", "x" * 500])
    assert len(tokens[0]) > 4
    assert tokens[1] == [2, 1]


def test_a_long_text_keeps_its_end_token():
    [whole], [cut] = (trained(max_tokens=n).encode([TEXTS[1]]) for n in (64, 5))
    assert cut == [*whole[:4], whole[-1]]
    assert len(whole) > 5


def test_training_depends_on_counts_only():
    shuffled = TEXTS.copy()
    random.Random(0).shuffle(shuffled)
    halves = word_counts(shuffled[:7]) + word_counts(shuffled[7:])
    again = train_tokenizer(halves, vocab_size=400, max_tokens=16)
    assert again.to_bytes() == trained().to_bytes()
    assert trained([*TEXTS, "a nine and a nine"] * 2).to_bytes() != trained().to_bytes()


def test_vocab_size_bounds_the_vocabulary():
    assert trained(vocab_size=SMALLEST_VOCAB).vocab_size == SMALLEST_VOCAB
    assert trained(vocab_size=270).vocab_size == 270
    assert trained(vocab_size=100_000).vocab_size < 400


def test_saved_file_restores_the_tokenizer_and_describes_itself():
    tokenizer = trained()
    data = tokenizer.to_bytes()
    restored = TextTokenizer.from_bytes(data, max_tokens=16)
    assert restored.encode(TEXTS) == tokenizer.encode(TEXTS)
    assert restored.to_bytes() == data
    # Any other reader of the file adds the same start, end and padding.
    plain = Tokenizer.from_buffer(data)
    batch = plain.encode_batch(["an eight", "a seven, a two"])
    ids, is_real = tokenizer.pad(tokenizer.encode(["an eight", "a seven, a two"]))
    assert [e.ids for e in batch] == ids.tolist()
    assert [e.attention_mask for e in batch] == is_real.astype(int).tolist()


def test_pad_goes_to_the_longest_of_the_batch():
    ids, is_real = trained().pad([[1, 5, 2], [1, 2], [1, 7, 8, 2]])
    assert ids.dtype == np.int64
    assert is_real.dtype == np.bool_
    assert ids.tolist() == [[1, 5, 2, 0], [1, 2, 0, 0], [1, 7, 8, 2]]
    assert is_real.tolist() == [[True, True, True, False], [True, True, False, False], [True] * 4]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: trained(vocab_size=258), r"vocab_size must be >= 259 .* got 258"),
        (lambda: trained([]), "no words to train"),
        (lambda: trained(max_tokens=2), "max_tokens must be >= 3"),
        (lambda: trained().pad([]), "cannot pad an empty batch"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("special", "roles"),
    [
        (("<|startoftext|>", "<|endoftext|>"), ("<|endoftext|>", "<|startoftext|>", "<|endoftext|>")),
        (("[PAD]", "[CLS]", "[SEP]"), ("[PAD]", "[CLS]", "[SEP]")),
        (("<s>", "</s>", "<pad>"), ("<pad>", "<s>", "</s>")),
    ],
)
def test_special_tokens_by_their_common_names(tmp_path, special, roles):
    backend = foreign(*special)
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(str(tmp_path), max_tokens=8)
    expected = tuple(backend.token_to_id(token) for token in roles)
    assert (tokenizer.pad_id, tokenizer.start_id, tokenizer.end_id) == expected
    assert tokenizer.encode(["a dog"]) == [[expected[1], 0, 2, expected[2]]]
    assert TextTokenizer.from_bytes(tokenizer.to_bytes(), max_tokens=8).pad_id == expected[0]


def test_special_tokens_from_the_folders_own_config(tmp_path):
    backend = foreign("<void>", "<go>", "<stop>", "<pad>", "<s>", "</s>")
    backend.save(str(tmp_path / "tokenizer.json"))
    names = {"pad_token": "<void>", "bos_token": {"content": "<go>"}, "eos_token": "<stop>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(names))
    tokenizer = load_tokenizer(str(tmp_path), max_tokens=8)
    assert (tokenizer.pad_id, tokenizer.start_id, tokenizer.end_id) == (3, 4, 5)
    # The unusual names survive in the one file that travels.
    restored = TextTokenizer.from_bytes(tokenizer.to_bytes(), max_tokens=8)
    assert restored.encode(["cat"]) == tokenizer.encode(["cat"]) == [[4, 1, 5]]
    assert restored.pad_id == 3
    alone = load_tokenizer(str(tmp_path / "tokenizer.json"), max_tokens=8)
    assert alone.start_id == backend.token_to_id("<s>")


@pytest.mark.parametrize(
    ("special", "lacking"),
    [
        (("<s>", "</s>"), "no pad token"),
        (("<pad>",), "no start and no end token"),
        (("<pad>", "<s>"), "no end"),
    ],
)
def test_a_tokenizer_without_special_tokens_is_refused(tmp_path, special, lacking):
    foreign(*special).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match=lacking):
        load_tokenizer(str(tmp_path), max_tokens=8)


def test_an_absent_or_broken_tokenizer_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"tokenizer\.json' does not exist"):
        load_tokenizer(str(tmp_path), max_tokens=8)
    (tmp_path / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(ValueError, match="cannot be read as a tokenizer"):
        load_tokenizer(str(tmp_path), max_tokens=8)


@pytest.mark.shared_data
def test_the_published_clip_vocabulary(shared_data, tmp_path):
    packed = (shared_data / "clip_bpe_simple_vocab_16e6.txt.gz").read_bytes()
    lines = gzip.decompress(packed).decode().split("\n")
    merges = [tuple(line.split()) for line in lines[1 : 49152 - 256 - 2 + 1]]
    # CLIP lists the printable bytes first, then the others shifted above 255.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(b) for b in printable] + [chr(256 + n) for n in range(256 - len(printable))]
    tokens = letters + [f"{c}</w>" for c in letters] + ["".join(merge) for merge in merges]
    vocab = {token: i for i, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}
    backend = Tokenizer(models.BPE(vocab, merges, end_of_word_suffix="</w>"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.post_processor = processors.RobertaProcessing(
        ("<|endoftext|>", 49407), ("<|startoftext|>", 49406), add_prefix_space=False
    )
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(str(tmp_path), max_tokens=77)
    assert tokenizer.vocab_size == 49408
    assert tokenizer.pad_id == 49407
    # The ids CLIP's own tokenizer gives.
    assert tokenizer.encode(["a photo of a cat"]) == [[49406, 320, 1125, 539, 320, 2368, 49407]]


def test_words_are_split_at_white_space_and_lower_case():
    assert word_counts(["A cat", "a  Cat\n"]) == {"a": 2, "cat": 2}
    assert re.fullmatch(r"\S+", next(iter(word_counts(["one"]))))
