"""Text to token ids: a small BPE trained on the captions, or a tokenizer from a local Hugging Face folder.

A tokenizer travels as one Hugging Face `tokenizers` file that describes itself: its post-processor adds
the start and end tokens and its padding section names the padding token, so any reader of such files
encodes as we do.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final

import numpy as np
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from pipelines.storage import exists, join, read_bytes

PAD, START, END = "<pad>", "<start>", "<end>"

# 256 byte values and three special tokens: every text can be encoded with these alone.
SMALLEST_VOCAB: Final = 259

# The names in use, by family: ours, CLIP, BERT, T5 and Llama. CLIP has no padding token of its own and
# pads with its end token; the mask says what is real.
_KNOWN_NAMES: Final = {
    "pad": (PAD, "[PAD]", "<|pad|>", "<|endoftext|>"),
    "start": (START, "<|startoftext|>", "[CLS]", "<s>", "<bos>", "<|begin_of_text|>"),
    "end": (END, "<|endoftext|>", "[SEP]", "</s>", "<eos>", "<|end_of_text|>"),
}
_CONFIG_KEYS: Final = {
    "pad": ("pad_token",),
    "start": ("bos_token", "cls_token"),
    "end": ("eos_token", "sep_token"),
}


class TextTokenizer:
    """Encodes texts as [start, ..., end] and pads batches; never longer than `max_tokens`."""

    def __init__(self, backend: Tokenizer, *, special: Mapping[str, str], max_tokens: int) -> None:
        """Args:
            special: the tokens that play "pad", "start" and "end".

        Raises:
            ValueError: `max_tokens` < 3, or a special token is not in the vocabulary.
        """
        if max_tokens < 3:
            raise ValueError(f"max_tokens must be >= 3 (start, one token, end), got {max_tokens}")
        ids = {role: backend.token_to_id(token) for role, token in special.items()}
        absent = [f"{role} '{special[role]}'" for role, found in ids.items() if found is None]
        if absent:
            raise ValueError(f"the tokenizer's vocabulary lacks its {', '.join(absent)} token")
        self.max_tokens = max_tokens
        self.pad_id, self.start_id, self.end_id = ids["pad"], ids["start"], ids["end"]
        self._special = dict(special)
        self._backend = backend
        self._backend.no_truncation()
        self._backend.no_padding()

    @property
    def vocab_size(self) -> int:
        """One more than the largest token id: the rows of an embedding table."""
        return max(self._backend.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text, start and end included; a long text loses its tail, never its end token."""
        encodings = self._backend.encode_batch(texts, add_special_tokens=False)
        return [[self.start_id, *e.ids[: self.max_tokens - 2], self.end_id] for e in encodings]

    def pad(self, token_lists: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
        """Pad to the longest of the batch.

        Returns:
            ids int64 [B, T] and is_real bool [B, T].

        Raises:
            ValueError: the batch is empty.
        """
        if not token_lists:
            raise ValueError("cannot pad an empty batch")
        lengths = np.array([len(tokens) for tokens in token_lists])
        is_real = np.arange(lengths.max()) < lengths[:, None]
        ids = np.full(is_real.shape, self.pad_id, dtype=np.int64)
        ids[is_real] = [token for tokens in token_lists for token in tokens]
        return ids, is_real

    def to_bytes(self) -> bytes:
        """The self-describing `tokenizer.json`."""
        copy = Tokenizer.from_str(self._backend.to_str())
        start, end = self._special["start"], self._special["end"]
        copy.post_processor = processors.TemplateProcessing(
            single=f"{start} $A {end}", special_tokens=[(start, self.start_id), (end, self.end_id)]
        )
        copy.enable_padding(pad_id=self.pad_id, pad_token=self._special["pad"])
        return copy.to_str(pretty=True).encode()

    @classmethod
    def from_bytes(cls, data: bytes, *, max_tokens: int, where: str = "the tokenizer") -> TextTokenizer:
        """Read a `tokenizer.json`; special tokens from its own description, else by their common names.

        Raises:
            ValueError: no pad, start or end token can be found; it says which.
        """
        return _from_json(data, settings={}, max_tokens=max_tokens, where=where)


def word_counts(texts: Iterable[str]) -> Counter[str]:
    """How often each lower-case word occurs: all that training needs, and it adds up over workers."""
    return Counter(word for text in texts for word in text.lower().split())


def check_vocab_size(vocab_size: int) -> None:
    """Raises ValueError when a byte-level BPE cannot be as small as that."""
    if vocab_size < SMALLEST_VOCAB:
        raise ValueError(
            f"vocab_size must be >= {SMALLEST_VOCAB} (bytes and special tokens), got {vocab_size}"
        )


def train_tokenizer(words: Mapping[str, int], *, vocab_size: int, max_tokens: int) -> TextTokenizer:
    """Train a byte-level BPE, the same for the same counts in whatever order.

    Args:
        words: word -> count, of `word_counts`.
        vocab_size: upper bound; few words need fewer tokens.

    Raises:
        ValueError: `vocab_size` cannot hold the 256 bytes and 3 special tokens, or there are no words.
    """
    check_vocab_size(vocab_size)
    if not words:
        raise ValueError("no words to train a tokenizer on")
    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    # The prefix space makes a word one token wherever it stands.
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        # <end> must not be id 2: transformers reads a text's feature elsewhere for that id.
        special_tokens=[PAD, END, START],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(_repeated(words), trainer=trainer)
    return TextTokenizer(backend, special={"pad": PAD, "start": START, "end": END}, max_tokens=max_tokens)


def load_tokenizer(uri: str, *, max_tokens: int) -> TextTokenizer:
    """Load a Hugging Face tokenizer from a folder or a `tokenizer.json`; nothing is fetched.

    Raises:
        ValueError: there is no `tokenizer.json`, or it has no pad, start or end token.
    """
    file = uri if uri.endswith(".json") else join(uri, "tokenizer.json")
    if not exists(file):
        raise ValueError(
            f"data.tokenizer: '{file}' does not exist; it must be a tokenizer.json or a folder that holds "
            "one (AutoTokenizer.save_pretrained writes it)"
        )
    settings = {}
    if file != uri and exists(join(uri, "tokenizer_config.json")):
        settings = json.loads(read_bytes(join(uri, "tokenizer_config.json")))
    return _from_json(read_bytes(file), settings=settings, max_tokens=max_tokens, where=f"'{file}'")


def _from_json(data: bytes, *, settings: dict[str, Any], max_tokens: int, where: str) -> TextTokenizer:
    try:
        backend = Tokenizer.from_buffer(data)
    except ValueError as error:
        raise ValueError(f"{where} cannot be read as a tokenizer.json: {error}") from error
    vocab = backend.get_vocab(with_added_tokens=True)
    described = _described_tokens(json.loads(data))
    special: dict[str, str] = {}
    for role, names in _KNOWN_NAMES.items():
        configured = [_token_text(settings.get(key)) for key in _CONFIG_KEYS[role]]
        candidates = [*configured, described.get(role), *names]
        special[role] = next((name for name in candidates if name in vocab), "")
    lacking = [role for role, name in special.items() if not name]
    if lacking:
        raise ValueError(
            f"{where} has no {' and no '.join(lacking)} token; name it in tokenizer_config.json "
            f"({', '.join(_CONFIG_KEYS[role][0] for role in lacking)}) or use a tokenizer that has one"
        )
    return TextTokenizer(backend, special=special, max_tokens=max_tokens)


def _described_tokens(spec: dict[str, Any]) -> dict[str, str]:
    """The special tokens a `tokenizer.json` itself names."""
    found = {}
    if spec.get("padding"):
        found["pad"] = spec["padding"]["pad_token"]
    processor = spec.get("post_processor") or {}
    if "cls" in processor and "sep" in processor:  # RobertaProcessing and BertProcessing: [token, id]
        found["start"], found["end"] = processor["cls"][0], processor["sep"][0]
    parts = processor.get("single") or []
    if parts and "SpecialToken" in parts[0] and "SpecialToken" in parts[-1]:
        found["start"], found["end"] = parts[0]["SpecialToken"]["id"], parts[-1]["SpecialToken"]["id"]
    return found


def _token_text(value: Any) -> str | None:
    # An added token is a string, or an object with its text in "content".
    return value.get("content") if isinstance(value, dict) else value


def _repeated(words: Mapping[str, int]) -> Iterator[str]:
    """Each word as often as it was counted, in a fixed order, some thousand per text."""
    step = 4096
    for word in sorted(words):
        for start in range(0, words[word], step):
            yield " ".join([word] * min(step, words[word] - start))
