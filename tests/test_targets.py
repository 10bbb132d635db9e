"""Target rows, their temperature and the KL losses: stored values, limits, refusals."""

import math

import pytest
import torch
import torch.nn.functional as F

from models.targets import (
    bisect_temperature,
    cross_entropy_rows,
    is_positive,
    kl_rows,
    mean_off_diagonal_mass,
    negative_targets,
    same_group_log_targets,
    smoothed_over_all,
    smoothed_over_negatives,
    soft_targets,
    spatial_log_targets,
    symmetric_kl_rows,
    temperature_from_off_diagonal_mass,
)
from tests.golden_files import assert_golden, leaf, tensors
from tests.oracles.lovt import loop_spatial_targets
from tests.oracles.softclip import loop_soft_targets

LOSSES = ["softclip_loss_0", "softclip_loss_2"]


def draw(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def table(n, *, seed=0, width=6):
    rows = F.normalize(draw(n, width, seed=seed), dim=1)
    return rows @ rows.T, torch.arange(n)


@pytest.mark.parametrize("name", LOSSES)
def test_target_rows_equal_the_stored_ones(name):
    golden = tensors(name)
    tau, beta = golden["tau_intra"].item(), golden["beta"].item()
    for guidance, direction in (("r", "v2t"), ("a", "t2v")):
        unit = F.normalize(golden[guidance], dim=1)
        similarities, own = unit @ unit.T, torch.arange(len(unit))
        assert_golden(
            soft_targets(similarities, own, temperature=tau, mixing=1.0).exp(), golden[f"q_{direction}"]
        )
        assert_golden(
            soft_targets(similarities, own, temperature=tau, mixing=beta).exp(), golden[f"y_{direction}"]
        )
        negatives = negative_targets(similarities, own, temperature=tau).exp()
        assert_golden(negatives, golden[f"qneg_{direction}"])


def test_divergence_splits_into_the_positive_and_the_negatives():
    golden = tensors("softclip_identity")
    v, t, r = (F.normalize(golden[key], dim=1) for key in "vtr")
    tau, beta, own = golden["tau_intra"].item(), golden["beta"].item(), torch.arange(len(v))
    logits, similarities = golden["scale"] * v @ t.T, r @ r.T
    log_y = soft_targets(similarities, own, temperature=tau, mixing=beta)
    kl = kl_rows(log_y, logits)
    relation = kl_rows(
        negative_targets(similarities, own, temperature=tau), logits, ~is_positive(logits, own)
    )
    weight = 1 - log_y.diagonal().exp()
    assert_golden(kl, golden["kl"])
    assert_golden(relation, golden["kl_negatives"])
    assert_golden(weight, golden["weight"], atol=1e-12)
    assert_golden(kl - weight * relation, golden["kl_binary"])
    assert (kl - relation - golden["kl_binary"]).abs().min() > 0.1


def test_label_smoothing_equals_both_stored_conventions():
    golden = tensors("softclip_label_smoothing")
    logits, own, alpha = golden["logits"], torch.arange(5), golden["alpha"].item()
    over_negatives = smoothed_over_negatives(logits, own, smoothing=alpha)
    over_all = smoothed_over_all(logits, own, smoothing=alpha)
    assert_golden(cross_entropy_rows(over_negatives, logits).mean(), golden["loss_negatives_only"])
    assert_golden(cross_entropy_rows(over_all, logits).mean(), golden["loss_torch_convention"])
    assert_golden(F.cross_entropy(logits, own, label_smoothing=alpha), golden["loss_torch_convention"])
    assert abs(golden["loss_torch_convention"] - golden["loss_negatives_only"]) > 1e-3


def test_saturation_equals_the_stored_table_and_the_closed_form_inverts_it():
    for n, tau, cosine, own_share in tensors("softclip_saturation")["table"].tolist():
        row = torch.full((1, int(n)), cosine, dtype=torch.float64)
        row[0, 0] = 1.0
        mass = mean_off_diagonal_mass(row, torch.tensor([0]), temperature=tau).item()
        assert 1 - mass == pytest.approx(own_share, abs=1e-12)
        if 1e-3 < own_share < 1 - 1e-3:
            found = temperature_from_off_diagonal_mass(mass, num_candidates=int(n), typical_cosine=cosine)
            assert found == pytest.approx(tau, rel=1e-9)


def test_a_shared_temperature_collapses_the_targets_to_the_own_pair():
    similarities, own = table(64)
    sharp = mean_off_diagonal_mass(similarities, own, temperature=0.01)
    soft = mean_off_diagonal_mass(
        similarities, own, temperature=bisect_temperature(similarities, own, mass=0.5)
    )
    assert sharp < 0.2 < 0.499 < soft < 0.501


@pytest.mark.parametrize("mass", [0.05, 0.5, 0.8])
def test_bisection_reaches_the_wanted_mass(mass):
    similarities, own = table(9)
    temperature = bisect_temperature(similarities, own, mass=mass)
    assert not temperature.requires_grad
    assert mean_off_diagonal_mass(similarities, own, temperature=temperature).item() == pytest.approx(
        mass, 1e-8
    )
    other = bisect_temperature(similarities, own, mass=mass + 0.01)
    assert other > temperature


def test_bisection_agrees_with_the_closed_form_on_constant_cosines():
    similarities = torch.full((7, 7), 0.3, dtype=torch.float64).fill_diagonal_(1.0)
    expected = temperature_from_off_diagonal_mass(0.4, num_candidates=7, typical_cosine=0.3)
    assert bisect_temperature(similarities, torch.arange(7), mass=0.4).item() == pytest.approx(expected, 1e-9)


def test_a_slice_of_rows_has_the_numbers_of_the_whole_table():
    similarities, own = table(6)
    logits, part = draw(6, 6, seed=5), slice(2, 5)
    whole = soft_targets(similarities, own, temperature=0.2, mixing=0.4)
    rows = soft_targets(similarities[part], own[part], temperature=0.2, mixing=0.4)
    torch.testing.assert_close(rows, whole[part])
    torch.testing.assert_close(kl_rows(rows, logits[part]), kl_rows(whole, logits)[part])
    assert not torch.allclose(soft_targets(similarities[part], own[:3], temperature=0.2, mixing=0.4), rows)


@pytest.mark.parametrize("mixing", [0.0, 0.3, 1.0])
def test_targets_are_distributions_and_equal_the_loop(mixing):
    similarities, own = table(5)
    targets = soft_targets(similarities, own, temperature=0.1, mixing=mixing).exp()
    expected = loop_soft_targets(similarities, temperature=0.1, mixing=mixing)
    torch.testing.assert_close(targets, torch.tensor(expected, dtype=torch.float64))
    torch.testing.assert_close(targets.sum(1), torch.ones(5, dtype=torch.float64))


def test_invalid_columns_get_no_target():
    similarities, own = table(5)
    valid = torch.ones(5, 5, dtype=torch.bool)
    valid[0, 3] = valid[3, 0] = False
    targets = soft_targets(similarities, own, temperature=0.3, mixing=0.5, is_valid=valid)
    assert (targets.exp()[~valid] == 0).all()
    torch.testing.assert_close(targets.exp().sum(1), torch.ones(5, dtype=torch.float64))
    logits = leaf(draw(5, 5, seed=2))
    kl_rows(targets, logits, valid).sum().backward()
    assert logits.grad.isfinite().all()
    assert (logits.grad[~valid] == 0).all()


def test_divergences_vanish_only_at_the_targets():
    similarities, own = table(5)
    targets = soft_targets(similarities, own, temperature=0.3, mixing=0.5)
    for divergence in (kl_rows, symmetric_kl_rows):
        torch.testing.assert_close(divergence(targets, targets), torch.zeros(5, dtype=torch.float64))
        assert (divergence(targets, targets + draw(5, 5)) > 1e-3).all()


def test_one_hot_targets_give_the_hard_loss_and_finite_gradients():
    logits, own = leaf(draw(5, 5)), torch.arange(5)
    rows = kl_rows(soft_targets(logits.detach(), own, temperature=1.0, mixing=0.0), logits)
    torch.testing.assert_close(rows, F.cross_entropy(logits, own, reduction="none"))
    rows.sum().backward()
    assert logits.grad.isfinite().all()
    smooth = kl_rows(soft_targets(logits.detach(), own, temperature=1.0, mixing=0.1), logits)
    assert not torch.allclose(smooth, rows)


def test_relation_gradient_sums_to_zero_over_the_negatives_and_spares_the_positive():
    similarities, own = table(6)
    logits = leaf(draw(6, 6, seed=4))
    kl_rows(
        negative_targets(similarities, own, temperature=0.2), logits, ~is_positive(logits, own)
    ).sum().backward()
    assert logits.grad.diagonal().abs().max() == 0
    assert logits.grad.sum(1).abs().max() < 1e-14
    assert logits.grad.abs().max() > 1e-2


def test_very_sharp_targets_stay_finite_in_float32():
    similarities, own = table(6)
    similarities = similarities.float()
    logits = draw(6, 6).float().requires_grad_()
    targets = soft_targets(similarities, own, temperature=0.01, mixing=0.5)
    symmetric_kl_rows(targets, logits).sum().backward()
    assert targets.dtype == torch.float32
    assert logits.grad.isfinite().all()


def test_spatial_targets_are_the_releases():
    """1e-7: the release computes them in float32."""
    golden = tensors("lovt_official_local_scan")
    threshold, sharpness = golden["threshold"].item(), golden["lam"].item()
    found = spatial_log_targets((3, 3), relative_threshold=threshold, sharpness=sharpness).exp()
    assert_golden(found, golden["pos_weights"], atol=1e-7)
    other = spatial_log_targets((3, 3), relative_threshold=threshold, sharpness=sharpness + 0.1).exp()
    assert (other - golden["pos_weights"]).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("grid", "threshold", "sharpness"), [((2, 5), 0.5, 1.0), ((4, 4), 0.5, 3.0), ((1, 4), 0.3, 0.0)]
)
def test_spatial_targets_equal_the_loop(grid, threshold, sharpness):
    found = spatial_log_targets(grid, relative_threshold=threshold, sharpness=sharpness)
    expected = loop_spatial_targets(grid, threshold, sharpness)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found.exp(), torch.tensor(expected, dtype=torch.float64))
    torch.testing.assert_close(found.exp().sum(1), torch.ones(len(found), dtype=torch.float64))


