"""mean_pool: the bits of PyTorch's avg_pool2d, both ways, on every instruction set; and teachers whose pooling is replaced by it."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from dwa_fast import ops
from dwa_fast.engine.backend import resolve
from dwa_fast.engine.fuse import trace
from dwa_fast.engine.layers import MeanPool
from dwa_fast.models.batchnorm import batchnorm_layers
from dwa_fast.reference import ops as reference
from dwa_fast.reference.ops import Operators
from tests.ops.conftest import LEVELS

SHAPES = [(1, 1, 2, 2), (2, 3, 5, 2), (3, 19, 7, 9), (2, 16, 8, 6), (4, 67, 3, 11), (8, 128, 16, 16), (1, 64, 1, 4)]
LAYOUTS = ["contiguous", "channels_last", "slice"]
DTYPES = [torch.float32, torch.bfloat16]


def features(shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> Tensor:
    """A slice is the inside of a larger tensor of NaN."""
    x = torch.randn(shape).to(dtype)
    if layout != "slice":
        return x.contiguous(memory_format=torch.channels_last if layout == "channels_last" else torch.contiguous_format)
    n, c, h, w = shape
    larger = torch.full((n, c, h + 2, 2 * w), math.nan, dtype=dtype)
    inside = larger[:, :, 1 : h + 1, ::2]
    inside.copy_(x)
    return inside


def both_ways(operator: Callable[[Tensor, int], Tensor], y: Tensor, window: int) -> tuple[Tensor, Tensor]:
    leaf = y.detach().requires_grad_()
    z = operator(leaf, window)
    return z.detach(), torch.autograd.grad(z, leaf, torch.randn(z.shape, generator=torch.Generator().manual_seed(1)).to(z.dtype))[0]


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("window", [1, 2, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_of_pytorch(level: str, window: int, dtype: torch.dtype, use_level: Callable[[str], None]) -> None:
    use_level(level)
    for shape in SHAPES:
        for layout in LAYOUTS:
            if min(shape[2:]) < window:
                continue
            y = features(shape, dtype, layout)
            # PyTorch sums the planes of a contiguous bfloat16 tensor in another precision than its channels-last ones.
            plain = y.contiguous(memory_format=torch.channels_last)
            for ours, wanted in zip(both_ways(ops.mean_pool, y, window), both_ways(reference.mean_pool, plain, window), strict=True):
                assert torch.equal(ours, wanted), (shape, layout)


@pytest.mark.parametrize("shape", [(0, 4, 4, 4), (2, 0, 4, 4), (2, 4, 1, 4), (2, 4, 4, 0)])
def test_nothing_to_read(shape: tuple[int, ...]) -> None:
    z, gradient = both_ways(ops.mean_pool, torch.randn(shape), 2)
    assert z.shape == (*shape[:2], shape[2] // 2, shape[3] // 2)
    assert torch.equal(gradient, torch.zeros(shape))


def test_same_bits_for_any_number_of_threads() -> None:
    y, found = features((6, 64, 32, 32), torch.bfloat16, "channels_last"), []
    for threads in (1, 2, 3, 1):
        torch.set_num_threads(threads)
        found.append(both_ways(ops.mean_pool, y, 2))
    assert all(torch.equal(z, found[0][0]) and torch.equal(gradient, found[0][1]) for z, gradient in found[1:])


def test_opcheck() -> None:
    ops.load()
    torch.library.opcheck(torch.ops.dwa_fast.mean_pool_forward.default, (features((2, 19, 5, 4), torch.float32, "channels_last"), 2))
    torch.library.opcheck(torch.ops.dwa_fast.mean_pool_backward.default, (torch.randn(2, 19, 2, 2), 2, 5, 4))


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        (([1.0], 2), TypeError, "y must be a tensor, got list"),
        ((torch.zeros(2, 4, 3, 3).half(), 2), TypeError, "y must be float32 or bfloat16, got float16"),
        ((torch.zeros(4, 3, 3), 2), ValueError, "y must be [N, C, H, W], got shape (4, 3, 3)"),
        ((torch.zeros(2, 4, 3, 3, device="meta"), 2), ValueError, "y must be on a CPU, got meta"),
        ((torch.zeros(2, 4, 3, 3), 2.0), TypeError, "window must be an integer, got float"),
        ((torch.zeros(2, 4, 3, 3), 0), ValueError, "window must be at least 1, got 0"),
    ],
)
def test_wrong_input(arguments: tuple[Tensor, int], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=re.escape(message)):
        ops.mean_pool(*arguments)


def test_gradients_of_another_shape_are_refused() -> None:
    ops.load()
    with pytest.raises(RuntimeError, match=r"grad_z must be \[N, C, 2, 3\], got shape \[1, 1, 2, 2\]"):
        torch.ops.dwa_fast.mean_pool_backward(torch.zeros(1, 1, 2, 2), 2, 4, 6)


@pytest.mark.parametrize(
    ("layer", "window"),
    [
        (nn.AvgPool2d(2), 2),
        (nn.AvgPool2d((3, 3), stride=3), 3),
        (nn.AvgPool2d(2, count_include_pad=False), 2),
        (nn.AvgPool2d(2, stride=1), None),
        (nn.AvgPool2d(2, padding=1), None),
        (nn.AvgPool2d((2, 1)), None),
        (nn.AvgPool2d(2, ceil_mode=True), None),
        (nn.AvgPool2d(2, divisor_override=3), None),
        (nn.MaxPool2d(2), None),
    ],
)
def test_which_layers_are_replaced(layer: nn.Module, window: int | None) -> None:
    teacher = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3), layer, nn.Flatten(1), nn.LazyLinear(5)).eval()
    images = torch.randn(2, 3, 9, 9)
    expected = teacher(images)
    rewritten = trace(teacher.requires_grad_(False), batchnorm_layers(teacher), resolve("fused", "fp32", "cpu").operators, images)
    found = [each.window for each in rewritten.module.modules() if isinstance(each, MeanPool)]
    assert found == ([] if window is None else [window])
    torch.testing.assert_close(rewritten.module(images), expected)


def test_plain_back_ends_pool_as_pytorch_does() -> None:
    y = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    assert torch.equal(Operators("reference").mean_pool(y, 2), nn.functional.avg_pool2d(y, 2))
