"""k-means over the features of a training split, and how tight each cluster is.

The maths of PCL's E-step. Everything here is a function of features and a seed: one process clusters,
and the result is sent to every worker.

N rows, K clusters, D width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from models.outputs import at_least_float32

# Entries of a block of distances: memory stays linear in N whatever K is.
_BLOCK_ENTRIES: Final = 1 << 22
# Steps of the fixed-point numbers that are summed as integers: sums of floats depend on the order of a
# GPU's threads, sums of integers do not. Holds 2^26 rows; means are exact to 2^-37 of the largest value.
_STEPS: Final = 2.0**36
# The same for the weights of the start, whose running sum must stay below 2^63.
_WEIGHT_STEPS: Final = 2.0**32
# Distances below this share of the longest row are rounding: the rows of such a cluster are identical.
_ROUNDING: Final = 1e-6


@dataclass(frozen=True)
class Clusters:
    """A partition of N rows.

    Attributes:
        means: mean of each cluster's rows, not brought to unit length, [K, D].
        assignment: cluster of each row, int64 [N]; every cluster has a row.
    """

    means: Tensor
    assignment: Tensor

    @property
    def centroids(self) -> Tensor:
        """Unit means, [K, D]."""
        return F.normalize(self.means, dim=1)


@torch.no_grad()
def kmeans(features_ND: Tensor, num_clusters: int, *, seed: int, num_iterations: int = 20) -> Clusters:
    """Euclidean k-means from a k-means++ start.

    The start draws from a generator of its own on the CPU and every sum is of integers, so one device
    gives the same clusters again; another may break a near-tie of two distances differently. A cluster
    that loses its rows takes the row farthest from its own mean. Stops early when nothing moves.

    Args:
        features_ND: [N, D]; float32 and float64 keep their precision.
        num_clusters: K, from 1 to N. The start takes K passes over the rows.
        seed: of the start.
        num_iterations: rounds at most, >= 1.

    Raises:
        ValueError: a count out of its range, features that are no finite [N, D].

    Source: PCL, arXiv 2005.04966: Euclidean on unit features, means brought to unit length after the
        last round only (`Clusters.centroids`). The release starts from random rows, restarts five times
        and caps the rows per cluster.
    """
    _check_features(features_ND, num_clusters)
    if num_iterations < 1:
        raise ValueError(f"num_iterations must be >= 1, got {num_iterations}")
    features = at_least_float32(features_ND)
    # Around 0 the expansion of the squared distance loses no digits when all features look alike.
    centred_ND = features - features.mean(0)
    means_KD = centred_ND[_spread_rows(centred_ND, num_clusters, seed=seed)]
    assignment_N = torch.full((len(features),), -1, device=features.device)
    for _ in range(num_iterations):
        nearest_N, distance_N = _nearest(centred_ND, means_KD)
        nearest_N = _without_empty(nearest_N, distance_N, num_clusters)
        if torch.equal(nearest_N, assignment_N):
            break
        assignment_N = nearest_N
        means_KD = cluster_means(centred_ND, assignment_N, num_clusters)
    return Clusters(cluster_means(features, assignment_N, num_clusters), assignment_N)


def cluster_means(features_ND: Tensor, assignment_N: Tensor, num_clusters: int) -> Tensor:
    """Mean of each cluster's rows, [K, D], the same for any order of the rows.

    Raises:
        ValueError: a cluster without rows.
    """
    count_K = torch.bincount(assignment_N, minlength=num_clusters)
    if bool((count_K == 0).any()):
        empty = (count_K == 0).nonzero()[:, 0].tolist()
        raise ValueError(f"{len(empty)} of {num_clusters} clusters have no rows, first {empty[:5]}")
    sums_KD = _sums(features_ND, assignment_N, num_clusters)
    return (sums_KD / count_K[:, None]).to(features_ND.dtype)


@torch.no_grad()
def concentration(
    features_ND: Tensor, means_KD: Tensor, assignment_N: Tensor, *, temperature: float
) -> Tensor:
    """How spread each cluster is, as the temperature of its prototype's column: phi, [K].

    phi_c = mean distance to the mean / log(n_c + 10); a single row says nothing and takes the largest;
    then clipped to the 10th and 90th percentile and scaled to the wanted mean.

    Args:
        features_ND: what was clustered.
        means_KD: means of the clusters, not brought to unit length.
        assignment_N: cluster of each row, int64.
        temperature: mean of phi, > 0.

    Raises:
        ValueError: temperature <= 0, or more than a tenth of the clusters of identical rows, whose phi is 0.

    Source: PCL, arXiv 2005.04966, as released.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be > 0, got {temperature}")
    features, num_clusters = at_least_float32(features_ND), len(means_KD)
    distance_N = torch.cat(
        [
            torch.linalg.vector_norm(rows - means_KD[clusters], dim=1)
            for rows, clusters in _blocks(features, assignment_N)
        ]
    )
    count_K = torch.bincount(assignment_N, minlength=num_clusters)
    mean_K = _sums(distance_N[:, None], assignment_N, num_clusters)[:, 0] / count_K.clamp(min=1)
    longest = torch.linalg.vector_norm(features, dim=1).max()
    spread_K = mean_K.masked_fill((count_K <= 1) | (mean_K <= _ROUNDING * longest), 0.0)
    phi_K = spread_K / (count_K.double() + 10).log()
    phi_K = torch.where(count_K <= 1, phi_K.max(), phi_K)
    phi_K = phi_K.clamp(torch.quantile(phi_K, 0.1), torch.quantile(phi_K, 0.9))
    if not bool((phi_K > 0).all()):
        raise ValueError(
            f"{int((spread_K == 0).sum())} of {num_clusters} clusters hold identical rows only, so their "
            "concentration is 0; lower num_clusters, or the features have collapsed"
        )
    return (temperature * phi_K / phi_K.mean()).to(features.dtype)


