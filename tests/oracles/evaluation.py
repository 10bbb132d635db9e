"""Evaluation metrics as plain loops over Python floats; shares no code with the package."""

from __future__ import annotations

import math
from collections.abc import Sequence

Vector = Sequence[float]


def loop_unit(vector: Vector) -> list[float]:
    length = math.sqrt(sum(x * x for x in vector))
    return [x / length for x in vector]


def loop_dot(a: Vector, b: Vector) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def loop_class_embedding(prompts: Sequence[Vector]) -> list[float]:
    """Unit each prompt, mean, unit again."""
    total = [0.0] * len(prompts[0])
    for prompt in prompts:
        for i, x in enumerate(loop_unit(prompt)):
            total[i] += x / len(prompts)
    return loop_unit(total)


def loop_softmax_score(positive: float, negative: float) -> float:
    return math.exp(positive) / (math.exp(positive) + math.exp(negative))


def loop_auroc(scores: Vector, is_positive: Sequence[int], *, tie: float = 0.5) -> float:
    """Share of (positive, negative) pairs in the right order; `tie` is what an equal pair counts."""
    wins, pairs = 0.0, 0
    for s, p in zip(scores, is_positive, strict=True):
        for t, q in zip(scores, is_positive, strict=True):
            if p and not q:
                pairs += 1
                wins += 1.0 if s > t else tie if s == t else 0.0
    return wins / pairs


def loop_order(scores: Vector) -> list[int]:
    """Candidates, best first, equal ones in their order."""
    return sorted(range(len(scores)), key=lambda i: (-scores[i], i))


def loop_first_hit(scores: Vector, targets: set[int]) -> int:
    """Position of the first target in the sorted list."""
    return next(place for place, i in enumerate(loop_order(scores)) if i in targets)


def loop_accuracy(scores: Sequence[Vector], target: Sequence[int], k: int) -> float:
    hits = 0
    for row, right in zip(scores, target, strict=True):
        hits += right in loop_order(row)[:k]
    return hits / len(target)


def loop_mean_per_class_recall(scores: Sequence[Vector], target: Sequence[int]) -> float:
    recalls = []
    for c in sorted(set(target)):
        rows = [row for row, right in zip(scores, target, strict=True) if right == c]
        recalls.append(sum(loop_order(row)[0] == c for row in rows) / len(rows))
    return sum(recalls) / len(recalls)


def loop_text_ranks(images: Sequence[Vector], texts: Sequence[Vector], words: Sequence[str]) -> list[int]:
    """Per image: distinct texts before its own."""
    firsts = [j for j, w in enumerate(words) if w not in words[:j]]
    ranks = []
    for i, image in enumerate(images):
        scores = [loop_dot(image, texts[j]) for j in firsts]
        ranks.append(loop_first_hit(scores, {c for c, j in enumerate(firsts) if words[j] == words[i]}))
    return ranks


def loop_image_ranks(images: Sequence[Vector], texts: Sequence[Vector], words: Sequence[str]) -> list[int]:
    """Per text: images before the first whose text has the same words."""
    ranks = []
    for i, text in enumerate(texts):
        scores = [loop_dot(text, image) for image in images]
        ranks.append(loop_first_hit(scores, {j for j, w in enumerate(words) if w == words[i]}))
    return ranks


def loop_chance_image_recall(num_targets: Sequence[int], k: int) -> float:
    """Mean of 1 - C(N - t, k) / C(N, k)."""
    n = len(num_targets)
    return sum(1 - math.comb(n - t, k) / math.comb(n, k) for t in num_targets) / n


def loop_pointing(
    patches: Sequence[Vector], label: Vector, boxes: Sequence[tuple[float, float, float, float]]
) -> bool:
    """Whether the centre of the best patch of a square grid lies in one of the (x, y, w, h) boxes."""
    grid = math.isqrt(len(patches))
    best = loop_order([loop_dot(patch, label) for patch in patches])[0]
    x, y = (best % grid + 0.5) / grid, (best // grid + 0.5) / grid
    return any(bx <= x < bx + w and by <= y < by + h for bx, by, w, h in boxes)


def loop_percentile(values: Vector, q: float) -> float:
    """Linear interpolation between order statistics."""
    ordered = sorted(values)
    place = q * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def loop_chexzero_interval(replicates: Vector) -> tuple[float, float]:
    """CheXzero's released convention: sorted elements int(0.025 n) - 1 and int(0.975 n) - 1."""
    ordered = sorted(replicates)
    n = len(ordered)
    return ordered[int(0.025 * n) - 1], ordered[int(0.975 * n) - 1]
