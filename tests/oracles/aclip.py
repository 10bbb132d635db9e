"""A-CLIP's token scores, selection, SimCLR and BYOL as loops, arXiv 2212.08653."""

import math

from torch import Tensor


def loop_class_rows(query: Tensor, key: Tensor) -> list[list[list[float]]]:
    """softmax(q_0 k^T / sqrt(D)) for query [B, H, D] and key [B, H, N, D]."""
    rows = []
    for queries, keys in zip(query.double().tolist(), key.double().tolist(), strict=True):
        heads = []
        for q, ks in zip(queries, keys, strict=True):
            logits = [sum(x * y for x, y in zip(q, k, strict=True)) / math.sqrt(len(q)) for k in ks]
            weights = [math.exp(x - max(logits)) for x in logits]
            heads.append([w / sum(weights) for w in weights])
        rows.append(heads)
    return rows


def loop_scores(class_rows: list[Tensor]) -> list[list[float]]:
    """Mean over layers and heads of each patch's column."""
    layers = [rows.double().tolist() for rows in class_rows]
    num_heads, num_tokens = len(layers[0][0]), len(layers[0][0][0])
    return [
        [
            sum(layer[b][h][p] for layer in layers for h in range(num_heads)) / (len(layers) * num_heads)
            for p in range(1, num_tokens)
        ]
        for b in range(len(layers[0]))
    ]


def loop_kept(scores: Tensor, *, keep_ratio: float, block: int) -> list[list[int]]:
    """Indices of the kept tokens: the best blocks by mean score, ties to the lower index."""
    kept = []
    grid = math.isqrt(scores.shape[1])
    side = grid // block
    for row in scores.double().tolist():
        tokens_of = [
            [
                (m // side * block + i) * grid + m % side * block + j
                for i in range(block)
                for j in range(block)
            ]
            for m in range(side * side)
        ]
        means = [sum(row[p] for p in tokens) / block**2 for tokens in tokens_of]
        best = sorted(range(side * side), key=lambda m: (-means[m], m))
        count = min(int(side * side * keep_ratio) + 1, side * side)
        kept.append(sorted(p for m in best[:count] for p in tokens_of[m]))
    return kept


def loop_mapped(scores: Tensor, source: list[float], view: list[float]) -> list[float]:
    """One map [P] read off at the view's patch centres, bilinear, 0 outside the source."""
    grid = math.isqrt(len(scores))
    row = scores.double().tolist()
    mapped = []
    for i in range(grid):
        for j in range(grid):
            y = (view[0] - source[0] + (i + 0.5) * view[2] / grid) / source[2]
            x = (view[1] - source[1] + (j + 0.5) * view[3] / grid) / source[3]
            mapped.append(_bilinear(row, grid, y, x) if 0 <= y <= 1 and 0 <= x <= 1 else 0.0)
    return mapped


def _bilinear(row: list[float], grid: int, y: float, x: float) -> float:
    u = min(max(y * grid - 0.5, 0), grid - 1)
    v = min(max(x * grid - 0.5, 0), grid - 1)
    top, left = min(int(u), grid - 2), min(int(v), grid - 2)
    a, b = u - top, v - left
    corner = [row[(top + i) * grid + left + j] for i in (0, 1) for j in (0, 1)]
    return (1 - a) * ((1 - b) * corner[0] + b * corner[1]) + a * ((1 - b) * corner[2] + b * corner[3])


def _cosine(u: list[float], w: list[float]) -> float:
    dot = sum(x * y for x, y in zip(u, w, strict=True))
    return dot / math.sqrt(sum(x * x for x in u) * sum(x * x for x in w))


def loop_simclr(a: Tensor, b: Tensor, *, temperature: float) -> float:
    """Each row against all rows of both views but itself, mean over rows and views."""
    views = [a.double().tolist(), b.double().tolist()]
    total = 0.0
    for own, other in (views, views[::-1]):
        for i, anchor in enumerate(own):
            positive = _cosine(anchor, other[i]) / temperature
            everyone = [_cosine(anchor, row) / temperature for row in other]
            everyone += [_cosine(anchor, row) / temperature for j, row in enumerate(own) if j != i]
            total += math.log(sum(math.exp(s) for s in everyone)) - positive
    return total / (2 * len(a))


def loop_byol(prediction: Tensor, target: Tensor) -> float:
    rows = zip(prediction.double().tolist(), target.double().tolist(), strict=True)
    distances = [2 - 2 * _cosine(p, t) for p, t in rows]
    return sum(distances) / len(distances)


def loop_ema(teacher: Tensor, online: Tensor, decay: float) -> list[float]:
    pairs = zip(teacher.double().tolist(), online.double().tolist(), strict=True)
    return [t * decay + o * (1 - decay) for t, o in pairs]
