"""Replacement layers against PyTorch's own: lean convolutions, the stem's image gradient, strided 1×1 convolutions."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from dwa_fast.config import Normalisation, SynthesisConfig
from dwa_fast.engine.ascent import Arena
from dwa_fast.engine.backend import resolve
from dwa_fast.engine.capture import trace_step
from dwa_fast.engine.layers import (
    GlobalMean,
    LeanConv,
    SampledConv,
    StemConv,
    StridedPointwise,
    replace_stems,
    replace_strided_pointwise,
)
from dwa_fast.engine.network import Network
from dwa_fast.engine.refine import Refinement, Teacher
from dwa_fast.engine.teacher import prepare
from dwa_fast.models.architectures import build
from dwa_fast.models.batchnorm import batchnorm_layers
from dwa_fast.schedule import make_schedule
from tests.nets import alive, distance, small_teacher

CONVOLUTIONS: dict[str, Callable[[], nn.Conv2d]] = {
    "3×3": lambda: nn.Conv2d(16, 32, 3, padding=1, bias=False),
    "strided 1×1": lambda: nn.Conv2d(16, 32, 1, stride=2, bias=False),
    "with a bias": lambda: nn.Conv2d(16, 16, 3, stride=2, padding=1),
    "groups": lambda: nn.Conv2d(16, 32, 3, padding=1, groups=4),
    "depthwise": lambda: nn.Conv2d(16, 16, 5, padding=2, groups=16, bias=False),
    "dilated": lambda: nn.Conv2d(16, 16, (3, 1), padding=(2, 0), dilation=(2, 1)),
}


def hooked(register: str) -> nn.Conv2d:
    layer = nn.Conv2d(3, 3, 1)
    getattr(layer, register)(lambda *_: None)
    return layer


@pytest.mark.parametrize("learning", [(), ("weight",), ("bias",), ("weight", "bias")], ids="-".join)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("layer", CONVOLUTIONS)
def test_lean_convolution_has_the_librarys_bits(layer: str, dtype: torch.dtype, channels_last: bool, learning: tuple[str, ...]) -> None:
    torch.manual_seed(0)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    theirs = CONVOLUTIONS[layer]().to(dtype=dtype, memory_format=layout)  # type: ignore[call-overload]
    for name, p in theirs.named_parameters():
        p.requires_grad_(name in learning)
    ours = LeanConv(copy.deepcopy(theirs))
    x = torch.randn(2, 16, 12, 9, dtype=dtype).to(memory_format=layout)
    found = []
    for each in (theirs, ours):
        leaf = x.clone(memory_format=torch.preserve_format).requires_grad_(True)
        y = each(leaf)
        wanted = [leaf, *(p for p in each.parameters() if p.requires_grad)]
        source = torch.Generator().manual_seed(1)
        gradient = torch.randn(y.shape, generator=source).to(dtype).to(memory_format=layout)
        found.append([y, *torch.autograd.grad(y, wanted, gradient)])
    for own, wanted_bits in zip(found[1], found[0], strict=True):
        assert torch.equal(own, wanted_bits)
        assert own.stride() == wanted_bits.stride()


@pytest.mark.parametrize("learns", [False, True])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("stride", "bias", "groups"), [(2, False, 1), (2, True, 4), (3, True, 1)])
def test_a_sampled_convolution_gives_the_gradient_of_the_pixels_that_it_reads(
    stride: int, bias: bool, groups: int, dtype: torch.dtype, channels_last: bool, learns: bool
) -> None:
    """The result has the library's bits; the gradients are as near to float64 as its own."""
    torch.manual_seed(0)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    layer = nn.Conv2d(16, 32, 1, stride=stride, bias=bias, groups=groups).to(dtype=dtype, memory_format=layout)  # type: ignore[call-overload]
    x = torch.randn(2, 16, 11, 9, dtype=dtype).to(memory_format=layout).requires_grad_()
    gradient = torch.randn_like(layer(x))

    def results(convolution: nn.Conv2d, x: Tensor) -> list[Tensor]:
        y = convolution(x)
        of_x, *of_weights = torch.autograd.grad(y, [x, *(convolution.parameters() if learns else [])], gradient.to(y))
        return [y, of_x[:, :, ::stride, ::stride], *of_weights]

    exact = results(copy.deepcopy(layer).double(), x.detach().double().requires_grad_())
    theirs = results(layer, x)
    assert SampledConv.suits(layer)
    ours, sampled = SampledConv(layer.requires_grad_(learns)), x.detach()[:, :, ::stride, ::stride].requires_grad_()
    y = ours(x, sampled)
    found = [y, *torch.autograd.grad(y, [sampled, *(ours.parameters() if learns else [])], gradient)]
    assert torch.equal(y, theirs[0])
    assert found[1].is_contiguous(memory_format=layout)
    for own, plain, expected in zip(found, theirs, exact, strict=True):
        assert distance(own.double(), expected) <= max(2 * distance(plain.double(), expected), 1e-6)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 4, 1),
        nn.Conv2d(4, 4, 1, stride=(2, 1)),
        nn.Conv2d(4, 4, 3, stride=2, padding=1),
        nn.Conv2d(4, 4, 1, stride=2, padding=1),
        None,
    ],
)
def test_a_sampled_convolution_leaves_other_layers_alone(layer: nn.Module | None) -> None:
    assert not SampledConv.suits(layer)


