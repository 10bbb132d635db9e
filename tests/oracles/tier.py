"""TIER's two entropies as loops, arXiv 2212.06710."""

import math

from torch import Tensor


def _softmax(values: list[float]) -> list[float]:
    top = max(values)
    weights = [math.exp(v - top) for v in values]
    return [w / sum(weights) for w in weights]


def _entropy(values: list[float], eps: float) -> float:
    return -sum((p + eps) * math.log(p + eps) for p in _softmax(values))


def loop_entropies(
    similarities: Tensor,
    *,
    temperature: float = 1.0,
    is_real_token: Tensor | None = None,
    is_kept_patch: Tensor | None = None,
    eps: float = 1e-7,
) -> tuple[list[list[float]], list[list[float]]]:
    """Per pair: the entropy of each real word over patches, and of each kept patch over words."""
    over_patches, over_tokens = [], []
    for n, table in enumerate(similarities.double().tolist()):
        words = [t for t in range(len(table)) if is_real_token is None or bool(is_real_token[n, t])]
        patches = [p for p in range(len(table[0])) if is_kept_patch is None or bool(is_kept_patch[n, p])]
        cut = [[table[t][p] / temperature for p in patches] for t in words]
        over_patches.append([_entropy(row, eps) for row in cut])
        over_tokens.append([_entropy([row[p] for row in cut], eps) for p in range(len(patches))])
    return over_patches, over_tokens


def loop_means(per_pair: list[list[float]]) -> tuple[float, float]:
    """Mean over everything, and mean of the pairs' own means."""
    flat = [value for values in per_pair for value in values]
    means = [sum(values) / len(values) for values in per_pair]
    return sum(flat) / len(flat), sum(means) / len(means)
