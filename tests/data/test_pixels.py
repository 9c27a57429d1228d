"""Pixels from one scale to another, and back."""

from __future__ import annotations

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