def test_spatial_targets_at_their_limits():
    one_hot = spatial_log_targets((3, 4), relative_threshold=0.0).exp()
    torch.testing.assert_close(one_hot, torch.eye(12, dtype=torch.float64))
    even = spatial_log_targets((3, 4), relative_threshold=1.0, sharpness=0.0).exp()
    torch.testing.assert_close(even, torch.full((12, 12), 1 / 12, dtype=torch.float64))
    sharp = spatial_log_targets((3, 4), sharpness=1e4).exp()
    torch.testing.assert_close(sharp, torch.eye(12, dtype=torch.float64))


@pytest.mark.parametrize("side", [4, 6, 14, 16])
def test_regions_exactly_at_the_threshold_are_within(side):
    """Half the diagonal of an even square grid is a distance that occurs: side / 2 rows and columns apart."""
    found = spatial_log_targets((side, side))
    apart = side // 2 * (side + 1)
    assert found[0, apart].isfinite()
    assert torch.isinf(found[0, apart + 1])
    assert torch.isinf(spatial_log_targets((side, side), relative_threshold=0.499)[0, apart])


def test_same_group_targets_are_even_over_the_rows_group():
    keys, everyone = torch.tensor([5, 7, 9]), torch.tensor([7, 5, 7, 9, 5, 7])
    found = same_group_log_targets(keys, everyone, torch.tensor([1, 0, 3])).exp()
    expected = [[0, 1 / 2, 0, 0, 1 / 2, 0], [1 / 3, 0, 1 / 3, 0, 0, 1 / 3], [0, 0, 0, 1, 0, 0]]
    torch.testing.assert_close(found, torch.tensor(expected))


