"""BatchNorm in train mode from Triton's passes, interpreted on a CPU and real on a GPU, against PyTorch in float64."""

from __future__ import annotations

import importlib
import math
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dwa_fast.ops.activation import ACTIVATIONS, Activation
from dwa_fast.reference.ops import _ACTIVATIONS
from tests.kernels.cases import Launches, meta
from tests.kernels.layers import EPS, LARGER, SMALL, batch, slope_of
from tests.kernels.support import PRECISIONS, assert_as_good_as_pytorch, error

pytest.importorskip("triton", reason="this PyTorch comes without Triton")
kernel = importlib.import_module("dwa_fast.kernels.batch_norm_act")

MOMENTUM = 0.3


def ours(y: Tensor, values: list[Tensor | None], skip: Tensor | None, activation: Activation, grad_z: Tensor) -> dict[str, Tensor]:
    """Results and gradients of both launchers; the running statistics are copies of those given."""
    running_mean, running_var, weight, bias = (None if value is None else value.clone() for value in values)
    slope, behind = slope_of(activation, y), skip is not None
    arguments = running_mean, running_var, weight, bias, MOMENTUM, EPS, skip, activation, slope
    z, mean, var, mask = kernel.batch_norm_act_forward(y, *arguments)
    reads_skip = behind and activation not in ("none", "relu")
    backward = y, mean, var, weight, bias, EPS, skip if reads_skip else None, mask, behind, activation, slope
    grad_y, grad_skip, parameters, grad_slope = kernel.batch_norm_act_backward(grad_z, *backward)
    results = {"z": z, "grad_y": grad_y, "grad_weight": parameters[0], "grad_bias": parameters[1]}
    if running_mean is not None and running_var is not None:
        results |= {"running_mean": running_mean, "running_var": running_var}
    results |= {} if slope is None else {"grad_slope": grad_slope}
    return results | ({"grad_skip": grad_skip} if behind and activation != "none" else {})


def pytorch(
    y: Tensor, values: list[Tensor | None], skip: Tensor | None, activation: Activation, grad_z: Tensor, dtype: torch.dtype
) -> dict[str, Tensor]:
    """The same from PyTorch, features in `dtype`."""
    wide = torch.promote_types(dtype, torch.float32)
    running_mean, running_var, weight, bias = (None if value is None else value.to(wide, copy=True) for value in values)
    channels = y.shape[1]
    weight, bias = (
        (torch.full((channels,), start, dtype=wide, device=y.device) if each is None else each).requires_grad_()
        for start, each in ((1.0, weight), (0.0, bias))
    )
    y = y.to(dtype).detach().requires_grad_()
    skip = None if skip is None else skip.to(dtype).detach().requires_grad_()
    slope = slope_of(activation, y)
    slope = None if slope is None else slope.to(wide).requires_grad_()
    x = F.batch_norm(y, running_mean, running_var, weight, bias, True, MOMENTUM, EPS)
    x = x if skip is None else x + skip
    z = _ACTIVATIONS[activation](x) if slope is None else F.prelu(x.to(wide), slope).to(dtype)
    wanted = {"grad_y": y, "grad_weight": weight, "grad_bias": bias} | ({} if slope is None else {"grad_slope": slope})
    wanted |= {} if skip is None or activation == "none" else {"grad_skip": skip}
    found = dict(zip(wanted, torch.autograd.grad(z, list(wanted.values()), grad_z.to(dtype)), strict=True))
    running = {} if running_mean is None or running_var is None else {"running_mean": running_mean, "running_var": running_var}
    return {"z": z.detach(), **found, **running}


def values_of(channels: int, device: torch.device | str) -> list[Tensor | None]:
    """Running statistics, γ and β."""
    drawn = torch.randn(channels), torch.rand(channels) + 0.1, 1 + 0.3 * torch.randn(channels), torch.randn(channels)
    return [each.to(device) for each in drawn]


def assert_matches(y: Tensor, values: list[Tensor | None], skip: Tensor | None, activation: Activation) -> dict[str, Tensor]:
    grad_z = torch.randn_like(y)
    found = ours(y, values, skip, activation, grad_z)
    plain, expected = (pytorch(y, values, skip, activation, grad_z, dtype) for dtype in (y.dtype, torch.float64))
    sizes = {name: expected[name] for name in ("running_mean", "running_var")} if "running_mean" in found else {}  # three roundings
    terms = torch.full_like(expected["grad_bias"], math.sqrt(y.numel() / y.shape[1]))  # of sums that may cancel
    sizes |= dict.fromkeys(("grad_weight", "grad_bias", "grad_slope"), terms)
    for name, result in found.items():
        assert_as_good_as_pytorch(result, plain[name], expected[name], sizes.get(name))
    return found


