"""conv_product: as near to float64 as PyTorch's convolution, with every gradient and every choice of what is a product."""

from __future__ import annotations

import itertools
import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from dwa_fast import ops
from dwa_fast.reference.ops import Operators

# images, inputs, outputs, height, width, side of the kernel, stride: odd and even sides, maps smaller than the kernel or the stride
SHAPES = [
    (3, 8, 16, 4, 4, 3, 1),
    (2, 5, 7, 6, 3, 3, 2),
    (2, 16, 8, 1, 1, 3, 1),
    (4, 3, 6, 7, 5, 1, 1),
    (3, 12, 9, 5, 8, 1, 2),
    (2, 4, 4, 2, 7, 3, 3),
]
# float64 is only summed in another order; bf16 is rounded once, as PyTorch's is
TOLERANCES = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 4e-3}


def problem(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, w, b and ∂L/∂y."""
    n, c, o, h, w, kernel, stride = shape
    source = torch.Generator().manual_seed(0)
    sizes = [(n, c, h, w), (o, c, kernel, kernel), (o,), (n, o, -(-h // stride), -(-w // stride))]
    x, weight, bias, gradient = (torch.randn(size, generator=source) for size in sizes)
    return x.to(dtype), (weight / math.sqrt(kernel * kernel * c)).to(dtype), bias.to(dtype), gradient.to(dtype)


def results(operator: Any, x: Tensor, weight: Tensor, bias: Tensor | None, gradient: Tensor, *settings: Any) -> list[Tensor]:
    """y, ∂L/∂x, ∂L/∂w and, with a bias, ∂L/∂b."""
    leaves = [each.detach().clone().requires_grad_() for each in (x, weight, bias) if each is not None]
    y = operator(*leaves, *([None] if bias is None else []), *settings)
    return [y.detach(), *torch.autograd.grad(y, leaves, gradient.to(y))]


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("parts", list(itertools.product((False, True), repeat=3)), ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_near_float64(shape: tuple[int, ...], parts: tuple[bool, bool, bool], dtype: torch.dtype) -> None:
    given = problem(shape, dtype)
    exact = results(Operators("reference").conv_product, *(each.double() for each in given), shape[-1])
    for own, expected in zip(results(ops.conv_product, *given, shape[-1], *parts), exact, strict=True):
        assert own.shape == expected.shape
        assert own.dtype is dtype
        assert float((own.double() - expected).norm()) <= TOLERANCES[dtype] * float(expected.norm())


def test_products_round_as_the_librarys_convolution() -> None:
    """Largest errors in bf16 of a layer of a ResNet-18, where thousands of terms are added."""
    given = problem((5, 256, 256, 4, 4, 3, 1), torch.bfloat16)
    exact = results(Operators("reference").conv_product, *(each.double() for each in given))
    theirs, ours = results(Operators("reference").conv_product, *given), results(ops.conv_product, *given)
    for own, plain, expected in zip(ours[:3], theirs, exact, strict=False):
        assert (own - expected).abs().max() <= 1.1 * (plain - expected).abs().max()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_any_layout_and_channels_last_products(shape: tuple[int, ...]) -> None:
    x, weight, _, gradient = problem(shape, torch.float32)
    expected = results(ops.conv_product, x, weight, None, gradient, shape[-1])
    wide = torch.full((*x.shape[:3], 2 * x.shape[3]), math.nan)
    wide[..., ::2] = x
    for each in (x.contiguous(memory_format=torch.channels_last), wide[..., ::2]):
        for layout in (torch.contiguous_format, torch.channels_last):
            laid = weight.contiguous(memory_format=layout), None, gradient.contiguous(memory_format=layout)
            assert all(map(torch.equal, results(ops.conv_product, each, *laid, shape[-1]), expected))
    products = [expected[0], expected[2]] if shape[-1] > 1 and shape[-2] > 1 else expected
    assert all(each.is_contiguous(memory_format=torch.channels_last) for each in products)


def test_only_what_is_needed_is_computed_and_kept() -> None:
    x, weight, bias, gradient = problem(SHAPES[0], torch.float32)
    leaf = x.requires_grad_() * 1
    frozen = ops.conv_product(leaf, weight, bias)
    assert frozen.grad_fn is not None
    assert not any(each is not None and each.data_ptr() == leaf.data_ptr() for each in frozen.grad_fn.saved_tensors)
    for parts in itertools.product((False, True), repeat=3):  # the library's gradient of x needs no values of x
        y = ops.conv_product(leaf, weight, bias, 1, *parts)
        expected = results(Operators("reference").conv_product, x, weight, bias, gradient)[1]
        torch.testing.assert_close(torch.autograd.grad(y, leaf, gradient, retain_graph=True)[0], expected)


def test_the_same_bits_every_time_and_for_any_number_of_threads_in_its_own_parts() -> None:
    x, weight, _, _ = problem((7, 32, 48, 9, 10, 3, 2), torch.bfloat16)
    ops.load()
    found = []
    for threads in (1, 2, 3, 1):
        torch.set_num_threads(threads)
        found.append((torch.ops.dwa_fast.conv_windows(x, 3, 2), torch.ops.dwa_fast.conv_turned(weight)))
    for each in found[1:]:
        assert all(map(torch.equal, each, found[0]))


def test_windows_are_those_of_unfold_with_channels_innermost() -> None:
    ops.load()
    for n, c, _, h, w, kernel, stride in SHAPES:
        x = torch.randn(n, c, h, w)
        columns = torch.nn.functional.unfold(x, kernel, padding=kernel // 2, stride=stride)  # [N, C·K², ⌈H/s⌉·⌈W/s⌉]
        expected = columns.view(n, c, kernel * kernel, -1).permute(0, 3, 2, 1).reshape(-1, kernel * kernel * c)
        assert torch.equal(torch.ops.dwa_fast.conv_windows(x, kernel, stride), expected)


@pytest.mark.parametrize("shape", [(0, 4, 8, 4, 4, 3, 1), (2, 4, 8, 0, 4, 1, 1)], ids=str)
def test_nothing_to_read(shape: tuple[int, ...]) -> None:
    given = problem(shape, torch.float32)
    y, of_x, of_weight, of_bias = results(ops.conv_product, *given)
    assert (y.shape, of_x.shape) == (given[3].shape, given[0].shape)
    assert not of_weight.any()
    assert not of_bias.any()


def test_opcheck() -> None:
    ops.load()
    x, weight, _, _ = problem((2, 6, 8, 5, 4, 3, 2), torch.bfloat16)
    torch.library.opcheck(torch.ops.dwa_fast.conv_windows.default, (x, 3, 2))
    torch.library.opcheck(torch.ops.dwa_fast.conv_turned.default, (weight,))


@pytest.mark.parametrize(
    ("changed", "kind", "message"),
    [
        ({0: [1.0]}, TypeError, "x must be a tensor, got list"),
        ({0: torch.zeros(2, 4, 4, 4, dtype=torch.int64)}, TypeError, "x must be of floating point, got int64"),
        ({1: torch.zeros(8, 4, 3, 3).bfloat16()}, TypeError, "weight must have the precision of x, got bfloat16"),
        ({2: torch.zeros(8, device="meta")}, ValueError, "bias must be on a CPU, got meta"),
        ({0: torch.zeros(4, 4, 4)}, ValueError, "x must be [N, C, H, W], got shape (4, 4, 4)"),
        ({1: torch.zeros(8, 5, 3, 3)}, ValueError, "weight must be [O, 4, K, K] with K 1 or 3, got shape (8, 5, 3, 3)"),
        ({1: torch.zeros(8, 4, 5, 5)}, ValueError, "weight must be [O, 4, K, K] with K 1 or 3, got shape (8, 4, 5, 5)"),
        ({2: torch.zeros(7)}, ValueError, "bias must be [8], got shape (7,)"),
        ({3: 0}, ValueError, "stride must be a positive integer, got 0"),
        ({3: 1.0}, ValueError, "stride must be a positive integer, got 1.0"),
    ],
)
def test_wrong_input(changed: dict[int, object], kind: type[Exception], message: str) -> None:
    arguments: list[object] = [torch.zeros(2, 4, 4, 4), torch.zeros(8, 4, 3, 3), torch.zeros(8), 1]
    for place, value in changed.items():
        arguments[place] = value
    with pytest.raises(kind, match=re.escape(message)):
        ops.conv_product(*arguments)  # type: ignore[arg-type]


def test_operators_refuse_what_makes_no_windows() -> None:
    ops.load()
    with pytest.raises(RuntimeError, match="kernel must be odd and at least 1, got 2"):
        torch.ops.dwa_fast.conv_windows(torch.zeros(1, 4, 4, 4), 2, 1)
    with pytest.raises(RuntimeError, match="stride must be at least 1, got 0"):
        torch.ops.dwa_fast.conv_windows(torch.zeros(1, 4, 4, 4), 3, 0)
    with pytest.raises(RuntimeError, match="weight must be"):
        torch.ops.dwa_fast.conv_turned(torch.zeros(4, 4))
