"""Pixels on each of their scales: uint8 levels, fractions in [0, 1], normalised."""

from __future__ import annotations

import torch
from torch import Tensor

from dwa_fast.config import Normalisation
from dwa_fast.errors import InputError


def to_unit(
    pixels: Tensor,  # any shape, uint8
) -> Tensor:  # float32 in [0, 1]
    """pixels / 255 on their own device, the same bits on each: divided by a tensor, since CUDA multiplies by the reciprocal of a number."""
    return pixels.float() / torch.full((), 255.0, device=pixels.device)


def normalise(
    pixels: Tensor,  # [N, C, H, W], uint8 as `ImageSet.load` gives them, or floating point in [0, 1]
    normalisation: Normalisation,
) -> Tensor:  # [N, C, H, W]
    """(pixels − mean) / std per channel, with the pixels scaled to [0, 1].

    Raises:
        InputError: the pixels are integers other than uint8.
    """
    if pixels.dtype == torch.uint8:
        pixels = to_unit(pixels)
    elif not pixels.is_floating_point():
        raise InputError(f"pixels must be uint8, or floating point in [0, 1], got {pixels.dtype}")
    mean, std = (torch.tensor(value).to(pixels)[:, None, None] for value in (normalisation.mean, normalisation.std))
    return (pixels - mean) / std


def denormalise(
    images: Tensor,  # [N, C, H, W], normalised
    normalisation: Normalisation,
) -> Tensor:  # [N, C, H, W] in [0, 1]
    """images · std + mean per channel: undoes `normalise`, up to rounding."""
    mean, std = (torch.tensor(value).to(images)[:, None, None] for value in (normalisation.mean, normalisation.std))
    return images * std + mean


def to_levels(
    pixels: Tensor,  # [n, C, H, W] in [0, 1], on any device
) -> Tensor:  # [n, C, H, W] uint8 on the CPU
    """Pixels as image files hold them: clamped to [0, 1], times 255, rounded."""
    return (pixels.clamp(0, 1) * 255).round().to(torch.uint8).cpu()
