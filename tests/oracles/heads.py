"""Text, distillation and hash heads, distribution penalties and prompts as float64 loops over lists.

Sources: BERT arXiv 1810.04805, RadTex 2208.03218, MIMKD 2110.15946, MaskCLIP (CVPR 2023), CMIMH 2112.06489,
CoCoNet 2209.07811, CPL 2210.10362.
"""

import math

from torch import Tensor, nn

Vector = list[float]


def _dot(a: Vector, b: Vector) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def _cosine(a: Vector, b: Vector) -> float:
    return _dot(a, b) / math.sqrt(_dot(a, a) * _dot(b, b))


def _unit(a: Vector) -> Vector:
    length = math.sqrt(_dot(a, a))
    return [x / length for x in a]


def _log_softmax(values: Vector) -> Vector:
    top = max(values)
    normaliser = top + math.log(sum(math.exp(v - top) for v in values))
    return [v - normaliser for v in values]


def _centred(values: Vector, eps: float = 1e-5) -> Vector:
    mean = sum(values) / len(values)
    variance = sum((v - mean) ** 2 for v in values) / len(values)
    return [(v - mean) / math.sqrt(variance + eps) for v in values]


def _softplus(x: float) -> float:
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def loop_masked(
    texts: list[list[int]], noise: Tensor, *, mask_id: int, vocab_size: int, share: float
) -> tuple[list[list[int]], list[list[int]]]:
    """Texts without padding -> corrupted texts and the positions to predict."""
    corrupted, targets = [], []
    for text, draws in zip(texts, noise.double().tolist(), strict=True):
        changed, chosen = list(text), []
        for t in range(1, len(text) - 1):
            is_chosen, fate, replacement = draws[t]
            if is_chosen >= share:
                continue
            chosen.append(t)
            if fate < 0.8:
                changed[t] = mask_id
            elif fate < 0.9:
                changed[t] = math.floor(replacement * vocab_size)
        corrupted.append(changed)
        targets.append(chosen)
    return corrupted, targets


def loop_token_rows(
    logits: Tensor, texts: list[list[int]], positions: list[list[int]]
) -> list[tuple[float, int]]:
    """Sum of -log p(token) over the named positions of each text, and their number."""
    rows = []
    for scores, text, wanted in zip(logits.double().tolist(), texts, positions, strict=True):
        rows.append((-sum(_log_softmax(scores[t])[text[t]] for t in wanted), len(wanted)))
    return rows


def loop_caption_rows(forwards: Tensor, backwards: Tensor, texts: list[list[int]]) -> list[Vector]:
    """Sum and count forwards and backwards: scores [b][t] are for the token after position t."""
    rows = []
    for b, text in enumerate(texts):
        row: Vector = []
        for scores, read in ((forwards[b], text), (backwards[b], text[::-1])):
            table = scores.double().tolist()
            losses = [-_log_softmax(table[t])[read[t + 1]] for t in range(len(read) - 1)]
            row += [sum(losses), float(len(losses))]
        rows.append(row)
    return rows


def _projected(vector: Vector, layers: nn.Sequential) -> Vector:
    """Linear, LayerNorm, ReLU, linear."""
    first, norm, _, second = layers
    hidden = [_dot(w, vector) + b for w, b in zip(first.weight.tolist(), first.bias.tolist(), strict=True)]
    scaled = zip(_centred(hidden), norm.weight.tolist(), norm.bias.tolist(), strict=True)
    active = [max(0.0, h * w + b) for h, w, b in scaled]
    return [_dot(w, active) + b for w, b in zip(second.weight.tolist(), second.bias.tolist(), strict=True)]


def loop_critic(student: Vector, teacher: Vector, critic: nn.Module) -> float:
    scale = math.exp(critic.log_scale.item())
    return scale * _cosine(_projected(student, critic.student), _projected(teacher, critic.teacher))


def loop_distil_rows(
    student: list[list[Vector]], teacher: list[list[Vector]], negatives: list[list[Vector]], critic: nn.Module
) -> Vector:
    """Per image: mean over the student's places of softplus(-t+) + softplus(t-).

    A single teacher vector serves all places.
    """
    rows = []
    for places, matched, others in zip(student, teacher, negatives, strict=True):
        total = 0.0
        for p, vector in enumerate(places):
            k = p if len(matched) > 1 else 0
            total += _softplus(-loop_critic(vector, matched[k], critic))
            total += _softplus(loop_critic(vector, others[k], critic))
        rows.append(total / len(places))
    return rows


