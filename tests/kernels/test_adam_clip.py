"""adam_clip_ in Triton, interpreted on a CPU and real on a GPU, against its plain twin in float64 and torch.optim.Adam."""

from __future__ import annotations

import importlib
import math

import pytest
import torch
from torch import Tensor

from dwa_fast.reference import ops as reference
from tests.kernels.cases import BETAS, EPS, State
from tests.kernels.support import assert_as_good_as_pytorch, captured, error

pytest.importorskip("triton", reason="this PyTorch comes without Triton")
kernel = importlib.import_module("dwa_fast.kernels.adam_clip")

SHAPES = [(1, 1, 1, 1), (2, 3, 5, 7), (1, 1, 8, 8), (4, 3, 16, 16), (2, 17, 3, 31)]


def step_of(count: int, device: torch.device | str) -> Tensor:
    return torch.tensor(count, device=device)


def ours(state: State, count: int) -> list[Tensor]:
    x, m, v = state.changing()
    step = step_of(count, x.device)
    kernel.adam_clip_(x, state.gradient, m, v, state.learning_rates, step, state.low, state.high, *BETAS, EPS)
    return [x, m, v]


def plainly(state: State, count: int, dtype: torch.dtype) -> list[Tensor]:
    x, m, v = state.changing(dtype)
    low, high = state.low.to(dtype), state.high.to(dtype)
    rates, step = state.learning_rates, step_of(count, x.device)
    reference.adam_clip_(x, state.gradient.to(dtype), m, v, rates, step, low, high, BETAS, EPS)
    return [x, m, v]


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=["channels-last", "contiguous"])
@pytest.mark.parametrize("count", [0, 1, 7, 1999])
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_float64(shape: tuple[int, ...], count: int, layout: torch.memory_format, device: torch.device) -> None:
    state = State(shape, device, layout)
    results = zip(ours(state, count), plainly(state, count, torch.float32), plainly(state, count, torch.float64), strict=True)
    for result, plain, expected in results:
        assert_as_good_as_pytorch(result, plain, expected)


@pytest.mark.parametrize("count", [0, 1, 2, 5, 20, 100, 1000])
def test_step_is_as_exact_as_pytorch(count: int, device: torch.device) -> None:
    """The step itself, from images of 0 that round nothing away: learning rate and both corrections are exact to float32."""
    state = State((2, 3, 16, 16), device, torch.channels_last)
    state.images.zero_()
    state.low, state.high = state.low - 1e9, state.high + 1e9
    moved, plain, expected = ours(state, count)[0], plainly(state, count, torch.float32)[0], plainly(state, count, torch.float64)[0]
    assert_as_good_as_pytorch(moved, plain, expected)


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
        kernel.adam_clip_(x, gradient, m, v, state.learning_rates, step_of(count, device), low, high, *BETAS, EPS)
    assert_as_good_as_pytorch(x, run(torch.float32), run(torch.float64))


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=["channels-last", "contiguous"])
def test_every_channel_has_its_own_bounds(layout: torch.memory_format, device: torch.device) -> None:
    state = State((2, 5, 6, 7), device, layout)
    state.images *= 100
    x = ours(state, 3)[0]
    for channel in range(5):
        assert x[:, channel].min() == state.low[channel]
        assert x[:, channel].max() == state.high[channel]


def test_mixed_memory_layouts(device: torch.device) -> None:
    """Slices, and tensors that lie otherwise than the images: the same bits, in place, and nothing around a slice is touched."""
    state = State((2, 3, 6, 8), device, torch.channels_last)
    expected = ours(state, 4)
    whole = torch.full((4, 3, 6, 16), 5.0, device=device)
    x = whole[1:3, :, :, ::2]
    for layout in (torch.channels_last, torch.contiguous_format):
        x.copy_(state.images)
        m, v = state.exp_avg.contiguous(memory_format=layout).clone(), state.exp_avg_sq.transpose(2, 3).clone().transpose(2, 3)
        gradient = state.gradient.contiguous()
        kernel.adam_clip_(x, gradient, m, v, state.learning_rates, step_of(4, device), state.low, state.high, *BETAS, EPS)
        for result, wanted in zip((x, m, v), expected, strict=True):
            assert torch.equal(result, wanted)
        untouched = torch.ones_like(whole, dtype=torch.bool)
        untouched[1:3, :, :, ::2] = False
        assert (whole[untouched] == 5).all()


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 0, 4, 4), (2, 3, 4, 0)])
def test_empty(shape: tuple[int, ...], device: torch.device) -> None:
    assert all(result.shape == shape for result in ours(State(shape, device, torch.contiguous_format), 0))


def test_zero_gradient_from_scratch_moves_nothing(device: torch.device) -> None:
    state = State((1, 3, 4, 4), device, torch.channels_last)
    for tensor in (state.gradient, state.exp_avg, state.exp_avg_sq):
        tensor.zero_()
    state.images.clamp_(-0.5, 0.5)
    assert torch.equal(ours(state, 0)[0], state.images)


def test_nan_stays_nan_and_infinity_is_clamped(device: torch.device) -> None:
    state = State((1, 3, 4, 4), device, torch.channels_last)
    state.images[0, 1, 2, 3], state.gradient[0, 0, 0, 0], state.images[0, 2, 1, 1] = math.nan, math.nan, math.inf
    for result, plain in zip(ours(state, 5), plainly(state, 5, torch.float32), strict=True):
        torch.testing.assert_close(result, plain, equal_nan=True)


def test_same_bits_again(device: torch.device) -> None:
    state = State((2, 3, 9, 9), device, torch.channels_last)
    for first, second in zip(ours(state, 9), ours(state, 9), strict=True):
        assert torch.equal(first, second)


@pytest.mark.gpu
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=["channels-last", "contiguous"])
def test_real_size(layout: torch.memory_format) -> None:
    state = State((100, 3, 224, 224), "cuda", layout)
    results = zip(ours(state, 700), plainly(state, 700, torch.float32), plainly(state, 700, torch.float64), strict=True)
    for result, plain, expected in results:
        assert_as_good_as_pytorch(result, plain, expected)


@pytest.mark.gpu
def test_captured_in_a_cuda_graph() -> None:
    """The row is read when the graph runs: replays with a growing counter equal single calls."""
    state = State((4, 3, 32, 32), "cuda", torch.channels_last)
    step = step_of(0, "cuda")
    called, replayed = state.changing(), state.changing()

    def advance(tensors: list[Tensor]) -> None:
        x, m, v = tensors
        kernel.adam_clip_(x, state.gradient, m, v, state.learning_rates, step, state.low, state.high, *BETAS, EPS)
        step.add_(1)

    for _ in range(3):
        advance(called)
    step.zero_()
    spare = state.changing()
    captured(lambda: advance(spare))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        advance(replayed)
    step.zero_()
    for _ in range(3):
        graph.replay()
    for result, expected in zip(replayed, called, strict=True):
        assert torch.equal(result, expected)
    assert error(replayed[0], state.images.double()) > 0
