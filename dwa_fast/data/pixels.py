"""Pixels on each of their scales: uint8 levels, fractions in [0, 1], normalised."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from dwa_fast.config import Normalisation
from dwa_fast.errors import InputError


def to_unit(
    pixels: Tensor,  # any shape, uint8
) -> Tensor:  # float32 in [0, 1]
    """pixels / 255 on their own device, the same bits on each: divided by a tensor, since CUDA multiplies by the reciprocal of a number."""
    return pixels.float() / torch.full((), 255.0, device=pixels.device)


_LARGEST = 4.0  # above it a pixel in floating point is no fraction; below it may be that of noise, or of a filter that overshoots


def normalise(pixels: Tensor, normalisation: Normalisation) -> Tensor:
    """(pixels − mean) / std per channel, with the pixels scaled to [0, 1].

    Args:
        pixels: [N, C, H, W], uint8 as `ImageSet.load` gives them, or floating point in [0, 1].
        normalisation: mean and std of C channels, such as `recipe("cifar100").data`.
    Returns:
        [N, C, H, W], in the precision of the pixels, float32 for uint8.
    Raises:
        TypeError: an argument is of the wrong type.
        InputError: the pixels are integers other than uint8, have another number of channels, or, on a CPU, are no fractions.
    """
    _check(pixels, normalisation, "pixels")
    if pixels.dtype == torch.uint8:
        pixels = to_unit(pixels)
    elif not pixels.is_floating_point():
        raise InputError(f"pixels must be uint8, or floating point in [0, 1], got {pixels.dtype}")
    elif not pixels.is_cuda and pixels.numel() and float(pixels.detach().amax()) > _LARGEST:  # a GPU would have to be waited for
        raise InputError(f"pixels in floating point must lie in [0, 1], got up to {float(pixels.detach().amax()):g}; divide them by 255?")
    mean, std = _mean_and_std(normalisation, pixels)
    return (pixels - mean) / std


def denormalise(images: Tensor, normalisation: Normalisation) -> Tensor:
    """images · std + mean per channel: undoes `normalise`, up to rounding.

    Args:
        images: [N, C, H, W], normalised, floating point. normalisation: mean and std of C channels.
    Returns:
        [N, C, H, W] in [0, 1], as far as the images are those of pixels.
    Raises:
        TypeError: an argument is of the wrong type.
        InputError: the images have another number of channels, or are integers.
    """
    _check(images, normalisation, "images")
    if not images.is_floating_point():
        raise InputError(f"images must be normalised floating point, got {images.dtype}")
    mean, std = _mean_and_std(normalisation, images)
    return images * std + mean


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of a CPU on the device; a GPU copies it when its queue gets there, and nobody waits."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def _mean_and_std(
    normalisation: Normalisation,
    like: Tensor,  # floating point
) -> Iterator[Tensor]:  # [C, 1, 1] each
    return (moved(torch.tensor(value).to(like.dtype), like.device)[:, None, None] for value in (normalisation.mean, normalisation.std))


def _check(pixels: Tensor, normalisation: Normalisation, what: str) -> None:
    if not isinstance(pixels, Tensor):
        raise TypeError(f"{what} must be a torch.Tensor, got {type(pixels).__name__}")
    if not isinstance(normalisation, Normalisation):
        raise TypeError(f"normalisation must hold mean and std, as recipe('cifar100').data does, got {type(normalisation).__name__}")
    if pixels.dim() != 4 or pixels.shape[1] != normalisation.channels:
        raise InputError(f"{what} must be [N, {normalisation.channels}, H, W] for this mean and std, got shape {tuple(pixels.shape)}")


def to_levels(
    pixels: Tensor,  # [n, C, H, W] in [0, 1], on any device
) -> Tensor:  # [n, C, H, W] uint8 on the CPU
    """Pixels as image files hold them: clamped to [0, 1], times 255, rounded."""
    return (pixels.clamp(0, 1) * 255).round().to(torch.uint8).cpu()
