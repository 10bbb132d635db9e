"""Tables within a sample: LoVT's local losses, their weights and pads."""

import pytest
import torch

from models.estimators import InfoLOOB, InfoNCE, JensenShannon
from models.pair_table import PairTable
from models.targets import spatial_log_targets
from models.within_sample import within_sample_tables
from tests.golden_files import assert_golden, leaf, tensors
from tests.oracles.lovt import loop_local_loss, loop_spatial_targets

SCAN, REPORT = "lovt_official_local_scan", "lovt_official_local_report"


def draw(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def loss(table: PairTable, estimator=InfoNCE()):
    return estimator.reduce(estimator.rows(table), table.row_weights)


def golden_case(name: str, **options):
    """Both losses of a stored case and the gradients of .375 of their sum, LoVT's weight of a local term."""
    golden = tensors(name)
    z = leaf(golden["zl" if name == SCAN else "zs"])
    attended = leaf(golden["z_attended"])
    tables = within_sample_tables(
        z,
        attended,
        inverse_temperature=1 / golden["tau"].item(),
        row_weights_BK=golden["weights"],
        is_real_BK=golden.get("mask"),
        **options,
    )
    to_attended, to_features = (loss(table) for table in tables)
    (0.375 * (to_attended + to_features)).backward()
    return golden, to_attended, to_features, z.grad, attended.grad


def test_local_loss_of_regions_is_the_releases():
    stored_targets = tensors(SCAN)["pos_weights"].double().log()
    golden, to_attended, to_features, grad_z, grad_attended = golden_case(SCAN, log_targets_KK=stored_targets)
    assert_golden(to_attended, golden["l2att"])
    assert_golden(to_features, golden["att2l"])
    assert_golden(grad_z, golden["grad_zl"])
    assert_golden(grad_attended, golden["grad_att"])


def test_local_loss_of_regions_with_our_targets():
    """1e-7: the release's targets are float32."""
    golden = tensors(SCAN)
    ours = spatial_log_targets((3, 3), relative_threshold=golden["threshold"].item(), sharpness=1.0)
    golden, to_attended, to_features, grad_z, grad_attended = golden_case(SCAN, log_targets_KK=ours)
    assert_golden(to_attended, golden["l2att"], atol=1e-7)
    assert_golden(to_features, golden["att2l"], atol=1e-7)
    assert_golden(grad_z, golden["grad_zl"], atol=1e-7)
    assert_golden(grad_attended, golden["grad_att"], atol=1e-7)
    _, hard, *_ = golden_case(SCAN)
    assert abs(hard.item() - golden["l2att"].item()) > 1e-2


def test_local_loss_of_sentences_is_the_releases():
    golden, to_attended, to_features, grad_z, grad_attended = golden_case(REPORT)
    assert_golden(to_attended, golden["l2att"])
    assert_golden(to_features, golden["att2l"])
    assert_golden(grad_z, golden["grad_zs"])
    assert_golden(grad_attended, golden["grad_att"])
    golden["mask"][1, 2] = True  # another mask is another loss
    tables = within_sample_tables(
        golden["zs"],
        golden["z_attended"],
        inverse_temperature=1 / golden["tau"].item(),
        row_weights_BK=golden["weights"],
        is_real_BK=golden["mask"],
    )
    assert abs(loss(tables[0]).item() - golden["l2att"].item()) > 1e-2


def bags(*, seed=0):
    """Features, attended features, weights and mask of three samples on a grid of 2 x 3."""
    is_real = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 0, 1, 1, 0, 0], [0, 1, 1, 0, 0, 1]], dtype=torch.bool)
    return draw(3, 6, 4, seed=seed), draw(3, 6, 4, seed=seed + 1), draw(3, 6, seed=seed + 2).abs(), is_real


def both_losses(features, attended, weights, is_real, *, log_targets=None, estimator=InfoNCE()):
    tables = within_sample_tables(
        features,
        attended,
        inverse_temperature=1 / 0.3,
        row_weights_BK=weights,
        is_real_BK=is_real,
        log_targets_KK=log_targets,
    )
    return torch.stack([loss(table, estimator) for table in tables])


