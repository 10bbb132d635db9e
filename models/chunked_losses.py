"""Contrastive losses of a whole batch in linear memory, from unit features alone.

For callers without a recipe; the same rows and reductions as the plain tables, see models/chunks.py.
N pairs, D joint width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from models.chunks import rows_in_chunks
from models.estimators import Estimator, InfoLOOB, InfoNCE
from models.outputs import at_least_float32
from models.pair_table import PairTable
from models.retrieval import hopfield_retrieval


def chunked_info_nce(
    image_ND: Tensor, text_ND: Tensor, *, inverse_temperature: float | Tensor, rows_per_chunk: int | None
) -> Tensor:
    """The CLIP loss: mean of InfoNCE over both directions.

    Args:
        image_ND, text_ND: unit rows, [N, D]; row i of both is a pair.
        inverse_temperature: 1 / temperature, > 0; a scalar tensor gets a gradient.
        rows_per_chunk: rows of a table to hold at once; None holds whole tables.

    Returns:
        Scalar in nats, float32 at least, also under autocast; log(N) when all similarities are equal.

    Raises:
        ValueError: features of different shapes, or N < 2, which leaves no negatives.

    Source: CLIP, arXiv 2103.00020.
    """
    return _both_directions(
        InfoNCE(),
        ((image_ND, text_ND), (text_ND, image_ND)),
        inverse_temperature=inverse_temperature,
        rows_per_chunk=rows_per_chunk,
    )


def chunked_info_loob(
    image_ND: Tensor, text_ND: Tensor, *, inverse_temperature: float | Tensor, rows_per_chunk: int | None
) -> Tensor:
    """Mean of InfoLOOB over both directions, without retrieval.

    Arguments and errors as `chunked_info_nce`.

    Returns:
        Scalar in nats; log(N - 1) when all similarities are equal.

    Source: CLOOB, arXiv 2110.11316; the factor to the authors' loss is at `InfoLOOB`.
    """
    return _both_directions(
        InfoLOOB(),
        ((image_ND, text_ND), (text_ND, image_ND)),
        inverse_temperature=inverse_temperature,
        rows_per_chunk=rows_per_chunk,
    )


def chunked_cloob(
    image_ND: Tensor,
    text_ND: Tensor,
    *,
    beta: float | Tensor,
    inverse_temperature: float | Tensor,
    rows_per_chunk: int | None,
) -> Tensor:
    """The CLOOB loss: InfoLOOB of retrieved features; the associations are computed in chunks as well.

    Args:
        beta: inverse temperature of the retrieval, > 0; others as `chunked_info_nce`.

    Returns:
        Scalar in nats: the mean of both directions, not times the temperature.

    Raises:
        ValueError: as `chunked_info_nce`, or beta <= 0.

    Source: CLOOB, arXiv 2110.11316: images and texts retrieve from the images for the one direction, from
        the texts for the other. The authors' loss is 2 / inverse_temperature times ours.
    """
    _check(image_ND, text_ND)

    def retrieved(memory_ND: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
        return tuple(
            hopfield_retrieval(state_ND, memory_ND, beta=beta, rows_per_chunk=rows_per_chunk)
            for state_ND in states
        )

    with torch.autocast(image_ND.device.type, enabled=False):
        image, text = at_least_float32(image_ND), at_least_float32(text_ND)
        from_images, from_texts = retrieved(image, image, text), retrieved(text, text, image)
    return _both_directions(
        InfoLOOB(),
        ((from_images[0], from_images[1]), (from_texts[0], from_texts[1])),
        inverse_temperature=inverse_temperature,
        rows_per_chunk=rows_per_chunk,
    )


def _both_directions(
    estimator: Estimator,
    directions: tuple[tuple[Tensor, Tensor], ...],
    *,
    inverse_temperature: float | Tensor,
    rows_per_chunk: int | None,
) -> Tensor:
    """Mean over directions of an estimator on queries [N, D] against candidates [N, D]."""
    losses = []
    for queries_ND, candidates_ND in directions:
        _check(queries_ND, candidates_ND)
        with torch.autocast(queries_ND.device.type, enabled=False):
            rows_of = _rows_of_table(
                estimator,
                at_least_float32(queries_ND) * inverse_temperature,
                at_least_float32(candidates_ND),
            )
            rows = rows_in_chunks(rows_of, len(queries_ND), rows_per_chunk)
            losses.append(estimator.reduce(rows))
    return torch.stack(losses).mean()


def _rows_of_table(
    estimator: Estimator, queries_ND: Tensor, candidates_ND: Tensor
) -> Callable[[slice], Tensor]:
    positive_N = torch.arange(len(queries_ND), device=queries_ND.device)

    def rows_of(rows: slice) -> Tensor:
        return estimator.rows(PairTable(queries_ND[rows] @ candidates_ND.T, positive_N[rows]))

    return rows_of


def _check(image_ND: Tensor, text_ND: Tensor) -> None:
    if image_ND.ndim != 2 or image_ND.shape != text_ND.shape:
        raise ValueError(
            f"images and texts must both be [N, D], got {tuple(image_ND.shape)} and {tuple(text_ND.shape)}"
        )
