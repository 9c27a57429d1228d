"""Training views, drawn per image and made for a whole batch at once on the device; pixels in [0, 1] in and out."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dwa_fast.config import Mixing, SqueezeConfig, ValidationConfig

_SCALE, _RATIO = (0.08, 1.0), (3 / 4, 4 / 3)  # random resized crop of the published training recipes


def augment(
    pixels: Tensor,  # [B, C, H, W]
    config: SqueezeConfig | ValidationConfig,
    source: np.random.Generator,
) -> Tensor:  # [B, C, H, W]
    """Random crop and flip as the configuration says."""
    if config.augmentation == "resized-crop":
        return _resized_crop(pixels, config.flip, source)
    if config.augmentation == "pad-crop":
        pixels = _pad_crop(pixels, config.padding, source)
    if config.flip > 0:
        flipped = torch.from_numpy(source.random(len(pixels)) < config.flip).to(pixels.device)
        pixels = torch.where(flipped[:, None, None, None], pixels.flip(3), pixels)
    return pixels


def mix(
    images: Tensor,  # [B, C, H, W]
    mixing: Mixing,
    alpha: float,
    source: np.random.Generator,
) -> tuple[Tensor, Tensor, float]:  # mixed images; partner of each image [B]; share of the image itself
    """Mixup (blend) or CutMix (paste a box) with a random partner; the share is drawn from Beta(alpha, alpha)."""
    if mixing == "none":
        return images, torch.arange(len(images), device=images.device), 1.0
    partner = torch.from_numpy(source.permutation(len(images))).to(images.device)
    share = float(source.beta(alpha, alpha))
    if mixing == "mixup":
        return share * images + (1 - share) * images[partner], partner, share
    height, width = images.shape[2:]
    side = math.sqrt(1 - share)
    y, x = int(source.integers(height)), int(source.integers(width))
    top, bottom = max(0, y - int(height * side) // 2), min(height, y + int(height * side) // 2)
    left, right = max(0, x - int(width * side) // 2), min(width, x + int(width * side) // 2)
    images = images.clone()
    images[:, :, top:bottom, left:right] = images[partner, :, top:bottom, left:right]
    return images, partner, 1 - (bottom - top) * (right - left) / (height * width)


def _pad_crop(pixels: Tensor, padding: int, source: np.random.Generator) -> Tensor:
    count, _, height, width = pixels.shape
    padded = F.pad(pixels, [padding] * 4)
    offsets = torch.from_numpy(source.integers(0, 2 * padding + 1, (2, count))).to(pixels.device)
    rows = offsets[0, :, None] + torch.arange(height, device=pixels.device)
    columns = offsets[1, :, None] + torch.arange(width, device=pixels.device)
    image = torch.arange(count, device=pixels.device)[:, None, None]
    return padded.permute(0, 2, 3, 1)[image, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def _resized_crop(pixels: Tensor, flip: float, source: np.random.Generator) -> Tensor:
    """A crop of random area and ratio per image, resized bilinearly; shrunk to the image where it would not fit."""
    count = len(pixels)
    area = source.uniform(*_SCALE, count)
    ratio = np.exp(source.uniform(math.log(_RATIO[0]), math.log(_RATIO[1]), count))
    width, height = np.minimum(np.sqrt(area * ratio), 1), np.minimum(np.sqrt(area / ratio), 1)  # shares of the image
    x, y = source.uniform(-1, 1, count) * (1 - width), source.uniform(-1, 1, count) * (1 - height)  # centre, −1 … 1
    mirrored = np.where(source.random(count) < flip, -width, width)
    zero = np.zeros(count)
    theta = torch.from_numpy(np.stack([[mirrored, zero, x], [zero, height, y]]).transpose(2, 0, 1)).to(pixels)
    grid = F.affine_grid(theta, list(pixels.shape), align_corners=False)
    return F.grid_sample(pixels, grid, mode="bilinear", padding_mode="border", align_corners=False)
