"""moments: the shifted moments of features in one read, in C++ on every instruction set and in both layouts, against float64."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dwa_fast import ops
from dwa_fast.reference import ops as reference
from tests.ops.conftest import LEVELS
from tests.ops.layers import error

SHAPES = [
    (1, 1, 1, 1),
    (4, 1, 5, 5),
    (4, 9, 1, 1),
    (2, 3, 5, 7),
    (3, 20, 4, 9),
    (2, 67, 3, 11),
    (8, 64, 32, 32),
    (2, 3, 112, 112),
    (50, 512, 4, 4),
]
LAYOUTS = ["contiguous", "channels_last", "slice"]
DTYPES = [torch.float32, torch.bfloat16]


def features(shape: tuple[int, ...], dtype: torch.dtype, layout: str, device: torch.device | str = "cpu") -> Tensor:
    """Values with the magnitudes of a trained network; a slice is the inside of a larger tensor of NaN."""
    x = (torch.randn(shape) * 1.5 + 0.3).to(dtype).to(device)
    if layout != "slice":
        return x.contiguous(memory_format=torch.channels_last if layout == "channels_last" else torch.contiguous_format)
    n, c, h, w = shape
    larger = torch.full((n, c, h + 2, 2 * w), math.nan, dtype=dtype, device=device)
    inside = larger[:, :, 1 : h + 1, ::2]
    inside.copy_(x)
    return inside


def both_ways(operator: Callable[..., Tensor], y: Tensor, mean: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    leaf = y.detach().requires_grad_()
    sums = operator(leaf, mean)
    return sums.detach(), torch.autograd.grad(sums, leaf, grad)[0]


def assert_as_good_as_pytorch(y: Tensor) -> None:
    """Errors of sums and gradient against float64 at most twice those of PyTorch's operators, or a unit of the precision."""
    mean, grad = (torch.randn(shape, device=y.device) for shape in ((y.shape[1],), (2, y.shape[1])))
    ours, plain = both_ways(ops.moments, y, mean, grad), both_ways(reference.moments, y, mean, grad)
    expected = both_ways(reference.moments, y.double(), mean.double(), grad.double())
    for result, other, exact, unit in zip(ours, plain, expected, (2.0**-23, torch.finfo(y.dtype).eps / 2), strict=True):
        assert result.shape == exact.shape
        assert result.dtype == other.dtype
        assert error(result, exact) <= max(2 * error(other, exact), unit)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_float64(shape: tuple[int, ...], layout: str, dtype: torch.dtype, device: torch.device) -> None:
    assert_as_good_as_pytorch(features(shape, dtype, layout, device))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_instruction_set_matches_float64(level: str, layout: str, dtype: torch.dtype, use_level: Callable[[str], None]) -> None:
    use_level(level)
    for shape in SHAPES:
        assert_as_good_as_pytorch(features(shape, dtype, layout))


@pytest.mark.gpu
def test_half_precision_on_a_gpu() -> None:
    for layout in LAYOUTS:
        assert_as_good_as_pytorch(features((8, 64, 16, 16), torch.float16, layout, "cuda"))


@pytest.mark.parametrize("layout", LAYOUTS[:2])
def test_by_hand(layout: str, device: torch.device) -> None:
    y = features((1, 2, 1, 2), torch.float32, layout, device)
    y.copy_(torch.tensor([[[[1.0, 3.0]], [[0.0, 0.0]]]]))
    y.requires_grad_()
    sums = ops.moments(y, torch.tensor([5.0, -4.0], device=device))
    assert sums.tolist() == [[-6.0, 8.0], [20.0, 32.0]]
    sums.backward(torch.tensor([[1.0, 0.5], [0.25, 2.0]], device=device))
    assert y.grad is not None
    assert y.grad.tolist() == [[[[1 + 0.5 * (1 - 5), 1 + 0.5 * (3 - 5)]], [[0.5 + 4 * 4, 0.5 + 4 * 4]]]]


@pytest.mark.parametrize("layout", LAYOUTS[:2])
def test_large_offsets_keep_their_variance(layout: str, device: torch.device) -> None:
    """E[y²] − E[y]² would lose every digit at |μ|/σ = 1000; the moments of y − m do not."""
    y = features((16, 8, 32, 32), torch.float32, layout, device) + 1000
    mean = torch.full((8,), 1000.25, device=device)
    assert error(ops.moments(y, mean), reference.moments(y.double(), mean.double())) < 1e-6


