"""Cropping to boxes and shrinking: rows on their own, constants, averages, refusals."""

import pytest
import torch
import torch.nn.functional as F

from models.crops import crop_images, shrink_images


def test_shrinking_averages_and_keeps_constants():
    flat = torch.full((1, 3, 32, 32), 7.0)
    torch.testing.assert_close(shrink_images(flat, 0.5, patch_size=8), flat[:, :, :16, :16])
    assert shrink_images(flat, 1.0, patch_size=8) is flat
    stripes = flat.clone()
    stripes[..., ::2] = 0.0
    middle = shrink_images(stripes, 0.5, patch_size=8)[..., 1:-1]
    torch.testing.assert_close(middle, torch.full_like(middle, 3.5))
    # sampling without antialiasing at a quarter of the size would read stripes or gaps alone
    quarter = shrink_images(stripes, 0.25, patch_size=8)[..., 1:-1]
    torch.testing.assert_close(quarter, torch.full_like(quarter, 3.5))


def test_a_crop_is_the_same_whatever_else_is_in_its_batch():
    pixels = torch.randint(
        0, 256, (3, 30, 30, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )
    boxes = torch.tensor([[0.0, 0.0, 30.0, 30.0], [3.0, 4.0, 20.0, 22.0], [0.0, 0.0, 30.0, 30.0]])
    together = crop_images(pixels, boxes)
    alone = torch.cat([crop_images(pixels[i : i + 1], boxes[i : i + 1]) for i in range(3)])
    assert torch.equal(together, alone)
    whole = pixels.permute(0, 3, 1, 2).float()
    assert torch.equal(together[[0, 2]], whole[[0, 2]])
    assert torch.equal(crop_images(pixels, boxes, all_whole=True), whole)
    assert together.is_contiguous()
    assert not torch.allclose(together[1], whole[1], atol=1.0)
    zoomed = F.interpolate(whole[1:2, :, 5:25, 5:25], size=(30, 30), mode="bilinear")
    found = crop_images(pixels[1:2], torch.tensor([[5.0, 5.0, 20.0, 20.0]]))
    torch.testing.assert_close(found[..., 2:-2, 2:-2], zoomed[..., 2:-2, 2:-2], atol=1e-3, rtol=0)


def test_nothing_is_read_back_from_a_device():
    """Reading a value of a tensor without values raises."""
    pixels, boxes = (
        torch.zeros(2, 32, 32, 3, dtype=torch.uint8, device="meta"),
        torch.zeros(2, 4, device="meta"),
    )
    with pytest.raises(RuntimeError, match="meta"):
        bool(boxes.all())
    cropped = crop_images(pixels, boxes)
    assert shrink_images(cropped, 0.5, patch_size=8).shape == (2, 3, 16, 16)


@pytest.mark.parametrize(
    ("scale", "patch_size", "message"),
    [
        (0.5, 6, "32 pixels at scale 0.5 have 16 pixels per side, no multiple of the patch size 6"),
        (0.3, 8, "have 9.6 pixels per side, no multiple of the patch size 8"),
        (0.0, 8, r"scale must be in \(0, 1\], got 0.0"),
        (2.0, 8, r"scale must be in \(0, 1\], got 2.0"),
    ],
)
def test_refusals(scale, patch_size, message):
    with pytest.raises(ValueError, match=message):
        shrink_images(torch.ones(1, 3, 32, 32), scale, patch_size=patch_size)
