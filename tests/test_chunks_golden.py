"""Losses in chunks reproduce the released values and gradients of CLIP, InfoLOOB and CLOOB."""

import pytest
import torch.nn.functional as F
from torch import Tensor

from models.chunked_losses import chunked_cloob, chunked_info_loob, chunked_info_nce
from tests.golden_files import GOLDEN, assert_golden, leaf, tensors

CHUNK = 3  # divides none of the batches


def cases(prefix: str) -> list[str]:
    return sorted(path.stem for path in GOLDEN.glob(f"{prefix}_*.npz"))


def test_every_copied_case_is_used():
    assert [len(cases(prefix)) for prefix in ("clip", "infoloob", "cloob")] == [10, 7, 5]


def unit_leaves(golden: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Raw leaves and their unit rows."""
    x, y = leaf(golden["x_raw"]), leaf(golden["y_raw"])
    return x, y, F.normalize(x, dim=1), F.normalize(y, dim=1)


@pytest.mark.parametrize("name", cases("clip"))
def test_info_nce_equals_the_clip_release(name):
    golden = tensors(name)
    log_scale = leaf(golden["inv_tau"].log())
    x, y, image, text = unit_leaves(golden)
    found = chunked_info_nce(image, text, inverse_temperature=log_scale.exp(), rows_per_chunk=CHUNK)
    assert_golden(found, golden["loss"])
    found.backward()
    assert_golden(x.grad, golden["g_x_raw"])
    assert_golden(y.grad, golden["g_y_raw"])
    assert_golden(log_scale.grad, golden["g_log_inv_tau"])
    other = chunked_info_nce(image, text.roll(1, 0), inverse_temperature=1.0, rows_per_chunk=CHUNK)
    # little, yet far above the tolerance, where the embeddings are collapsed
    assert abs(other - golden["loss"]) > 1e-5


@pytest.mark.parametrize("name", cases("infoloob"))
def test_info_loob_equals_the_cloob_release(name):
    """The release sums both directions and multiplies by the temperature."""
    golden = tensors(name)
    scale = leaf(golden["inv_tau"])
    x, y, image, text = unit_leaves(golden)
    found = 2 / scale * chunked_info_loob(image, text, inverse_temperature=scale, rows_per_chunk=CHUNK)
    assert_golden(found, golden["loss"])
    found.backward()
    assert_golden(x.grad, golden["g_x_raw"])
    assert_golden(y.grad, golden["g_y_raw"])
    assert_golden(scale.grad, golden["g_inv_tau"])
    other = chunked_info_nce(image, text, inverse_temperature=scale, rows_per_chunk=CHUNK)
    assert abs(2 / scale * other - golden["loss"]) > 1e-3


@pytest.mark.parametrize("name", cases("cloob"))
def test_cloob_equals_the_cloob_release(name):
    golden = tensors(name)
    beta, scale = leaf(golden["beta"]), leaf(golden["inv_tau"])
    x, y, image, text = unit_leaves(golden)
    ours = chunked_cloob(image, text, beta=beta, inverse_temperature=scale, rows_per_chunk=CHUNK)
    assert_golden(2 / scale * ours, golden["loss"])
    (2 / scale * ours).backward()
    assert_golden(x.grad, golden["g_x_raw"])
    assert_golden(y.grad, golden["g_y_raw"])
    assert_golden(beta.grad, golden["g_beta"])
    assert_golden(scale.grad, golden["g_inv_tau"])
    without = chunked_info_loob(image, text, inverse_temperature=scale, rows_per_chunk=CHUNK)
    assert abs(2 / scale * without - golden["loss"]) > 1e-6
