"""Sizes of random crops; crops of whole pixels, enlarged to the last bit as Pillow does: crop, then two passes, each rounded to uint8.

SRe2L's programs store such crops (FKD files), and the teacher saw Pillow's pixels of them.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_RATIO = (3 / 4, 4 / 3)  # of torchvision's RandomResizedCrop
_ATTEMPTS = 10
_BITS = 22  # of the fraction in Pillow's weights
_CHUNK = 64  # images that are resized at once, which bounds the memory


def draw_crop_sizes(
    count: int,
    smallest: float,  # share of the image's area
    source: np.random.Generator,
    side: int | None = None,  # height and width of the images, pixels; None: sizes are shares of the image's, not rounded
) -> NDArray[np.float64]:  # [2, count]: heights and widths
    """Sizes of the distribution of torchvision's RandomResizedCrop: the first of ten tries that fits, or the whole image."""
    tries, whole = (_ATTEMPTS, count), side or 1
    area = source.uniform(smallest, 1.0, tries) * whole**2
    ratio = np.exp(source.uniform(math.log(_RATIO[0]), math.log(_RATIO[1]), tries))
    sizes = np.stack([np.sqrt(area / ratio), np.sqrt(area * ratio)])  # [2, tries, count]
    if side:
        sizes = sizes.round()
    fits = ((sizes > 0) & (sizes <= whole)).all(0)
    return np.where(fits.any(0), sizes[:, fits.argmax(0), np.arange(count)], whole)


def draw_boxes(
    count: int,
    side: int,  # height and width of the images, pixels
    smallest: float,  # share of the image's area
    source: np.random.Generator,
) -> Tensor:  # [count, 4] int16: top, left, height, width
    """Boxes of random sizes (`draw_crop_sizes`) at random places."""
    size = draw_crop_sizes(count, smallest, source, side).astype(np.int64)
    return torch.from_numpy(np.concatenate([source.integers(0, side - size + 1), size]).T.astype(np.int16))


def resize_boxes(
    pixels: Tensor,  # [B, C, H, W] uint8
    boxes: Tensor,  # [B, 4]: top, left, height, width, inside the images
) -> Tensor:  # [B, C, H, W] uint8, channels-last
    """Each box, enlarged bilinearly to the size of the image: the bits of Pillow's crop and resize, on every device."""
    height, width = pixels.shape[2:]
    top, left, rows, columns = boxes.cpu().to(torch.float64).unbind(1)
    across, down = _taps(left, columns, width), _taps(top, rows, height)
    chunks = []
    for start in range(0, len(pixels), _CHUNK):
        part = slice(start, start + _CHUNK)
        wide = _pass(pixels[part].permute(0, 3, 2, 1), across, part)  # [b, W, H, C]
        chunks.append(_pass(wide.transpose(1, 2), down, part))
    return torch.cat(chunks).permute(0, 3, 1, 2)


def _taps(first: Tensor, length: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """For each box and output pixel the two input pixels, [B, size, 2], and their weights, int32 of `_BITS` bits (Pillow's Resample.c)."""
    centre = (torch.arange(size, dtype=torch.float64) + 0.5) * (length / size)[:, None]
    low = (centre - 0.5).floor().clamp_min(0)
    places = torch.stack([low, low + 1], 2)
    weights = (1 - (places - centre[:, :, None] + 0.5).abs()).clamp_min(0) * (places < length[:, None, None])
    weights = weights / weights.sum(2, keepdim=True)
    places = torch.minimum(places, length[:, None, None] - 1) + first[:, None, None]
    return places.to(torch.int64), (weights * 2**_BITS + 0.5).to(torch.int32)


def _pass(pixels: Tensor, taps: tuple[Tensor, Tensor], part: slice) -> Tensor:
    """Resize the second axis of the images, rounded to uint8."""
    places, weights = (value[part].to(pixels.device) for value in taps)
    image = torch.arange(len(pixels), device=pixels.device)[:, None]
    low, high = (pixels[image, places[:, :, tap]].to(torch.int32) * weights[:, :, tap, None, None] for tap in range(2))
    return ((low + high + (1 << (_BITS - 1))) >> _BITS).to(torch.uint8)