def _check_features(features_ND: Tensor, num_clusters: int) -> None:
    if features_ND.ndim != 2:
        raise ValueError(f"features must be [N, D], got shape {tuple(features_ND.shape)}")
    if not 1 <= num_clusters <= len(features_ND):
        raise ValueError(
            f"num_clusters must be from 1 to the number of rows, {len(features_ND)}, got {num_clusters}"
        )
    is_finite_N = features_ND.isfinite().all(1)
    if not bool(is_finite_N.all()):
        raise ValueError(f"{int((~is_finite_N).sum())} of {len(features_ND)} rows have non-finite features")


def _blocks(features_ND: Tensor, others_N: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    num_rows = max(1, _BLOCK_ENTRIES // max(1, features_ND.shape[1]))
    return zip(torch.split(features_ND, num_rows), torch.split(others_N, num_rows), strict=True)


def _spread_rows(features_ND: Tensor, num_clusters: int, *, seed: int) -> Tensor:
    """Rows that start the clusters, int64 [K]: each drawn in proportion to the squared distance to the
    nearest one before it (k-means++)."""
    device, num_rows = features_ND.device, len(features_ND)
    generator = torch.Generator().manual_seed(seed)
    uniform_K = torch.rand(num_clusters, generator=generator, dtype=torch.float64).to(device)
    rows = [(uniform_K[:1] * num_rows).long()]
    squares_N = features_ND.square().sum(1)
    nearest_N = torch.full_like(squares_N, torch.inf)
    for uniform in uniform_K[1:]:
        centre = features_ND[rows[-1][0]]
        distance_N = squares_N - 2 * (features_ND @ centre) + centre.square().sum()
        nearest_N = nearest_N.minimum(distance_N.clamp(min=0))
        nearest_N[rows[-1]] = 0.0
        largest = nearest_N.max().double()
        # Fewer different rows than clusters: any row will do, and empty clusters are filled later.
        weight_N = torch.where(largest > 0, nearest_N.double() / largest, 1.0)
        total_N = (weight_N * _WEIGHT_STEPS).long().cumsum(0)
        drawn = (uniform * total_N[-1]).long()
        rows.append(torch.searchsorted(total_N, drawn[None], right=True).clamp(max=num_rows - 1))
    return torch.cat(rows)


def _nearest(features_ND: Tensor, means_KD: Tensor) -> tuple[Tensor, Tensor]:
    """Nearest mean of each row, int64 [N], and its squared distance [N]."""
    squares_K = means_KD.square().sum(1)
    assignments, distances = [], []
    for rows in torch.split(features_ND, max(1, _BLOCK_ENTRIES // len(means_KD))):
        least = (squares_K - 2 * (rows @ means_KD.T)).min(1)
        assignments.append(least.indices)
        distances.append(least.values + rows.square().sum(1))
    return torch.cat(assignments), torch.cat(distances).clamp(min=0)


def _without_empty(assignment_N: Tensor, distance_N: Tensor, num_clusters: int) -> Tensor:
    """The assignment with the farthest rows moved into clusters that have none."""
    counts = torch.bincount(assignment_N, minlength=num_clusters).tolist()
    empty = [cluster for cluster, count in enumerate(counts) if count == 0]
    if not empty:
        return assignment_N
    clusters = assignment_N.tolist()
    for row in distance_N.argsort(descending=True, stable=True).tolist():
        if counts[clusters[row]] > 1:
            counts[clusters[row]] -= 1
            clusters[row] = empty.pop()
        if not empty:
            break
    return torch.tensor(clusters, device=assignment_N.device)


def _sums(values_ND: Tensor, assignment_N: Tensor, num_clusters: int) -> Tensor:
    """Sum of each cluster's values, float64 [K, D], through integers."""
    largest = values_ND.abs().max().double().clamp(min=torch.finfo(torch.float64).tiny)
    sums_KD = torch.zeros(num_clusters, values_ND.shape[1], dtype=torch.int64, device=values_ND.device)
    for values, clusters in _blocks(values_ND, assignment_N):
        sums_KD.index_add_(0, clusters, (values.double() / largest * _STEPS).round().long())
    return sums_KD.double() / _STEPS * largest
