"""Convolutions that keep no input, or read the pixels of their stride alone, against PyTorch's own."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from dwa_fast.config import Normalisation, SynthesisConfig
from dwa_fast.engine.ascent import Arena
from dwa_fast.engine.backend import resolve
from dwa_fast.engine.capture import trace_step
from dwa_fast.engine.layers import LeanConv, SampledConv
from dwa_fast.engine.refine import Refinement, Teacher
from dwa_fast.engine.teacher import prepare
from dwa_fast.models.architectures import build
from tests.nets import distance

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
