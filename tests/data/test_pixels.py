"""Pixels from one scale to another, and back."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dwa_fast import InputError
from dwa_fast.data.pixels import denormalise, normalise, to_levels
from dwa_fast.recipes import recipe


def test_normalise_and_back() -> None:
    pixels = torch.rand(2, 3, 4, 4)
    images = normalise(pixels, recipe("cifar10").data)
    assert torch.allclose(images[:, 1], (pixels[:, 1] - 0.4822) / 0.1994)
    assert torch.allclose(denormalise(images, recipe("cifar10").data), pixels, atol=1e-6)


def test_every_level_is_normalised_as_its_fraction_of_255() -> None:
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    config = recipe("digits").data
    assert torch.equal(normalise(levels, config), normalise(levels.float() / 255, config))
    assert torch.equal(to_levels(denormalise(normalise(levels, config), config)), levels)
    with pytest.raises(InputError, match=r"pixels must be uint8, or floating point in \[0, 1\], got torch.int64"):
        normalise(levels.long(), config)


@pytest.mark.parametrize("function", [normalise, denormalise])
@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (torch.rand(2, 1, 4, 4), r"must be \[N, 3, H, W\] for this mean and std, got shape \(2, 1, 4, 4\)"),
        (torch.rand(4, 4), r"must be \[N, 3, H, W\] for this mean and std, got shape \(4, 4\)"),
        (torch.rand(2, 4, 4, 3), r"must be \[N, 3, H, W\] for this mean and std, got shape \(2, 4, 4, 3\)"),
    ],
)
def test_other_channels_than_mean_and_std_are_refused(function: Any, pixels: torch.Tensor, message: str) -> None:
    with pytest.raises(InputError, match=message):
        function(pixels, recipe("cifar10").data)


def test_levels_in_floating_point_are_no_fractions() -> None:
    with pytest.raises(InputError, match=r"pixels in floating point must lie in \[0, 1\], got up to 255; divide them by 255"):
        normalise(torch.full((1, 3, 2, 2), 255.0), recipe("cifar10").data)


def test_integers_are_not_normalised_images() -> None:
    """mean and std, cast to integers, would be 0."""
    with pytest.raises(InputError, match=r"images must be normalised floating point, got torch\.uint8"):
        denormalise(torch.ones(1, 3, 2, 2, dtype=torch.uint8), recipe("cifar10").data)


@pytest.mark.parametrize("function", [normalise, denormalise])
def test_arguments_of_another_type_are_named(function: Any) -> None:
    with pytest.raises(TypeError, match=r"normalisation must hold mean and std, as recipe\('cifar100'\).data does, got Recipe"):
        function(torch.rand(1, 3, 2, 2), recipe("cifar10"))
    with pytest.raises(TypeError, match=r"must be a torch\.Tensor, got list"):
        function([0.0], recipe("cifar10").data)
