"""A captured step gives oneDNN the weights that it never changes packed, once; the bits stay."""

from __future__ import annotations

import gc
import importlib
import operator
import threading
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Node

from dwa_fast.engine import packing
from dwa_fast.engine.capture import CallList, trace_step
from dwa_fast.engine.packing import frozen_tensors, pack_convolutions

CONSTANT = torch.randn(8, 16, 3, 3, generator=torch.Generator().manual_seed(0)).contiguous(memory_format=torch.channels_last)
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
    captured = images.clone(), torch.zeros(()), torch.zeros_like(images)
    calls = CallList(lambda: step_of(convolution, *captured))
    step_of(convolution, *plain)
    for _ in range(2):
        convolution.weight.mul_(0.5).add_(0.01)
        calls.refresh()
        calls.run(2)
        for _ in range(2):
            step_of(convolution, *plain)
    for ours, theirs in zip(captured, plain, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch without oneDNN")
def test_frozen_weights_are_packed_once() -> None:
    layers = nn.Sequential(*(CONVOLUTIONS[name]() for name in ("3x3",)), nn.ReLU(), nn.Conv2d(32, 8, 1, bias=False))
    layers = layers.to(memory_format=torch.channels_last).requires_grad_(False)
    images = torch.randn(20, 16, 8, 8).contiguous(memory_format=torch.channels_last)
    graph = trace_step(lambda: step_of(layers, images, torch.zeros(()), torch.zeros_like(images)))
    packs = pack_convolutions(graph)
    targets = [str(node.target) for node in graph.graph.nodes]
    assert sum("_reorder_convolution" in target for target in targets) == 4
    assert all(node in packs for node in graph.graph.nodes if "_reorder_convolution" in str(node.target))
    assert not any(target.startswith("aten.convolution") for target in targets)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch without oneDNN")
def test_layers_of_equal_shapes_and_settings_are_compared_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A dilated one, whose shapes are the same, is compared on its own, and so decided on its own."""
    like, dilated = CONVOLUTIONS["groups"], nn.Conv2d(32, 32, 3, padding=2, dilation=2, bias=False)
    layers = nn.Sequential(like(), *(nn.Conv2d(32, 32, 3, padding=1, bias=False) for _ in range(3)), dilated)
    layers = layers.to(memory_format=torch.channels_last).requires_grad_(False)
    images = torch.randn(2, 16, 8, 8).contiguous(memory_format=torch.channels_last)
    graph = trace_step(lambda: images.add_(layers(images).mean()))
    compared = []

    def compare(node: Node, packed: packing._Packed) -> bool:
        compared.append(node)
        return 2 not in packed.shape[3]

    monkeypatch.setattr(packing, "_compare", compare)
    pack_convolutions(graph)
    assert len(compared) == 3
    targets = [str(node.target) for node in graph.graph.nodes]
    assert sum("_reorder_convolution" in target for target in targets) == 4
    assert targets.count("aten.convolution.default") == 1


def test_weights_that_the_step_changes_are_not_constant() -> None:
    """An ascent writes its weights through one flat tensor, of which every weight is a view."""
    flat = torch.randn(4 * 3 * 9)
    weight = flat[: 4 * 3 * 9].view(4, 3, 3, 3)
    x = torch.randn(2, 3, 6, 6)

    def step() -> None:
        flat.add_(F.conv2d(x, weight).mean())

    before = flat.clone()
    calls = CallList(step)
    calls.run(3)
    for _ in range(4):
        before.add_(F.conv2d(x, before.view(4, 3, 3, 3)).mean())
    assert torch.equal(flat, before)


def test_only_tensors_that_no_call_writes_into_are_frozen() -> None:
    """Through a view, through a copy that is none (`_unsafe_view`), by running statistics that no schema mentions."""
    kept, by_view, mean, result = torch.randn(4), torch.randn(2, 2), torch.zeros(4), torch.zeros(4)

    def step() -> None:
        by_view.view(4)[1:].add_(1)
        F.batch_norm(result.expand(3, 4), mean, torch.ones(4), training=True)
        result.copy_(kept * 2)

    graph = trace_step(step)
    frozen = {operator.attrgetter(node.target)(graph).untyped_storage().data_ptr() for node in frozen_tensors(graph)}
    assert kept.untyped_storage().data_ptr() in frozen
    assert not frozen & {each.untyped_storage().data_ptr() for each in (by_view, mean, result)}


def test_what_is_computed_from_weights_alone_is_computed_in_every_repeat() -> None:
    """A reshape that copies gives memory which its operators do not declare; changes in place must not add up over the repeats."""
    weight, result = torch.randn(4, 2), torch.zeros(8)

    def step() -> None:
        value = weight.t().reshape(-1)
        value += 1.0
        result.copy_(value)

    calls = CallList(step)
    calls.run(3)
    assert torch.equal(result, weight.t().reshape(-1) + 1)


@pytest.mark.parametrize(("make", "shape"), [(nn.Conv1d, (3, 16, 8)), (nn.Conv3d, (3, 16, 4, 8, 8))], ids=["1d", "3d"])
def test_other_dimensions_are_called_as_they_are(make: type[nn.Module], shape: tuple[int, ...]) -> None:
    layer = make(16, 8, 3, padding=1).requires_grad_(False)
    plain, captured = ((torch.ones(shape), torch.zeros(()), torch.zeros(shape)) for _ in range(2))
    calls = CallList(lambda: step_of(layer, *captured))
    calls.run(2)
    for _ in range(3):
        step_of(layer, *plain)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(captured, plain, strict=True))


@pytest.mark.parametrize(
    "call",
    [
        lambda x: F.conv2d(x, CONSTANT, stride=(2,), padding="valid"),
        lambda x: F.conv2d(x, CONSTANT, stride=(1,), padding=(1,)),
        lambda x: F.conv2d(x, CONSTANT[:1].expand(8, 16, 3, 3), padding=1),
        lambda x: F.conv2d(x, CONSTANT[:, :1].expand(8, 1, 3, 3).repeat(2, 1, 1, 1), padding=1, groups=16),
        lambda x: F.conv2d(x, CONSTANT, torch.ones(1).expand(8)),
        lambda x: x * F.conv2d((x.detach() > 0).long(), CONSTANT.sign().long(), padding=1).sum(1, keepdim=True).to(x.dtype),
    ],
    ids=["valid", "one number", "expanded", "grouped", "expanded bias", "integers"],
)
def test_convolutions_that_cannot_be_packed_are_called_as_they_are(call: Callable[[Tensor], Tensor]) -> None:
    images = torch.randn(3, 16, 8, 8).contiguous(memory_format=torch.channels_last)
    result = torch.zeros_like(images)

    def step() -> None:
        leaf = images.detach().requires_grad_(True)
        result.copy_(torch.autograd.grad((call(leaf) ** 2).sum(), leaf)[0])

    step()
    wanted = result.clone()
    calls = CallList(step)
    result.zero_()
    calls.run(2)
    assert torch.equal(result, wanted)


def test_packing_leaves_the_global_random_numbers_alone() -> None:
    torch.manual_seed(3)
    wanted = torch.rand(2)
    layer = CONVOLUTIONS["3x3"]().to(memory_format=torch.channels_last).requires_grad_(False)
    images = torch.randn(3, 16, 8, 8).contiguous(memory_format=torch.channels_last)
    torch.manual_seed(3)
    CallList(lambda: step_of(layer, images, torch.zeros(()), torch.zeros_like(images)))
    assert torch.equal(torch.rand(2), wanted)


def test_packed_weights_are_not_in_the_pool_that_they_would_not_return_to() -> None:
    """oneDNN frees its memory through the allocator of that moment: a block that the pool still counted would be handed out twice."""
    extension = importlib.import_module("dwa_fast._C")
    layer = nn.Conv2d(64, 64, 3, padding=1, bias=False).to(memory_format=torch.channels_last).requires_grad_(False)
    images = torch.randn(20, 64, 8, 8).contiguous(memory_format=torch.channels_last)
    calls = CallList(lambda: step_of(layer, images, torch.zeros(()), torch.zeros_like(images)))
    values = torch.randn(300, 300)
    other = CallList(lambda: values.copy_(torch.tanh(values @ values)))  # holds the pool open in its thread
    thread = threading.Thread(target=other.run, args=(300,))
    thread.start()
    for _ in range(3):
        calls.refresh()
        calls.run(2)
    thread.join()
    del calls
    gc.collect()
    assert extension.pool_in_use() == 0


def test_other_threads_use_onednn_while_a_program_runs() -> None:
    """Their memory does not come from the pool, so none of it is handed out twice."""
    extension = importlib.import_module("dwa_fast._C")
    values, layer, x = torch.randn(200, 200), nn.Conv2d(64, 64, 3), torch.randn(8, 64, 12, 12)
    done = threading.Event()
    with torch.no_grad():
        wanted = layer(x)

    def repeat() -> None:
        calls = CallList(lambda: values.copy_(torch.tanh(values @ values)))
        for _ in range(400):
            calls.run(1)
        done.set()

    thread = threading.Thread(target=repeat)
    thread.start()
    while not done.is_set():
        with torch.no_grad():
            assert torch.equal(layer(x), wanted)
    thread.join()
    gc.collect()
    assert extension.pool_in_use() == 0
