"""Augmentation: random parameters are drawn on the host for a whole batch, then applied on the device. Pixels are in [0, 1].

The parameters are values of their own, so that they can be stored with the teacher's labels for them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dwa_fast.config import SqueezeConfig, ValidationConfig
from dwa_fast.data.boxes import draw_crop_sizes, resize_boxes
from dwa_fast.data.pixels import to_unit

_SMALLEST = 0.08  # share of the area: random resized crop of the published training recipes


@dataclass(frozen=True)
class RandAugment:
    """torchvision's RandAugment on a batch, with operations drawn for each image from one seed."""

    operations: int  # of each image
    magnitude: int  # 0 to 30
    seed: int


@dataclass(frozen=True)
class Views:
    """Cells, crops and flips of each image of a batch; None: not applied. Tensors are on the CPU."""

    offsets: Tensor | None = None  # [B, 2] int16: first row and column of the crop, in the padded image
    flipped: Tensor | None = None  # [B] bool
    crops: Tensor | None = None  # [B, 4] float32: width (negative: mirrored) and height, shares of the image; centre x and y, −1 … 1
    cells: Tensor | None = None  # [B, 2, n] uint8: new order of the n columns and of the n rows of cells
    rand_augment: RandAugment | None = None
    boxes: Tensor | None = None  # [B, 4] int16: top, left, height and width of the crop, whole pixels (FKD files)


@dataclass(frozen=True)
class Mix:
    """The mixup or CutMix partner of each image of a batch."""

    partner: Tensor | None = None  # [B] int64 on the CPU; None: not mixed
    share: float = 1.0  # weight of the image itself
    box: tuple[int, int, int, int] | None = None  # CutMix: top, bottom, left, right of the pasted box; None: mixup


def draw_views(count: int, config: SqueezeConfig | ValidationConfig, source: np.random.Generator) -> Views:
    """Draw the crops and flips of `count` images, and for students cells and RandAugment."""
    views = _draw_crops_and_flips(count, config, source)
    if not isinstance(config, ValidationConfig):
        return views
    cells = rand_augment = None
    if config.shuffle_cells > 1:
        orders = np.tile(np.arange(config.shuffle_cells, dtype=np.uint8), (count, 2, 1))
        cells = torch.from_numpy(source.permuted(orders, axis=2))
    if config.rand_augment > 0:
        rand_augment = RandAugment(config.rand_augment, config.rand_magnitude, int(source.integers(2**63)))
    return replace(views, cells=cells, rand_augment=rand_augment)


def _draw_crops_and_flips(count: int, config: SqueezeConfig | ValidationConfig, source: np.random.Generator) -> Views:
    if config.augmentation == "resized-crop":
        smallest = config.smallest_crop if isinstance(config, ValidationConfig) else _SMALLEST
        return Views(crops=_draw_crops(count, config.flip, smallest, source))
    offsets = flipped = None
    if config.augmentation == "pad-crop":
        offsets = torch.from_numpy(source.integers(0, 2 * config.padding + 1, (2, count)).T.astype(np.int16))
    if config.flip > 0:
        flipped = torch.from_numpy(source.random(count) < config.flip)
    return Views(offsets, flipped)


def apply_views(
    pixels: Tensor,  # [B, C, H, W], uint8 or in [0, 1]
    views: Views,
    padding: int,  # of pad-crop, pixels
) -> Tensor:  # [B, C, H, W], channels-last
    """Shuffle cells, apply RandAugment, then crop and flip: `crops` give pixels in [0, 1], all others leave them as they are."""
    if views.cells is not None:
        pixels = _shuffle_cells(pixels, views.cells.to(pixels.device))
    if views.rand_augment is not None:
        pixels = _rand_augment(pixels, views.rand_augment)
    if views.crops is not None:
        pixels = to_unit(pixels) if pixels.dtype == torch.uint8 else pixels
        return _resized_crop(pixels, views.crops.to(pixels))
    if views.boxes is not None:
        pixels = resize_boxes(pixels, views.boxes)
    if views.offsets is None and views.flipped is None:
        return pixels
    return _gather(pixels, padding if views.offsets is not None else 0, views)


def mirror(
    views: Views,
    flipped: Tensor,  # [B] bool
) -> Views:
    """The same crops, with these images mirrored and no others."""
    if views.crops is None:
        return replace(views, flipped=flipped)
    width, others = views.crops[:, :1].abs(), views.crops[:, 1:]
    return replace(views, crops=torch.cat([torch.where(flipped[:, None], -width, width), others], 1))