@pytest.mark.parametrize("shape", [(0, 5, 3, 3), (3, 0, 2, 2), (2, 4, 0, 3)])
@pytest.mark.parametrize("layout", LAYOUTS[:2])
def test_nothing_to_read(shape: tuple[int, ...], layout: str, device: torch.device) -> None:
    y = features(shape, torch.float32, layout, device)
    sums, gradient = both_ways(ops.moments, y, torch.randn(shape[1], device=device), torch.randn(2, shape[1], device=device))
    assert sums.tolist() == [[0.0] * shape[1]] * 2
    assert gradient.shape == y.shape


@pytest.mark.parametrize("layout", LAYOUTS[:2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_infinity_stay_in_their_channels(dtype: torch.dtype, layout: str, device: torch.device) -> None:
    y = features((2, 35, 4, 5), dtype, layout, device)
    y[0, 3, 1, 2], y[1, 34, 3, 4] = math.nan, -math.inf
    sums = ops.moments(y, torch.zeros(35, device=device))
    bad = (~sums.isfinite()).all(0).nonzero().flatten().tolist()
    assert bad == [3, 34]
    assert sums.isfinite().sum() == 2 * 33


@pytest.mark.parametrize("layout", LAYOUTS[:2])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5, 67, 9, 7), (6, 64, 32, 32)])
def test_same_bits_for_any_number_of_threads(shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> None:
    y, mean, grad = features(shape, dtype, layout), torch.randn(shape[1]), torch.randn(2, shape[1])
    results = []
    for threads in (1, 2, 3, 1):
        torch.set_num_threads(threads)
        results.append(both_ways(ops.moments, y, mean, grad))
    for sums, gradient in results[1:]:
        assert torch.equal(sums, results[0][0])
        assert torch.equal(gradient, results[0][1])


def test_second_derivatives_are_refused() -> None:
    y = features((2, 4, 3, 3), torch.float32, "contiguous").requires_grad_()
    (gradient,) = torch.autograd.grad(ops.moments(y, torch.zeros(4)).square().sum(), y, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(layout: str) -> None:
    ops.load()
    y = features((2, 19, 5, 4), torch.bfloat16, layout)
    torch.library.opcheck(torch.ops.dwa_fast.moments_forward.default, (y, torch.randn(19)))
    torch.library.opcheck(torch.ops.dwa_fast.moments_backward.default, (torch.randn(2, 19), y, torch.randn(19)))


WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"y": [1.0]}, TypeError, "y must be a tensor, got list"),
    ({"y": torch.zeros(2, 4, 3, 3).double()}, TypeError, "y must be float32 or bfloat16 on cpu, got float64"),
    ({"y": torch.zeros(4, 3, 3)}, ValueError, "y must be [N, C, H, W], got shape (4, 3, 3)"),
    ({"mean": None}, TypeError, "mean must be a tensor, got NoneType"),
    ({"mean": torch.zeros(3)}, ValueError, "mean must be [C] with C = 4, got shape (3,)"),
    ({"mean": torch.zeros(4).double()}, TypeError, "mean must be float32, got float64"),
    ({"mean": torch.zeros(4, device="meta")}, ValueError, "mean must be on the device of y, cpu, got meta"),
    ({"mean": torch.zeros(4, requires_grad=True)}, ValueError, "moments is not differentiable in mean"),
]


@pytest.mark.parametrize(("change", "kind", "message"), WRONG, ids=[row[-1] for row in WRONG])
def test_wrong_input(change: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=re.escape(message)):
        ops.moments(**({"y": torch.zeros(2, 4, 3, 3), "mean": torch.zeros(4)} | change))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(4, 3, 3), torch.zeros(3)), r"y must be \[N, C, H, W\], got shape \[4, 3, 3\]"),
        ((torch.zeros(2, 4, 3, 3).half(), torch.zeros(4)), "y must be float32 or bfloat16 on a CPU, got Half"),
        ((torch.zeros(2, 4, 3, 3), torch.zeros(3)), r"mean must be \[C\] with C = 4, got shape \[3\]"),
        ((torch.zeros(2, 4, 3, 3), torch.zeros(4).double()), "mean must be float32, got Double"),
    ],
)
def test_the_operator_checks_for_itself(arguments: tuple[Tensor, Tensor], message: str) -> None:
    ops.load()
    with pytest.raises(RuntimeError, match=message):
        torch.ops.dwa_fast.moments_forward(*arguments)


def test_gradients_of_another_shape_are_refused() -> None:
    ops.load()
    with pytest.raises(RuntimeError, match=r"grad_sums must be \[2, 4\], got shape \[2, 3\]"):
        torch.ops.dwa_fast.moments_backward(torch.zeros(2, 3), torch.zeros(2, 4, 3, 3), torch.zeros(4))
