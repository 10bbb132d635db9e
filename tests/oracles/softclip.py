"""SoftCLIP's terms as loops, arXiv 2303.17561 (there is no released code)."""

import math

from torch import Tensor

Table = list[list[float]]


def _unit(rows: Tensor) -> Table:
    return [[x / math.sqrt(sum(y * y for y in row)) for x in row] for row in rows.double().tolist()]


def _dots(a: Table, b: Table) -> Table:
    return [[sum(x * y for x, y in zip(u, w, strict=True)) for w in b] for u in a]


def _softmax(values: list[float]) -> list[float]:
    top = max(values)
    weights = [math.exp(v - top) for v in values]
    return [w / sum(weights) for w in weights]


def _kl(a: list[float], b: list[float]) -> float:
    return sum(x * math.log(x / y) for x, y in zip(a, b, strict=True) if x > 0)


def _divergence(a: list[float], b: list[float], symmetric: bool) -> float:
    return 0.5 * (_kl(a, b) + _kl(b, a)) if symmetric else _kl(a, b)


def _without(values: list[float], index: int) -> list[float]:
    return values[:index] + values[index + 1 :]


def loop_soft_targets(similarities: Tensor, *, temperature: float, mixing: float) -> Table:
    """y of every row of a square table."""
    targets = []
    for i, row in enumerate(similarities.double().tolist()):
        q = _softmax([c / temperature for c in row])
        targets.append([(1 - mixing) * (i == j) + mixing * q[j] for j in range(len(row))])
    return targets


def _direction(
    logits: Table,
    similarities: Table,
    *,
    temperature: float,
    mixing: float,
    smoothing: float,
    symmetric: bool,
) -> tuple[float, float, float]:
    hard = soft = relation = 0.0
    n = len(logits)
    for i in range(n):
        p = _softmax(logits[i])
        q = _softmax([c / temperature for c in similarities[i]])
        smoothed = [1 - smoothing if i == j else smoothing / (n - 1) for j in range(n)]
        hard -= sum(y * math.log(p[j]) for j, y in enumerate(smoothed) if y > 0) / n
        y = [(1 - mixing) * (i == j) + mixing * q[j] for j in range(n)]
        soft += _divergence(y, p, symmetric) / n
        scaled = [c / temperature for c in similarities[i]]
        relation += (
            _divergence(_softmax(_without(scaled, i)), _softmax(_without(logits[i], i)), symmetric) / n
        )
    return hard, soft, relation


def loop_softclip(
    image: Tensor,
    text: Tensor,
    *,
    image_guidance: Tensor,
    text_guidance: Tensor,
    inverse_temperature: float,
    guidance_temperature: float,
    mixing: float,
    smoothing: float,
    symmetric: bool,
) -> tuple[float, float, float]:
    """hard, soft and relation terms, each the mean of both directions."""
    v, t, r, a = (_unit(x) for x in (image, text, image_guidance, text_guidance))
    logits = [[inverse_temperature * x for x in row] for row in _dots(v, t)]
    transposed = [list(column) for column in zip(*logits, strict=True)]
    settings = {
        "temperature": guidance_temperature,
        "mixing": mixing,
        "smoothing": smoothing,
        "symmetric": symmetric,
    }
    forward = _direction(logits, _dots(r, r), **settings)
    backward = _direction(transposed, _dots(a, a), **settings)
    hard, soft, relation = (0.5 * (x + y) for x, y in zip(forward, backward, strict=True))
    return hard, soft, relation
