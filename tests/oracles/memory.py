"""Queues, memories, prototypes and their losses as loops over lists of float64 numbers.

Sources: MoCo arXiv 1911.05722, CMC arXiv 1906.05849, PCL arXiv 2005.04966.
"""

import math

from torch import Tensor

Vector = list[float]


def dot(a: Vector, b: Vector) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def unit(a: Vector) -> Vector:
    length = math.sqrt(dot(a, a))
    return [x / length for x in a]


class LoopQueue:
    """Slots written one row at a time, oldest first."""

    def __init__(self, size: int) -> None:
        self.slots: list[Vector | None] = [None] * size
        self.next = 0

    def push(self, rows: Tensor) -> None:
        for row in rows.double().tolist():
            self.slots[self.next] = row
            self.next = (self.next + 1) % len(self.slots)


def loop_memory(memory: Tensor, index: Tensor, features: Tensor, *, momentum: float) -> list[Vector]:
    """A memory after one batch; a row that occurs again starts from the memory before the batch."""
    before = memory.double().tolist()
    after = [list(row) for row in before]
    for row, feature in zip(index.tolist(), features.double().tolist(), strict=True):
        after[row] = unit(
            [momentum * old + (1 - momentum) * new for old, new in zip(before[row], feature, strict=True)]
        )
    return after


def loop_normaliser(scores: Tensor, *, num_rows: int) -> float:
    """Z: rows of the memory times the mean of exp(score)."""
    values = [math.exp(s) for row in scores.double().tolist() for s in row]
    return num_rows * sum(values) / len(values)


def loop_binary_nce(scores: Tensor, *, z: float, num_rows: int) -> list[float]:
    """Binary NCE of each row by its probabilities; column 0 is the own pair, the others are noise."""
    losses = []
    for own, *noise in scores.double().tolist():
        expected = len(noise) / num_rows
        p_own = math.exp(own) / z
        loss = -math.log(p_own / (p_own + expected))
        for score in noise:
            loss -= math.log(expected / (math.exp(score) / z + expected))
        losses.append(loss)
    return losses


def loop_cross_entropy(own: float, others: list[float]) -> float:
    top = max([own, *others])
    return top + math.log(sum(math.exp(s - top) for s in [own, *others])) - own


def loop_prototype_nce(
    queries: Tensor, prototypes: Tensor, phi: Tensor, *, own: list[int], columns: list[int]
) -> list[float]:
    """Cross-entropy of each query over a set of prototypes; `columns` holds each of them once."""
    centres, temperatures = prototypes.double().tolist(), phi.double().tolist()
    losses = []
    for query, cluster in zip(queries.double().tolist(), own, strict=True):
        scores = {c: dot(query, centres[c]) / temperatures[c] for c in columns}
        losses.append(loop_cross_entropy(scores[cluster], [s for c, s in scores.items() if c != cluster]))
    return losses


def percentile(values: Vector, share: float) -> float:
    """Linear between the two nearest ranks."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def distance(a: Vector, b: Vector) -> float:
    return math.sqrt(sum((x - y) ** 2 for x, y in zip(a, b, strict=True)))


def loop_concentration(features: Tensor, means: Tensor, assignment: Tensor, *, temperature: float) -> Vector:
    rows, clusters = features.double().tolist(), assignment.tolist()
    phi: list[float | None] = []
    for cluster, mean in enumerate(means.double().tolist()):
        distances = [distance(row, mean) for row, c in zip(rows, clusters, strict=True) if c == cluster]
        is_known = len(distances) > 1
        phi.append(sum(distances) / len(distances) / math.log(len(distances) + 10) if is_known else None)
    largest = max(value for value in phi if value is not None)
    filled = [largest if value is None else value for value in phi]
    low, high = percentile(filled, 0.1), percentile(filled, 0.9)
    clipped = [min(max(value, low), high) for value in filled]
    mean_phi = sum(clipped) / len(clipped)
    return [temperature * value / mean_phi for value in clipped]


def loop_means(features: Tensor, assignment: Tensor, num_clusters: int) -> list[Vector]:
    rows, clusters = features.double().tolist(), assignment.tolist()
    means = []
    for cluster in range(num_clusters):
        members = [row for row, c in zip(rows, clusters, strict=True) if c == cluster]
        means.append([sum(column) / len(members) for column in zip(*members, strict=True)])
    return means


def loop_nearest(features: Tensor, means: Tensor) -> list[int]:
    centres = means.double().tolist()
    return [
        min(range(len(centres)), key=lambda c: distance(row, centres[c]))
        for row in features.double().tolist()
    ]


def loop_spread(features: Tensor, assignment: Tensor, num_clusters: int) -> float:
    """Sum of squared distances to the own mean, what k-means lowers."""
    means = loop_means(features, assignment, num_clusters)
    rows = zip(features.double().tolist(), assignment.tolist(), strict=True)
    return sum(distance(row, means[c]) ** 2 for row, c in rows)
