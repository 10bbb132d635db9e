"""Region, word and sentence pools as float64 loops over lists; pads are dropped before anything is summed.

Sources: Liao et al. arXiv 2103.04537, Wang et al. arXiv 2212.05561, GLoRIA (Huang et al., ICCV 2021).
"""

import math
from collections.abc import Callable

from torch import Tensor

Rows = list[list[float]]


def without_pads(bags: Tensor, is_real: Tensor | None) -> list[Rows]:
    """The real rows of each bag."""
    listed = bags.double().tolist()
    if is_real is None:
        return listed
    return [
        [row for row, real in zip(bag, mask, strict=True) if real]
        for bag, mask in zip(listed, is_real.tolist(), strict=True)
    ]


def _dot(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def _cosine(a: list[float], b: list[float]) -> float:
    return _dot(a, b) / math.sqrt(_dot(a, a) * _dot(b, b))


def _softmax(values: list[float]) -> list[float]:
    top = max(values)
    powers = [math.exp(v - top) for v in values]
    return [p / sum(powers) for p in powers]


def _mix(weights: list[float], vectors: Rows) -> list[float]:
    return [
        sum(w * vector[d] for w, vector in zip(weights, vectors, strict=True)) for d in range(len(vectors[0]))
    ]


def log_mean_exp(values: list[float], sharpness: float) -> float:
    return math.log(sum(math.exp(sharpness * v) for v in values) / len(values)) / sharpness


def log_odds_of_any(logits: list[float]) -> float:
    """Literally: one minus the product of what is missed, as log-odds."""
    missed = math.prod(1 - 1 / (1 + math.exp(-z)) for z in logits)
    return math.log((1 - missed) / missed)


def loop_scores(scores: Tensor, is_region: Tensor | None, pool: Callable[[list[float]], float]) -> Rows:
    """Region-text scores [B, P, N] -> [B, N], each column of each bag through `pool`."""
    return [
        [pool(list(column)) for column in zip(*bag, strict=True)] for bag in without_pads(scores, is_region)
    ]


def loop_select(scores: Tensor, is_region: Tensor | None, *, positive: list[int], rule: str) -> Rows:
    """Scores of the region chosen with the own text."""
    pooled = []
    for bag, own in zip(without_pads(scores, is_region), positive, strict=True):
        evidence = [
            row[own] - (math.log(sum(math.exp(x) for x in row)) if rule == "pmi" else 0.0) for row in bag
        ]
        pooled.append(bag[evidence.index(max(evidence))])
    return pooled


def loop_global_mean(regions: Tensor, texts: Tensor, is_region: Tensor | None) -> Rows:
    pooled = []
    for bag in without_pads(regions, is_region):
        mean = _mix([1 / len(bag)] * len(bag), bag)
        pooled.append([_cosine(mean, text) for text in texts.double().tolist()])
    return pooled


def loop_attention(regions: Tensor, texts: Tensor, is_region: Tensor | None, *, temperature: float) -> Rows:
    pooled = []
    for bag in without_pads(regions, is_region):
        row = []
        for text in texts.double().tolist():
            weights = _softmax([_cosine(region, text) / temperature for region in bag])
            row.append(_cosine(_mix(weights, bag), text))
        pooled.append(row)
    return pooled


def loop_non_local(regions: Tensor, texts: Tensor, is_region: Tensor | None, *, projection: Tensor) -> Rows:
    matrix = projection.double().tolist()
    pooled = []
    for bag in without_pads(regions, is_region):
        projected = [[_dot(line, region) for line in matrix] for region in bag]
        row = []
        for text in texts.double().tolist():
            cosines = [_cosine(region, text) for region in bag]
            critical = projected[cosines.index(max(cosines))]
            weights = _softmax([_dot(critical, other) / math.sqrt(len(matrix)) for other in projected])
            row.append(_cosine(_mix(weights, bag), text))
        pooled.append(row)
    return pooled


def loop_gloria_attention(bag: Rows, words: Rows, *, region_sharpness: float) -> Rows:
    """Attention of each word over one image's regions."""
    over_words = [_softmax([_dot(region, word) for word in words]) for region in bag]
    return [_softmax([region_sharpness * row[t] for row in over_words]) for t in range(len(words))]


def loop_gloria(
    regions: Tensor, words: Tensor, is_word: Tensor, *, sharpness: tuple[float, float], aggregation: str
) -> Rows:
    """Scores [B, N] with (region, word) sharpness."""
    pooled = []
    for bag in without_pads(regions, None):
        row = []
        for text in without_pads(words, is_word):
            attention = loop_gloria_attention(bag, text, region_sharpness=sharpness[0])
            powers = [
                math.exp(sharpness[1] * _cosine(_mix(weights, bag), word))
                for weights, word in zip(attention, text, strict=True)
            ]
            row.append(math.log(sum(powers) / (len(text) if aggregation == "mean" else 1)))
        pooled.append(row)
    return pooled


def loop_sentences(scores: Tensor, is_sentence: Tensor, pool: Callable[[list[float]], float]) -> Rows:
    """Scores [B, N, M] -> [B, N], the real sentences of each report through `pool`."""
    return [
        [
            pool([score for score, real in zip(report, mask, strict=True) if real])
            for report, mask in zip(image, is_sentence.tolist(), strict=True)
        ]
        for image in scores.double().tolist()
    ]
