"""bn_act_pool in Triton, interpreted on a CPU and real on a GPU, against its plain twin in float64."""

from __future__ import annotations

import importlib
import itertools
import math
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dwa_fast import ops
from dwa_fast.ops.activation import ACTIVATIONS, Activation
from dwa_fast.reference import ops as reference
from tests.kernels.cases import Launches, meta
from tests.kernels.layers import batch, layer, slope_of
from tests.kernels.support import PRECISIONS, assert_as_good_as_pytorch, captured

pytest.importorskip("triton", reason="this PyTorch comes without Triton")
kernel = importlib.import_module("dwa_fast.kernels.bn_act_pool")

EPS = 1e-5
WINDOWS = [(3, 2, 1), (2, 2, 0), (3, 1, 1), (2, 2, 1), (2, 3, 0)]  # k, s, p
MEANS = [(2, 2, 0, True), (3, 3, 0, True)]
Pooling = tuple[int, int, int] | tuple[int, int, int, bool]
CASES = [
    ((2, 3, 5, 7), (3, 2, 1), "relu"),
    ((1, 64, 6, 6), (3, 2, 1), "relu"),
    ((1, 130, 5, 4), (2, 2, 0), "relu"),  # several blocks of channels
    *[((2, 20, 7, 6), windows, "relu") for windows in (*WINDOWS, *MEANS)],
    *[((2, 20, 6, 5), (3, 2, 1), activation) for activation in ACTIVATIONS if activation != "relu"],
    *[((2, 20, 5, 5), (2, 2, 0, True), activation) for activation in ACTIVATIONS if activation != "relu"],
    ((1, 130, 5, 4), (2, 2, 0, True), "relu"),
]


def both_ways(
    y: Tensor,
    values: list[Tensor | None],
    windows: Pooling,
    activation: Activation,
    grad_z: Tensor,
    grad_sums: Tensor | None,
    grad_alias: Tensor | None = None,
    *,
    parameters: bool = True,
) -> dict[str, Tensor]:
    """Every result of the kernels, forward and backward."""
    slope = slope_of(activation, y)
    *sides, averages = *windows[:3], len(windows) > 3
    z, sums, index = kernel.bn_act_pool_forward(y, *values, EPS, activation, slope, *sides, averages=averages)
    behind = index, activation, slope, *sides, parameters, grad_alias, averages
    grad_y, grad_parameters, grad_slope = kernel.bn_act_pool_backward(grad_z, grad_sums, y, *values, EPS, *behind)
    results = {"z": z, "sums": sums, "grad_y": grad_y}
    if parameters:
        results |= {"grad_weight": grad_parameters[0], "grad_bias": grad_parameters[1]}
    return results if slope is None or not parameters else {**results, "grad_slope": grad_slope}


