"""What fills a table besides cosines, as loops: graphs of views, regions chosen by rule."""

import math

from torch import Tensor

Rows = list[list[float]]


def _dot(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def loop_view_graph(
    views: dict[str, Tensor],
    edges: list[tuple[str, str]],
    *,
    is_there: dict[str, Tensor],
    temperature: float,
) -> float:
    """Sum over edges of InfoNCE in both directions, among the pairs that have both ends.

    Source: CMC, arXiv 1906.05849.
    """
    total = 0.0
    for names in edges:
        pairs = [
            number
            for number in range(len(views[names[0]]))
            if all(name not in is_there or bool(is_there[name][number]) for name in names)
        ]
        first, second = ([views[name][number].tolist() for number in pairs] for name in names)
        for queries, keys in ((first, second), (second, first)):
            for own, query in enumerate(queries):
                scores = [_dot(query, key) / temperature for key in keys]
                top = max(scores)
                normaliser = top + math.log(sum(math.exp(score - top) for score in scores))
                total += (normaliser - scores[own]) / len(pairs)
    return total


def loop_region_rule(scores: Tensor, *, rule: str) -> Rows:
    """Scores of patches and texts [B, P, B] -> [B, B], pair i on the diagonal.

    `max`: each text finds its best patch. `select`: the patch that fits the own text best speaks to all.
    `pmi`: so does the patch whose share of the softmax over texts is largest for the own text.
    """
    table = []
    for own, patches in enumerate(scores.tolist()):
        if rule == "max":
            table.append([max(patch[text] for patch in patches) for text in range(len(patches[0]))])
            continue

        def merit(patch: list[float], own: int = own) -> float:
            if rule == "select":
                return patch[own]
            return patch[own] - math.log(sum(math.exp(score) for score in patch))

        table.append(max(patches, key=merit))
    return table


def loop_uniformity(rows: Tensor, *, scale: float) -> float:
    """log of the mean of exp(-scale * squared distance) over all pairs of different rows.

    Source: Wang and Isola, arXiv 2005.10242.
    """
    points = rows.tolist()
    values = [
        math.exp(-scale * sum((x - y) ** 2 for x, y in zip(points[i], points[j], strict=True)))
        for i in range(len(points))
        for j in range(i)
    ]
    return math.log(sum(values) / len(values))