@pytest.mark.parametrize("has_pads", [True, False])
@pytest.mark.parametrize("is_spatial", [True, False])
def test_losses_equal_the_loop(has_pads, is_spatial):
    features, attended, weights, is_real = bags()
    if not has_pads:
        is_real = None
    log_targets = spatial_log_targets((2, 3)) if is_spatial else None
    found = both_losses(features, attended, weights, is_real, log_targets=log_targets)
    expected = loop_local_loss(
        features,
        attended,
        temperature=0.3,
        weights=weights,
        is_real=is_real,
        targets=loop_spatial_targets((2, 3), 0.5, 1.0) if is_spatial else None,
    )
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))
    unweighted = both_losses(features, attended, None, is_real, log_targets=log_targets)
    assert not torch.allclose(found, unweighted, atol=1e-3)


def test_no_weights_are_equal_weights_and_their_scale_is_irrelevant():
    features, attended, weights, is_real = bags()
    equal = both_losses(features, attended, torch.ones(3, 6), is_real)
    torch.testing.assert_close(both_losses(features, attended, None, is_real), equal)
    scaled = both_losses(features, attended, weights * torch.tensor([[1.0], [7.0], [0.1]]), is_real)
    torch.testing.assert_close(scaled, both_losses(features, attended, weights, is_real))


