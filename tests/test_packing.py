"""A recorded step computes once what depends on frozen tensors alone, and gives oneDNN its weights packed; the bits stay."""

from __future__ import annotations

import gc
import importlib
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dwa_fast.packing import constants, pack_convolutions
from dwa_fast.program import Program
from dwa_fast.tracing import trace

CONVOLUTIONS = {
    "3x3": lambda: nn.Conv2d(16, 32, 3, padding=1, bias=False),
    "bias": lambda: nn.Conv2d(16, 24, 3),
    "stride": lambda: nn.Conv2d(16, 32, 3, 2, 1, bias=False),
    "stride, even side left over": lambda: nn.Conv2d(16, 32, 1, 2, bias=False),
    "dilation": lambda: nn.Conv2d(16, 32, 3, padding=2, dilation=2, bias=False),
    "rectangle": lambda: nn.Conv2d(16, 16, (1, 5), (1, 2), (0, 1)),
    "groups": lambda: nn.Conv2d(16, 32, 3, padding=1, groups=4, bias=False),
    "depthwise": lambda: nn.Conv2d(16, 16, 3, 2, 1, groups=16, bias=False),
    "odd channels": lambda: nn.Conv2d(16, 7, 3, padding=1),
}


def step_of(layer: nn.Module, images: Tensor, total: Tensor, gradient: Tensor) -> None:
    """What a refinement does with frozen weights: a forward pass, the gradient of the images, an update in place."""
    leaf = images.detach().requires_grad_(True)
    y = layer(leaf)
    (found,) = torch.autograd.grad((y.float() ** 2).sum(), leaf)
    gradient.copy_(found)
    total.add_(y.float().sum())
    images.sub_(0.01 * found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("layer", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_bits_are_those_of_the_step_and_follow_changed_weights(layer: object, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    convolution = layer().to(dtype, memory_format=torch.channels_last).requires_grad_(False)  # type: ignore[operator]
    images = torch.randn(3, 16, 10, 8, dtype=dtype).contiguous(memory_format=torch.channels_last)
    plain = images.clone(), torch.zeros(()), torch.zeros_like(images)
    recorded = images.clone(), torch.zeros(()), torch.zeros_like(images)
    program = Program(lambda: step_of(convolution, *recorded))
    step_of(convolution, *plain)
    for _ in range(2):
        convolution.weight.mul_(0.5).add_(0.01)
        program.refresh()
        program.run(2)
        for _ in range(2):
            step_of(convolution, *plain)
    for ours, theirs in zip(recorded, plain, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch without oneDNN")
def test_frozen_weights_are_packed_once() -> None:
    layers = nn.Sequential(*(CONVOLUTIONS[name]() for name in ("3x3",)), nn.ReLU(), nn.Conv2d(32, 8, 1, bias=False))
    layers = layers.to(memory_format=torch.channels_last).requires_grad_(False)
    images = torch.randn(20, 16, 8, 8).contiguous(memory_format=torch.channels_last)
    graph = trace(lambda: step_of(layers, images, torch.zeros(()), torch.zeros_like(images)))
    once = constants(graph)
    pack_convolutions(graph, once)
    targets = [str(node.target) for node in graph.graph.nodes]
    assert sum("_reorder_convolution" in target for target in targets) == 4
    assert all(node in once for node in graph.graph.nodes if "_reorder_convolution" in str(node.target))
    assert not any(target.startswith("aten.convolution") for target in targets)


def test_weights_that_the_step_changes_are_not_constant() -> None:
    """An ascent writes its weights through one flat tensor, of which every weight is a view."""
    flat = torch.randn(4 * 3 * 9)
    weight = flat[: 4 * 3 * 9].view(4, 3, 3, 3)
    x = torch.randn(2, 3, 6, 6)

    def step() -> None:
        flat.add_(F.conv2d(x, weight).mean())

    before = flat.clone()
    program = Program(step)
    program.run(3)
    for _ in range(4):
        before.add_(F.conv2d(x, before.view(4, 3, 3, 3)).mean())
    assert torch.equal(flat, before)


def test_what_is_written_into_or_drawn_is_not_constant() -> None:
    weight, result = torch.randn(5), torch.zeros(5)

    def step() -> None:
        doubled = weight * 2  # constant
        changed = weight * 3
        view = changed[1:]
        view.add_(1)  # so `changed` is not
        noise = torch.bernoulli(torch.sigmoid(weight))  # nor is what is drawn
        result.add_(doubled + changed + noise)

    graph = trace(step)
    found = {str(node.target) for node in constants(graph) if node.op == "call_function"}
    names = [node.name for node in constants(graph)]
    assert found >= {"aten.mul.Tensor", "aten.sigmoid.default"}
    assert not found & {"aten.bernoulli.default", "aten.add_.Tensor"}
    assert sum(name.startswith("mul") for name in names) == 1
    program = Program(step)
    result.zero_()
    torch.manual_seed(1)
    program.run(3)
    wanted = torch.zeros(5)
    torch.manual_seed(1)
    for _ in range(3):
        changed = weight * 3
        changed[1:] += 1
        wanted.add_(weight * 2 + changed + torch.bernoulli(torch.sigmoid(weight)))
    assert torch.equal(result, wanted)


def test_packing_leaves_the_global_random_numbers_alone() -> None:
    torch.manual_seed(3)
    wanted = torch.rand(2)
    layer = CONVOLUTIONS["3x3"]().to(memory_format=torch.channels_last).requires_grad_(False)
    images = torch.randn(3, 16, 8, 8).contiguous(memory_format=torch.channels_last)
    torch.manual_seed(3)
    Program(lambda: step_of(layer, images, torch.zeros(()), torch.zeros_like(images)))
    assert torch.equal(torch.rand(2), wanted)


def test_packed_weights_are_not_in_the_pool_that_they_would_not_return_to() -> None:
    """oneDNN frees its memory through the allocator of that moment: a block that the pool still counted would be handed out twice."""
    extension = importlib.import_module("dwa_fast._C")
    layer = nn.Conv2d(64, 64, 3, padding=1, bias=False).to(memory_format=torch.channels_last).requires_grad_(False)
    images = torch.randn(20, 64, 8, 8).contiguous(memory_format=torch.channels_last)
    program = Program(lambda: step_of(layer, images, torch.zeros(()), torch.zeros_like(images)))
    values = torch.randn(300, 300)
    other = Program(lambda: values.copy_(torch.tanh(values @ values)))  # holds the pool open in its thread
    thread = threading.Thread(target=other.run, args=(300,))
    thread.start()
    for _ in range(3):
        program.refresh()
        program.run(2)
    thread.join()
    del program
    gc.collect()
    assert extension.pool_in_use() == 0
