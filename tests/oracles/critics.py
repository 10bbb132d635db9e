"""Critics, projection blocks and the prior's losses as float64 loops, one pair at a time.

Sources: Liao et al. arXiv 2103.04537, Deep InfoMax arXiv 1808.06670.
"""

import math

from torch import Tensor

Vector = list[float]
Layers = list[tuple[Tensor, Tensor]]


def _affine(x: Vector, weight: Tensor, bias: Tensor | None) -> Vector:
    rows = weight.double().tolist()
    shift = [0.0] * len(rows) if bias is None else bias.double().tolist()
    return [sum(w * v for w, v in zip(row, x, strict=True)) + b for row, b in zip(rows, shift, strict=True)]


def loop_mlp(x: Vector, layers: Layers) -> float:
    """A ReLU network with one output, given (weight, bias) of each layer."""
    for weight, bias in layers[:-1]:
        x = [max(value, 0.0) for value in _affine(x, weight, bias)]
    return _affine(x, *layers[-1])[0]


def loop_concat_scores(images: Tensor, texts: Tensor, layers: Layers) -> list[list[float]]:
    """The network on the concatenation of every image with every text."""
    return [[loop_mlp(v + u, layers) for u in texts.double().tolist()] for v in images.double().tolist()]


def loop_layer_norm(x: Vector, weight: Tensor, bias: Tensor) -> Vector:
    mean = sum(x) / len(x)
    variance = sum((value - mean) ** 2 for value in x) / len(x)
    scale, shift = weight.double().tolist(), bias.double().tolist()
    return [
        w * (value - mean) / math.sqrt(variance + 1e-5) + b
        for value, w, b in zip(x, scale, shift, strict=True)
    ]


def loop_mi_block(rows: Tensor, state: dict[str, Tensor]) -> list[Vector]:
    """Each row through the block with inner layer norm; `state` by parameter name."""
    results = []
    for x in rows.double().tolist():
        hidden = loop_layer_norm(
            _affine(x, state["first.weight"], None), state["norm.weight"], state["norm.bias"]
        )
        hidden = _affine([max(h, 0.0) for h in hidden], state["second.weight"], state["second.bias"])
        shortcut = _affine(x, state["shortcut.weight"], state["shortcut.bias"])
        total = [h + s for h, s in zip(hidden, shortcut, strict=True)]
        results.append(loop_layer_norm(total, state["out_norm.weight"], state["out_norm.bias"]))
    return results


def _slope_squared(x: Vector, layers: Layers, step: float = 1e-6) -> float:
    """Squared length of the gradient by central differences, exact between the kinks of a ReLU network."""
    total = 0.0
    for d in range(len(x)):
        up, down = ([v + sign * step * (k == d) for k, v in enumerate(x)] for sign in (1, -1))
        total += ((loop_mlp(up, layers) - loop_mlp(down, layers)) / (2 * step)) ** 2
    return total


def loop_prior(
    features: Tensor, noise: Tensor, layers: Layers, *, gradient_penalty: float
) -> tuple[Vector, Vector]:
    """Rows of the encoder's and of the discriminator's loss, from probabilities."""
    encoder, discriminator = [], []
    for feature, sample in zip(features.double().tolist(), noise.double().tolist(), strict=True):
        encoded = [1 / (1 + math.exp(-v)) for v in feature]
        is_noise = {
            key: 1 / (1 + math.exp(-loop_mlp(z, layers))) for key, z in (("q", encoded), ("p", sample))
        }
        slopes = _slope_squared(sample, layers) + _slope_squared(encoded, layers)
        encoder.append(-math.log(is_noise["q"]))
        discriminator.append(
            -math.log(is_noise["p"]) - math.log(1 - is_noise["q"]) + gradient_penalty / 2 * slopes
        )
    return encoder, discriminator
