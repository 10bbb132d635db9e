"""The planted task's bags and reports, and linear encoders that fill the contract between towers and methods.

An image is a bag of regions full of noise; each of its concepts stands in one region, as a vector of an
image codebook. Its report has one noisy sentence per concept, from an unrelated text codebook.

Shape letters: K bags, P regions, C concepts, M sentences, T words, F fillers, E input width, D joint width.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.outputs import NUM_TAGS, PairBatch, PairOutputs
from models.training_slots import Features

NUM_CONCEPTS, MAX_CONCEPTS, GRID = 20, 3, 3
NUM_REGIONS = GRID**2
INPUT_WIDTH, JOINT_WIDTH = 32, 16
# Codes are standard normal, so these are noise per unit of signal in every coordinate.
REGION_NOISE, SENTENCE_NOISE = 1.1, 0.3
# Words that every text has beside its concepts': over the words of a prompt of one word, GLoRIA's first
# softmax would say nothing.
NUM_FILLERS = 1
NUM_HELD_OUT = 512


@dataclass(frozen=True)
class Bags:
    """Images and their reports.

    Attributes:
        regions: inputs of the image encoder, [K, P, E].
        is_shown: whether a region shows a concept, bool [K, P, C].
        sentences: inputs of the text encoder, one per concept of the bag in no order, so that the first is
            one drawn at random, [K, M, E].
        concepts: of each sentence, int64 [K, M].
        is_sentence: False where a bag has fewer concepts, bool [K, M]; the first is always there.
        draw_keys: int64 [K].
    """

    regions: Tensor
    is_shown: Tensor
    sentences: Tensor
    concepts: Tensor
    is_sentence: Tensor
    draw_keys: Tensor

    def rows(self, rows: slice) -> Bags:
        return Bags(*(getattr(self, f.name)[rows] for f in fields(self)))

    def shuffled(self) -> Bags:
        """Every image with the report of the bag before it."""
        return replace(
            self,
            sentences=self.sentences.roll(1, 0),
            concepts=self.concepts.roll(1, 0),
            is_sentence=self.is_sentence.roll(1, 0),
        )


@dataclass(frozen=True)
class World:
    """What there is to learn, and from what.

    Attributes:
        image_codes, text_codes: a vector per concept, [C, E].
        fillers: of the filler words, [F, E].
        held_out, training: bags.
    """

    image_codes: Tensor
    text_codes: Tensor
    fillers: Tensor
    held_out: Bags
    training: Bags


@lru_cache(maxsize=3)
def make_world(seed: int, num_bags: int) -> World:
    """What a seed is about, the same for every recipe; 50 MB for 600 steps of 48 bags."""
    generator = torch.Generator().manual_seed(seed)
    image_codes, text_codes = torch.randn(2, NUM_CONCEPTS, INPUT_WIDTH, generator=generator)
    fillers = torch.randn(NUM_FILLERS, INPUT_WIDTH, generator=generator)
    held_out, training = (
        _draw_bags(count, image_codes, text_codes, generator=generator) for count in (NUM_HELD_OUT, num_bags)
    )
    return World(image_codes, text_codes, fillers, held_out, training)


def _draw_bags(
    count: int, image_codes_CE: Tensor, text_codes_CE: Tensor, *, generator: torch.Generator
) -> Bags:
    """Bags of 1 to 3 different concepts, each in a region of its own."""

    def different(among: int) -> Tensor:
        return torch.rand(count, among, generator=generator).argsort(1)[:, :MAX_CONCEPTS]

    concepts, places = different(NUM_CONCEPTS), different(NUM_REGIONS)
    num_concepts = torch.randint(1, MAX_CONCEPTS + 1, (count, 1), generator=generator)
    is_sentence = torch.arange(MAX_CONCEPTS) < num_concepts
    is_shown = torch.zeros(count, NUM_REGIONS, NUM_CONCEPTS, dtype=torch.bool)
    is_shown[torch.arange(count)[:, None], places, concepts] = is_sentence
    noise = torch.randn(count, NUM_REGIONS, INPUT_WIDTH, generator=generator)
    blur = torch.randn(count, MAX_CONCEPTS, INPUT_WIDTH, generator=generator)
    return Bags(
        regions=is_shown.float() @ image_codes_CE + REGION_NOISE * noise,
        is_shown=is_shown,
        sentences=text_codes_CE[concepts] + SENTENCE_NOISE * blur,
        concepts=concepts,
        is_sentence=is_sentence,
        draw_keys=torch.randint(1 << 62, (count,), generator=generator),
    )


@dataclass(frozen=True)
class Texts:
    """Inputs of the text encoder for K pairs.

    Attributes:
        texts: of a pair, [K, M, E].
        is_text: False where a pair has fewer, bool [K, M].
        words: of text 0, fillers last, [K, T, E].
        is_word: False at padding, bool [K, T].
    """

    texts: Tensor
    is_text: Tensor
    words: Tensor
    is_word: Tensor


def read(bags: Bags, features: Features, *, fillers_FE: Tensor) -> Texts:
    """What a method reads: as many sentences as it encodes, or the caption, which is their mean."""
    sentences_KME, is_sentence_KM = bags.sentences, bags.is_sentence
    if features.text == "caption":
        words = _with_fillers(sentences_KME, is_sentence_KM, fillers_FE)
        share_KM1 = (is_sentence_KM / is_sentence_KM.sum(1, keepdim=True))[..., None]
        caption_KE = (sentences_KME * share_KM1).sum(1)
        return Texts(caption_KE[:, None], is_sentence_KM[:, :1], *words)
    chosen = slice(min(features.num_texts, MAX_CONCEPTS))
    words = _with_fillers(sentences_KME[:, :1], is_sentence_KM[:, :1], fillers_FE)
    return Texts(sentences_KME[:, chosen], is_sentence_KM[:, chosen], *words)


def prompts(world: World) -> Texts:
    """Every concept as a text without noise."""
    codes_C1E = world.text_codes[:, None]
    is_text_C1 = torch.ones(codes_C1E.shape[:2], dtype=torch.bool)
    return Texts(codes_C1E, is_text_C1, *_with_fillers(codes_C1E, is_text_C1, world.fillers))


def _with_fillers(words_KTE: Tensor, is_word_KT: Tensor, fillers_FE: Tensor) -> tuple[Tensor, Tensor]:
    fillers_KFE = fillers_FE.expand(len(words_KTE), -1, -1)
    return torch.cat([words_KTE, fillers_KFE], 1), F.pad(is_word_KT, (0, len(fillers_FE)), value=True)


class LinearEncoders(nn.Module):
    """Regions, sentences and words into the joint space, in place of towers and projections."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Linear(INPUT_WIDTH, JOINT_WIDTH)
        self.text = nn.Linear(INPUT_WIDTH, JOINT_WIDTH)

    def forward(self, regions_KPE: Tensor, texts: Texts, features: Features) -> PairOutputs:
        """What towers would say; an image is the mean of its regions.

        Prompts belong to no image, so their number may be another than that of the images.
        """
        tokens_KPD, texts_KMD = self.image(regions_KPE), self.text(texts.texts)
        mean_KD, unit_texts_KMD = tokens_KPD.mean(1), F.normalize(texts_KMD, dim=2)
        report_KD = unit_texts_KMD[:, 0]
        if features.report != "first":
            report_KD = F.normalize((texts_KMD * texts.is_text[..., None]).sum(1), dim=1)
        return PairOutputs(
            image_embeds=F.normalize(mean_KD, dim=1)[None],
            text_embeds=unit_texts_KMD.transpose(0, 1),
            report_embeds=report_KD,
            is_text=texts.is_text.T,
            image_tokens=tokens_KPD[None],
            text_tokens=self.text(texts.words),
            is_real_token=texts.is_word,
            image_features=mean_KD[None],
            patch_features=tokens_KPD[None],
        )


