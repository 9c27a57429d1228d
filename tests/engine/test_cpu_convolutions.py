"""Which convolutions of teachers and students are computed otherwise on a CPU, and that all forms of a network pass through them."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dwa_fast import ops
from dwa_fast.engine import cpu_convolutions
from dwa_fast.engine.backend import bf16_instructions, resolve
from dwa_fast.engine.capture import CallList, trace_step
from dwa_fast.engine.cpu_convolutions import CpuConv
from dwa_fast.engine.fuse import trace
from dwa_fast.engine.layers import LeanConv
from dwa_fast.engine.packing import pack_convolutions
from dwa_fast.engine.training_form import training_form
from dwa_fast.models.batchnorm import batchnorm_layers
from dwa_fast.reference.ops import Operators

REPLACED = {
    "3×3": (nn.Conv2d(16, 32, 3, padding=1), True),
    "strided": (nn.Conv2d(16, 32, 3, stride=2, padding=1), False),
    "unpadded": (nn.Conv2d(16, 32, 3), False),
    "dilated": (nn.Conv2d(16, 32, 3, padding=1, dilation=(1, 2)), False),
    "groups": (nn.Conv2d(16, 32, 3, padding=1, groups=2), False),
    "5×5": (nn.Conv2d(16, 32, 5, padding=1), False),
    "inputs": (nn.Conv2d(3, 32, 3, padding=1), False),
    "outputs": (nn.Conv2d(16, 40, 3, padding=1), False),
    "reflected": (nn.Conv2d(16, 32, 3, padding=1, padding_mode="reflect"), False),
}


@pytest.mark.parametrize(("layer", "suits"), REPLACED.values(), ids=REPLACED)
def test_which_layers_have_fewer_multiplications(layer: nn.Conv2d, suits: bool) -> None:
    assert CpuConv.is_3x3(layer) is suits


def network(side: int = 8) -> nn.Sequential:
    torch.manual_seed(0)
    first, middle = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 32, 3, padding=1)
    return nn.Sequential(
        first, nn.BatchNorm2d(16), nn.ReLU(), middle, nn.BatchNorm2d(32), nn.ReLU(), nn.Flatten(), nn.Linear(32 * side**2, 5)
    )


PRODUCTS = {
    "1×1": (nn.Conv2d(5, 7, 1), True),
    "strided 1×1": (nn.Conv2d(5, 7, 1, stride=2), True),
    "3×3": (nn.Conv2d(5, 7, 3, padding=1), True),
    "strided 3×3": (nn.Conv2d(5, 7, 3, stride=2, padding=1), True),
    "unpadded": (nn.Conv2d(5, 7, 3), False),
    "padded 1×1": (nn.Conv2d(5, 7, 1, padding=1), False),
    "strides": (nn.Conv2d(5, 7, 3, stride=(1, 2), padding=1), False),
    "dilated": (nn.Conv2d(5, 7, 3, padding=1, dilation=(1, 2)), False),
    "groups": (nn.Conv2d(6, 6, 1, groups=2), False),
    "5×5": (nn.Conv2d(5, 7, 5, padding=2), False),
}


@pytest.mark.parametrize(("layer", "suits"), PRODUCTS.values(), ids=PRODUCTS)
def test_which_layers_may_be_products(layer: nn.Conv2d, suits: bool) -> None:
    assert CpuConv.may_be_product(layer) is suits


CONV3X3, CONV_PRODUCT = ops.conv3x3, ops.conv_product


def counting(counted: list[Any]) -> Operators:
    """Operators that append which parts of a convolution they made products, and "3×3" where it took fewer multiplications."""

    def conv3x3(*arguments: Tensor) -> Tensor:
        counted.append("3×3")
        return CONV3X3(*arguments)

    def conv_product(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, *parts: bool) -> Tensor:
        counted.append(parts)
        return CONV_PRODUCT(x, weight, bias, stride, *parts)

    return Operators("counting", conv3x3=conv3x3, conv_product=conv_product)


@pytest.mark.parametrize(("dtype", "side", "replaced"), [(torch.float32, 8, ["3×3"]), (torch.float32, 3, []), (torch.bfloat16, 8, [])])
def test_where_a_3x3_layer_is_computed_otherwise(dtype: torch.dtype, side: int, replaced: list[str]) -> None:
    layer, counted = nn.Conv2d(16, 32, 3, padding=1).to(dtype), list[Any]()
    ours, x = CpuConv(copy.deepcopy(layer), counting(counted)), torch.randn(2, 16, side, side, dtype=dtype)
    torch.testing.assert_close(ours(x), layer(x))
    assert counted == replaced


# kernel, stride, side of the map, channels, whether the weights learn; which of result, gradient of x and of the weights are products
PARTS = [
    (3, 1, 4, 64, True, (True, True, True)),
    (3, 1, 4, 32, True, (True, True, False)),
    (3, 1, 4, 64, False, (True, True, False)),
    (3, 1, 5, 64, True, None),
    (3, 1, 8, 256, True, (False, False, True)),
    (3, 2, 8, 64, True, (True, False, True)),
    (3, 2, 15, 32, True, (True, False, False)),
    (1, 1, 16, 64, True, (True, True, False)),
    (1, 1, 17, 64, True, None),
    (1, 2, 8, 64, True, (True, True, True)),
]


@pytest.mark.parametrize(("kernel", "stride", "side", "channels", "learns", "parts"), PARTS)
@pytest.mark.parametrize("autocast", [False, True])
def test_where_a_layer_is_a_product(
    kernel: int, stride: int, side: int, channels: int, learns: bool, parts: tuple[bool, ...] | None, autocast: bool
) -> None:
    """With the numbers of the layer itself, also under autocast, where it is given float32 and its weights keep their precision."""
    torch.manual_seed(0)
    layer, counted = nn.Conv2d(16, channels, kernel, stride, kernel // 2), list[Any]()
    layer.to(torch.float32 if autocast else torch.bfloat16).requires_grad_(learns)
    ours, found = CpuConv(copy.deepcopy(layer), counting(counted)), []
    x = torch.randn(2, 16, side, side, dtype=layer.weight.dtype).to(memory_format=torch.channels_last)
    for each in (ours, layer):
        leaf = x.detach().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = each(leaf)
        assert y.dtype is torch.bfloat16
        leaves = [leaf, *each.parameters()] if learns else [leaf]
        found.append([y, *torch.autograd.grad(y, leaves, torch.ones_like(y))])
    assert counted == ([] if parts is None else [parts])
    for own, plain in zip(*found, strict=True):
        assert own.dtype is plain.dtype
        torch.testing.assert_close(own, plain, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("instructions", ["AMX", "AVX-512 BF16", None])
def test_products_only_with_amx(instructions: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_convolutions, "bf16_instructions", lambda: instructions)
    monkeypatch.setattr(cpu_convolutions, "cpu_level", lambda: "avx2")
    module, counted = nn.Sequential(nn.Conv2d(16, 64, 1), nn.Conv2d(64, 64, 3, padding=1)).bfloat16(), list[Any]()
    cpu_convolutions.replace_cpu_convolutions(module, counting(counted))
    assert [isinstance(each, CpuConv) for each in module] == [instructions == "AMX", True]
    module(torch.randn(2, 16, 4, 4).bfloat16())
    assert counted == ([(True, True, True)] * 2 if instructions == "AMX" else [])


@pytest.mark.parametrize(("limit", "expected"), [("AVX512_CORE_BF16", "AVX-512 BF16"), ("avx512_core_amx", "AMX"), ("ALL", "AMX")])
def test_amx_is_not_used_where_onednn_is_held_down(limit: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: True)
    if torch.ops.mkldnn._is_mkldnn_bf16_supported():
        assert bf16_instructions() == expected


def test_teachers_pass_through_it_and_plain_back_ends_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_convolutions, "cpu_level", lambda: "avx2")
    teacher, images = network().eval().requires_grad_(False), torch.randn(3, 3, 8, 8)
    for backend, kind in (("fused", CpuConv), ("compiled", LeanConv)):
        operators = resolve(backend, "fp32", "cpu").operators  # type: ignore[arg-type]
        rewritten = trace(copy.deepcopy(teacher), batchnorm_layers(teacher), operators, images)
        found = [type(each) for each in rewritten.module.modules() if isinstance(each, LeanConv)]
        assert found[1:] == [kind]
        torch.testing.assert_close(rewritten.module(images), teacher(images))


def test_the_baseline_keeps_the_librarys_convolutions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_convolutions, "cpu_level", lambda: "baseline")
    monkeypatch.setattr(cpu_convolutions, "bf16_instructions", lambda: None)
    teacher, images = network().eval().requires_grad_(False), torch.randn(3, 3, 8, 8)
    rewritten = trace(teacher, batchnorm_layers(teacher), resolve("fused", "fp32", "cpu").operators, images)
    assert not any(isinstance(each, CpuConv) for each in rewritten.module.modules())


def test_trainings_alone_take_large_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients of images have no larger errors than PyTorch's."""
    asked: list[bool] = []
    monkeypatch.setattr(cpu_convolutions, "cpu_level", lambda: "avx2")
    monkeypatch.setattr(ops, "conv3x3", lambda *arguments: asked.append(arguments[3]) or CONV3X3(*arguments))
    teacher, images = network().eval().requires_grad_(False), torch.randn(3, 3, 8, 8)
    synthesis = trace(teacher, batchnorm_layers(teacher), resolve("fused", "fp32", "cpu").operators, images)
    training = training_form(network().train(), (3, 8, 8), torch.device("cpu"))
    for form, large in ((synthesis.module, False), (training, True)):
        asked.clear()
        form(images)
        assert asked
        assert set(asked) == {large}


