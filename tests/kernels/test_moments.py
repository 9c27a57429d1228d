"""moments in Triton, interpreted on a CPU and real on a GPU, against its plain twin in float64."""

from __future__ import annotations

import importlib
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from dwa_fast import ops
from dwa_fast.reference import ops as reference
from tests.kernels.cases import Launches, meta
from tests.kernels.support import PRECISIONS, assert_as_good_as_pytorch, captured

pytest.importorskip("triton", reason="this PyTorch comes without Triton")
kernel = importlib.import_module("dwa_fast.kernels.moments")
kernel_layout = importlib.import_module("dwa_fast.kernels.layout")

SHAPES = [(1, 1, 3, 7), (2, 3, 5, 7), (40, 5, 2, 2), (3, 24, 4, 4), (2, 58, 9, 8), (5, 130, 1, 1)]
LAYOUTS = [torch.contiguous_format, torch.channels_last]


def both_ways(y: Tensor, mean: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    return kernel.moments_forward(y, mean), kernel.moments_backward(grad, y, mean)


def assert_matches(y: Tensor) -> None:
    mean, grad = torch.randn(y.shape[1], device=y.device), torch.randn(2, y.shape[1], device=y.device)
    found = both_ways(y, mean, grad)
    others = []
    for dtype in (y.dtype, torch.float64):
        wide = torch.promote_types(dtype, torch.float32)
        leaf = y.detach().to(dtype).requires_grad_()
        sums = reference.moments(leaf, mean.to(wide))
        others.append((sums.detach(), torch.autograd.grad(sums, leaf, grad.to(wide))[0]))
    for result, plain, expected in zip(found, *others, strict=True):
        assert_as_good_as_pytorch(result, plain, expected)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_float64(shape: tuple[int, ...], dtype: torch.dtype, layout: torch.memory_format, device: torch.device) -> None:
    assert_matches(torch.randn(shape).to(device, dtype).contiguous(memory_format=layout))


@pytest.mark.parametrize("programs", [1, 2, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_programs_loop_over_tiles(
    layout: torch.memory_format, programs: int, monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    """Fewer programs than tiles: each takes several, the last ones not all equally many."""
    monkeypatch.setattr("dwa_fast.kernels.layout.resident", lambda *_: programs)
    assert_matches(torch.randn(150, 8, 3, 2, device=device).contiguous(memory_format=layout))


def test_partial_sums_in_memory_that_is_given(device: torch.device) -> None:
    y, mean = torch.randn(4, 6, 5, 9, device=device), torch.randn(6, device=device)
    rows = y.contiguous(memory_format=torch.channels_last)
    partials = torch.full((2, ops.partial_rows(y, moments=True), 6), torch.nan, device=device)
    kernel.moments_forward(rows, mean, partials)
    torch.testing.assert_close(partials.double().sum(1).float(), kernel.moments_forward(rows, mean))
    with pytest.raises(ValueError, match="channels-last features alone"):
        kernel.moments_forward(y, mean, partials)


def test_strides_with_gaps(device: torch.device) -> None:
    assert_matches(torch.randn(4, 6, 5, 9, device=device)[:, ::2, :, 1:8])


@pytest.mark.parametrize("shape", [(0, 5, 3, 3), (3, 0, 2, 2)])
def test_nothing_to_read(shape: tuple[int, ...], device: torch.device) -> None:
    sums, gradient = both_ways(
        torch.randn(shape, device=device), torch.randn(shape[1], device=device), torch.randn(2, shape[1], device=device)
    )
    assert sums.tolist() == [[0.0] * shape[1]] * 2
    assert gradient.shape == shape


def test_same_bits_again(device: torch.device) -> None:
    y, mean, grad = torch.randn(9, 20, 8, 8, device=device), torch.randn(20, device=device), torch.randn(2, 20, device=device)
    for first, second in zip(both_ways(y, mean, grad), both_ways(y, mean, grad), strict=True):
        assert torch.equal(first, second)


@pytest.mark.gpu
def test_captured_in_a_cuda_graph() -> None:
    y, mean, grad = torch.randn(9, 20, 8, 8, device="cuda"), torch.randn(20, device="cuda"), torch.randn(2, 20, device="cuda")
    called = both_ways(y, mean, grad)
    for expected, replayed in zip(called, captured(lambda: both_ways(y, mean, grad)), strict=True):
        assert torch.equal(expected, replayed)


def launches() -> Launches:
    """A ResNet-18 for CIFAR and a ResNet-50 at 224 pixels, batch 100; and odd sizes."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for layout in (torch.contiguous_format, torch.channels_last):
            for shape in [(100, 64, 32, 32), (100, 512, 4, 4), (100, 64, 112, 112)]:
                y, mean = torch.empty(shape, dtype=dtype, device="meta", memory_format=layout), meta(shape[1])
                case = f"{dtype} {str(layout).removeprefix('torch.')} C={shape[1]} {shape[2]} px"
                yield case, partial(kernel.moments_forward, y, mean)
                yield case, partial(kernel.moments_backward, meta(2, shape[1]), y, mean)


def public_calls() -> list[tuple[str, tuple[Any, ...]]]:
    """For test_dispatch: public operators with arguments, whose results and gradients are compared with the plain twin."""
    y = torch.randn(2, 5, 4, 3).contiguous(memory_format=torch.channels_last).requires_grad_()
    return [("moments", (y, torch.randn(5)))]


def schema_calls() -> list[tuple[str, tuple[Any, ...]]]:
    """For test_dispatch: every schema with arguments, for opcheck."""
    y, mean = torch.randn(2, 5, 4, 3).contiguous(memory_format=torch.channels_last), torch.randn(5)
    return [("moments_forward", (y, mean)), ("moments_backward", (torch.rand(2, 5), y, mean))]
