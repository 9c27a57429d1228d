"""The stem against PyTorch's own convolution: its image gradient, and images in blocks."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dwa_fast.config import Normalisation, SynthesisConfig
from dwa_fast.engine.ascent import Arena
from dwa_fast.engine.backend import resolve
from dwa_fast.engine.layers import StemConv, replace_stems
from dwa_fast.engine.network import Network
from dwa_fast.engine.refine import Refinement, Teacher
from dwa_fast.engine.teacher import prepare
from dwa_fast.models.architectures import build
from dwa_fast.models.batchnorm import batchnorm_layers
from dwa_fast.schedule import make_schedule
from tests.nets import alive


@pytest.mark.parametrize(("size", "priors"), [(16, 0.0), (15, 0.0), (16, 1e-3)])
def test_gradient_of_the_images_stays_in_blocks(size: int, priors: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the bits of a run that moves it to [N, C, H, W], which is needed where a side is odd or something else reads the images."""
    torch.manual_seed(0)
    teacher = alive(build("resnet18-cifar", classes=10, channels=3, size=size))
    config = SynthesisConfig(iterations=3, ascent="none", device="cpu", backend="fused", precision="fp32", tv_l2=priors)
    execution = replace(resolve(config.backend, config.precision, config.device), captures=False)
    images, labels, results = torch.randn(2, 3, size, size), torch.tensor([1, 2]), []
    network, _ = prepare(teacher, images, execution)
    Arena(network, execution, moves=False)
    for takes in (True, False):
        if not takes:
            monkeypatch.setattr(Network, "takes_blocks", False)
        with execution.arithmetic():
            refinement = Refinement([Teacher(network, network)], images.shape, config, Normalisation(), execution)
            refinement.load(images, labels, make_schedule(config, size, size, seed=0, batch=0))
            assert (refinement._blocks(((0, 1.0),)) is not None) == (takes and size % 2 == 0 and not priors)
            refinement.advance(3)
        results.append(refinement.images)
    assert not torch.equal(results[0], images)
    assert torch.equal(*results)


def test_images_in_blocks_are_for_stems_alone() -> None:
    """Not where something else reads the images."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = build("resnet18-cifar", classes=10, channels=3, size=8)

        def forward(self, images: Tensor) -> Tensor:
            return self.net(images) + images.mean((1, 2, 3))[:, None]

    execution, images = resolve("fused", "fp32", "cpu"), torch.randn(2, 3, 8, 8)
    networks = [prepare(alive(teacher), images, execution)[0] for teacher in (Twice(), Twice().net)]
    assert [network.takes_blocks for network in networks] == [False, True]


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
def test_stem_has_the_librarys_outputs_and_gradients(geometry: tuple[int, ...], channels_last: bool) -> None:
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


@pytest.mark.parametrize("learns", [False, True])
@pytest.mark.parametrize("geometry", [each for each in GEOMETRIES if each[-2] % 2 == each[-1] % 2 == 0])
def test_stem_takes_images_in_blocks(geometry: tuple[int, ...], learns: bool) -> None:
    """The same bits; the gradient of the images is a view of what the convolution computed."""
    *shape, height, width = geometry
    stem = StemConv(layer_of(*shape).to(memory_format=torch.channels_last).requires_grad_(learns))  # type: ignore[call-overload]
    images = torch.randn(2, shape[0], height, width, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    found = []
    for leaf in (images.clone(), images.clone().view(2, shape[0], height // 2, 2, width // 2, 2)):
        y = stem(leaf.requires_grad_())
        gradient = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(1))
        found.append([y, *torch.autograd.grad(y, [leaf, *(stem.parameters() if learns else [])], gradient)])
    blocks = found[1][1]
    assert blocks._is_view()
    for whole, own in zip(*found, strict=True):
        assert torch.equal(own.reshape(whole.shape), whole)


def test_stem_whose_weights_are_fixed() -> None:
    """They are arranged once, and again at every call of refresh."""
    stem, gradient = StemConv(nn.Conv2d(3, 8, 3, padding=1, bias=False)), torch.randn(2, 8, 6, 6)
    expected = stem.image_gradient(gradient, 6, 6)
    for factor in (1.0, 2.0):
        with torch.no_grad():
            stem.weight.mul_(factor)
        stem.refresh()
        assert torch.equal(stem.image_gradient(gradient, 6, 6), factor * expected)


def test_stem_gradients_agree_with_differences() -> None:
    stem = StemConv(layer_of(3, 2, 3, 2, 1, bias=False))
    images = torch.randn(1, 3, 5, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, w: torch.func.functional_call(stem, {"weight": w}, (x,)), (images, stem.weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stem_error_is_the_librarys(dtype: torch.dtype) -> None:
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
def test_stem_leaves_other_layers_alone(layer: nn.Module | None) -> None:
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
