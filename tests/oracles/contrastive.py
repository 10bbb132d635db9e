"""Estimators, Hopfield retrieval and region pools as float64 loops over lists.

A table is a list of rows; `positive` names each row's own column and `valid` says which columns take part
besides it. Sources: CLIP arXiv 2103.00020, CLOOB arXiv 2110.11316, Deep InfoMax arXiv 1808.06670.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

Rows = list[list[float]]


@dataclass
class LoopTable:
    """Scores [Q, C] with each row's own column and, optionally, the columns that take part."""

    scores: Tensor
    positive: list[int]
    valid: Tensor | None = None

    def rows(self) -> Iterator[tuple[float, list[float]]]:
        """The own score and the scores of the negatives, row by row."""
        for q, row in enumerate(self.scores.double().tolist()):
            yield row[self.positive[q]], [row[c] for c in self.negatives(q)]

    def negatives(self, q: int) -> list[int]:
        """Columns that are candidates of row `q` and not its own."""
        columns = range(self.scores.shape[1])
        return [
            c
            for c in columns
            if c != self.positive[q] and (self.valid is None or bool(self.valid[q, c].item()))
        ]


def log_sum_exp(values: list[float]) -> float:
    """log of the sum of exp, -inf for nothing."""
    if not values:
        return -math.inf
    top = max(values)
    return top + math.log(sum(math.exp(v - top) for v in values))


def softplus(x: float) -> float:
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def loop_ce(table: LoopTable) -> list[float]:
    """InfoNCE of each row."""
    return [log_sum_exp([own, *negatives]) - own for own, negatives in table.rows()]


def loop_soft_ce(table: LoopTable, targets: Tensor) -> list[float]:
    """Cross-entropy of each row's softmax with target probabilities [Q, C]."""
    values = []
    scores = table.scores.double().tolist()
    for q, wanted in enumerate(targets.double().tolist()):
        taking_part = [table.positive[q], *table.negatives(q)]
        normaliser = log_sum_exp([scores[q][c] for c in taking_part])
        values.append(sum(wanted[c] * (normaliser - scores[q][c]) for c in taking_part))
    return values


def loop_loob(table: LoopTable) -> list[float]:
    """InfoLOOB of each row: the own score is no part of the sum."""
    return [log_sum_exp(negatives) - own for own, negatives in table.rows()]


def loop_jsd(table: LoopTable) -> float:
    attracted, repelled = [], []
    for own, negatives in table.rows():
        attracted.append(softplus(-own))
        repelled += [softplus(s) for s in negatives]
    return sum(attracted) / len(attracted) + sum(repelled) / len(repelled)


def loop_dv(table: LoopTable) -> float:
    positives, everything = [], []
    for own, negatives in table.rows():
        positives.append(own)
        everything += negatives
    return log_sum_exp(everything) - math.log(len(everything)) - sum(positives) / len(positives)


def _kl(a: list[float], b: list[float]) -> float:
    return sum(x * math.log(x / y) for x, y in zip(a, b, strict=True) if x > 0)


def _divergence(target: list[float], scores: list[float], symmetric: bool) -> float:
    normaliser = log_sum_exp(scores)
    found = [math.exp(s - normaliser) for s in scores]
    forward = _kl(target, found)
    return 0.5 * (forward + _kl(found, target)) if symmetric else forward


def loop_kl(table: LoopTable, targets: Tensor, *, symmetric: bool = False) -> list[float]:
    """Divergence of each row's softmax from target probabilities [Q, C]."""
    values = []
    scores, wanted = table.scores.double().tolist(), targets.double().tolist()
    for q in range(len(scores)):
        taking_part = [table.positive[q], *table.negatives(q)]
        values.append(
            _divergence([wanted[q][c] for c in taking_part], [scores[q][c] for c in taking_part], symmetric)
        )
    return values


def loop_relation_kl(table: LoopTable, targets: Tensor, *, symmetric: bool = False) -> list[float]:
    """The same among the negatives alone, both sides renormalised."""
    values = []
    scores, wanted = table.scores.double().tolist(), targets.double().tolist()
    for q in range(len(scores)):
        negatives = table.negatives(q)
        share = sum(wanted[q][c] for c in negatives)
        renormalised = [wanted[q][c] / share for c in negatives]
        values.append(_divergence(renormalised, [scores[q][c] for c in negatives], symmetric))
    return values


def _dot(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def loop_hopfield(state: Tensor, stored: Tensor, *, beta: float) -> Rows:
    """One retrieval step, renormalised."""
    memory = stored.double().tolist()
    retrieved = []
    for query in state.double().tolist():
        logits = [beta * _dot(query, pattern) for pattern in memory]
        normaliser = log_sum_exp(logits)
        weights = [math.exp(x - normaliser) for x in logits]
        mean = [
            sum(w * pattern[d] for w, pattern in zip(weights, memory, strict=True)) for d in range(len(query))
        ]
        length = math.sqrt(sum(x * x for x in mean))
        retrieved.append([x / length for x in mean])
    return retrieved


def loop_cloob(image: Tensor, text: Tensor, *, beta: float, inverse_temperature: float) -> tuple[Rows, Rows]:
    """Score tables of CLOOB's two directions from unit features: images as memory, texts as memory."""
    tables = []
    for anchors, keys in ((image, text), (text, image)):
        rows = loop_hopfield(anchors, anchors, beta=beta)
        columns = loop_hopfield(keys, anchors, beta=beta)
        tables.append([[inverse_temperature * _dot(u, v) for v in columns] for u in rows])
    return tables[0], tables[1]


def loop_pool(similarities: Tensor, *, kind: str, sharpness: float) -> Rows:
    """Patch-text similarities [B, P, N] -> image-text scores [B, N]."""
    pooled = []
    for patches in similarities.double().tolist():
        columns = [list(column) for column in zip(*patches, strict=True)]
        if kind == "max":
            pooled.append([max(column) for column in columns])
        elif kind == "mean":
            pooled.append([sum(column) / len(column) for column in columns])
        else:
            pooled.append(
                [
                    (log_sum_exp([sharpness * x for x in column]) - math.log(len(column))) / sharpness
                    for column in columns
                ]
            )
    return pooled
