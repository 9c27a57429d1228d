"""view and its adjoint in Triton, interpreted on a CPU and real on a GPU, against the plain twin in float64."""

from __future__ import annotations

import importlib
from functools import partial

import pytest
import torch
from torch import Tensor

from dwa_fast.reference import ops as reference
from tests.kernels.cases import CASES, Launches, Row, meta, schedule
from tests.kernels.support import PRECISIONS, assert_as_good_as_pytorch, captured, error

pytest.importorskip("triton", reason="this PyTorch comes without Triton")
kernel, update = (importlib.import_module(f"dwa_fast.kernels.{name}") for name in ("view", "view_adam_clip"))


def adjoint(grad: Tensor, rows: Tensor, step: Tensor) -> Tensor:
    """What view_adam_clip_ leaves in Adam's first moment where β₁ is 0."""
    images, exp_avg, exp_avg_sq = (torch.zeros(grad.shape, device=grad.device) for _ in range(3))
    rates, bound = torch.zeros(len(rows), device=grad.device), torch.zeros(grad.shape[1], device=grad.device)
    update.view_adam_clip_(images, grad, exp_avg, exp_avg_sq, rows, rates, step, bound, bound, 1.0, 0.0, 0.0, 1e-8)
    return exp_avg


def plain_adjoint(grad: Tensor, rows: Tensor, step: Tensor, dtype: torch.dtype) -> Tensor:
    images = torch.zeros(grad.shape, dtype=dtype, device=grad.device, requires_grad=True)
    return torch.autograd.grad(reference.view(images, rows, step), images, grad.to(dtype))[0]


@pytest.mark.parametrize(("shape", "row"), CASES)
def test_forward_matches_float64(shape: tuple[int, ...], row: Row, device: torch.device) -> None:
    images, (rows, step) = torch.randn(shape).to(device), schedule(row, device)
    result = kernel.view(images, rows, step, torch.float32)
    assert result.is_contiguous(memory_format=torch.channels_last)
    assert_as_good_as_pytorch(result, reference.view(images, rows, step), reference.view(images.double(), rows, step))


@pytest.mark.parametrize(("shape", "row"), CASES)
def test_adjoint_matches_float64(shape: tuple[int, ...], row: Row, device: torch.device) -> None:
    grad, (rows, step) = torch.randn(shape).to(device), schedule(row, device)
    result = adjoint(grad, rows, step)
    assert_as_good_as_pytorch(result, plain_adjoint(grad, rows, step, torch.float32), plain_adjoint(grad, rows, step, torch.float64))


@pytest.mark.parametrize("dtype", PRECISIONS)
def test_every_precision(dtype: torch.dtype, device: torch.device) -> None:
    images, (rows, step) = torch.randn(2, 3, 8, 10, device=device), schedule((1, 2, 6, 7, 1, 3, 2), device)
    result = kernel.view(images, rows, step, dtype)
    assert_as_good_as_pytorch(result, reference.view(images, rows, step, dtype), reference.view(images.double(), rows, step))
    grad = torch.randn(2, 3, 8, 10, device=device).to(dtype).contiguous(memory_format=torch.channels_last)
    collected = adjoint(grad, rows, step)
    assert_as_good_as_pytorch(
        collected, plain_adjoint(grad, rows, step, torch.float32), plain_adjoint(grad.double(), rows, step, torch.float64)
    )


@pytest.mark.parametrize("size", [1, 2, 3, 5, 11])
def test_every_height_of_a_crop(size: int, device: torch.device) -> None:
    """At both borders: forward and adjoint gather from exactly the pixels that belong to each other."""
    crops = [(top, height) for height in range(1, size + 1) for top in sorted({0, size - height})]
    rows = torch.tensor([[top, 0, height, 1, 0, top % 3, 0] for top, height in crops], dtype=torch.int32, device=device)
    images, grad = torch.randn(1, 1, size, 1, device=device), torch.randn(1, 1, size, 1, device=device)
    for index in range(len(crops)):
        step = torch.tensor(index, device=device)
        expected, expected_adjoint = reference.view(images.double(), rows, step), plain_adjoint(grad, rows, step, torch.float64)
        assert error(kernel.view(images, rows, step, torch.float32), expected) < 1e-6
        assert error(adjoint(grad, rows, step), expected_adjoint) < 1e-6


