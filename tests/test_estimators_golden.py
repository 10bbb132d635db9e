"""Estimators reproduce stored values and gradients: CLIP, InfoLOOB, bounds, local mutual information."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.estimators import (
    InfoLOOB,
    InfoNCE,
    donsker_varadhan,
    info_loob,
    info_nce,
    jensen_shannon,
    symmetric,
)
from models.pair_table import PairTable
from models.recipe import RegionPool
from models.similarities import pool_regions
from tests.golden_files import GOLDEN, assert_golden, leaf, tensors

CLIP_CASES = sorted(path.stem for path in GOLDEN.glob("clip_*.npz"))
LOOB_CASES = sorted(path.stem for path in GOLDEN.glob("infoloob_*.npz"))


def loss(estimator, table: PairTable) -> Tensor:
    return estimator.reduce(estimator.rows(table))


def similarities(x_raw: Tensor, y_raw: Tensor) -> Tensor:
    return F.normalize(x_raw, dim=1) @ F.normalize(y_raw, dim=1).T


def test_every_copied_case_is_used():
    assert (len(CLIP_CASES), len(LOOB_CASES)) == (10, 7)


@pytest.mark.parametrize("name", CLIP_CASES)
def test_info_nce_equals_the_clip_release(name):
    golden = tensors(name)
    x, y, log_scale = leaf(golden["x_raw"]), leaf(golden["y_raw"]), leaf(golden["inv_tau"].log())
    logits = log_scale.exp() * similarities(x, y)
    assert_golden(logits, golden["logits"])
    assert_golden(info_nce(logits), golden["ce_i2t"])
    assert_golden(info_nce(logits.T), golden["ce_t2i"])
    found = symmetric(InfoNCE(), logits)
    assert_golden(found, golden["loss"])
    found.backward()
    assert_golden(x.grad, golden["g_x_raw"])
    assert_golden(y.grad, golden["g_y_raw"])
    assert_golden(log_scale.grad, golden["g_log_inv_tau"])
    mispaired = symmetric(InfoNCE(), golden["logits"].roll(1, 0))
    assert abs(mispaired - golden["loss"]) > 1e-3


@pytest.mark.parametrize("name", CLIP_CASES)
def test_info_nce_gradient_in_the_unit_features_equals_the_clip_release(name):
    golden = tensors(name)
    x, y = (leaf(F.normalize(golden[key], dim=1)) for key in ("x_raw", "y_raw"))
    symmetric(InfoNCE(), golden["inv_tau"] * x @ y.T).backward()
    assert_golden(x.grad, golden["g_x_unit"])
    assert_golden(y.grad, golden["g_y_unit"])


@pytest.mark.parametrize("name", LOOB_CASES)
def test_info_loob_equals_the_cloob_release(name):
    """The release sums both directions and multiplies by the temperature: 2 * temperature times ours."""
    golden = tensors(name)
    x, y, scale = leaf(golden["x_raw"]), leaf(golden["y_raw"]), leaf(golden["inv_tau"])
    logits = scale * similarities(x, y)
    assert_golden(info_loob(logits) / scale, golden["loss_xy"])
    assert_golden(info_loob(logits.T) / scale, golden["loss_yx"])
    found = 2 / scale * symmetric(InfoLOOB(), logits)
    assert_golden(found, golden["loss"])
    found.backward()
    assert_golden(x.grad, golden["g_x_raw"])
    assert_golden(y.grad, golden["g_y_raw"])
    assert_golden(scale.grad, golden["g_inv_tau"])
    with_positive = 2 / golden["inv_tau"] * symmetric(InfoNCE(), logits.detach())
    assert abs(with_positive - golden["loss"]) > 1e-3


@pytest.mark.parametrize("name", LOOB_CASES)
def test_info_loob_gradient_in_the_unit_features_equals_the_cloob_release(name):
    golden = tensors(name)
    x, y = (leaf(F.normalize(golden[key], dim=1)) for key in ("x_raw", "y_raw"))
    (2 / golden["inv_tau"] * symmetric(InfoLOOB(), golden["inv_tau"] * x @ y.T)).backward()
    assert_golden(x.grad, golden["g_x_unit"])
    assert_golden(y.grad, golden["g_y_unit"])


@pytest.mark.parametrize(
    ("ours", "key", "constant"),
    [
        (donsker_varadhan, "dv", 0.0),
        (info_nce, "infonce", math.log(6)),
        # the release reports NWJ's value with this gradient; its own value is the f-GAN one
        (jensen_shannon, "js_fgan", 0.0),
    ],
)
def test_bounds_equal_the_released_ones_with_the_sign_turned(ours, key, constant):
    golden = tensors("vbmi_official_bounds")
    scores = leaf(golden["scores"])
    found = ours(scores)
    assert_golden(constant - found, golden[key])
    found.backward()
    assert_golden(-scores.grad, golden[f"{key}_grad"])
    if key == "js_fgan":
        assert_golden(-scores.grad, golden["js_grad"])
    assert abs(constant - ours(golden["scores"].flip(0)) - golden[key]) > 0.1


def region_scores(golden: dict[str, Tensor], patches: Tensor, sentences: Tensor) -> Tensor:
    """The stored two-layer critic on every patch, image and sentence: [image, patch, sentence]."""
    N, U = len(patches), len(sentences)
    both = torch.cat(
        [
            patches[:, :, None].expand(-1, -1, U, -1),
            sentences[None, None].expand(N, patches.shape[1], -1, -1),
        ],
        dim=3,
    )
    hidden = F.relu(both @ golden["W1"].T + golden["b1"])
    hidden = F.relu(hidden @ golden["W2"].T + golden["b2"])
    return (hidden @ golden["W3"].T + golden["b3"])[..., 0]


@pytest.mark.parametrize(
    ("key", "objective"),
    [
        ("max_dv", donsker_varadhan),
        ("max_nce_row", info_nce),
        ("max_nce_col", lambda table: info_nce(table.T)),
    ],
)
def test_region_maximum_equals_the_derived_local_values(key, objective):
    golden = tensors("localmi_derived_regions")
    patches, sentences = leaf(golden["V"]), leaf(golden["U"])
    scores = region_scores(golden, patches, sentences)
    assert_golden(scores, golden["S"].transpose(1, 2))
    table = pool_regions(scores, RegionPool(kind="max"))
    assert_golden(table, golden["score_max"])
    found = objective(table)
    assert_golden(found, golden[key])
    found.backward()
    assert_golden(patches.grad, golden[f"{key}_gradV"])
    assert_golden(sentences.grad, golden[f"{key}_gradU"])
    assert abs(found - golden[key.replace("max", "sel")]) > 1e-3


def test_jensen_shannon_equals_deep_infomax_with_its_constant():
    """The release averages over locals n and globals q of [i, j, n, q] and subtracts 2 log 2."""
    golden = tensors("localmi_dim_official")
    local, whole = leaf(golden["l"]), leaf(golden["m"])
    scores = torch.einsum("jun,iuq->nqij", local, whole).flatten(0, 1)
    found = torch.stack([jensen_shannon(table) for table in scores]).mean() - 2 * math.log(2)
    assert_golden(found, golden["fd_JSD"])
    found.backward()
    assert_golden(local.grad, golden["fd_JSD_gradl"])
    assert_golden(whole.grad, golden["fd_JSD_gradm"])
    swapped = torch.stack([jensen_shannon(-table) for table in scores]).mean() - 2 * math.log(2)
    assert abs(swapped - golden["fd_JSD"]) > 0.05


def test_info_nce_with_excluded_candidates_equals_deep_infomax():
    """Queries are (image, local, global); other locals of the same image are no candidates."""
    golden = tensors("localmi_dim_official")
    B, N, Q = 4, golden["l"].shape[2], golden["m"].shape[2]
    scores = torch.einsum("iuq,jun->iqjn", golden["m"], golden["l"])
    image, local, _ = torch.meshgrid(*(torch.arange(n) for n in (B, N, Q)), indexing="ij")
    rows = scores[:, None].expand(-1, N, -1, -1, -1).reshape(B * N * Q, B * N)
    positive = (image * N + local).flatten()
    of_other_image = torch.arange(B * N)[None, :] // N != image.flatten()[:, None]
    found = loss(InfoNCE(), PairTable(rows, positive, is_valid=of_other_image))
    assert_golden(found, golden["nce_exact_mask"])
    assert abs(loss(InfoNCE(), PairTable(rows, positive)) - golden["nce_exact_mask"]) > 0.01


def test_orthonormal_pairs_have_the_closed_value():
    golden = tensors("derived_orthonormal_closed_form")
    logits = golden["inv_tau"] * torch.eye(int(golden["B"]), dtype=torch.float64)
    assert_golden(symmetric(InfoNCE(), logits), golden["clip"])
    assert_golden(2 / golden["inv_tau"] * symmetric(InfoLOOB(), logits), golden["infoloob"])
