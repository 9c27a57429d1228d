"""bn_act: BatchNorm in eval mode, skip, activation and moments in one pass, in C++ on every instruction set, against float64."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from dwa_fast import ops
from dwa_fast.ops.activation import ACTIVATIONS, Activation
from dwa_fast.reference import ops as reference
from tests.ops.conftest import LEVELS
from tests.ops.layers import (
    DTYPES,
    LAYOUTS,
    NO_EPS,
    SHAPES,
    SMALL,
    VARIANTS,
    Inputs,
    assert_as_good_as_pytorch,
    error,
    extension,
    make,
    run,
)


def cases() -> Iterator[tuple[tuple[int, ...], str, bool, Activation]]:
    """Every shape in every layout without an activation and with a ReLU; with the others, which differ by element alone, in one layout."""
    for number, (shape, (skip, activation)) in enumerate(itertools.product(SHAPES, VARIANTS)):
        layouts = LAYOUTS if activation in ("none", "relu") else [LAYOUTS[number % len(LAYOUTS)]]
        for layout in layouts:
            yield shape, layout, skip, activation


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "layout", "skip", "activation"), list(cases()))
def test_matches_float64(
    shape: tuple[int, ...], layout: str, dtype: torch.dtype, skip: bool, activation: Activation, device: torch.device
) -> None:
    assert_as_good_as_pytorch(make(shape, dtype, layout, skip=skip, activation=activation, device=device))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(("skip", "activation"), VARIANTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_instruction_set_matches_float64(
    level: str, dtype: torch.dtype, skip: bool, activation: Activation, use_level: Callable[[str], None]
) -> None:
    """The large shapes without an activation and with a ReLU: the others differ by element alone."""
    use_level(level)
    for shape in SHAPES if activation in ("none", "relu") else SMALL:
        assert_as_good_as_pytorch(make(shape, dtype, skip=skip, activation=activation))
        assert_as_good_as_pytorch(make(shape, dtype, skip=skip, activation=activation), moments=False)


def test_no_channels() -> None:
    """PyTorch's batch_norm refuses them."""
    z, sums = ops.bn_act(**make((4, 0, 2, 2), skip=True, activation="relu"))
    assert (z.shape, sums.shape) == ((4, 0, 2, 2), (2, 0))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_without_weight_and_bias(activation: Activation, device: torch.device) -> None:
    assert_as_good_as_pytorch(make((4, 24, 6, 6), activation=activation, affine=False, device=device))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
@pytest.mark.gpu
def test_half_precisions_on_a_gpu(dtype: torch.dtype) -> None:
    assert_as_good_as_pytorch(make((8, 64, 16, 16), dtype, skip=True, activation="relu", device="cuda"))


def test_large_offsets_keep_their_variance(device: torch.device) -> None:
    """E[y²] − E[y]² would lose every digit at |μ|/σ = 1000; the moments of y − m do not."""
    inputs = make((16, 8, 32, 32), device=device)
    inputs["mean"] = inputs["mean"] * 0 + 1000.25
    inputs["y"] = inputs["y"] + 1000
    sums = ops.bn_act(**inputs)[1]
    expected = run(reference.bn_act, inputs, double=True)["sums"]
    assert error(sums, expected) < 1e-6


def numerical(inputs: Inputs, name: str, direction: Tensor, grad_z: Tensor, grad_sums: Tensor, step: float = 1e-2) -> float:
    """Central difference along a direction of Σ grad_z·z + Σ grad_sums·sums."""
    values = []
    for sign in (1, -1):
        z, sums = ops.bn_act(**(inputs | {name: inputs[name] + sign * step * direction}))
        values.append((z.double() * grad_z).sum() + (sums.double() * grad_sums).sum())
    return float(values[0] - values[1]) / (2 * step)


