"""The first convolution's image gradient by blocks of pixels, against the library's."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dwa_fast.engine.stem import StemConv, replace_stems
from dwa_fast.models.architectures import build
from dwa_fast.models.batchnorm import batchnorm_layers

GEOMETRIES = [
    # channels, outputs, kernel, stride, padding, height, width
    (3, 8, 3, 1, 1, 8, 8),
    (3, 8, 7, 2, 3, 16, 16),
    (3, 8, 3, 2, 1, 8, 8),
    (1, 4, 3, 1, 1, 7, 9),
    (3, 5, 7, 2, 3, 15, 13),
    (2, 3, 2, 2, 0, 9, 8),
    (3, 3, 4, 2, 1, 10, 7),
    (4, 3, 5, 1, 0, 6, 7),
    (3, 3, 5, 1, 4, 6, 6),
    (1, 1, 1, 1, 0, 1, 1),
    (3, 2, 6, 2, 5, 5, 5),
]


def layer_of(channels: int, outputs: int, kernel: int, stride: int, padding: int, *, bias: bool = True) -> nn.Conv2d:
    torch.manual_seed(0)
    return nn.Conv2d(channels, outputs, kernel, stride, padding, bias=bias).double()


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_outputs_and_gradients_are_the_librarys(geometry: tuple[int, ...], channels_last: bool) -> None:
    *shape, height, width = geometry
    layer = layer_of(*shape)
    assert StemConv.suits(layer)
    if channels_last:
        layer = layer.to(memory_format=torch.channels_last)
    ours = StemConv(copy.deepcopy(layer))
    images = torch.randn(2, shape[0], height, width, dtype=torch.float64)
    found = []
    for each in (layer, ours):
        leaf = images.clone().requires_grad_(True)
        y = each(leaf)
        wanted = (leaf, each.weight, each.bias)
        found.append((y, *torch.autograd.grad(y, wanted, torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(1)))))
    for theirs, own in zip(*found, strict=True):
        torch.testing.assert_close(own, theirs, rtol=1e-12, atol=1e-12)


def test_gradients_agree_with_differences() -> None:
    stem = StemConv(layer_of(3, 2, 3, 2, 1, bias=False))
    images = torch.randn(1, 3, 5, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, w: torch.func.functional_call(stem, {"weight": w}, (x,)), (images, stem.weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_is_the_librarys(dtype: torch.dtype) -> None:
    exact = layer_of(3, 64, 7, 2, 3, bias=False)
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    gradient = torch.randn(2, 64, 16, 16, dtype=torch.float64)
    wanted = StemConv(exact).image_gradient(gradient, 32, 32)
    layer = copy.deepcopy(exact).to(dtype)
    rounded = layer.weight.double(), gradient.to(dtype).double()
    reference = torch.nn.grad.conv2d_input(list(images.shape), *rounded, stride=2, padding=3)
    library = torch.nn.grad.conv2d_input(list(images.shape), layer.weight, gradient.to(dtype), stride=2, padding=3)
    ours = StemConv(layer).image_gradient(gradient.to(dtype), 32, 32)
    assert (ours.double() - reference).norm() <= 2 * (library.double() - reference).norm()
    assert (ours.double() - wanted).norm() <= 1.1 * (library.double() - wanted).norm()


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(5, 8, 3, padding=1),
        nn.Conv2d(3, 8, 4, 4),
        nn.Conv2d(3, 8, 3, padding="same"),
        nn.Conv2d(3, 8, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(3, 9, 3, padding=1, groups=3),
        nn.Conv2d(3, 8, 3, dilation=2),
        nn.Conv2d(3, 8, (3, 5), padding=1),
        nn.Conv2d(3, 8, 1, 2),
        nn.Conv2d(3, 8, 2, padding=2),
        nn.ConvTranspose2d(3, 8, 3),
        None,
    ],
)
def test_other_layers_are_left_alone(layer: nn.Module | None) -> None:
    assert not StemConv.suits(layer)


@pytest.mark.parametrize(("architecture", "name"), [("resnet18", "conv1"), ("resnet18-cifar", "conv1"), ("convnet128", None)])
def test_networks_keep_their_parameters(architecture: str, name: str | None) -> None:
    module = build(architecture, classes=10, channels=3, size=32).eval()
    before = {key: value.data_ptr() for key, value in module.named_parameters()}
    traced = torch.fx.symbolic_trace(module)
    replace_stems(traced)
    stems = [key for key, layer in traced.named_modules() if isinstance(layer, StemConv)]
    assert len(stems) == 1
    assert name in (None, stems[0])
    assert {key: value.data_ptr() for key, value in traced.named_parameters()} == before
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(traced(images), module(images))
    assert batchnorm_layers(module)


def test_shared_weights_that_change_are_followed() -> None:
    """The ascent moves the weights between two gradients."""
    stem = StemConv(layer_of(3, 4, 3, 1, 1))
    images = torch.randn(1, 3, 6, 6, dtype=torch.float64, requires_grad=True)
    with torch.no_grad():
        stem.weight.mul_(2)
    (ours,) = torch.autograd.grad(stem(images).sum(), images)
    (theirs,) = torch.autograd.grad(F.conv2d(images, stem.weight, stem.bias, padding=1).sum(), images)
    torch.testing.assert_close(ours, theirs)
