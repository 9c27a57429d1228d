"""bn_act: BatchNorm in eval mode, skip, activation and moments in one pass, in C++ on every instruction set, against float64."""

from __future__ import annotations

import importlib
import itertools
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from dwa_fast import ops
from dwa_fast.ops.activation import ACTIVATIONS, Activation
from dwa_fast.reference import ops as reference
from tests.ops.conftest import LEVELS

EPS = 1e-5
NO_EPS = 1e-300  # adds nothing; PyTorch 2.11 refuses 0
SHAPES = [
    (1, 1, 1, 1),
    (2, 3, 5, 7),
    (3, 20, 4, 9),
    (2, 67, 3, 11),
    (1, 136, 6, 5),
    (8, 64, 32, 32),
    (50, 512, 4, 4),
    (0, 16, 8, 8),
]
SMALL = [shape for shape in SHAPES if math.prod(shape) < 10_000]
LAYOUTS = ["contiguous", "channels_last", "slice"]
DTYPES = [torch.float32, torch.bfloat16]
VARIANTS = list(itertools.product([False, True], ACTIVATIONS))
Inputs = dict[str, Any]


def extension() -> Any:
    return importlib.import_module("dwa_fast._C")


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The same numbers in another place: channels-last, or the inside of a larger channels-last tensor."""
    if layout == "contiguous":
        return x.contiguous()
    if layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    n, c, h, w = x.shape
    larger = torch.full((n, c, h + 2, 2 * w), math.nan, dtype=x.dtype, device=x.device).contiguous(memory_format=torch.channels_last)
    inside = larger[:, :, 1 : h + 1, ::2]
    inside.copy_(x)
    return inside


def make(
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    layout: str = "channels_last",
    *,
    skip: bool = False,
    activation: Activation = "none",
    slopes: int | None = None,
    affine: bool = True,
    device: torch.device | str = "cpu",
) -> Inputs:
    """Arguments of bn_act with the magnitudes of a trained network."""
    channels = shape[1]

    def features() -> Tensor:
        return laid_out((torch.randn(shape) * 1.5 + 0.3).to(dtype).to(device), layout)

    vectors = {
        "mean": torch.randn(channels) * 0.5,
        "var": torch.rand(channels) * 2 + 0.1,
        "weight": torch.rand(channels) + 0.5 if affine else None,
        "bias": torch.randn(channels) * 0.3 if affine else None,
    }
    placed = {name: None if vector is None else vector.to(device) for name, vector in vectors.items()}
    inputs = {"y": features(), **placed, "eps": EPS, "skip": features() if skip else None, "activation": activation}
    slope = torch.rand(channels if slopes is None else slopes) - 0.3 if activation == "leaky_relu" else None
    return inputs | {"slope": None if slope is None else slope.to(device)}


def run(operator: Callable[..., Any], inputs: Inputs, double: bool = False, moments: bool = True) -> dict[str, Tensor]:
    """Results of an operator and their gradients, for fixed gradients of the results."""
    leaves: Inputs = {}
    for name, value in inputs.items():
        leaves[name] = value
        if isinstance(value, Tensor):
            leaves[name] = value.detach().double() if double else value.detach()
            leaves[name].requires_grad_(name in ("y", "skip", "weight", "bias", "slope"))
    z, sums = operator(**leaves)
    source = torch.Generator().manual_seed(1)
    grad_z = torch.randn(z.shape, generator=source).to(inputs["y"].dtype).to(z)
    grad_sums = (1e-3 * torch.randn(sums.shape, generator=source)).to(sums)
    wanted = {name: leaf for name, leaf in leaves.items() if isinstance(leaf, Tensor) and leaf.requires_grad}
    outputs, grads = ((z, sums), (grad_z, grad_sums)) if moments else ((z,), (grad_z,))
    gradients = torch.autograd.grad(outputs, list(wanted.values()), grads)
    return {"z": z.detach(), "sums": sums.detach(), **dict(zip(wanted, gradients, strict=True))}


def error(result: Tensor, expected: Tensor) -> float:
    return (torch.linalg.vector_norm(result.double() - expected) / torch.linalg.vector_norm(expected).clamp_min(1e-300)).item()


def assert_as_good_as_pytorch(inputs: Inputs, moments: bool = True) -> None:
    """Errors of results and gradients against float64 at most twice those of PyTorch's operators, or a unit of the precision."""
    ours, plain = run(ops.bn_act, inputs, moments=moments), run(reference.bn_act, inputs, moments=moments)
    expected = run(reference.bn_act, inputs, double=True, moments=moments)
    assert set(ours) == set(expected)
    for name, result in ours.items():
        assert result.shape == expected[name].shape, name
        assert result.dtype == (torch.float32 if name == "sums" else inputs[name if name in inputs else "y"].dtype), name
        unit = 2.0 ** (-9 if result.dtype == torch.bfloat16 else -23)
        # Of one or three numbers PyTorch may hit one by luck, or all lie where a derivative nearly cancels.
        units = 3 if result.numel() < 64 and inputs["activation"] not in ("none", "relu") else 1
        assert error(result, expected[name]) <= max(2 * error(plain[name], expected[name]), units * unit), name
    for name in ("z", "y", "skip"):
        if name in ours and (name != "skip" or inputs["activation"] != "none"):  # else the skip's gradient is that of z itself
            assert ours[name].stride() == torch.empty_like(inputs["y"]).stride(), name


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


