"""view_adam_clip_ in Triton, interpreted on a CPU and real on a GPU, against its plain twin in float64 and torch.optim.Adam."""

from __future__ import annotations

import importlib
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dwa_fast.reference import ops as reference
from tests.kernels.cases import BETAS, CASES, EPS, Launches, Row, State, meta, schedule
from tests.kernels.support import PRECISIONS, assert_as_good_as_pytorch, captured

pytest.importorskip("triton", reason="this PyTorch comes without Triton")
kernel = importlib.import_module("dwa_fast.kernels.view_adam_clip")


def ours(state: State, gradient: Tensor, rows: Tensor, step: Tensor, loss_scale: float = 1.0) -> list[Tensor]:
    x, m, v = state.changing()
    kernel.view_adam_clip_(x, gradient, m, v, rows, state.learning_rates, step, state.low, state.high, loss_scale, *BETAS, EPS)
    return [x, m, v]


def plainly(state: State, gradient: Tensor, rows: Tensor, step: Tensor, dtype: torch.dtype, loss_scale: float = 1.0) -> list[Tensor]:
    x, m, v = state.changing(dtype)
    low, high = state.low.to(dtype), state.high.to(dtype)
    reference.view_adam_clip_(x, gradient, m, v, rows, state.learning_rates, step, low, high, loss_scale, BETAS, EPS)
    return [x, m, v]


def assert_as_good(state: State, gradient: Tensor, rows: Tensor, step: Tensor, loss_scale: float = 1.0) -> None:
    given = state, gradient, rows, step
    twins = [plainly(*given, dtype, loss_scale) for dtype in (torch.float32, torch.float64)]
    for result, plain, expected in zip(ours(*given, loss_scale), *twins, strict=True):
        assert_as_good_as_pytorch(result, plain, expected)


@pytest.mark.parametrize(("shape", "row"), CASES)
def test_matches_float64(shape: tuple[int, ...], row: Row, device: torch.device) -> None:
    state = State(shape, device, torch.channels_last)
    assert_as_good(state, state.gradient, *schedule(row, device))


@pytest.mark.parametrize("loss_scale", [1.0, 2.0**14, 3.0])
@pytest.mark.parametrize("dtype", PRECISIONS)
def test_every_precision_and_scale(dtype: torch.dtype, loss_scale: float, device: torch.device) -> None:
    state = State((2, 3, 8, 10), device, torch.channels_last)
    assert_as_good(state, (state.gradient * loss_scale).to(dtype), *schedule((1, 2, 6, 7, 1, 3, 2), device), loss_scale)