@pytest.mark.parametrize("row", [(0, 0, 6, 9, 0, 2, 4), (0, 0, 6, 9, 1, 0, 3)])
def test_views_without_a_crop_move_pixels_bit_for_bit(row: Row, device: torch.device) -> None:
    images, (rows, step) = torch.randn(2, 3, 6, 9, device=device), schedule(row, device)
    seen = kernel.view(images, rows, step, torch.float32)
    assert torch.equal(seen, reference.view(images, rows, step))
    assert torch.equal(adjoint(seen, rows, step), images)


def test_images_of_any_strides(device: torch.device) -> None:
    images, (rows, step) = torch.randn(2, 3, 8, 6, device=device), schedule((1, 1, 5, 4, 1, 2, 1), device)
    expected = kernel.view(images, rows, step, torch.float32)
    collected = adjoint(images, rows, step)
    whole = torch.randn(4, 3, 16, 6, device=device)
    whole[::2, :, 1::2] = images
    flipped = images.transpose(2, 3).contiguous().transpose(2, 3)
    for given in (images.contiguous(memory_format=torch.channels_last), whole[::2, :, 1::2], flipped):
        assert torch.equal(kernel.view(given, rows, step, torch.float32), expected)
        assert torch.equal(adjoint(given, rows, step), collected)


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 0, 4, 4), (2, 3, 0, 4)])
def test_empty(shape: tuple[int, ...], device: torch.device) -> None:
    images, (rows, step) = torch.zeros(shape, device=device), schedule((0, 0, 4, 4, 0, 0, 0), device)
    assert kernel.view(images, rows, step, torch.bfloat16).shape == shape
    assert adjoint(images, rows, step).shape == shape


def test_same_bits_again(device: torch.device) -> None:
    images, (rows, step) = torch.randn(2, 3, 12, 12, device=device), schedule((2, 3, 5, 7, 1, 2, 4), device)
    assert torch.equal(kernel.view(images, rows, step, torch.bfloat16), kernel.view(images, rows, step, torch.bfloat16))
    assert torch.equal(adjoint(images, rows, step), adjoint(images, rows, step))


@pytest.mark.gpu
@pytest.mark.parametrize("row", [(0, 0, 224, 224, 1, 32, 7), (31, 57, 64, 63, 1, 5, 32), (10, 0, 180, 201, 0, 0, 0)])
def test_real_size(row: Row) -> None:
    images, (rows, step) = torch.randn(20, 3, 224, 224, device="cuda"), schedule(row, "cuda")
    result = kernel.view(images, rows, step, torch.float32)
    assert_as_good_as_pytorch(result, reference.view(images, rows, step), reference.view(images.double(), rows, step))
    collected = adjoint(images, rows, step)
    assert_as_good_as_pytorch(collected, plain_adjoint(images, rows, step, torch.float32), plain_adjoint(images, rows, step, torch.float64))


@pytest.mark.gpu
def test_captured_in_a_cuda_graph() -> None:
    """The row is read when the graph runs: another counter, another view."""
    images, (rows, step) = torch.randn(4, 3, 32, 32, device="cuda"), schedule((3, 4, 20, 21, 1, 2, 3), "cuda")
    rows[0] = torch.tensor([0, 0, 32, 32, 0, 1, 1], dtype=torch.int32)

    def call() -> tuple[Tensor, Tensor]:
        return kernel.view(images, rows, step, torch.bfloat16), adjoint(images, rows, step)

    called = call()
    for expected, replayed in zip(called, captured(call), strict=True):
        assert torch.equal(expected, replayed)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed_results = call()
    step.zero_()
    graph.replay()
    for expected, replayed in zip(call(), replayed_results, strict=True):
        assert torch.equal(expected, replayed)
    assert not torch.equal(called[0], replayed_results[0])


def launches() -> Launches:
    """A ResNet-18 for CIFAR and a ResNet-50 at 224 pixels, batch 100; and odd sizes."""
    rows, step = meta(2000, 7, dtype=torch.int32), meta(1, dtype=torch.int64)[0]
    for size in (32, 224):
        for dtype in (torch.float32, torch.bfloat16):
            yield f"{dtype} {size} px", partial(kernel.view, meta(100, 3, size, size), rows, step, dtype)
    yield "torch.bfloat16 224 px contiguous", partial(kernel.view, meta(100, 3, 224, 224).contiguous(), rows, step, torch.bfloat16)