def test_same_group_targets_of_distinct_groups_are_one_hot_and_keep_the_own_pair():
    own = torch.tensor([2, 0, 1])
    distinct = same_group_log_targets(torch.tensor([3, 1, 2]), torch.tensor([1, 2, 3]), own)
    torch.testing.assert_close(distinct.exp(), torch.eye(3)[own])
    unlike = same_group_log_targets(torch.tensor([8]), torch.tensor([1, 8, 3]), torch.tensor([2]))
    torch.testing.assert_close(unlike.exp(), torch.tensor([[0.0, 0.5, 0.5]]))


def test_same_group_rows_are_a_slice_of_the_whole_table_and_bound_the_loss():
    keys = torch.tensor([4, 4, 6, 4])
    whole, part = same_group_log_targets(keys, keys, torch.arange(4)), slice(1, 3)
    torch.testing.assert_close(
        same_group_log_targets(keys[part], keys, torch.arange(4)[part]), whole[part], rtol=0, atol=0
    )
    best = cross_entropy_rows(whole.double(), whole.double().clamp_min(-1e3))
    torch.testing.assert_close(best, torch.tensor([3.0, 3.0, 1.0, 3.0], dtype=torch.float64).log())


S, OWN = table(3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: soft_targets(S, OWN, temperature=0.0, mixing=0.5), "temperature must be > 0, got 0.0"),
        (lambda: soft_targets(S, OWN, temperature=0.1, mixing=1.5), r"mixing must be in \[0, 1\], got 1.5"),
        (lambda: soft_targets(S[:1, :1], OWN[:1], temperature=1, mixing=0.5), "at least 2 candidates, got 1"),
        (lambda: soft_targets(S, OWN[:2], temperature=1, mixing=0.5), r"must have shape \[3\], got \[2\]"),
        (lambda: negative_targets(S, OWN, temperature=-1.0), "temperature must be > 0, got -1.0"),
        (lambda: smoothed_over_all(S, OWN, smoothing=1.0), r"label smoothing must be in \[0, 1\), got 1.0"),
        (lambda: bisect_temperature(S, OWN, mass=0.7), r"in \(0, 0.6667\) for 3 candidates, got 0.7"),
        (lambda: bisect_temperature(S, OWN, mass=0.5, low=2, high=1), "need 0 < low < high"),
        (
            lambda: temperature_from_off_diagonal_mass(0.5, num_candidates=1, typical_cosine=0),
            "num_candidates must be >= 2, got 1",
        ),
        (
            lambda: temperature_from_off_diagonal_mass(0.5, num_candidates=4, typical_cosine=1.0),
            "typical_cosine must be < 1, got 1.0",
        ),
        (lambda: spatial_log_targets((0, 3)), r"at least one row and one column, got \(0, 3\)"),
        (lambda: spatial_log_targets((2, 2), relative_threshold=-1.0), "relative_threshold must be >= 0"),
        (lambda: spatial_log_targets((2, 2), sharpness=-1.0), "sharpness must be >= 0, got -1.0"),
        (
            lambda: same_group_log_targets(torch.arange(3), torch.arange(3), OWN[:2]),
            r"must have shape \[3\], got \[2\]",
        ),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_symmetric_divergence_of_one_hot_targets_is_infinite():
    hard = soft_targets(S, OWN, temperature=1.0, mixing=0.0)
    assert math.isinf(symmetric_kl_rows(hard, draw(3, 3)).min().item())
