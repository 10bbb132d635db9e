"""k-means and the concentration of clusters: stored values, loops, planted clusters, refusals."""

import itertools

import pytest
import torch
import torch.nn.functional as F

import models.clustering
from models.clustering import cluster_means, concentration, kmeans
from models.prototypes import PairClusters, Prototypes, cluster_pairs
from tests.golden_files import assert_golden, tensors
from tests.oracles.memory import loop_concentration, loop_means, loop_nearest, loop_spread


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def planted(num_clusters=6, per_cluster=12, *, width=8, noise=0.05, seed=0, dtype=torch.float64):
    """Unit rows around far centres, shuffled, and the cluster of each."""
    centres = F.normalize(draw(num_clusters, width, seed=seed), dim=1)
    truth = torch.arange(num_clusters).repeat_interleave(per_cluster)
    order = torch.randperm(len(truth), generator=torch.Generator().manual_seed(seed + 1))
    rows = F.normalize(centres[truth] + noise * draw(len(truth), width, seed=seed + 2), dim=1)
    return rows[order].to(dtype), truth[order]


def same_partition(a, b):
    return torch.equal(a[:, None] == a, b[:, None] == b)


def loop(values):
    return torch.tensor(values, dtype=torch.float64)


def test_concentration_equals_the_release():
    golden = tensors("pcl_official_density")
    features, means, own = golden["features"], golden["raw_centroids"], golden["im2cluster"]
    found = concentration(features.double(), means.double(), own, temperature=golden["temperature"].item())
    # the release's distances are in float32
    assert_golden(found, golden["phi"], atol=1e-6)
    assert_golden(F.normalize(means.double(), dim=1), golden["centroids"])
    assert loop_nearest(features, means) == own.tolist()
    of_unit_means = concentration(features.double(), golden["centroids"], own, temperature=0.2)
    assert (of_unit_means - golden["phi"]).abs().max() > 1e-3


@pytest.mark.parametrize("num_clusters", [2, 5, 11])
def test_concentration_equals_the_loop(num_clusters):
    features = draw(30, 4, seed=num_clusters)
    own = torch.randint(num_clusters - 1, (30,), generator=torch.Generator().manual_seed(1))
    own[7] = num_clusters - 1  # one cluster of a single row, which takes the largest
    means = draw(num_clusters, 4, seed=2)
    found = concentration(features, means, own, temperature=0.3)
    assert_golden(found, loop(loop_concentration(features, means, own, temperature=0.3)))
    assert_golden(found.mean(), loop(0.3))
    assert found[-1] == found.max()