@pytest.mark.parametrize("bf16", [False, True])
def test_steps_of_a_training(bf16: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In bf16 under autocast, with parameters in float32."""
    counted: list[Any] = []
    monkeypatch.setattr(cpu_convolutions, "bf16_instructions", lambda: "AMX")
    monkeypatch.setattr(cpu_convolutions, "cpu_level", lambda: "avx2")
    for name in ("conv3x3", "conv_product"):
        monkeypatch.setattr(ops, name, getattr(counting(counted), name))
    found = []
    for form in (lambda module: module, lambda module: training_form(module, (3, 4, 4), torch.device("cpu"))):
        module = network(4).train()
        forward, images = form(module), torch.randn(6, 3, 4, 4, generator=torch.Generator().manual_seed(1))
        counted.clear()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            logits = forward(images.contiguous(memory_format=torch.channels_last))
        loss = F.cross_entropy(logits.float(), torch.arange(6) % 5)
        found.append([logits.detach().float(), *torch.autograd.grad(loss, list(module.parameters()))])
    assert counted == ([(True, True, False)] * 2 if bf16 else ["3×3"])
    for ours, theirs in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(ours, theirs, **({"rtol": 0.05, "atol": 0.02} if bf16 else {"rtol": 1e-4, "atol": 1e-5}))


@pytest.mark.parametrize(
    ("dtype", "arranged"),
    [(torch.float32, ["dwa_fast.conv3x3_weights.default"] * 2), (torch.bfloat16, ["dwa_fast.conv_turned.default"])],
)
def test_a_captured_step_arranges_frozen_weights_once_and_again_when_they_have_changed(dtype: torch.dtype, arranged: list[str]) -> None:
    layer = CpuConv(
        nn.Conv2d(16, 32, 3, padding=1).to(dtype).requires_grad_(False),
        Operators("fused", **{name: getattr(ops, name) for name in ("conv3x3", "conv_product")}),
    )
    x, gradient = torch.randn(2, 16, 4, 4).to(dtype), torch.zeros(2, 16, 4, 4).to(dtype)

    def step() -> None:
        leaf = x.detach().requires_grad_()
        gradient.copy_(torch.autograd.grad(layer(leaf).square().sum(), leaf)[0])

    captured = CallList(step)
    for factor, _ in itertools.product((1.0, 0.5), range(2)):
        layer.weight.mul_(factor)
        captured.refresh()
        step()
        expected = gradient.clone()
        gradient.zero_()
        captured.run(1)
        assert torch.equal(gradient, expected)
    once = pack_convolutions(trace_step(step))
    assert sorted(str(node.target) for node in once) == arranged
