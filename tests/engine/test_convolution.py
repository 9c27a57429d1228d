"""Convolutions that do not keep their inputs, against PyTorch's own."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from dwa_fast.config import SynthesisConfig
from dwa_fast.engine.backend import resolve
from dwa_fast.engine.convolution import LeanConv
from dwa_fast.engine.refine import Refinement
from dwa_fast.engine.synthesis import Batch, Lane
from dwa_fast.engine.teacher import prepare
from dwa_fast.engine.tracing import trace
from dwa_fast.models.architectures import build

LAYERS: dict[str, Callable[[], nn.Conv2d]] = {
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
@pytest.mark.parametrize("layer", LAYERS)
def test_bits_are_the_librarys(layer: str, dtype: torch.dtype, channels_last: bool, learning: tuple[str, ...]) -> None:
    torch.manual_seed(0)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    theirs = LAYERS[layer]().to(dtype=dtype, memory_format=layout)  # type: ignore[call-overload]
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


def test_input_is_kept_only_where_weights_learn() -> None:
    def keeps(layer: LeanConv) -> bool:
        x = torch.randn(1, 16, 5, 5, requires_grad=True) * 1
        y = layer(x)  # which keeps the graph
        return any(each is not None and each.data_ptr() == x.data_ptr() for each in y.grad_fn.saved_tensors)

    layer = LeanConv(LAYERS["with a bias"]())
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
def test_other_layers_stay(layer: nn.Module | None) -> None:
    assert not LeanConv.suits(layer)


@pytest.mark.parametrize("architecture", ["resnet18-cifar", "mobilenet-v2-cifar"])
def test_iteration_reads_no_activation_for_an_input_gradient(architecture: str) -> None:
    """Nothing that the forward pass computed is kept for the gradient of a convolution's input."""
    torch.manual_seed(0)
    teacher = build(architecture, classes=10, channels=3, size=32).eval()
    config = SynthesisConfig(batch_size=2, iterations=2, ascent="none", device="cpu", backend="fused", precision="fp32")
    execution = resolve(config.backend, config.precision, config.device)
    images, labels = torch.randn(2, 3, 32, 32), torch.tensor([0, 1])
    network, _ = prepare(teacher, images, execution)
    lane = Lane(network, config, execution)
    refinement: Refinement = lane.begin(Batch(0, images, labels), seed=0)
    nodes = trace(refinement._iterate).graph.nodes
    backward = [node for node in nodes if node.target is torch.ops.aten.convolution_backward.default]
    assert len(backward) >= 19  # all but the first layer's, which has its own way
    assert {inputs.target for inputs in (node.args[1] for node in backward)} == {torch.ops.aten.empty_strided.default}


def test_ascent_moves_the_weights() -> None:
    """The layers' weights are the network's parameters, under their names."""
    torch.manual_seed(0)
    layer = LAYERS["with a bias"]()
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