def test_concentration_grows_with_the_spread_of_a_cluster():
    own = torch.arange(2).repeat_interleave(40)
    features = draw(80, 3)
    features[:40] *= 0.2
    found = concentration(features, cluster_means(features, own, 2), own, temperature=0.2)
    assert found[1] > 2 * found[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_planted_clusters_are_found(dtype):
    features, truth = planted(dtype=dtype)
    found = kmeans(features, 6, seed=0)
    assert same_partition(found.assignment, truth)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-10
    assert_golden(found.means, loop(loop_means(features, found.assignment, 6)), atol=tolerance)
    assert_golden(found.centroids.norm(dim=1), torch.ones(6), atol=tolerance)
    assert found.means.norm(dim=1).max() < 0.9999
    assert found.means.dtype == dtype
    assert not same_partition(found.assignment, truth.roll(1))


def test_features_that_look_alike_are_told_apart():
    """Collapsed features: float32 squares of the raw rows would leave no digits for their distances."""
    features, truth = planted(dtype=torch.float64)
    close = (F.normalize(draw(1, 8, seed=5), dim=1) + 1e-5 * features).float()
    assert same_partition(kmeans(close, 6, seed=0).assignment, truth)


def test_result_is_a_fixed_point():
    features = draw(60, 3, seed=4)
    found = kmeans(features, 5, seed=1, num_iterations=200)
    assert loop_nearest(features, found.means) == found.assignment.tolist()
    assert_golden(found.means, loop(loop_means(features, found.assignment, 5)))
    once = kmeans(features, 5, seed=1, num_iterations=1)
    assert loop_nearest(features, once.means) != once.assignment.tolist()
    assert loop_spread(features, once.assignment, 5) > loop_spread(features, found.assignment, 5)


def test_best_of_a_few_starts_is_the_best_of_all_partitions():
    features = draw(9, 2, seed=8)
    partitions = (torch.tensor(p) for p in itertools.product(range(2), repeat=9) if 0 < sum(p) < 9)
    best = min(loop_spread(features, own, 2) for own in partitions)
    found = [loop_spread(features, kmeans(features, 2, seed=s).assignment, 2) for s in range(5)]
    assert min(found) == pytest.approx(best, abs=1e-12)


def test_start_spreads_over_the_clusters():
    """Uniform starts would miss one of 6 equal clusters with probability 1 - 6! / 6^6 = .985."""
    features, truth = planted(noise=0.01)
    starts = [models.clustering._spread_rows(features, 6, seed=seed) for seed in range(20)]
    num_complete = sum(len(truth[rows].unique()) == 6 for rows in starts)
    assert num_complete >= 18
    assert len({tuple(rows.tolist()) for rows in starts}) > 15


def test_seed_decides_alone():
    features = draw(80, 4, seed=3)
    torch.manual_seed(0)
    one = kmeans(features, 8, seed=5)
    torch.manual_seed(1)
    again, other = kmeans(features, 8, seed=5), kmeans(features, 8, seed=6)
    assert torch.equal(one.means, again.means)
    assert torch.equal(one.assignment, again.assignment)
    assert not same_partition(one.assignment, other.assignment)


def test_size_of_the_blocks_changes_nothing(monkeypatch):
    features, _ = planted()
    own = torch.arange(len(features)) % 6
    whole = kmeans(features, 6, seed=2)
    whole_phi = concentration(features, whole.means, own, temperature=0.2)
    monkeypatch.setattr(models.clustering, "_BLOCK_ENTRIES", 40)
    blocks = kmeans(features, 6, seed=2)
    assert torch.equal(whole.assignment, blocks.assignment)
    assert torch.equal(whole.means, blocks.means)
    assert torch.equal(whole_phi, concentration(features, whole.means, own, temperature=0.2))


def test_order_of_the_rows_does_not_move_the_means():
    features, own = draw(50, 3), torch.arange(50) % 4
    order = torch.randperm(50, generator=torch.Generator().manual_seed(0))
    means = cluster_means(features, own, 4)
    assert torch.equal(cluster_means(features[order], own[order], 4), means)
    assert not torch.equal(cluster_means(features[order], own, 4), means)


@pytest.mark.parametrize(("num_different", "num_clusters"), [(1, 4), (3, 7), (12, 12)])
def test_every_cluster_has_a_row(num_different, num_clusters):
    features = draw(num_different, 3).repeat(12 // num_different, 1)
    for seed in range(3):
        found = kmeans(features, num_clusters, seed=seed)
        assert found.assignment.bincount(minlength=num_clusters).min() >= 1
        assert found.means.isfinite().all()


def test_an_empty_cluster_takes_the_farthest_row():
    assignment = torch.tensor([0, 0, 0, 2, 2])
    distance = torch.tensor([0.1, 0.9, 0.2, 0.5, 0.3])
    filled = models.clustering._without_empty(assignment, distance, 4)
    assert filled.tolist() == [0, 3, 0, 1, 2]


def test_a_lone_row_is_not_taken_from_its_cluster():
    assignment, distance = torch.tensor([0, 1, 1]), torch.tensor([9.0, 0.1, 0.2])
    assert models.clustering._without_empty(assignment, distance, 3).tolist() == [0, 1, 2]


def test_pairs_are_clustered_by_both_modalities():
    """Images tell two groups apart, texts two others; only both together tell four."""
    group = torch.arange(4).repeat(10)
    images = F.normalize(torch.eye(3)[group // 2] + 0.05 * draw(40, 3, seed=1).float(), dim=1)
    texts = F.normalize(torch.eye(3)[group % 2] + 0.05 * draw(40, 3, seed=2).float(), dim=1)
    found = cluster_pairs(images, texts, num_clusters=4, temperature=0.2, seed=0)
    assert same_partition(found.assignment, group)
    assert not same_partition(kmeans(images, 4, seed=0).assignment, group)
    for centroids, features in ((found.image_centroids, images), (found.text_centroids, texts)):
        expected = F.normalize(loop(loop_means(features, found.assignment, 4)), dim=1)
        assert_golden(centroids, expected, atol=1e-6)
    pairs = torch.cat([images, texts], 1)
    means = loop(loop_means(pairs, found.assignment, 4))
    assert_golden(
        found.concentration,
        loop(loop_concentration(pairs, means, found.assignment, temperature=0.2)),
        atol=1e-6,
    )


def test_found_clusters_fit_the_prototypes():
    images, texts = (F.normalize(draw(30, 5, seed=s).float(), dim=1) for s in (0, 1))
    found = [cluster_pairs(images, texts, num_clusters=k, temperature=0.2, seed=0) for k in (3, 6)]
    prototypes = Prototypes(30, (3, 6), 5)
    prototypes.set_(found)
    assert prototypes.is_ready
    index = torch.arange(4)
    table = prototypes.table(
        1,
        images[:4],
        side="image",
        row_index_B=index,
        row_index_N=index,
        uniform_K=prototypes.noise(index)[1],
        num_others=9,
    )
    assert table.scores.shape == (4, 6)
    own = found[1].assignment[:4]
    expected = (images[:4] * found[1].text_centroids[own]).sum(1) / found[1].concentration[own]
    assert_golden(table.positive_scores, expected, atol=1e-5)
    with pytest.raises(ValueError, match="clustering 0: image_centroids must have shape"):
        prototypes.set_(found[::-1])


def test_clusters_are_detached():
    images = F.normalize(draw(12, 3), dim=1).requires_grad_()
    found = cluster_pairs(images, images, num_clusters=2, temperature=0.2, seed=0)
    assert isinstance(found, PairClusters)
    assert not any(value.requires_grad for value in vars(found).values())


ROWS = draw(5, 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: kmeans(ROWS, 6, seed=0), "from 1 to the number of rows, 5, got 6"),
        (lambda: kmeans(ROWS, 0, seed=0), "from 1 to the number of rows, 5, got 0"),
        (lambda: kmeans(ROWS[0], 1, seed=0), r"must be \[N, D\], got shape \(3,\)"),
        (lambda: kmeans(ROWS, 2, seed=0, num_iterations=0), "num_iterations must be >= 1, got 0"),
        (
            lambda: kmeans(ROWS.index_fill(0, torch.tensor(3), torch.nan), 2, seed=0),
            "1 of 5 rows have non-finite features",
        ),
        (
            lambda: cluster_means(ROWS, torch.tensor([0, 0, 3, 3, 0]), 4),
            r"2 of 4 clusters have no rows, first \[1, 2\]",
        ),
        (
            lambda: concentration(ROWS, ROWS[:2], torch.tensor([0, 1, 0, 1, 0]), temperature=0.0),
            "temperature must be > 0, got 0.0",
        ),
        (
            lambda: concentration(ROWS, ROWS, torch.arange(5), temperature=0.2),
            "5 of 5 clusters hold identical rows only",
        ),
        (
            lambda: cluster_pairs(ROWS, ROWS[:4], num_clusters=2, temperature=0.2, seed=0),
            r"equal shapes, got \(5, 3\) and \(4, 3\)",
        ),
        (
            lambda: cluster_pairs(
                ROWS[:1].repeat(9, 1), ROWS[:1].repeat(9, 1), num_clusters=3, temperature=0.2, seed=0
            ),
            "3 of 3 clusters hold identical rows only.*or the features have collapsed",
        ),
    ],
)
def test_what_cannot_be_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
