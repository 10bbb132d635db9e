"""LoVT's parts as loops over numbers, arXiv 2112.02889: attention in both directions, attention pooling, the
local loss within a sample, spatial targets."""

import math

from torch import Tensor

Vector = list[float]
Matrix = list[Vector]


def _dot(a: Vector, b: Vector) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def _linear(x: Vector, weight: Matrix, bias: Vector) -> Vector:
    return [_dot(row, x) + shift for row, shift in zip(weight, bias, strict=True)]


def _softmax(scores: Vector) -> Vector:
    top = max(scores)
    shares = [math.exp(score - top) for score in scores]
    return [share / sum(shares) for share in shares]


def _mix(shares: Vector, vectors: Matrix) -> Vector:
    return [
        sum(s * vector[d] for s, vector in zip(shares, vectors, strict=True)) for d in range(len(vectors[0]))
    ]


def _layer_norm(x: Vector, gain: Vector, shift: Vector, eps: float = 1e-5) -> Vector:
    mean = sum(x) / len(x)
    variance = sum((value - mean) ** 2 for value in x) / len(x)
    return [
        g * (value - mean) / math.sqrt(variance + eps) + s for value, g, s in zip(x, gain, shift, strict=True)
    ]


def loop_cross_attention(
    regions: Matrix, sentences: Matrix, parameters: dict[str, Tensor]
) -> tuple[Matrix, Matrix, Matrix, Matrix]:
    """One pair without pads, LayerNorm: what sentences find in regions, what regions find in sentences, and
    both attentions. Parameters by their names in the module."""
    p = {name: value.detach().double().tolist() for name, value in parameters.items()}

    def apply(name: str, x: Vector) -> Vector:
        return _linear(x, p[f"{name}.weight"], p[f"{name}.bias"])

    def attend(queries: Matrix, others: Matrix) -> tuple[Matrix, Matrix]:
        outputs, attention = [], []
        for query in queries:
            key = apply("key", query)
            shares = _softmax([_dot(key, apply("key", other)) / math.sqrt(len(query)) for other in others])
            found = apply("output", _mix(shares, [apply("value", other) for other in others]))
            outputs.append(_layer_norm(found, p["norm.weight"], p["norm.bias"]))
            attention.append(shares)
        return outputs, attention

    at_sentences, over_regions = attend(sentences, regions)
    at_regions, over_sentences = attend(regions, sentences)
    return at_sentences, at_regions, over_regions, over_sentences


def loop_attention_pool(
    tokens: Matrix, parameters: dict[str, Tensor], num_heads: int
) -> tuple[Vector, Vector]:
    """One bag without pads: pooled feature, attention averaged over heads."""
    p = {name: value.detach().double().tolist() for name, value in parameters.items()}
    width, size = len(tokens[0]), len(tokens[0]) // num_heads
    weight, bias = p["attention.in_proj_weight"], p["attention.in_proj_bias"]

    def part(number: int, x: Vector) -> Vector:
        rows = slice(number * width, (number + 1) * width)
        return _linear(x, weight[rows], bias[rows])

    query = part(0, [sum(token[d] for token in tokens) / len(tokens) for d in range(width)])
    keys, values = [part(1, token) for token in tokens], [part(2, token) for token in tokens]
    joined: Vector = []
    mean_shares = [0.0] * len(tokens)
    for head in range(num_heads):
        of_head = slice(head * size, (head + 1) * size)
        shares = _softmax([_dot(query[of_head], key[of_head]) / math.sqrt(size) for key in keys])
        joined += _mix(shares, [value[of_head] for value in values])
        mean_shares = [m + s / num_heads for m, s in zip(mean_shares, shares, strict=True)]
    return _linear(joined, p["attention.out_proj.weight"], p["attention.out_proj.bias"]), mean_shares


def loop_local_loss(
    features: Tensor,
    attended: Tensor,
    *,
    temperature: float,
    weights: Tensor,
    is_real: Tensor | None = None,
    targets: Matrix | None = None,
) -> tuple[float, float]:
    """Both directions of the local loss: a weighted mean within each sample, then the mean over samples."""
    totals = [0.0, 0.0]
    for b in range(len(features)):
        real = [n for n in range(features.shape[1]) if is_real is None or bool(is_real[b, n])]
        for direction, (query, other) in enumerate(((features, attended), (attended, features))):
            queries, others = query[b].double().tolist(), other[b].double().tolist()
            loss = 0.0
            for n in real:
                cosines = {
                    k: _dot(queries[n], others[k]) / math.hypot(*queries[n]) / math.hypot(*others[k])
                    for k in real
                }
                share = {k: float(k == n) if targets is None else targets[n][k] for k in real}
                log_sum = math.log(sum(math.exp(cosine / temperature) for cosine in cosines.values()))
                wanted = sum(share[k] * cosines[k] for k in real) / sum(share.values()) / temperature
                loss += float(weights[b, n]) * (log_sum - wanted)
            totals[direction] += loss / sum(float(weights[b, n]) for n in real) / len(features)
    return totals[0], totals[1]


def loop_spatial_targets(grid: tuple[int, int], threshold: float, sharpness: float) -> Matrix:
    """Rows of neighbours within the threshold, the nearer the more; distances in grid diagonals."""
    cells = [(i, j) for i in range(grid[0]) for j in range(grid[1])]
    rows = []
    for i, j in cells:
        distances = [math.hypot(i - k, j - m) / math.hypot(*grid) for k, m in cells]
        shares = [math.exp(-sharpness * d) if d <= threshold + 1e-12 else 0.0 for d in distances]
        rows.append([share / sum(shares) for share in shares])
    return rows
