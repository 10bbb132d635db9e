"""Local-global losses as float64 loops over pairs, locals and globals.

Sources: Deep InfoMax arXiv 1808.06670 with its released code's constants, f-GAN arXiv 1606.00709.
"""

import math
from collections.abc import Callable

from torch import Tensor

# (term of a true pair to maximise, term of a false pair to minimise)
TERMS: dict[str, tuple[Callable[[float], float], Callable[[float], float]]] = {
    "gan": (lambda s: math.log(_sigmoid(s)), lambda s: -math.log(1 - _sigmoid(s))),
    "jsd": (lambda s: math.log(2 * _sigmoid(s)), lambda s: -math.log(2 * (1 - _sigmoid(s)))),
    "x2": (lambda s: s**2, lambda s: -((abs(s) + 1) ** 2) / 2),
    "kl": (lambda s: s, lambda s: math.exp(s - 1)),
    "rkl": (lambda s: -math.exp(-s), lambda s: s - 1),
    "h2": (lambda s: 1 - math.exp(-s), lambda s: math.exp(s) - 1),
    "w1": (lambda s: s, lambda s: s),
}


def _sigmoid(s: float) -> float:
    return 1 / (1 + math.exp(-s))


def _score(locals_: Tensor, globals_: Tensor, *, at: tuple[int, int, int, int]) -> float:
    """Dot product of local n of pair j with global q of pair i; `at` is (j, n, i, q)."""
    j, n, i, q = at
    width = locals_.shape[1]
    return sum(locals_[j, u, n].item() * globals_[i, u, q].item() for u in range(width))


def loop_f_divergence(
    locals_: Tensor, globals_: Tensor, *, measure: str, valid: list[list[bool]] | None = None
) -> float:
    """Mean over false pairs minus mean over true pairs, each the mean over its locals and globals."""
    true_term, false_term = TERMS[measure]
    num_locals, num_globals = locals_.shape[2], globals_.shape[2]
    true, false = [], []
    for j in range(len(locals_)):
        for i in range(len(globals_)):
            if i != j and valid is not None and not valid[j][i]:
                continue
            term = true_term if i == j else false_term
            total = sum(
                term(_score(locals_, globals_, at=(j, n, i, q)))
                for n in range(num_locals)
                for q in range(num_globals)
            )
            (true if i == j else false).append(total / (num_locals * num_globals))
    return sum(false) / len(false) - sum(true) / len(true)


def loop_local_info_nce(
    locals_: Tensor, globals_: Tensor, *, own_image_score: float | None, valid: list[list[bool]] | None = None
) -> float:
    """Softmax cross-entropy of every (pair, local, global) with its candidates listed."""
    num_locals, num_globals = locals_.shape[2], globals_.shape[2]
    values = []
    for i in range(len(globals_)):
        for n in range(num_locals):
            for q in range(num_globals):
                own = _score(locals_, globals_, at=(i, n, i, q))
                candidates = [own]
                for j in range(len(locals_)):
                    if j == i:
                        candidates += [] if own_image_score is None else [own_image_score] * num_locals
                    elif valid is None or valid[j][i]:
                        candidates += [_score(locals_, globals_, at=(j, k, i, q)) for k in range(num_locals)]
                values.append(math.log(sum(math.exp(s) for s in candidates)) - own)
    return sum(values) / len(values)
