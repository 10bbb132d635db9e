"""Prototypes: cluster centres of the training split as candidates, each with its own temperature.

B rows of this worker, N rows of all workers (of `PairClusters`: of the training split), K prototypes, C of
them used as columns, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.clustering import concentration, kmeans
from models.keyed_noise import Draw, keyed_uniform
from models.memory import Side
from models.outputs import at_least_float32
from models.pair_table import PairTable


@dataclass(frozen=True)
class PairClusters:
    """A partition of the training pairs with a prototype of either modality per cluster.

    Attributes:
        image_centroids, text_centroids: unit mean of the modality's features in each cluster, [K, D].
        concentration: phi, the temperature of each cluster's column, > 0, [K].
        assignment: cluster of each training row, int64 [N], in the order of `PairBatch.row_index`.
    """

    image_centroids: Tensor
    text_centroids: Tensor
    concentration: Tensor
    assignment: Tensor


@torch.no_grad()
def cluster_pairs(
    images_ND: Tensor,
    texts_ND: Tensor,
    *,
    num_clusters: int,
    temperature: float,
    seed: int,
    num_iterations: int = 20,
) -> PairClusters:
    """Cluster pairs by both embeddings at once.

    Args:
        images_ND, texts_ND: unit embeddings of every training row, in the order of `row_index`.
        num_clusters: K.
        temperature: mean of the concentrations, > 0.
        seed: of the start.
        num_iterations: rounds of k-means at most.

    Raises:
        ValueError: the shapes differ, or as `kmeans` and `concentration`.

    Source: PCL, arXiv 2005.04966, whose rows are images only. Here the concatenation of both embeddings
        is clustered, and each half of a mean is the prototype of its modality.
    """
    if images_ND.shape != texts_ND.shape:
        raise ValueError(
            f"images and texts must have equal shapes, got {tuple(images_ND.shape)} "
            f"and {tuple(texts_ND.shape)}"
        )
    pairs = at_least_float32(torch.cat([images_ND, texts_ND], 1))
    found = kmeans(pairs, num_clusters, seed=seed, num_iterations=num_iterations)
    images_KD, texts_KD = found.means.chunk(2, 1)
    return PairClusters(
        image_centroids=F.normalize(images_KD, dim=1),
        text_centroids=F.normalize(texts_KD, dim=1),
        concentration=concentration(pairs, found.means, found.assignment, temperature=temperature),
        assignment=found.assignment,
    )


class _PrototypeSet(nn.Module):
    """One clustering of the training split, as buffers."""

    image_centroids: Tensor
    text_centroids: Tensor
    concentration: Tensor
    assignment: Tensor

    def __init__(self, num_rows: int, num_clusters: int, width: int) -> None:
        super().__init__()
        self.register_buffer("image_centroids", torch.zeros(num_clusters, width))
        self.register_buffer("text_centroids", torch.zeros(num_clusters, width))
        self.register_buffer("concentration", torch.ones(num_clusters))
        self.register_buffer("assignment", torch.zeros(num_rows, dtype=torch.int64))


class Prototypes(nn.Module):
    """Several clusterings of the training split, replaced as a whole between epochs.

    Source: PCL, arXiv 2005.04966. Deviations: pairs are clustered by both modalities and a query meets
        the other modality's prototypes; pairs of a batch that share a cluster share a column, where the
        release repeats it and so makes a positive its own negative.
    """

    epoch: Tensor

    def __init__(self, num_rows: int, num_clusters: tuple[int, ...], width: int) -> None:
        """
        Args:
            num_rows: of the training split.
            num_clusters: prototypes of each clustering.
            width: of the features.

        Raises:
            ValueError: no clustering, or one with fewer than 2 prototypes or more than rows.
        """
        if not num_clusters or not 2 <= min(num_clusters) <= max(num_clusters) <= num_rows:
            raise ValueError(
                f"num_clusters must each be from 2 to the number of training rows, {num_rows}, "
                f"got {num_clusters}"
            )
        super().__init__()
        self.num_clusters = num_clusters
        self.sets = nn.ModuleList(_PrototypeSet(num_rows, count, width) for count in num_clusters)
        # Of training, counted from 0, for which these were found; -1 before the first.
        self.register_buffer("epoch", torch.full((), -1, dtype=torch.int64))

    @property
    def is_ready(self) -> bool:
        """Whether there are prototypes yet."""
        return int(self.epoch) >= 0

    @torch.no_grad()
    def set_(self, found: Sequence[PairClusters], *, epoch: int = 0) -> None:
        """Replace every clustering; call it with the same clusters on every worker, between steps.

        Args:
            found: one per entry of `num_clusters`, in that order; `cluster_pairs` makes them.
            epoch: of training in which they will be used, >= 0; a resumed run reads it to know whether they
                are still the right ones.

        Raises:
            ValueError: another number of clusterings, other shapes, an assignment out of range, a
                concentration <= 0 or an epoch < 0. Nothing is changed then.
        """
        if epoch < 0:
            raise ValueError(f"epoch must be >= 0, got {epoch}")
        if len(found) != len(self.sets):
            raise ValueError(f"{len(self.sets)} clusterings are needed, got {len(found)}")
        for number, clusters in enumerate(found):
            self._check(number, clusters)
        for number, clusters in enumerate(found):
            for name, buffer in self._set(number).named_buffers():
                buffer.copy_(getattr(clusters, name))
        self.epoch.fill_(epoch)

    def noise(self, draw_keys_N: Tensor) -> tuple[Tensor, ...]:
        """Uniform numbers for the draw of each clustering, [K] each, from the keys of the global batch.

        The order of the keys does not matter.
        """
        batch_key = draw_keys_N.sum(0, keepdim=True)  # wraps modulo 2^64; the keys are hashes
        uniform = keyed_uniform(batch_key, Draw.PROTOTYPES, sum(self.num_clusters))[0]
        return torch.split(uniform, list(self.num_clusters))

    def table(
        self,
        number: int,
        queries_BD: Tensor,
        *,
        side: Side,
        row_index_B: Tensor,
        row_index_N: Tensor,
        uniform_K: Tensor,
        num_others: int,
    ) -> PairTable:
        """Queries of one modality against prototypes of the other.

        Columns: the different prototypes of the global batch, then others drawn at random; the scores
        are divided by each prototype's concentration, so no further temperature applies.

        Args:
            number: of the clustering.
            queries_BD: unit.
            side: modality of the queries.
            row_index_B: position of each query's pair in the training split.
            row_index_N: that of all workers' pairs.
            uniform_K: from `noise`, entry `number`.
            num_others: prototypes drawn at most; fewer when fewer are left.

        Raises:
            ValueError: `set_` was never called.
        """
        if not self.is_ready:
            raise ValueError("the prototypes are not set; cluster the training split before using them")
        chosen = self._set(number)
        columns_C, positive_B = prototype_columns(
            chosen.assignment[row_index_B],
            chosen.assignment[row_index_N],
            uniform_K=uniform_K,
            num_others=num_others,
        )
        centroids = chosen.text_centroids if side == "image" else chosen.image_centroids
        scores_BC = prototype_scores(queries_BD, centroids[columns_C], chosen.concentration[columns_C])
        return PairTable(scores_BC, positive_B)

    def _set(self, number: int) -> _PrototypeSet:
        chosen = self.sets[number]
        assert isinstance(chosen, _PrototypeSet)
        return chosen

    def _check(self, number: int, clusters: PairClusters) -> None:
        for name, buffer in self._set(number).named_buffers():
            given = getattr(clusters, name)
            if given.shape != buffer.shape:
                raise ValueError(
                    f"clustering {number}: {name} must have shape {tuple(buffer.shape)}, "
                    f"got {tuple(given.shape)}"
                )
        count, assignment = self.num_clusters[number], clusters.assignment
        if bool(((assignment < 0) | (assignment >= count)).any()):
            raise ValueError(f"clustering {number}: assignments must be in [0, {count})")
        if not bool((clusters.concentration > 0).all()):
            raise ValueError(f"clustering {number}: concentrations must be > 0")


def prototype_scores(queries_BD: Tensor, prototypes_CD: Tensor, concentration_C: Tensor) -> Tensor:
    """Similarity of queries and prototypes, each column divided by its own temperature, [B, C]."""
    queries = at_least_float32(queries_BD)
    return queries @ prototypes_CD.to(queries).T / concentration_C.to(queries)


def prototype_columns(
    cluster_B: Tensor, cluster_N: Tensor, *, uniform_K: Tensor, num_others: int
) -> tuple[Tensor, Tensor]:
    """Which prototypes are columns, and each query's own among them.

    Args:
        cluster_B: cluster of each query, int64; all of them occur in `cluster_N`.
        cluster_N: clusters of the global batch.
        uniform_K: one uniform number per prototype; those with the smallest are drawn.
        num_others: drawn beside the batch's own, at most.

    Returns:
        Prototypes, int64 [C], the batch's own in ascending order first; and the column of each query's
        own, int64 [B].
    """
    is_own_K = torch.zeros_like(uniform_K, dtype=torch.bool).scatter(0, cluster_N, True)
    own_C = is_own_K.nonzero()[:, 0]
    drawn_K = uniform_K.masked_fill(is_own_K, torch.inf).argsort(stable=True)
    num_drawn = min(num_others, len(uniform_K) - len(own_C))
    columns_C = torch.cat([own_C, drawn_K[:num_drawn]])
    return columns_C, torch.searchsorted(own_C, cluster_B.contiguous())
