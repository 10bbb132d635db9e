"""Cropping and shrinking a batch of images, on the device the images are on.

B images, S pixels per side.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def crop_images(images: Tensor, boxes: Tensor, *, all_whole: bool = False) -> Tensor:
    """Cut one box out of each image and resize it to the image's size, bilinearly.

    Args:
        images: uint8 [B, S, S, 3].
        boxes: (top, left, height, width) in pixels, float32 [B, 4], inside the image. Boxes enlarge,
            never shrink, so no antialiasing is needed.
        all_whole: the caller knows that every box is its whole image, which saves the sampling.

    Returns:
        Grey levels 0..255, float32 [B, 3, S, S]; an image whose box is whole is returned as it is.
    """
    pixels = images.permute(0, 3, 1, 2).float()
    side = images.shape[1]
    is_whole = (boxes[:, 2:] >= side).all(1)
    # Looking is free on the CPU; on an accelerator every view would wait for the device.
    if all_whole or (boxes.device.type == "cpu" and bool(is_whole.all())):
        return pixels.contiguous()
    centres = (torch.arange(side, device=images.device, dtype=boxes.dtype) + 0.5) / side
    # grid_sample's coordinates run from -1 to 1 between the outer edges of the image.
    y = (boxes[:, :1] + centres * boxes[:, 2:3]) * (2 / side) - 1
    x = (boxes[:, 1:2] + centres * boxes[:, 3:4]) * (2 / side) - 1
    points = torch.stack([x[:, None, :].expand(-1, side, -1), y[:, :, None].expand(-1, -1, side)], -1)
    sampled = F.grid_sample(pixels, points, mode="bilinear", padding_mode="border", align_corners=False)
    # Sampling a whole image only adds rounding, and a row must not depend on the others of its batch.
    return torch.where(is_whole[:, None, None, None], pixels, sampled).contiguous()


def shrink_images(images_B3SS: Tensor, scale: float, *, patch_size: int) -> Tensor:
    """Images at a fraction of their size, bilinear with antialiasing.

    Args:
        images_B3SS: grey levels as float, [B, 3, S, S].
        scale: in (0, 1]; 0.5 halves the sides. 1 returns the images as they are.
        patch_size: pixels per side of a patch; it must divide the new side.

    Returns:
        Grey levels, [B, 3, S * scale, S * scale].

    Raises:
        ValueError: a scale out of range, or a new side that is no multiple of the patch size.

    Source: A-CLIP's half-resolution scorer, arXiv 2212.08653; how it downsizes is not published.
    """
    if not 0.0 < scale <= 1.0:
        raise ValueError(f"scale must be in (0, 1], got {scale}")
    old = images_B3SS.shape[2]
    new = round(old * scale)
    if abs(new - old * scale) > 1e-6 or new % patch_size or new == 0:
        raise ValueError(
            f"images of {old} pixels at scale {scale} have {old * scale:g} pixels per side, "
            f"no multiple of the patch size {patch_size}"
        )
    if new == old:
        return images_B3SS
    return F.interpolate(images_B3SS, size=(new, new), mode="bilinear", align_corners=False, antialias=True)