def plainly(
    y: Tensor,
    values: list[Tensor | None],
    windows: Pooling,
    activation: Activation,
    grad_z: Tensor,
    grad_sums: Tensor | None,
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    """The same from the plain twin and automatic differentiation, activations in `dtype`."""
    wide = torch.promote_types(dtype, torch.float32)
    y = y.to(dtype).detach().requires_grad_()
    mean, var, weight, bias = (None if value is None else value.to(wide) for value in values)
    weight, bias = ((torch.full_like(mean, i) if v is None else v.detach()).requires_grad_() for i, v in ((1, weight), (0, bias)))
    slope = slope_of(activation, y)
    slope = None if slope is None else slope.to(wide).requires_grad_()
    z, sums = reference.bn_act_pool(y, mean, var, weight, bias, EPS, *windows[:3], activation, slope, averages=len(windows) > 3)
    grad_sums = torch.zeros_like(sums) if grad_sums is None else grad_sums.to(wide)
    wanted = {"grad_y": y, "grad_weight": weight, "grad_bias": bias} | ({} if slope is None else {"grad_slope": slope})
    grads = torch.autograd.grad([z, sums], list(wanted.values()), [grad_z.to(dtype), grad_sums])
    return {"z": z.detach(), "sums": sums.detach(), **dict(zip(wanted, grads, strict=True))}


def distinct(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Features without equals in a window, even where they and what follows are rounded: of equals only the first takes the gradient."""
    places = torch.arange(math.prod(shape[2:])).view(shape[2:])
    spread = 0.25 * (places * 7 % 23 - 11) + 0.0625 * torch.randint(2, shape)
    return spread.to(device, dtype).contiguous(memory_format=torch.channels_last)


def pooled(y: Tensor, windows: Pooling) -> Tensor:
    return torch.randn_like(F.max_pool2d(y.float(), *windows[:3])).to(y.dtype).contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(("shape", "windows", "activation"), CASES)
@pytest.mark.parametrize("dtype", PRECISIONS)
def test_matches_float64(
    shape: tuple[int, ...], windows: Pooling, activation: Activation, dtype: torch.dtype, device: torch.device
) -> None:
    y = batch(shape, dtype, device) if dtype == torch.float32 else distinct(shape, dtype, device)
    values = layer(shape[1], device)
    given = values, windows, activation, pooled(y, windows), torch.randn(2, shape[1], device=device)
    if dtype != torch.float32:  # an affine map of few digits, so that what is different stays so when it is rounded
        values[:] = [torch.zeros_like(values[0]), torch.full_like(values[1], 1 - EPS), values[2].sign(), torch.full_like(values[3], 0.5)]
    ours, plain, expected = both_ways(y, *given), plainly(y, *given, dtype), plainly(y, *given, torch.float64)
    for name, result in ours.items():
        sums = name in ("grad_weight", "grad_bias", "grad_slope")  # they may cancel
        size = torch.full_like(expected[name], given[3].double().norm() / shape[1] ** 0.5) if sums else None
        assert_as_good_as_pytorch(result, plain[name], expected[name], size)


@pytest.mark.parametrize("programs", [1, 2, 3])
def test_programs_loop_over_tiles(programs: int, monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    """Fewer programs than tiles change the order of the sums alone."""
    y, values = batch((2, 64, 13, 11), torch.float32, device), layer(64, device)
    given = y, values, (3, 2, 1), "relu", pooled(y, (3, 2, 1)), torch.randn(2, 64, device=device)
    expected = both_ways(*given)
    monkeypatch.setattr("dwa_fast.kernels.layout.resident", lambda *_: programs)
    for name, result in both_ways(*given).items():
        if name in ("z", "grad_y"):
            assert torch.equal(result, expected[name])
        torch.testing.assert_close(result, expected[name], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("shape", [(1, 3, 4, 4), (5, 24, 9, 7)])
def test_partial_sums_in_memory_that_is_given(shape: tuple[int, ...], device: torch.device) -> None:
    """Their rows add up to the sums; memory of another shape is refused."""
    y, values = batch(shape, torch.float32, device), layer(shape[1], device)
    partials = torch.full((2, ops.partial_rows(y, "relu", pools=True), shape[1]), math.nan, device=device)
    z, _, _ = kernel.bn_act_pool_forward(y, *values, EPS, "relu", None, 3, 2, 1, partials)
    expected, sums, _ = kernel.bn_act_pool_forward(y, *values, EPS, "relu", None, 3, 2, 1)
    assert torch.equal(z, expected)
    torch.testing.assert_close(partials.double().sum(1).float(), sums)
    with pytest.raises(ValueError, match="partials must be contiguous float32"):
        kernel.bn_act_pool_forward(y, *values, EPS, "relu", None, 3, 2, 1, partials[:, :, 1:])


@pytest.mark.parametrize("windows", [(3, 2, 1), (2, 2, 0, True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("activation", ["none", "relu", "silu"])
def test_gradients_of_two_uses_and_of_frozen_weights(
    activation: Activation, windows: Pooling, dtype: torch.dtype, device: torch.device
) -> None:
    """They are added as PyTorch adds them, bit for bit; frozen weights and moments without a gradient change nothing else."""
    y, values = batch((2, 20, 6, 5), dtype, device), layer(20, device)
    grad, more = pooled(y, windows), pooled(y, windows)
    for grad_sums in (None, torch.randn(2, 20, device=device)):
        two = both_ways(y, values, windows, activation, grad, grad_sums, more)
        one = both_ways(y, values, windows, activation, grad + more, grad_sums)
        frozen = both_ways(y, values, windows, activation, grad + more, grad_sums, parameters=False)
        assert all(torch.equal(two[name], one[name]) for name in one)
        assert all(torch.equal(frozen[name], one[name]) for name in frozen)


def test_equals_and_what_is_no_number(device: torch.device) -> None:
    """Of equals the first takes the gradient, of several NaN the last, as in PyTorch."""
    values = torch.tensor([math.nan, math.inf, -math.inf, -1.0, 0.0, 1.0, 1.0, 2.0], device=device)
    y = values[torch.randint(len(values), (2, 5, 7, 7), device=device)].contiguous(memory_format=torch.channels_last)
    constants = [torch.zeros(5, device=device), torch.ones(5, device=device), None, None]
    for activation, windows in itertools.product(("none", "relu"), WINDOWS):
        with np.errstate(invalid="ignore"):
            z, _, index = kernel.bn_act_pool_forward(y, *constants, 0.0, activation, None, *windows)
        before = y.clone().requires_grad_()
        expected = F.max_pool2d(F.relu(before) if activation == "relu" else before, *windows)
        assert torch.equal(z.nan_to_num(7.0), expected.nan_to_num(7.0))
        gradient = torch.randint(1, 9, z.shape, device=device).to(z).contiguous(memory_format=torch.channels_last)
        behind = index, activation, None, *windows
        grad_y, _, _ = kernel.bn_act_pool_backward(gradient, None, y, *constants, 0.0, *behind)
        assert torch.equal(grad_y, torch.autograd.grad(expected, before, gradient)[0])


def test_nothing_to_read(device: torch.device) -> None:
    y, values = torch.empty(0, 4, 6, 6, device=device), layer(4, device)
    z, sums, index = kernel.bn_act_pool_forward(y, *values, EPS, "relu", None, 3, 2, 1)
    grad_y, parameters, _ = kernel.bn_act_pool_backward(z, sums, y, *values, EPS, index, "relu", None, 3, 2, 1, True)
    assert (z.shape, grad_y.shape) == ((0, 4, 3, 3), y.shape)
    assert not sums.any()
    assert not parameters.any()


def test_more_pixels_than_are_counted_are_refused() -> None:
    y = torch.empty(2**17, 1, 128, 128, dtype=torch.bfloat16, device="meta").contiguous(memory_format=torch.channels_last)
    with pytest.raises(ValueError, match="y must have at most 2130706432 pixels in all images together, got 2147483648"):
        kernel.bn_act_pool_forward(y, *[meta(1)] * 4, EPS, "relu", None, 2, 2, 0)


@pytest.mark.gpu
def test_captured_in_a_graph() -> None:
    device = torch.device("cuda")
    y, values = batch((4, 64, 56, 56), torch.bfloat16, device), layer(64, device)
    given = y, values, (3, 2, 1), "relu", pooled(y, (3, 2, 1)), torch.randn(2, 64, device=device)
    expected = both_ways(*given)
    for name, result in captured(partial(both_ways, *given)).items():
        assert torch.equal(result, expected[name])


@pytest.mark.parametrize("windows", [(3, 2, 1), (2, 2, 0), (3, 1, 1)])
@pytest.mark.parametrize("shape", [(1, 3, 5, 7), (2, 64, 6, 4)])
def test_without_sums(shape: tuple[int, ...], windows: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    """One launch, which leaves none; the other results have the same bits."""
    y, values = batch(shape, torch.float32, device), layer(shape[1], device)
    z, _, index = kernel.bn_act_pool_forward(y, *values, EPS, "relu", None, *windows)
    for name in ("add_up", "sums_to_write"):
        monkeypatch.setattr(kernel, name, None)
    found, sums, places = kernel.bn_act_pool_forward(y, *values, EPS, "relu", None, *windows, None, False)
    assert torch.equal(found, z)
    assert torch.equal(places, index)
    assert sums.shape == (0,)


def public_calls() -> list[tuple[str, tuple[Any, ...]]]:
    """For test_dispatch."""
    y, weight, bias = (
        batch((2, 5, 4, 3), torch.float32, "cpu").requires_grad_(),
        torch.rand(5).requires_grad_(),
        torch.randn(5).requires_grad_(),
    )
    return [("bn_act_pool", (y, torch.randn(5), torch.rand(5) + 0.5, weight, bias, EPS, 3, 2, 1, "relu"))]


def schema_calls() -> list[tuple[str, tuple[Any, ...]]]:
    """For test_dispatch."""
    y, pooled, values = (
        batch((2, 5, 4, 3), torch.float32, "cpu"),
        batch((2, 5, 2, 2), torch.float32, "cpu"),
        (torch.randn(5), torch.rand(5) + 0.5, None, None, EPS),
    )
    return [
        ("bn_act_pool_forward", (y, *values, "relu", None, 3, 2, 1)),
        ("bn_act_pool_forward", (y, *values, "relu", None, 3, 2, 1, None, False)),
        ("bn_act_pool_backward", (pooled, None, y, *values, pooled.byte(), "relu", None, 3, 2, 1, True)),
        ("bn_act_pool_forward", (y, *values, "relu", None, 2, 2, 0, None, True, True)),
        (
            "bn_act_pool_backward",
            (y[:, :, ::2, :1], None, y, *values, pooled.new_empty(0, dtype=torch.uint8), "relu", None, 2, 2, 0, True, None, True, False),
        ),
    ]


def launches() -> Launches:
    """The first layer of a ResNet at 224 pixels, batch 100, blocks of a VGG and of a ConvNet-128; and odd sizes."""

    def both(shape: tuple[int, ...], windows: Pooling, dtype: torch.dtype, activation: Activation) -> None:
        y, values = meta(*shape, dtype=dtype), [meta(shape[1]) for _ in range(4)]
        slope = meta(shape[1]) if activation == "leaky_relu" else None
        *sides, averages = *windows[:3], len(windows) > 3
        z, _, index = kernel.bn_act_pool_forward(y, *values, EPS, activation, slope, *sides, averages=averages)
        kernel.bn_act_pool_forward(y, *values, EPS, activation, slope, *sides, None, False, averages)
        grad_sums, behind = meta(2, 4800)[:, : shape[1]], (index, activation, slope, *sides)
        kernel.bn_act_pool_backward(z, grad_sums, y, *values, EPS, *behind, averages=averages)
        kernel.bn_act_pool_backward(z, grad_sums, y, *values, EPS, *behind, False, z, averages)
        kernel.bn_act_pool_backward(z, None, y, *values, EPS, *behind, True, averages=averages)
        kernel.bn_act_pool_backward(z, None, y, *values, EPS, *behind, True, averages=averages, with_y=False, shares=meta(2, shape[1]))

    for dtype in (torch.bfloat16, torch.float32, torch.float16):
        for windows in ((3, 2, 1), (2, 2, 0)):
            yield f"{dtype} relu {windows}", partial(both, (100, 64, 112, 112), windows, dtype, "relu")
        yield f"{dtype} relu, means", partial(both, (100, 128, 32, 32), (2, 2, 0, True), dtype, "relu")
    for activation in ACTIVATIONS:
        if activation == "hardswish":  # 8 bytes are spilled for sm_90: no teacher is rewritten to that
            continue
        yield f"torch.bfloat16 {activation}", partial(both, (100, 64, 112, 112), (3, 2, 1), torch.bfloat16, activation)
        if activation != "relu6":  # nor to means of that one: 8 bytes for sm_80
            yield f"torch.bfloat16 {activation}, means", partial(both, (100, 128, 32, 32), (2, 2, 0, True), torch.bfloat16, activation)
    yield "torch.bfloat16 relu C=58, odd size", partial(both, (3, 58, 7, 7), (3, 1, 1), torch.bfloat16, "relu")
    yield "torch.bfloat16 relu C=58, odd size, means", partial(both, (3, 58, 7, 7), (2, 2, 0, True), torch.bfloat16, "relu")