def loop_code_rows(
    predicted: Tensor,
    teacher: Tensor,
    codes: Tensor,
    *,
    removed: list[list[int]],
    temperatures: tuple[float, float],
) -> list[tuple[float, int]]:
    """Soft-code cross-entropy summed over the removed patches of each image, and their number."""
    book = codes.double().tolist()
    rows = []
    for b, patches in enumerate(removed):
        total = 0.0
        for p in patches:
            student_scores, teacher_scores = (
                [_cosine(_centred(side[b, p].double().tolist()), code) / temperature for code in book]
                for side, temperature in zip((predicted, teacher), temperatures, strict=True)
            )
            target = [math.exp(x) for x in _log_softmax(teacher_scores)]
            total -= _dot(target, _log_softmax(student_scores))
        rows.append((total, len(patches)))
    return rows


def _bernoulli_entropy(p: float) -> float:
    return -sum(q * math.log(q) for q in (p, 1 - p) if q > 0)


def loop_hash_terms(image: Tensor, text: Tensor, *, temperature: float) -> dict[str, float]:
    """Unweighted: contrast, entropy of the mean bit, mean entropy of a code, KL of image from text bits."""
    sides = [image.double().tolist(), text.double().tolist()]
    count, bits = len(sides[0]), len(sides[0][0])
    codes = [[[1.0 if h >= 0 else -1.0 for h in row] for row in side] for side in sides]
    table = [[_dot(a, b) / bits / temperature for b in codes[1]] for a in codes[0]]
    contrast = 0.0
    for i in range(count):
        contrast -= _log_softmax(table[i])[i] + _log_softmax([table[j][i] for j in range(count)])[i]
    probability = [[[_sigmoid(h) for h in row] for row in side] for side in sides]
    balance = sum(
        _bernoulli_entropy(sum(row[k] for row in side) / count) for side in probability for k in range(bits)
    )
    certainty = sum(_bernoulli_entropy(p) for side in probability for row in side for p in row)
    gap = sum(
        p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
        for mine, other in zip(*probability, strict=True)
        for p, q in zip(mine, other, strict=True)
    )
    return {
        "contrast": contrast / (2 * count),
        "balance": balance / 2,
        "certainty": certainty / (2 * count),
        "gap": gap / count,
    }


def loop_hamming(queries: Tensor, candidates: Tensor) -> list[list[int]]:
    rows = candidates.tolist()
    return [[sum(a != b for a, b in zip(q, c, strict=True)) for c in rows] for q in queries.tolist()]


def loop_ranking(distances: Vector) -> list[int]:
    """Nearest first, equal distances in their order."""
    return sorted(range(len(distances)), key=lambda c: (distances[c], c))


def loop_average_precision(distances: Vector, relevant: list[bool], at: int) -> float:
    """Average precision of the first `at`, over the most hits there could be; nan without any relevant."""
    possible = min(at, sum(relevant))
    if possible == 0:
        return math.nan
    hits, total = 0, 0.0
    for rank, c in enumerate(loop_ranking(distances)[:at], start=1):
        if relevant[c]:
            hits += 1
            total += hits / rank
    return total / possible


def loop_sliced_wasserstein(a: Tensor, b: Tensor, directions: Tensor) -> float:
    total = 0.0
    for direction in directions.double().tolist():
        first, second = (sorted(_dot(row, direction) for row in side.double().tolist()) for side in (a, b))
        total += sum((x - y) ** 2 for x, y in zip(first, second, strict=True)) / len(first)
    return total / len(directions)


def loop_disagreement(a: Tensor, b: Tensor) -> float:
    rows = list(zip(a.double().tolist(), b.double().tolist(), strict=True))
    return sum(_cosine(x, y) ** 2 for x, y in rows) / len(rows)


def loop_prompt_terms(
    images: Tensor,
    texts: Tensor,
    labels: list[int],
    *,
    negatives: Tensor,
    interventions: Tensor,
    scale: float,
) -> dict[str, float]:
    """Unweighted terms of CPL: classes, counterfactual, length of the intervention."""
    classes = counterfactual = length = 0.0
    for b, label in enumerate(labels):
        v, negative, u = (side[b].double().tolist() for side in (images, negatives, interventions))
        prompts = texts[b].double().tolist()
        classes -= _log_softmax([scale * _dot(v, t) for t in prompts])[label]
        altered = _unit([(1 - w) * x + w * y for x, y, w in zip(v, negative, u, strict=True)])
        pair = [_dot(prompts[label], v), _dot(prompts[label], altered)]
        counterfactual -= _log_softmax(pair)[0]
        length += math.sqrt(_dot(u, u))
    count = len(labels)
    return {
        "classes": classes / count,
        "counterfactual": counterfactual / count,
        "intervention": length / count,
    }
