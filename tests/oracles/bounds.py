"""Sigmoid pairs and variational bounds as float64 loops over lists; bounds are to maximise.

Sources: SigLIP arXiv 2303.15343; CMC arXiv 1906.05849; Poole et al. arXiv 1905.06922; MINE arXiv 1801.04062;
SMILE arXiv 1910.06222; Jang et al. arXiv 2212.07050 for the aim of the relaxation.
"""

import math

from tests.oracles.contrastive import LoopTable, Rows, log_sum_exp, softplus


def _mean(values: list[float], weights: list[float]) -> float:
    return sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)


def _weights(table: LoopTable, weights: list[float] | None) -> list[float]:
    return [1.0] * len(table.positive) if weights is None else weights


def loop_sigmoid(table: LoopTable, weights: list[float] | None = None) -> float:
    """Loss: every query's own pair against 1, all its negatives against 0."""
    rows = [
        -math.log(1 / (1 + math.exp(-own))) - sum(math.log(1 - 1 / (1 + math.exp(-s))) for s in negatives)
        for own, negatives in table.rows()
    ]
    return _mean(rows, _weights(table, weights))


def loop_binary_nce(rows: Rows, *, normaliser: float, num_data: int) -> float:
    """CMC's binary loss of raw scores whose column 0 is the own pair, the rest K uniform draws."""
    total = 0.0
    for own, *drawn in rows:
        noise = len(drawn) / num_data
        found = math.exp(own) / normaliser
        total -= math.log(found / (found + noise))
        for score in drawn:
            total -= math.log(noise / (math.exp(score) / normaliser + noise))
    return total / len(rows)


def loop_tuba(table: LoopTable, baseline: list[float], weights: list[float] | None = None) -> float:
    """1 + mean(positive - a) - mean exp(negative - a); a weighs with its row in both means."""
    joint, joint_weights, marginal, marginal_weights = [], [], [], []
    row_weights = _weights(table, weights)
    for a, w, (own, negatives) in zip(baseline, row_weights, table.rows(), strict=True):
        joint.append(own - a)
        joint_weights.append(w)
        marginal += [math.exp(s - a) for s in negatives]
        marginal_weights += [w] * len(negatives)
    return 1 + _mean(joint, joint_weights) - _mean(marginal, marginal_weights)


def loop_nwj(table: LoopTable, weights: list[float] | None = None) -> float:
    return loop_tuba(table, [1.0] * len(table.positive), weights)


def loop_interpolated(
    table: LoopTable, baseline: list[float], *, alpha: float, weights: list[float] | None = None
) -> float:
    """Each query's baseline mixes exp(a) with the mean of its other candidates."""

    def mixed(left: list[float], a: float) -> float:
        log_mean = log_sum_exp(left) - math.log(len(left))
        return log_sum_exp([math.log(alpha) + log_mean, math.log(1 - alpha) + a])

    joint, joint_weights, marginal, marginal_weights = [], [], [], []
    row_weights = _weights(table, weights)
    for a, w, (own, negatives) in zip(baseline, row_weights, table.rows(), strict=True):
        of_row = []
        for left_out in range(len(negatives)):
            left = [own, *(s for j, s in enumerate(negatives) if j != left_out)]
            of_row.append(own - mixed(left, a))
        if of_row:
            joint.append(sum(of_row) / len(of_row))
            joint_weights.append(w)
        marginal += [math.exp(s - mixed(negatives, a)) for s in negatives]
        marginal_weights += [w] * len(negatives)
    return 1 + _mean(joint, joint_weights) - _mean(marginal, marginal_weights)


def loop_smile(table: LoopTable, *, clip: float) -> float:
    """Value of Donsker-Varadhan with clipped negatives."""
    positives, exponentials = [], []
    for own, negatives in table.rows():
        positives.append(own)
        exponentials += [math.exp(min(max(s, -clip), clip)) for s in negatives]
    return sum(positives) / len(positives) - math.log(sum(exponentials) / len(exponentials))


def loop_mine_gradient(table: LoopTable, *, average: float, decay: float) -> tuple[Rows, float]:
    """Gradient of MINE's corrected objective in a square table, and the new average."""
    scores = table.scores.double().tolist()
    size = len(scores)
    num_negatives = size * (size - 1)
    mean = sum(math.exp(s) for _, negatives in table.rows() for s in negatives) / num_negatives
    new = decay * average + (1 - decay) * mean
    gradient = [
        [1 / size if i == j else -math.exp(scores[i][j]) / num_negatives / new for j in range(size)]
        for i in range(size)
    ]
    return gradient, new


def loop_weighted_jsd(table: LoopTable, weights: list[float]) -> float:
    """Jensen-Shannon loss whose means run over pairs that weigh as their rows do."""
    attracted, repelled, repelled_weights = [], [], []
    for w, (own, negatives) in zip(weights, table.rows(), strict=True):
        attracted.append(softplus(-own))
        repelled += [softplus(s) for s in negatives]
        repelled_weights += [w] * len(negatives)
    return _mean(attracted, weights) + _mean(repelled, repelled_weights)


def loop_weighted_dv(table: LoopTable, weights: list[float]) -> float:
    """Donsker-Varadhan loss of weighted rows."""
    positives, exponentials, pair_weights = [], [], []
    for w, (own, negatives) in zip(weights, table.rows(), strict=True):
        positives.append(own)
        exponentials += [math.exp(s) for s in negatives]
        pair_weights += [w] * len(negatives)
    return math.log(_mean(exponentials, pair_weights)) - _mean(positives, weights)


def loop_relax(cosines: Rows, positive: list[int], *, kind: str, limit: float, slope: float) -> Rows:
    """Cosines held at a limit, or slowed above it."""
    relaxed = []
    for own, row in zip(positive, cosines, strict=True):
        values = []
        for column, cosine in enumerate(row):
            if cosine > limit and (kind == "cap_all" or column == own):
                cosine = limit + (slope * (cosine - limit) if kind == "leaky" else 0.0)
            values.append(cosine)
        relaxed.append(values)
    return relaxed