def in_blocks(gradient: Tensor, padded: int = 0) -> Tensor:
    """The gradient of an even number of lines and columns as a stem's convolution leaves it: a block's pixels are its channels."""
    count, channels, height, width = gradient.shape
    blocks = F.pixel_unshuffle(gradient, 2)
    room = torch.full((count, 4 * channels + padded, height // 2 + 1, width // 2 + 1), math.nan).to(blocks)
    inside = room.contiguous(memory_format=torch.channels_last)[:, : 4 * channels, 1:, :-1].copy_(blocks)
    return inside.unflatten(1, (channels, 2, 2)).permute(0, 1, 4, 2, 5, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("row", [(0, 0, 6, 8, 0, 0, 0), (1, 2, 4, 5, 1, 3, 2), (0, 0, 6, 8, 1, 1, 5)])
def test_gradient_in_blocks(row: Row, dtype: torch.dtype, device: torch.device) -> None:
    """Read where it is, in whatever strides: the same bits."""
    state, given = State((2, 3, 6, 8), device, torch.channels_last), schedule(row, device)
    gradient = state.gradient.mul(1e3).to(dtype)
    for blocks in (in_blocks(gradient, padded=4), gradient.unflatten(3, (4, 2)).unflatten(2, (3, 2))):
        assert torch.equal(blocks.reshape(gradient.shape), gradient)
        for result, expected in zip(ours(state, blocks, *given), ours(state, gradient, *given), strict=True):
            assert torch.equal(result, expected)


def identity(state: State, count: int) -> tuple[Tensor, Tensor]:
    """A schedule of views that change nothing, and the counter."""
    height, width = state.images.shape[2:]
    rows = torch.tensor([[0, 0, height, width, 0, 0, 0]], dtype=torch.int32, device=state.images.device)
    return rows.expand(len(state.learning_rates), 7), torch.tensor(count, device=state.images.device)


@pytest.mark.parametrize("count", [0, 1, 2, 5, 20, 100, 1000])
def test_step_is_as_exact_as_pytorch(count: int, device: torch.device) -> None:
    """The step itself, from images of 0 that round nothing away: learning rate and both corrections are exact to float32."""
    state = State((2, 3, 16, 16), device, torch.channels_last)
    state.images.zero_()
    state.low, state.high = state.low - 1e9, state.high + 1e9
    assert_as_good(state, state.gradient, *identity(state, count))


def test_a_run_is_as_exact_as_torch_optim_adam(device: torch.device) -> None:
    """Twenty steps from scratch with changing gradients, no pixel at a bound."""
    state = State((2, 3, 8, 8), device, torch.channels_last, iterations=20)
    gradients = [torch.randn_like(state.images) for _ in range(20)]
    low, high = torch.full_like(state.low, -1e9), torch.full_like(state.high, 1e9)

    def run(dtype: torch.dtype) -> Tensor:
        image = state.images.to(dtype, copy=True).requires_grad_()
        optimizer = torch.optim.Adam([image], betas=BETAS, eps=EPS)
        for count, gradient in enumerate(gradients):
            optimizer.param_groups[0]["lr"] = float(state.learning_rates[count])
            image.grad = gradient.to(dtype)
            optimizer.step()
        return image.detach()

    x, m, v = state.images.clone(), torch.zeros_like(state.images), torch.zeros_like(state.images)
    for count, gradient in enumerate(gradients):
        rows, step = identity(state, count)
        kernel.view_adam_clip_(x, gradient, m, v, rows, state.learning_rates, step, low, high, 1.0, *BETAS, EPS)
    assert_as_good_as_pytorch(x, run(torch.float32), run(torch.float64))


def test_zero_gradient_from_scratch_moves_nothing(device: torch.device) -> None:
    state = State((1, 3, 4, 4), device, torch.channels_last)
    for tensor in (state.gradient, state.exp_avg, state.exp_avg_sq):
        tensor.zero_()
    state.images.clamp_(-0.5, 0.5)
    assert torch.equal(ours(state, state.gradient, *identity(state, 0))[0], state.images)


def test_mixed_memory_layouts(device: torch.device) -> None:
    """Slices and other strides: the same bits, in place, and nothing around a slice is touched."""
    state, (rows, step) = State((2, 3, 6, 8), device, torch.channels_last), schedule((1, 2, 4, 5, 1, 1, 2), device)
    expected = ours(state, state.gradient, rows, step)
    whole = torch.full((4, 3, 6, 16), 5.0, device=device)
    x = whole[1:3, :, :, ::2]
    x.copy_(state.images)
    m, v = state.exp_avg.contiguous().clone(), state.exp_avg_sq.transpose(2, 3).clone().transpose(2, 3)
    scattered = rows.T.contiguous().T
    numbers = state.learning_rates, step, state.low, state.high, 1.0, *BETAS, EPS
    kernel.view_adam_clip_(x, state.gradient.contiguous(), m, v, scattered, *numbers)
    for result, wanted in zip((x, m, v), expected, strict=True):
        assert torch.equal(result, wanted)
    untouched = torch.ones_like(whole, dtype=torch.bool)
    untouched[1:3, :, :, ::2] = False
    assert (whole[untouched] == 5).all()


def test_every_channel_has_its_own_bounds(device: torch.device) -> None:
    state = State((2, 5, 6, 7), device, torch.channels_last)
    state.images *= 100
    x = ours(state, state.gradient, *schedule((0, 0, 6, 7, 0, 2, 3), device))[0]
    for channel in range(5):
        assert x[:, channel].min() == state.low[channel]
        assert x[:, channel].max() == state.high[channel]


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 0, 4, 4), (2, 3, 4, 0)])
def test_empty(shape: tuple[int, ...], device: torch.device) -> None:
    state = State(shape, device, torch.contiguous_format)
    results = ours(state, state.gradient, *schedule((0, 0, 4, 4, 0, 0, 0), device))
    assert all(result.shape == shape for result in results)