def test_input_is_kept_only_where_weights_learn() -> None:
    def keeps(layer: LeanConv) -> bool:
        x = torch.randn(1, 16, 5, 5, requires_grad=True) * 1
        y = layer(x)  # which keeps the graph
        return any(each is not None and each.data_ptr() == x.data_ptr() for each in y.grad_fn.saved_tensors)

    layer = LeanConv(CONVOLUTIONS["with a bias"]())
    assert keeps(layer)
    layer.weight.requires_grad_(False)
    assert not keeps(layer)  # nor for the bias


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv1d(3, 3, 1),
        nn.ConvTranspose2d(3, 3, 1),
        nn.LazyConv2d(3, 1),
        nn.Conv2d(3, 3, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(3, 3, 3, padding="same"),
        parametrizations.weight_norm(nn.Conv2d(3, 3, 1)),
        hooked("register_forward_hook"),
        hooked("register_forward_pre_hook"),
        hooked("register_full_backward_hook"),
        hooked("register_full_backward_pre_hook"),
        None,
    ],
)
def test_lean_convolution_leaves_other_layers_alone(layer: nn.Module | None) -> None:
    assert not LeanConv.suits(layer)


@pytest.mark.parametrize("architecture", ["resnet18-cifar", "mobilenet-v2-cifar"])
def test_iteration_reads_no_activation_for_an_input_gradient(architecture: str) -> None:
    """Nothing that the forward pass computed is kept for the gradient of a convolution's input."""
    torch.manual_seed(0)
    teacher = build(architecture, classes=10, channels=3, size=32).eval()
    config = SynthesisConfig(batch_size=2, iterations=2, ascent="none", device="cpu", backend="fused", precision="fp32")
    execution = replace(resolve(config.backend, config.precision, config.device), captures=False)  # it is traced below
    images = torch.randn(2, 3, 32, 32)
    network, _ = prepare(teacher, images, execution)
    Arena(network, execution, moves=False)
    with execution.arithmetic():
        refinement = Refinement([Teacher(network, network)], images.shape, config, Normalisation(), execution)
    nodes = trace_step(refinement._iterate).graph.nodes
    backward = [node for node in nodes if node.target is torch.ops.aten.convolution_backward.default]
    # Of 3×3 convolutions it is a convolution too, and reads the gradient and the weights alone.
    turned = [node for node in nodes if str(node.target) == "dwa_fast.conv3x3_weights.default" and node.args[1]]
    assert len(turned) == (13 if architecture == "resnet18-cifar" else 0)
    assert len(backward) + len(turned) >= 19  # all but the first layer's, which has its own way
    assert {inputs.target for inputs in (node.args[1] for node in backward)} == {torch.ops.aten.empty_strided.default}


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


