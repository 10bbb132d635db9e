"""Estimators reproduce stored values and gradients: CLIP, InfoLOOB, bounds, local mutual information."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.estimators import (
    DonskerVaradhan,
    InfoLOOB,
    InfoNCE,
    donsker_varadhan,
    info_loob,
    info_nce,
    jensen_shannon,
    symmetric,
)
from models.pair_table import PairTable
from models.region_pooling import pool_max
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
    table = pool_max(scores)
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


@pytest.mark.parametrize("with_same_modality", [False, True])
def test_direction_weights_and_same_modality_columns_equal_lovt(with_same_modality):
    """Its global loss; without same-modality negatives it is also that of a public ConVIRT port."""
    golden = tensors("lovt_official_global")
    key = "same" if with_same_modality else "cross"
    a, b = leaf(golden["za"]), leaf(golden["zb"])

    def direction(queries: Tensor, candidates: Tensor) -> Tensor:
        table = PairTable.square(similarities(queries, candidates) / golden["tau"])
        if with_same_modality:
            table = table.with_columns(similarities(queries, queries) / golden["tau"], ~table.is_positive)
        return loss(InfoNCE(), table)

    a_to_b, b_to_a = direction(a, b), direction(b, a)
    assert_golden(a_to_b, golden[f"{key}_a2b"])
    assert_golden(b_to_a, golden[f"{key}_b2a"])
    found = golden["w_a2b"] * a_to_b + (1 - golden["w_a2b"]) * b_to_a
    assert_golden(found, golden[f"{key}_loss"])
    if not with_same_modality:
        assert_golden(found, golden["convirt_pytorch_loss"])
    found.backward()
    assert_golden(a.grad, golden[f"{key}_grad_a"])
    assert_golden(b.grad, golden[f"{key}_grad_b"])
    assert abs(0.5 * (a_to_b + b_to_a) - golden[f"{key}_loss"]) > 0.1


def study_table(golden: dict[str, Tensor], image: Tensor, text: Tensor) -> PairTable:
    """The stored critic on every pair; pairs of one study are no candidates."""
    layers = [(golden[f"w_{n}_weight"], golden[f"w_{n}_bias"]) for n in (0, 2, 4)]

    def critic(pair: Tensor) -> Tensor:
        for weight, bias in layers[:-1]:
            pair = F.relu(weight @ pair + bias)
        weight, bias = layers[-1]
        return (weight @ pair + bias)[0]

    rows = [torch.stack([critic(torch.cat([v, u])) for u in text]) for v in image]
    study = golden["study_id"]
    return PairTable(torch.stack(rows), torch.arange(len(study)), is_valid=study[:, None] != study[None, :])


@pytest.mark.parametrize("key", ["dv", "infonce"])
def test_study_masked_bounds_equal_the_local_mutual_information_release(key):
    """The release's "infonce" is its dv without the log of the count, so the gradients are the same."""
    golden = tensors("localmi_official_global")
    image, text = leaf(golden["img"]), leaf(golden["txt"])
    table = study_table(golden, image, text)
    assert table.is_negative.sum() == golden["num_neg"]
    scores = [table.scores[i, i] for i in range(6)]
    scores += [
        table.scores[i, (i + g) % 6] for g in range(1, 6) for i in range(6) if table.is_valid[i, (i + g) % 6]
    ]
    assert_golden(torch.stack(scores), golden["logits"][:, 0])
    found = loss(DonskerVaradhan(), table)
    constant = golden["num_neg"].log() if key == "infonce" else 0.0
    # the release takes the log of the count in float32
    assert_golden(found + constant, golden[f"{key}_loss"], atol=2e-7)
    found.backward()
    assert_golden(image.grad, golden[f"grad_img_{key}"])
    assert_golden(text.grad, golden[f"grad_txt_{key}"])
    every_study = loss(DonskerVaradhan(), PairTable.square(table.scores))
    assert abs(every_study + constant - golden[f"{key}_loss"]) > 1e-3


def test_orthonormal_pairs_have_the_closed_value():
    golden = tensors("derived_orthonormal_closed_form")
    logits = golden["inv_tau"] * torch.eye(int(golden["B"]), dtype=torch.float64)
    assert_golden(symmetric(InfoNCE(), logits), golden["clip"])
    assert_golden(2 / golden["inv_tau"] * symmetric(InfoLOOB(), logits), golden["infoloob"])