def test_nan_stays_nan_where_it_is_read_and_infinity_is_clamped(device: torch.device) -> None:
    state, given = State((1, 3, 4, 4), device, torch.channels_last), schedule((1, 1, 2, 3, 0, 1, 2), device)
    state.gradient[0, 0, 0, 0], state.images[0, 1, 2, 3], state.images[0, 2, 1, 1] = math.nan, math.nan, math.inf
    twin = plainly(state, state.gradient, *given, torch.float32)
    for result, plain in zip(ours(state, state.gradient, *given), twin, strict=True):
        torch.testing.assert_close(result, plain, equal_nan=True)


def test_same_bits_again(device: torch.device) -> None:
    state, given = State((2, 3, 12, 12), device, torch.channels_last), schedule((2, 3, 5, 7, 1, 2, 4), device)
    for first, second in zip(ours(state, state.gradient, *given), ours(state, state.gradient, *given), strict=True):
        assert torch.equal(first, second)


@pytest.mark.gpu
@pytest.mark.parametrize("row", [(0, 0, 224, 224, 1, 32, 7), (31, 57, 64, 63, 1, 5, 32), (10, 0, 180, 201, 0, 0, 0)])
def test_real_size(row: Row) -> None:
    state = State((20, 3, 224, 224), "cuda", torch.channels_last)
    assert_as_good(state, state.gradient, *schedule(row, "cuda"))


@pytest.mark.gpu
def test_captured_in_a_cuda_graph() -> None:
    """Row and learning rate are read when the graph runs: replays with a growing counter equal single calls."""
    state = State((4, 3, 32, 32), "cuda", torch.channels_last)
    views = [(0, 0, 32, 32, 0, 1, 1), (3, 4, 20, 21, 1, 2, 3), (0, 2, 32, 9, 0, 4, 4)]
    rows, step = torch.tensor(views, dtype=torch.int32, device="cuda"), torch.tensor(0, device="cuda")
    called, replayed, spare = state.changing(), state.changing(), state.changing()

    def advance(tensors: list[Tensor]) -> None:
        x, m, v = tensors
        schedule_and_bounds = rows, state.learning_rates, step, state.low, state.high
        kernel.view_adam_clip_(x, state.gradient, m, v, *schedule_and_bounds, 1.0, *BETAS, EPS)
        step.add_(1)

    for _ in views:
        advance(called)
    step.zero_()
    captured(lambda: advance(spare))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        advance(replayed)
    step.zero_()
    for _ in views:
        graph.replay()
    for result, expected in zip(replayed, called, strict=True):
        assert torch.equal(result, expected)


def launches() -> Launches:
    """A ResNet-18 for CIFAR and a ResNet-50 at 224 pixels, batch 100; and odd sizes."""
    rows, step, bound = meta(2000, 7, dtype=torch.int32), meta(1, dtype=torch.int64)[0], meta(3)
    for size in (32, 224):
        images = meta(100, 3, size, size)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            arguments = images, images.to(dtype), images, images, rows, meta(2000), step, bound, bound, 2.0**14, 0.5, 0.9, 1e-8
            yield f"{dtype} {size} px", partial(kernel.view_adam_clip_, *arguments)
            arguments = images, in_blocks(images.to(dtype), padded=4), *arguments[2:]
            yield f"{dtype} {size} px, blocks", partial(kernel.view_adam_clip_, *arguments)