CASES = [
    (shape, activation) for shape in SMALL[1:] for activation in ACTIVATIONS if activation in ("none", "relu") or shape in SMALL[1:4:2]
]


@pytest.mark.parametrize(("shape", "activation"), CASES)
@pytest.mark.parametrize("has_skip", [False, True])
@pytest.mark.parametrize("dtype", PRECISIONS)
def test_matches_float64(shape: tuple[int, ...], dtype: torch.dtype, has_skip: bool, activation: Activation, device: torch.device) -> None:
    y, skip = batch(shape, dtype, device), batch(shape, dtype, device) if has_skip else None
    assert_matches(y, values_of(shape[1], device), skip, activation)


@pytest.mark.parametrize("shape", LARGER)
def test_several_column_blocks(shape: tuple[int, ...], device: torch.device) -> None:
    assert_matches(batch(shape, torch.float32, device), values_of(shape[1], device), batch(shape, torch.float32, device), "relu")


@pytest.mark.parametrize("programs", [1, 2, 3])
def test_programs_loop_over_tiles(programs: int, monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    monkeypatch.setattr("dwa_fast.kernels.layout.resident", lambda *_: programs)
    y, skip = batch((3, 64, 9, 7), torch.float32, device), batch((3, 64, 9, 7), torch.float32, device)
    assert_matches(y, values_of(64, device), skip, "relu")


@pytest.mark.parametrize("missing", [(0, 1), (2,), (3,), (0, 1, 2, 3)])
def test_without_running_statistics_weight_or_bias(missing: tuple[int, ...], device: torch.device) -> None:
    values = values_of(20, device)
    for position in missing:
        values[position] = None
    assert_matches(batch((2, 20, 5, 5), torch.float32, device), values, None, "relu")


def test_two_values_by_hand(device: torch.device) -> None:
    """1 and 5: mean 3, biased variance 4, unbiased 8."""
    y = torch.tensor([1.0, 5.0], device=device).view(2, 1, 1, 1)
    running_mean, running_var, weight, bias = (torch.tensor([each], device=device) for each in (7.0, 2.0, 3.0, 1.0))
    z, mean, var, _ = kernel.batch_norm_act_forward(y, running_mean, running_var, weight, bias, 0.25, 0.0, None, "none", None)
    assert (mean.item(), var.item(), running_mean.item(), running_var.item()) == (3.0, 4.0, 6.0, 3.5)
    assert z.flatten().tolist() == [-2.0, 4.0]
    grad = torch.tensor([1.0, 0.0], device=device).view(2, 1, 1, 1)
    backward = y, mean, var, weight, bias, 0.0, None, y.new_empty(0, dtype=torch.uint8), False, "none", None
    grad_y, _, parameters, _ = kernel.batch_norm_act_backward(grad, *backward)
    assert parameters.tolist() == [[-1.0], [1.0]]
    assert grad_y.flatten().tolist() == [0.0, 0.0]  # the results of two values do not depend on them


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("windows", [(2, 2, 0, True), (3, 2, 1, False)])
@pytest.mark.parametrize("activation", ["relu", "leaky_relu"])
def test_with_a_pooling_behind(
    windows: tuple[int, int, int, bool], activation: Activation, dtype: torch.dtype, device: torch.device
) -> None:
    """What the launchers give without one, with PyTorch's pooling behind it."""
    *sides, averages = windows
    y, values, slope = batch((2, 20, 7, 5), dtype, device), values_of(20, device), slope_of(activation, batch((2, 20, 7, 5), dtype, device))
    before, after = ([None if each is None else each.clone() for each in values] for _ in range(2))
    x, mean, var, mask = kernel.batch_norm_act_forward(y, *before, MOMENTUM, EPS, None, activation, slope)
    z, *statistics, places = kernel.batch_norm_act_forward(y, *after, MOMENTUM, EPS, None, activation, slope, sides, averages)
    expected = (F.avg_pool2d if averages else F.max_pool2d)(x.float().requires_grad_(), *sides)
    assert all(torch.equal(*each) for each in zip([*statistics, *after], [mean, var, *before], strict=True))
    assert error(z, expected.to(dtype)) <= (1e-7 if dtype is torch.float32 else 2.0**-8)
    grad_z = torch.randn_like(z)
    x = x.float().requires_grad_()
    (grad_x,) = torch.autograd.grad((F.avg_pool2d if averages else F.max_pool2d)(x, *sides), x, grad_z.float())
    layer = y, mean, var, *values[2:], EPS, None
    own = kernel.batch_norm_act_backward(grad_z, *layer, places, False, activation, slope, sides, averages)
    plain = kernel.batch_norm_act_backward(grad_x.to(dtype), *layer, mask, False, activation, slope)
    for mine, theirs in zip(own, plain, strict=True):
        assert mine.shape == theirs.shape
        assert not theirs.numel() or error(mine, theirs) <= (2e-6 if dtype is torch.float32 else 2.0**-6)


def test_mean_far_from_zero(device: torch.device) -> None:
    """Σ(y − m)² keeps its precision where E[y²] − E[y]² would lose it."""
    y, values = (100 + torch.randn(4, 8, 16, 16)).to(device), values_of(8, device)
    found = ours(y, values, None, "none", torch.randn_like(y))
    expected = pytorch(y, values, None, "none", torch.randn_like(y), torch.float64)
    assert error(found["running_var"], expected["running_var"]) < 1e-6
    assert error(found["running_mean"], expected["running_mean"]) < 1e-6


def test_a_constant_channel_and_nan(device: torch.device) -> None:
    """No variance is 0 and no less; NaN stays in its channel."""
    y, values = batch((2, 8, 4, 4), torch.float32, device), values_of(8, device)
    y[:, 3], y[1, 5, 2, 3] = 0.1, math.nan
    _, mean, var, _ = kernel.batch_norm_act_forward(y, *values, MOMENTUM, EPS, None, "relu", None)
    assert var[3].item() == 0
    assert mean.isnan().tolist() == var.isnan().tolist() == [channel == 5 for channel in range(8)]


def public_calls() -> list[tuple[str, tuple[Any, ...]]]:
    """For test_dispatch."""
    y, skip, weight, bias = (
        each.requires_grad_() for each in (*(batch((2, 5, 4, 3), torch.float32, "cpu") for _ in range(2)), *torch.rand(2, 5))
    )
    return [("batch_norm_act", (y, torch.zeros(5), torch.ones(5), weight, bias, MOMENTUM, EPS, skip, "relu"))]


def schema_calls() -> list[tuple[str, tuple[Any, ...]]]:
    """For test_dispatch."""
    y, mean, var = batch((2, 5, 4, 3), torch.float32, "cpu"), torch.randn(5), torch.rand(5) + 0.5
    mask = torch.zeros((y.numel() + 7) // 8, dtype=torch.uint8)
    return [
        ("batch_norm_act_forward", (y, mean, var, None, None, MOMENTUM, EPS, y, "relu", None)),
        ("batch_norm_act_backward", (y, y, mean, var, None, None, EPS, None, mask, True, "relu", None)),
        ("batch_norm_act_forward", (y, mean, var, None, None, MOMENTUM, EPS, None, "relu", None, [2, 2, 0], True)),
        (
            "batch_norm_act_backward",
            (y[:, :, ::2, :1], y, mean, var, None, None, EPS, None, mask[:0], False, "relu", None, [2, 2, 0], True),
        ),
    ]


def launches() -> Launches:
    """Layers of ConvNet-128 and of a ResNet in training, batch 100; and odd sizes."""

    def both(
        shape: tuple[int, ...], dtype: torch.dtype, has_skip: bool, activation: Activation, running: bool = True, **pooling: Any
    ) -> None:
        y, values = meta(*shape, dtype=dtype), [meta(shape[1]) if wanted else None for wanted in (running, running, True, True)]
        slope = meta(shape[1]) if activation == "leaky_relu" else None
        skip = y if has_skip else None
        z, mean, var, mask = kernel.batch_norm_act_forward(y, *values, MOMENTUM, EPS, skip, activation, slope, **pooling)
        kernel.batch_norm_act_backward(z, y, mean, var, *values[2:], EPS, skip, mask, has_skip, activation, slope, **pooling)

    for dtype in (torch.bfloat16, torch.float32, torch.float16):
        for has_skip in (False, True):
            yield f"{dtype} {has_skip} relu", partial(both, (100, 128, 16, 16), dtype, has_skip, "relu")
    for activation in ACTIVATIONS:
        yield f"training {activation}", partial(both, (100, 128, 16, 16), torch.bfloat16, False, activation)
    for averages in (False, True):
        pooled = partial(both, (100, 128, 32, 32), torch.bfloat16, False, "relu", windows=(2, 2, 0), averages=averages)
        yield f"pooled, {averages}", pooled
    yield "no running statistics", partial(both, (100, 128, 16, 16), torch.bfloat16, False, "relu", False)
    yield "odd", partial(both, (5, 3, 7, 5), torch.bfloat16, True, "relu")