@pytest.mark.parametrize("estimator", [InfoNCE(), InfoLOOB(), JensenShannon()], ids=lambda e: e.kind)
@pytest.mark.parametrize("content", [0.0, 1e6, torch.nan, torch.inf])
def test_pads_enter_nothing_and_get_no_gradient(content, estimator):
    features, attended, weights, is_real = bags()
    targets = spatial_log_targets((2, 3)) if estimator.kind == "ce" else None
    expected = both_losses(features, attended, weights, is_real, log_targets=targets, estimator=estimator)
    is_pad = ~is_real[:, :, None]
    padded, padded_attended = leaf(features.masked_fill(is_pad, content)), leaf(attended)
    found = both_losses(
        padded,
        padded_attended,
        weights.masked_fill(~is_real, content),
        is_real,
        log_targets=targets,
        estimator=estimator,
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    found.sum().backward()
    for gradient in (padded.grad, padded_attended.grad):
        assert gradient.isfinite().all()
        assert (gradient[~is_real] == 0).all()
        assert gradient[is_real].abs().min() > 0
    everything = both_losses(features, attended, weights, None, log_targets=targets, estimator=estimator)
    assert not torch.allclose(everything, expected, atol=1e-3)


def test_order_of_positions_is_irrelevant():
    features, attended, weights, is_real = bags()
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    targets = spatial_log_targets((2, 3))
    found = both_losses(features, attended, weights, is_real, log_targets=targets)
    moved = [value[:, order] for value in (features, attended, weights, is_real)]
    torch.testing.assert_close(both_losses(*moved, log_targets=targets[order][:, order]), found)
    assert not torch.allclose(both_losses(*moved, log_targets=targets), found, atol=1e-3)


def test_samples_may_have_targets_of_their_own():
    features, attended, weights, _ = bags()
    targets = spatial_log_targets((3, 3))
    kept = torch.stack([torch.randperm(9, generator=torch.Generator().manual_seed(s))[:6] for s in range(3)])
    per_sample = torch.stack([targets[index][:, index] for index in kept]).log_softmax(2)
    found = both_losses(features, attended, weights, None, log_targets=per_sample)
    alone = [
        both_losses(
            features[b : b + 1], attended[b : b + 1], weights[b : b + 1], None, log_targets=per_sample[b]
        )
        for b in range(3)
    ]
    torch.testing.assert_close(found, torch.stack(alone).mean(0))


def test_rows_of_several_workers_reduce_to_the_loss_of_the_whole_batch():
    """Samples of unequal length on two workers: rows and weights are gathered, then reduced."""
    features, attended, weights, is_real = bags()
    estimator, rows, row_weights, locally = InfoNCE(), [], [], []
    for part in (slice(0, 1), slice(1, 3)):
        table, _ = within_sample_tables(
            features[part],
            attended[part],
            inverse_temperature=1 / 0.3,
            row_weights_BK=weights[part],
            is_real_BK=is_real[part],
        )
        rows.append(estimator.rows(table))
        row_weights.append(table.row_weights)
        locally.append(loss(table))
    whole = both_losses(features, attended, weights, is_real)[0]
    torch.testing.assert_close(estimator.reduce(torch.cat(rows), torch.cat(row_weights)), whole)
    assert not torch.allclose(torch.stack(locally).mean(), whole, atol=1e-3)


def test_tables_have_the_shapes_and_weights_they_state():
    features, attended, weights, is_real = bags()
    weights = leaf(weights)
    tables = within_sample_tables(
        features, attended, inverse_temperature=2.0, row_weights_BK=weights, is_real_BK=is_real
    )
    for table in tables:
        assert table.scores.shape == (18, 6)
        assert table.positive.tolist() == list(range(6)) * 3
        assert (table.is_valid == is_real.repeat_interleave(6, 0)).all()
        assert not table.row_weights.requires_grad
        assert (table.row_weights.view(3, 6)[~is_real] == 0).all()
        torch.testing.assert_close(table.row_weights.view(3, 6).sum(1), torch.ones(3, dtype=torch.float64))
    torch.testing.assert_close(tables[0].scores.view(3, 6, 6), tables[1].scores.view(3, 6, 6).transpose(1, 2))
    assert tables[0].scores.abs().max() <= 2.0


def test_limits_of_the_temperature():
    """Flat scores give the log of the count, sharp scores of a perfect match nothing."""
    features, _, weights, _ = bags()
    flat, sharp = (
        within_sample_tables(
            features, features, inverse_temperature=scale, row_weights_BK=weights, is_real_BK=None
        )[0]
        for scale in (torch.tensor(0.0), 1e3)
    )
    torch.testing.assert_close(loss(flat), torch.tensor(6.0, dtype=torch.float64).log())
    assert loss(sharp).item() < 1e-6


def test_one_real_position_is_a_loss_of_zero_that_counts_and_none_does_not_count():
    features, attended, weights, is_real = bags()
    single, nothing = is_real.clone(), is_real.clone()
    single[2], nothing[2] = torch.tensor([0, 1, 0, 0, 0, 0]).bool(), False
    of_two = both_losses(features[:2], attended[:2], weights[:2], is_real[:2])
    torch.testing.assert_close(both_losses(features, attended, weights, single), of_two * 2 / 3)
    torch.testing.assert_close(both_losses(features, attended, weights, nothing), of_two)
    features = leaf(features)
    targets = spatial_log_targets((2, 3))
    both_losses(features, attended, weights, nothing, log_targets=targets).sum().backward()
    assert features.grad.isfinite().all()
    assert (features.grad[2] == 0).all()


def test_half_precision_features_make_float32_tables():
    features, attended, weights, is_real = bags()
    tables = within_sample_tables(
        features.bfloat16(),
        attended.bfloat16(),
        inverse_temperature=1.0,
        row_weights_BK=weights.bfloat16(),
        is_real_BK=is_real,
        log_targets_KK=spatial_log_targets((2, 3)),
    )
    for table in tables:
        assert table.scores.dtype == table.log_targets.dtype == table.row_weights.dtype == torch.float32


def test_gradcheck():
    features, attended, weights, is_real = bags()
    targets = spatial_log_targets((2, 3))
    assert torch.autograd.gradcheck(
        lambda x, y: both_losses(x, y, weights[:2], is_real[:2], log_targets=targets),
        (leaf(features[:2]), leaf(attended[:2])),
    )


X, Y, W, IS_REAL = bags()


def tables_of(features=X, attended=Y, **options):
    settings = {"inverse_temperature": 1.0, "row_weights_BK": W, **options}
    return within_sample_tables(features, attended, **settings)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: tables_of(X, Y[:, :3]), r"both be \[B, K, D\], got \[3, 6, 4\] and \[3, 3, 4\]"),
        (lambda: tables_of(X[0], Y[0]), r"both be \[B, K, D\], got \[6, 4\]"),
        (lambda: tables_of(row_weights_BK=W[:2]), r"row_weights must have shape \[3, 6\], got \[2, 6\]"),
        (lambda: tables_of(is_real_BK=IS_REAL[0]), r"is_real must have shape \[3, 6\], got \[6\]"),
        (
            lambda: tables_of(log_targets_KK=spatial_log_targets((3, 3))),
            r"log_targets must have shape \[6, 6\] or one such table per sample, got \[9, 9\]",
        ),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()