def test_ascent_moves_the_weights() -> None:
    """The layers' weights are the network's parameters, under their names."""
    torch.manual_seed(0)
    layer = CONVOLUTIONS["with a bias"]()
    names = {name: tuple(p.shape) for name, p in layer.named_parameters()}
    ours = LeanConv(layer)
    assert {name: tuple(p.shape) for name, p in ours.named_parameters()} == names
    assert ours.weight is layer.weight

    def gradient() -> Tensor:
        x = torch.ones(1, 16, 5, 5, requires_grad=True)
        return torch.autograd.grad(ours(x).sum(), x)[0]

    before = gradient()
    with torch.no_grad():
        ours.weight.mul_(2)
    assert torch.equal(gradient(), 2 * before)


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


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_global_mean_has_pytorchs_bits(dtype: torch.dtype, layout: torch.memory_format) -> None:
    y, gradient = torch.randn(3, 17, 5, 4).to(dtype).contiguous(memory_format=layout).requires_grad_(), torch.randn(3, 17, 1, 1).to(dtype)
    means = [pool(y) for pool in (nn.AdaptiveAvgPool2d(1), GlobalMean())]
    assert torch.equal(*means)
    assert torch.equal(*(torch.autograd.grad(mean, y, gradient)[0] for mean in means))
    assert [GlobalMean.suits(nn.AdaptiveAvgPool2d(size)) for size in (1, (1, 1), 2, (1, 2))] == [True, True, False, False]


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


# Plain PyTorch dies of this on processors with AVX-512; ours goes through.
RUN = """
import torch
from torch import nn
from dwa_fast import recipe, synthesize

class Block(nn.Module):
    def __init__(self, c, o):
        super().__init__()
        self.a, self.b, self.skip = nn.Conv2d(c, o, 3, 2, 1, bias=False), nn.BatchNorm2d(o), nn.Conv2d(c, o, 1, 2, bias=False)
    def forward(self, x):
        return self.b(self.a(x)).relu() + self.skip(x)

torch.manual_seed(0)
net = nn.Sequential(nn.Conv2d(3, 6, 3, 1, 1, bias=False), nn.BatchNorm2d(6), nn.ReLU(), Block(6, 8), Block(8, 12),
                    nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 10)).eval()
x = torch.rand(120, 3, 64, 64)
config = recipe("cifar10", iterations=1, batch_size=120, steps=3, backend="fused", precision="fp32", device="cpu")
print(torch.isfinite(synthesize(net, x, torch.arange(120) % 10, config).losses).all().item())
"""


@pytest.mark.parametrize(
    ("channels", "stride", "height", "width"), [(6, (2, 2), 8, 8), (8, (2, 2), 7, 9), (5, (3, 2), 7, 4), (1, (2, 2), 1, 1)]
)
def test_strided_pointwise_matches_the_convolution(channels: int, stride: tuple[int, int], height: int, width: int) -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(channels, 7, 1, stride).double()
    ours = StridedPointwise(layer)
    found = []
    for each in (layer, ours):
        x = torch.randn(2, channels, height, width, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_(True)
        y = each(x)
        found.append((y, *torch.autograd.grad(y.square().sum(), (x, layer.weight, layer.bias))))
    for theirs, own in zip(*found, strict=True):
        torch.testing.assert_close(own, theirs)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(16, 8, 1, 2),
        nn.Conv2d(6, 8, 1),
        nn.Conv2d(6, 8, 3, 2),
        nn.Conv2d(6, 8, 1, 2, padding=1),
        nn.Conv2d(6, 6, 1, 2, groups=2),
        nn.Linear(6, 8),
    ],
)
def test_strided_pointwise_leaves_other_layers_alone(layer: nn.Module) -> None:
    holder = nn.Sequential(layer)
    replace_strided_pointwise(holder)
    assert holder[0] is layer


def test_prepared_teachers_hold_none_of_the_layers_that_crash() -> None:
    teacher = small_teacher()
    strided = nn.Conv2d(1, 1, 1, 2)
    module = nn.Sequential(strided, teacher)
    network, _ = prepare(module, torch.zeros(2, 1, 16, 16), resolve("fused", "fp32", "cpu"))
    assert not any(StridedPointwise.suits(layer) for layer in network.modules())
    assert StridedPointwise.suits(strided)  # the caller's is untouched
    assert {name for name, _ in module.named_parameters()} == {name.removeprefix("module.") for name, _ in network.named_parameters()}


def test_ascent_goes_through_where_the_librarys_dies(tmp_path: Path) -> None:
    command = [sys.executable, "-c", RUN]  # elsewhere: it would import the dwa_fast of the folder that it starts in
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "True"