def draw_mix(
    count: int,
    image_size: tuple[int, int],  # height, width
    config: SqueezeConfig | ValidationConfig,
    source: np.random.Generator,
    *,
    by_area: bool = True,
) -> Mix:
    """Draw partners for mixup (blend) or CutMix (paste a box), and their share from Beta(alpha, alpha).

    Args:
        by_area: the share of CutMix is that of the pixels which stay; else as drawn, though the border of the image cuts boxes off.
    """
    if not isinstance(config, ValidationConfig) or config.mixing == "none":
        return Mix()
    partner = torch.from_numpy(source.permutation(count))
    share = float(source.beta(config.mixing_alpha, config.mixing_alpha))
    if config.mixing == "mixup":
        return Mix(partner, share)
    height, width = image_size
    side = math.sqrt(1 - share)
    y, x = int(source.integers(height)), int(source.integers(width))
    top, bottom = max(0, y - int(height * side) // 2), min(height, y + int(height * side) // 2)
    left, right = max(0, x - int(width * side) // 2), min(width, x + int(width * side) // 2)
    if by_area:
        share = 1 - (bottom - top) * (right - left) / (height * width)
    return Mix(partner, share, (top, bottom, left, right))


def apply_mix(
    images: Tensor,  # [B, C, H, W]
    mix: Mix,
) -> Tensor:  # [B, C, H, W]
    """Mix each image with its partner: share·x + (1 − share)·partner, or a pasted box."""
    if mix.partner is None:
        return images
    partner = mix.partner.to(images.device)
    if mix.box is None:
        return mix.share * images + (1 - mix.share) * images[partner]
    top, bottom, left, right = mix.box
    images = images.clone()
    images[:, :, top:bottom, left:right] = images[partner, :, top:bottom, left:right]
    return images


def _gather(pixels: Tensor, padding: int, views: Views) -> Tensor:
    """Crop the padded pixels at the offsets and mirror what is flipped, in one gather."""
    (count, _, height, width), device = pixels.shape, pixels.device
    rows, columns = torch.arange(height, device=device).expand(count, -1), torch.arange(width, device=device).expand(count, -1)
    if views.flipped is not None:
        columns = torch.where(views.flipped.to(device)[:, None], columns.flip(1), columns)
    if views.offsets is not None:
        offsets = views.offsets.to(device, torch.int64)
        rows, columns = rows + offsets[:, :1], columns + offsets[:, 1:]
    padded = F.pad(pixels, [padding] * 4) if padding else pixels
    image = torch.arange(count, device=device)[:, None, None]
    return padded.permute(0, 2, 3, 1)[image, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def _shuffle_cells(
    pixels: Tensor,  # [B, C, H, W]
    cells: Tensor,  # [B, 2, n]
) -> Tensor:
    """Put the columns of cells into their new order, and the rows; the last cell takes the pixels that are left over (RDED)."""
    count, _, height, width = pixels.shape
    number = cells.shape[2]
    places = cells.argsort(2)  # where each old strip comes

    def order(side: int, axis: int) -> Tensor:
        strip = (torch.arange(side, device=pixels.device) // max(1, side // number)).clamp_max(number - 1)
        return places[:, axis, strip].argsort(stable=True, dim=1)

    image = torch.arange(count, device=pixels.device)[:, None, None]
    return pixels.permute(0, 2, 3, 1)[image, order(height, 1)[:, :, None], order(width, 0)[:, None, :]].permute(0, 3, 1, 2)


def _rand_augment(pixels: Tensor, drawn: RandAugment) -> Tensor:
    from torchvision.transforms.v2 import RandAugment as Transform

    transform = Transform(drawn.operations, drawn.magnitude)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(drawn.seed)
        return torch.stack([transform(image) for image in pixels])


def _draw_crops(count: int, flip: float, smallest: float, source: np.random.Generator) -> Tensor:
    """Crops of random sizes (`draw_crop_sizes`) at random places."""
    height, width = draw_crop_sizes(count, smallest, source)
    x, y = source.uniform(-1, 1, count) * (1 - width), source.uniform(-1, 1, count) * (1 - height)
    mirrored = np.where(source.random(count) < flip, -width, width)
    return torch.from_numpy(np.stack([mirrored, height, x, y], axis=1).astype(np.float32))


def _resized_crop(pixels: Tensor, crops: Tensor) -> Tensor:
    """Resize each crop bilinearly to the image size."""
    width, height, x, y = crops.unbind(1)
    zero = torch.zeros_like(width)
    theta = torch.stack([torch.stack([width, zero, x], 1), torch.stack([zero, height, y], 1)], 1)
    grid = F.affine_grid(theta, list(pixels.shape), align_corners=False)
    return F.grid_sample(pixels, grid, mode="bilinear", padding_mode="border", align_corners=False)