def pair_batch(bags: Bags, texts: Texts) -> PairBatch:
    """Keys and labels of the bags; every pair is a group of its own. There are no pixels.

    A word's token is its concept's number plus one; fillers have the last ones.
    """
    count, num_texts = texts.is_text.shape
    num_words = texts.is_word.shape[1] - NUM_FILLERS
    fillers = torch.arange(NUM_CONCEPTS + 1, NUM_CONCEPTS + 1 + NUM_FILLERS).expand(count, -1)
    token_ids_KT = torch.cat([bags.concepts[:, :num_words] + 1, fillers], 1)
    row = torch.arange(count)
    tags = torch.zeros(count, NUM_TAGS)
    tags[:, :NUM_CONCEPTS] = bags.is_shown.any(1).float()
    return PairBatch(
        images=torch.zeros(count, 1, 1, 3, dtype=torch.uint8),
        view_boxes=torch.zeros(1, count, 4),
        teacher_boxes=torch.zeros(count, 4),
        # Only text 0 is read word by word.
        token_ids=token_ids_KT.expand(num_texts, -1, -1),
        is_real_token=texts.is_word.expand(num_texts, -1, -1),
        is_text=texts.is_text.T,
        selection_noise=torch.zeros(1, count, NUM_REGIONS),
        row_keys=row,
        group_keys=row,
        text_keys=bags.concepts[:, 0],
        draw_keys=bags.draw_keys,
        row_index=row,
        tags=tags,
    )