@pytest.mark.parametrize("shape", [(5, 67, 9, 7), (6, 64, 32, 32)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("skip", "activation"), VARIANTS)
def test_same_bits_for_any_number_of_threads(shape: tuple[int, ...], dtype: torch.dtype, skip: bool, activation: Activation) -> None:
    inputs = make(shape, dtype, skip=skip, activation=activation)
    results = []
    for threads in (1, 2, 3, 1):
        torch.set_num_threads(threads)
        results.append(run(ops.bn_act, inputs))
    for result in results[1:]:
        assert all(torch.equal(result[name], results[0][name]) for name in result)


def test_same_bits_again(device: torch.device) -> None:
    inputs = make((6, 48, 16, 16), torch.bfloat16, skip=True, activation="relu", device=device)
    first, second = run(ops.bn_act, inputs), run(ops.bn_act, inputs)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("used", ["z", "sums"])
def test_one_result_may_go_unused(used: str, device: torch.device) -> None:
    inputs = make((3, 16, 5, 5), skip=True, activation="relu", device=device)
    doubles = {name: value.double() if isinstance(value, Tensor) else value for name, value in inputs.items()}
    gradients = []
    for operator, values in ((ops.bn_act, inputs), (reference.bn_act, doubles)):
        y = values["y"].clone().requires_grad_()
        z, sums = operator(**(values | {"y": y}))
        (z if used == "z" else sums).square().sum().backward()
        gradients.append(y.grad)
    assert error(*gradients) < 1e-6


@pytest.mark.parametrize("activation", ["none", "relu", "silu"])
def test_only_the_skip_needs_a_gradient(activation: Activation, device: torch.device) -> None:
    inputs = make((3, 16, 5, 5), skip=True, activation=activation, device=device)
    expected = run(reference.bn_act, inputs, double=True)["skip"]
    inputs["skip"].requires_grad_()
    z, _ = ops.bn_act(**inputs)
    z.backward(torch.randn(z.shape, generator=torch.Generator().manual_seed(1)).to(z))
    assert error(inputs["skip"].grad, expected) < 1e-6
    assert inputs["y"].grad is None


@pytest.mark.parametrize("activation", ["none", "relu", "silu"])
@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("level", LEVELS)
def test_gradients_of_two_uses(
    level: str, dtype: torch.dtype, skip: bool, activation: Activation, use_level: Callable[[str], None]
) -> None:
    """They are added as PyTorch adds them, bit for bit; one of them may be missing."""
    use_level(level)
    y, added = (torch.randn(3, 67, 5, 4).to(dtype).requires_grad_() for _ in range(2))
    vectors = [torch.randn(67), torch.rand(67) + 0.1, torch.randn(67).requires_grad_(), torch.randn(67).requires_grad_()]
    layer = y, *vectors, EPS, added if skip else None, activation
    leaves = [y, *vectors[2:], *([added] if skip else [])]
    grad_z, grad_alias = torch.randn_like(y), torch.randn_like(y)
    grad_sums = torch.randn(2, 67)
    z, alias, sums = ops.bn_act(*layer, with_alias=True)
    assert z.data_ptr() == alias.data_ptr()
    found = torch.autograd.grad([z, alias, sums], leaves, [grad_z, grad_alias, grad_sums], retain_graph=True)
    alone = torch.autograd.grad([alias, sums], leaves, [grad_z, grad_sums])
    for result, gradient in ((found, grad_z + grad_alias), (alone, grad_z)):
        expected = torch.autograd.grad(ops.bn_act(*layer), leaves, [gradient, grad_sums])
        assert all(torch.equal(*each) for each in zip(result, expected, strict=True))


def test_gradients_of_any_strides(device: torch.device) -> None:
    """z.sum() hands back an expanded scalar, a flattening layer a contiguous tensor."""
    inputs = make((3, 16, 5, 5), activation="relu", device=device)
    for scale in (torch.ones((), device=device).expand(3, 16, 5, 5), torch.randn(3, 16, 5, 5, device=device)):
        y = inputs["y"].clone().requires_grad_()
        z, _ = ops.bn_act(**(inputs | {"y": y}))
        z.backward(scale)
        expected = scale * (z > 0) * (inputs["weight"] / (inputs["var"] + EPS).sqrt())[:, None, None]
        torch.testing.assert_close(y.grad, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("skip", "activation"), VARIANTS)
def test_gradients_of_weight_and_bias_only_where_asked(dtype: torch.dtype, skip: bool, activation: Activation) -> None:
    """Frozen weights cost nothing, and the other gradients keep every bit."""
    ops.load()
    inputs = make((3, 67, 7, 5), dtype, skip=skip, activation=activation)
    forward = tuple(inputs.values())
    layer = (*forward[:7], torch.ops.dwa_fast.bn_act_forward(*forward)[2], skip, *forward[7:])
    grad = torch.randn_like(inputs["y"])
    for grad_sums in (None, torch.randn(2, 67)):
        frozen = torch.ops.dwa_fast.bn_act_backward(grad, grad_sums, *layer)
        asked = torch.ops.dwa_fast.bn_act_backward(grad, grad_sums, *layer, True)
        assert (frozen[2].shape, asked[2].shape) == ((0,), (2, 67))
        assert (frozen[3].shape, asked[3].shape) == ((0,), (0 if inputs["slope"] is None else 67,))
        assert torch.equal(frozen[0], asked[0])
        assert torch.equal(frozen[1], asked[1])


def test_second_derivatives_are_refused() -> None:
    inputs = make((2, 4, 3, 3))
    inputs["y"].requires_grad_()
    z, _ = ops.bn_act(**inputs)
    (gradient,) = torch.autograd.grad(z.square().sum(), inputs["y"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


OPCHECKED = [  # every variant in one layout, and every layout with one of them, where time is short
    pytest.param(layout, *variant, marks=[pytest.mark.slow] * (layout != "channels_last" and variant != (True, "relu")))
    for layout in LAYOUTS
    for variant in VARIANTS
]


@pytest.mark.parametrize(("layout", "skip", "activation"), OPCHECKED)
def test_opcheck(layout: str, skip: bool, activation: Activation) -> None:
    ops.load()
    inputs = make((2, 19, 5, 4), torch.bfloat16, layout, skip=skip, activation=activation)
    forward = tuple(inputs.values())
    torch.library.opcheck(torch.ops.dwa_fast.bn_act_forward.default, forward)
    mask = torch.ops.dwa_fast.bn_act_forward(*forward)[2]
    shared = (*forward[:7], mask, skip, *forward[7:])
    grad = torch.randn_like(inputs["y"])
    torch.library.opcheck(torch.ops.dwa_fast.bn_act_backward.default, (grad, torch.randn(2, 19), *shared))
    torch.library.opcheck(torch.ops.dwa_fast.bn_act_backward.default, (grad, None, *shared))
    torch.library.opcheck(torch.ops.dwa_fast.bn_act_backward.default, (grad, None, *shared, True))
    torch.library.opcheck(torch.ops.dwa_fast.bn_act_backward.default, (grad, None, *shared, False, grad))


def test_meta_tensors_have_the_right_shape() -> None:
    inputs = make((2, 8, 3, 3), torch.bfloat16, skip=True, activation="relu", device="meta")
    z, sums = ops.bn_act(**inputs)
    assert (z.shape, z.dtype, z.stride()) == (inputs["y"].shape, torch.bfloat16, inputs["y"].stride())
    assert (sums.shape, sums.dtype, sums.device.type) == ((2, 8), torch.float32, "meta")


WRONG: list[tuple[Inputs, type[Exception], str]] = [
    ({"y": [1.0]}, TypeError, "y must be a tensor, got list"),
    ({"y": torch.zeros(2, 4, 3, 3).double()}, TypeError, "y must be float32 or bfloat16 on cpu, got float64"),
    ({"y": torch.zeros(2, 4, 3, 3).half()}, TypeError, "y must be float32 or bfloat16 on cpu, got float16"),
    ({"y": torch.zeros(4, 3, 3)}, ValueError, "y must be [N, C, H, W], got shape (4, 3, 3)"),
    ({"mean": None}, TypeError, "mean must be a tensor, got NoneType"),
    ({"mean": torch.zeros(3)}, ValueError, "mean must be [C] with C = 4, got shape (3,)"),
    ({"var": torch.zeros(4).double()}, TypeError, "var must be float32, got float64"),
    ({"var": torch.zeros(4, 1)}, ValueError, "var must be [C] with C = 4, got shape (4, 1)"),
    ({"weight": torch.zeros(4).bfloat16()}, TypeError, "weight must be float32, got bfloat16"),
    ({"bias": torch.zeros(4, device="meta")}, ValueError, "bias must be on the device of y, cpu, got meta"),
    ({"mean": torch.zeros(4, requires_grad=True)}, ValueError, "bn_act is not differentiable in mean and var"),
    ({"skip": 1}, TypeError, "skip must be a tensor, got int"),
    ({"skip": torch.zeros(2, 4, 3, 3).bfloat16()}, TypeError, "skip must have the precision of y, float32, got bfloat16"),
    ({"skip": torch.zeros(2, 4, 1, 1)}, ValueError, "skip must have the shape of y, (2, 4, 3, 3), got (2, 4, 1, 1)"),
    ({"skip": torch.zeros(2, 4, 3, 3, device="meta")}, ValueError, "skip must be on the device of y, cpu, got meta"),
    ({"activation": True}, TypeError, "activation must be a name, got bool"),
    (
        {"activation": "tanh"},
        ValueError,
        "activation must be one of none, relu, relu6, silu, hardswish, gelu, gelu_tanh, leaky_relu, got 'tanh'",
    ),
    ({"slope": torch.zeros(1)}, ValueError, "slope belongs to the activation leaky_relu, got one with none"),
    ({"activation": "leaky_relu"}, ValueError, "the activation leaky_relu needs a slope, [1] or [C]"),
    ({"activation": "leaky_relu", "slope": 0.1}, TypeError, "slope must be a tensor, got float"),
    ({"activation": "leaky_relu", "slope": torch.zeros(1).double()}, TypeError, "slope must be float32, got float64"),
    ({"activation": "leaky_relu", "slope": torch.zeros(3)}, ValueError, "slope must be [1] or [C] with C = 4, got shape (3,)"),
    ({"activation": "leaky_relu", "slope": torch.zeros(4, device="meta")}, ValueError, "slope must be on the device of y, cpu, got meta"),
]


@pytest.mark.parametrize(("change", "kind", "message"), WRONG, ids=[row[-1] for row in WRONG])
def test_wrong_input(change: Inputs, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=re.escape(message)):
        ops.bn_act(**(make((2, 4, 3, 3)) | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"y": torch.zeros(4, 3, 3)}, r"y must be \[N, C, H, W\], got shape \[4, 3, 3\]"),
        ({"y": torch.zeros(2, 4, 3, 3).half()}, "y must be float32 or bfloat16 on a CPU, got Half"),
        ({"mean": torch.zeros(3)}, r"mean must be \[C\] with C = 4, got shape \[3\]"),
        ({"var": torch.zeros(4).double()}, "var must be float32, got Double"),
        ({"skip": torch.zeros(2, 4, 3, 3).bfloat16()}, "skip must have the precision of y, Float, got BFloat16"),
        ({"skip": torch.zeros(2, 4, 1, 1)}, r"skip must have the shape of y, \[2, 4, 3, 3\], got \[2, 4, 1, 1\]"),
        ({"activation": "tanh"}, "activation must be none, relu, relu6, silu, hardswish, gelu, gelu_tanh or leaky_relu, got tanh"),
        ({"slope": torch.zeros(1)}, "slope belongs to activation leaky_relu alone"),
        ({"activation": "leaky_relu"}, "activation leaky_relu needs a slope"),
        ({"activation": "leaky_relu", "slope": torch.zeros(3)}, r"slope must be \[1\] or \[C\] with C = 4, got shape \[3\]"),
        ({"activation": "leaky_relu", "slope": torch.zeros(1).double()}, "slope must be float32, got Double"),
    ],
)
def test_the_operator_checks_for_itself(change: Inputs, message: str) -> None:
    """Callers of torch.ops.dwa_fast pass by the checks in Python: wrong input is refused in C++ too."""
    ops.load()
    with pytest.raises(RuntimeError, match=message):
        torch.ops.dwa_fast.bn_act_forward(*(make((2, 4, 3, 3)) | change).values())


def test_a_foreign_mask_is_refused() -> None:
    ops.load()
    inputs = list(make((2, 4, 3, 3)).values())[:6]
    with pytest.raises(RuntimeError, match=r"mask must be what bn_act_forward returned, uint8 \[9\], got Byte \[8\]"):
        torch.ops.dwa_fast.bn_act_backward(inputs[0], None, *inputs, None, torch.zeros(8, dtype=torch.uint8), True, "relu", None)


def test_the_skip_is_needed_again() -> None:
    ops.load()
    inputs, none = list(make((2, 4, 3, 3)).values())[:6], torch.zeros(0, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="activation silu behind a skip needs the skip again"):
        torch.ops.dwa_fast.bn_act_backward(inputs[0], None, *inputs, None, none, True, "silu", None)


def test_levels_have_names() -> None:
    assert ops.cpu_level() in LEVELS
    with pytest.raises(ValueError, match="level must be baseline, avx2, avx512 or avx512_bf16, got avx1024"):
        extension().set_cpu_level("avx1024")


@pytest.mark.gpu
def test_captured_in_a_cuda_graph() -> None:
    """A replay equals a call, bit for bit: nothing in the operator waits or allocates outside the graph."""
    inputs = make((8, 64, 16, 16), torch.bfloat16, skip=True, activation="relu", device="cuda")
    called = run(ops.bn_act, inputs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        z, sums = ops.bn_act(**inputs)
    graph.replay()
    assert torch.equal(z, called["z"])
    assert torch.equal(sums, called["sums"])
