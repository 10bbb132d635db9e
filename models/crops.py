"""Cropping a batch of images to boxes, on the device the images are on."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def crop_images(images: Tensor, boxes: Tensor) -> Tensor:
    """Cut one box out of each image and resize it to the image's size, bilinearly.

    Args:
        images: uint8 [B, S, S, 3].
        boxes: (top, left, height, width) in pixels, float32 [B, 4], inside the image. Boxes enlarge,
            never shrink, so no antialiasing is needed.

    Returns:
        Grey levels 0..255, float32 [B, 3, S, S].
    """
    pixels = images.permute(0, 3, 1, 2).float()
    side = images.shape[1]
    if bool((boxes[:, 2:] >= side).all()):
        return pixels.contiguous()
    centres = (torch.arange(side, device=images.device, dtype=boxes.dtype) + 0.5) / side
    # grid_sample's coordinates run from -1 to 1 between the outer edges of the image.
    y = (boxes[:, :1] + centres * boxes[:, 2:3]) * (2 / side) - 1
    x = (boxes[:, 1:2] + centres * boxes[:, 3:4]) * (2 / side) - 1
    points = torch.stack([x[:, None, :].expand(-1, side, -1), y[:, :, None].expand(-1, -1, side)], -1)
    return F.grid_sample(pixels, points, mode="bilinear", padding_mode="border", align_corners=False)