@pytest.mark.parametrize("name", ["y", "skip", "weight", "bias", "slope"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_are_those_of_the_results(name: str, activation: Activation, device: torch.device) -> None:
    """Finite differences; where the activation has a corner the values are kept away from it, on both sides of it."""
    inputs = make((2, 5, 3, 3), skip=True, activation=activation, device=device)
    if name == "slope" and inputs["slope"] is None:
        return
    if activation in ("relu", "relu6", "hardswish", "leaky_relu"):
        inputs["skip"] = inputs["skip"] + torch.where(inputs["skip"] > 0.3, 20, -20)
    grad_z, grad_sums = torch.randn(2, 5, 3, 3, device=device), torch.randn(2, 5, device=device)
    inputs[name].requires_grad_()
    gradient = torch.autograd.grad(ops.bn_act(**inputs), inputs[name], (grad_z, grad_sums))[0]
    inputs[name].requires_grad_(False)
    direction = torch.randn_like(inputs[name])
    expected = numerical(inputs, name, direction, grad_z.double(), grad_sums.double())
    assert (gradient * direction).sum().item() == pytest.approx(expected, rel=2e-3, abs=2e-3)


@pytest.mark.parametrize("with_skip", [False, True])
def test_zero_is_not_let_through(with_skip: bool, device: torch.device) -> None:
    """z = 0 exactly, from below, from above and −0: the gradient is 0 there, as in PyTorch."""
    y = torch.tensor([0.0, -0.0, 1.0, -1.0, 1e-38, -1e-38]).view(1, 1, 1, 6).to(device).requires_grad_()
    skip = torch.zeros_like(y).requires_grad_() if with_skip else None
    zero, one = torch.zeros(1, device=device), torch.ones(1, device=device)
    z, _ = ops.bn_act(y, zero, one, None, None, 0.0, skip, "relu")
    z.sum().backward()
    expected = torch.tensor([0.0, 0, 1, 0, 1, 0], device=device)
    assert y.grad is not None
    assert torch.equal(y.grad.flatten(), expected)
    assert torch.equal(z.flatten(), y.detach().flatten().relu())
    if skip is not None:
        assert skip.grad is not None
        assert torch.equal(skip.grad.flatten(), expected)


CORNERS = [0.0, -0.0, 3, -3, 6, 2.9999998, -2.9999998, 3.0000002, -3.0000002, 5.9999995, 6.0000005]
EXTREMES = [1e4, -1e4, 88.5, -88.5, 90, -90, 104, -104, 1e-30, -1e-30, 1e30, -1e30, 0.5, -0.5]


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("skip", "activation"), VARIANTS)
def test_corners_and_extremes(level: str, dtype: torch.dtype, skip: bool, activation: Activation, use_level: Callable[[str], None]) -> None:
    """At 0, ±3 and 6 the gradient is PyTorch's own; far from 0 every value is as the formula has it: SiLU of −10⁴ is −0, not NaN."""
    use_level(level)
    y = torch.tensor(CORNERS + EXTREMES).to(dtype).view(1, 1, 1, -1).requires_grad_()
    added, slope = torch.zeros_like(y) if skip else None, torch.tensor([0.1]) if activation == "leaky_relu" else None
    constants = torch.zeros(1), torch.ones(1), None, None, NO_EPS
    z, _ = ops.bn_act(y, *constants, added, activation, slope)
    (gradient,) = torch.autograd.grad(z, y, torch.ones_like(z))
    leaf = y.detach().double().requires_grad_()
    doubles = torch.zeros(1).double(), torch.ones(1).double(), None, None, NO_EPS
    expected, _ = reference.bn_act(leaf, *doubles, None, activation, None if slope is None else slope.double())
    (wanted,) = torch.autograd.grad(expected, leaf, torch.ones_like(expected))
    close: dict[str, Any] = {"rtol": 1e-6, "atol": 1e-7} if dtype == torch.float32 else {"rtol": 2**-8, "atol": 1e-7}
    torch.testing.assert_close(z.double(), expected, **close)
    finite = leaf.abs() < 1e20 if activation == "gelu_tanh" else torch.ones_like(leaf, dtype=torch.bool)  # x² is infinite in float32
    torch.testing.assert_close(gradient.double()[finite], wanted[finite], **(close | {"atol": 1e-6}))
    if activation in ("silu", "hardswish", "gelu", "gelu_tanh"):
        far = z.detach()[y == torch.tensor(-1e4).to(dtype)]
        assert far.tolist() == [0]
        assert far.signbit().all()


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
def test_every_value_is_as_good_as_pytorch(level: str, activation: Activation, use_level: Callable[[str], None]) -> None:
    """Over the whole range where the functions bend, the worst absolute error is at most twice PyTorch's, value and derivative."""
    use_level(level)
    x = torch.linspace(-20, 20, 40_001)
    found = []
    for operator, points in ((ops.bn_act, x), (reference.bn_act, x), (reference.bn_act, x.double())):
        leaf = points.view(1, 1, 1, -1).detach().requires_grad_()
        z, _ = operator(leaf, torch.zeros(1).to(leaf), torch.ones(1).to(leaf), None, None, NO_EPS, None, activation)
        found.append((z.detach().double(), torch.autograd.grad(z.sum(), leaf)[0].double()))
    for ours, plain, exact in zip(*found, strict=True):
        unit = torch.finfo(torch.float32).eps * exact.abs().clamp_min(0.1)
        assert ((ours - exact) / unit).abs().max() <= max(2 * ((plain - exact) / unit).abs().max(), 1.0)


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_slope_for_all_channels(dtype: torch.dtype, skip: bool) -> None:
    assert_as_good_as_pytorch(make((4, 24, 6, 6), dtype, skip=skip, activation="leaky_relu", slopes=1))


@pytest.mark.parametrize("channels", [1, 5, 8, 12, 24, 67, 80])
@pytest.mark.parametrize("level", LEVELS)
def test_mask_has_a_bit_per_element(level: str, channels: int, use_level: Callable[[str], None]) -> None:
    """Bit i of the mask, in memory order, says whether element i passes; a byte beyond the last element does not exist."""
    use_level(level)
    inputs = make((3, channels, 7, 13), skip=True, activation="relu")
    z, _, mask = torch.ops.dwa_fast.bn_act_forward(*inputs.values())
    bits = (mask[:, None] >> torch.arange(8)).bitwise_and(1).flatten()
    passed = z.permute(0, 2, 3, 1).flatten() > 0
    assert mask.shape == ((z.numel() + 7) // 8,)
    assert torch.equal(bits[: z.numel()].bool(), passed)
    assert not bits[z.numel() :].any()


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("skip", "activation"), VARIANTS)
def test_nan_and_infinity_propagate(
    level: str, dtype: torch.dtype, skip: bool, activation: Activation, use_level: Callable[[str], None]
) -> None:
    use_level(level)
    inputs = make((2, 35, 4, 5), dtype, skip=skip, activation=activation)
    inputs["y"][0, 3, 1, 2], inputs["y"][1, 17, 0, 0], inputs["y"][1, 34, 3, 4] = math.nan, math.inf, -math.inf
    ours, plain = run(ops.bn_act, inputs), run(reference.bn_act, inputs, double=True)
    for name, result in ours.items():
        if activation == "hardswish" and name not in ("z", "sums"):
            continue  # whether PyTorch's gradient at NaN is NaN depends on the layout of its tensors
        assert torch.equal(result.isnan(), plain[name].isnan()), name
        assert torch.equal(result.isinf(), plain[name].isinf()), name


def test_bfloat16_is_rounded_to_nearest_even(use_level: Callable[[str], None]) -> None:
    """Every level rounds as PyTorch does, for all magnitudes down to the smallest normal number."""
    bits = torch.randint(0x0080, 0x7F00, (4096,)).to(torch.int16)
    y = bits.view(torch.bfloat16).view(1, 4096, 1, 1)
    skip = (torch.randn(1, 4096, 1, 1) * y.float()).to(torch.bfloat16)
    expected = (y.float() + skip.float()).to(torch.bfloat16)
    for level in LEVELS[: LEVELS.index(ops.cpu_level()) + 1]:
        extension().set_cpu_level(level)
        z = ops.bn_act(y, torch.zeros(4096), torch.ones(4096), None, None, 0.0, skip)[0]
        normal = expected.float().abs() >= 2.0**-126
        assert torch.equal(z[normal], expected[normal]), level
