"""view: crop, resize, flip and roll by one row of the schedule, and the adjoint, in C++, against float64."""

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

H, W = 20, 15
ROWS = {
    "identity": (0, 0, H, W, 0, 0, 0),
    "roll": (0, 0, H, W, 0, 3, 4),
    "roll around": (0, 0, H, W, 0, H + 2, 2 * W),
    "roll back": (0, 0, H, W, 0, -3, -4),
    "flip": (0, 0, H, W, 1, 0, 0),
    "flip and roll": (0, 0, H, W, 1, 19, 14),
    "crop": (2, 3, 11, 7, 0, 0, 0),
    "everything": (4, 1, 9, 13, 1, 5, 2),
    "narrow": (0, 5, H, 4, 0, 1, 0),
    "low": (7, 0, 3, W, 1, 0, 1),
    "one pixel": (19, 14, 1, 1, 0, 2, 3),
    "one line": (5, 0, 1, W, 0, 0, 0),
    "nearly all": (1, 0, H - 1, W - 1, 0, 4, 4),
}
SIZES = [(2, 3), (1, 1), (5, 4)]  # N and C
LAYOUTS = ["contiguous", "channels_last", "slice"]
DTYPES = [torch.float32, torch.bfloat16]


def schedule(*rows: tuple[int, ...], device: torch.device | str = "cpu") -> Tensor:
    return torch.tensor(rows, dtype=torch.int32, device=device)


def at(step: int, device: torch.device | str = "cpu") -> Tensor:
    return torch.tensor(step, device=device)


def pixels(count: int, channels: int, layout: str = "channels_last", device: torch.device | str = "cpu") -> Tensor:
    x = torch.randn(count, channels, H, W, device=device)
    if layout == "contiguous":
        return x
    if layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    larger = torch.full((count, channels + 1, H + 3, 2 * W), math.nan, device=device)
    larger[:, 1:, 1 : H + 1, ::2] = x
    return larger[:, 1:, 1 : H + 1, ::2]


def run(operator: Any, images: Tensor, row: tuple[int, ...], dtype: torch.dtype | None, double: bool = False) -> tuple[Tensor, Tensor]:
    """The view, and the gradient of the images for a fixed gradient of it."""
    ours, other = operator is ops.view, (0, 0, 1, 1, 0, 0, 0)
    leaf = (images.double() if double else images).detach().requires_grad_(not ours)
    rows, step = schedule(other, row, other, device=images.device), at(1, images.device)
    result = operator(leaf, rows, step, torch.float64 if double else dtype)
    grad = torch.randn(result.shape, generator=torch.Generator().manual_seed(1)).to(dtype or torch.float32).to(result)
    return result.detach(), adjoint(grad, rows, step) if ours else torch.autograd.grad(result, leaf, grad)[0]


def adjoint(grad: Tensor, rows: Tensor, step: Tensor) -> Tensor:
    """The gradient of the images, as view_adam_clip_ leaves it in Adam's first moment where β₁ is 0."""
    images, exp_avg, exp_avg_sq = (torch.zeros(grad.shape, device=grad.device) for _ in range(3))
    rates, bound = torch.zeros(len(rows), device=grad.device), torch.zeros(grad.shape[1], device=grad.device)
    ops.view_adam_clip_(images, grad, exp_avg, exp_avg_sq, rows, rates, step, bound, bound, betas=(0.0, 0.0))
    return exp_avg


@pytest.mark.parametrize("row", ROWS.values(), ids=list(ROWS))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_matches_float64(layout: str, dtype: torch.dtype, row: tuple[int, ...], device: torch.device) -> None:
    for count, channels in SIZES:
        images = pixels(count, channels, layout, device)
        seen, gradient = run(ops.view, images, row, dtype)
        plain, plain_gradient = run(reference.view, images, row, dtype)
        expected, expected_gradient = run(reference.view, images, row, dtype, double=True)
        assert (seen.dtype, gradient.dtype) == (dtype, torch.float32)
        assert seen.is_contiguous(memory_format=torch.channels_last)
        unit = 2.0 ** (-9 if dtype == torch.bfloat16 else -23)
        assert error(seen, expected) <= max(2 * error(plain, expected), unit)
        assert error(gradient, expected_gradient) <= max(2 * error(plain_gradient, expected_gradient), 2**-22)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("level", LEVELS)
def test_every_instruction_set_collects_alike(level: str, dtype: torch.dtype, use_level: Callable[[str], None]) -> None:
    """The adjoint in every vector width, with channels that fill vectors of four and that do not."""
    use_level(level)
    for row in ROWS.values():
        for count, channels in [*SIZES, (2, 8), (1, 21)]:
            _, gradient = run(ops.view, pixels(count, channels), row, dtype)
            _, plain = run(reference.view, pixels(count, channels), row, dtype)
            _, expected = run(reference.view, pixels(count, channels), row, dtype, double=True)
            assert error(gradient, expected) <= max(2 * error(plain, expected), 2**-22)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_real_size(layout: str, device: torch.device) -> None:
    images = torch.randn(8, 3, 224, 224, device=device)
    images = images.contiguous(memory_format=torch.channels_last) if layout == "channels_last" else images
    row = (31, 17, 101, 160, 1, 30, 9)
    for ours, plain, expected in zip(
        run(ops.view, images, row, None), run(reference.view, images, row, None), run(reference.view, images, row, None, True), strict=True
    ):
        assert error(ours, expected) <= max(2 * error(plain, expected), 2**-23)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["identity", "roll", "roll around", "flip and roll"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_without_a_crop_bits_are_copied(layout: str, name: str, dtype: torch.dtype, device: torch.device) -> None:
    images = pixels(3, 3, layout, device)
    images[0, 0, 0, :3] = torch.tensor([math.inf, -math.inf, math.nan])
    seen, gradient = run(ops.view, images, ROWS[name], dtype)
    plain, plain_gradient = run(reference.view, images, ROWS[name], dtype)
    torch.testing.assert_close(seen, plain, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(gradient, plain_gradient)


@pytest.mark.parametrize("row", ROWS.values(), ids=list(ROWS))
def test_view_adam_clip_applies_the_adjoint(row: tuple[int, ...], device: torch.device) -> None:
    """⟨view(x), g⟩ = ⟨x, adjoint(g)⟩, in float64 products."""
    images, rows, step = pixels(2, 3, device=device), schedule(row, device=device), at(0, device)
    seen = ops.view(images, rows, step)
    grad = torch.randn_like(seen)
    gradient = adjoint(grad, rows, step)
    left, right = (seen.double() * grad).sum(), (images.double() * gradient).sum()
    assert left.item() == pytest.approx(right.item(), rel=1e-5, abs=1e-4)


def test_gradient_is_that_of_the_view(device: torch.device) -> None:
    """The view is linear: a difference of any length is exact."""
    images, direction = pixels(2, 3, device=device), pixels(2, 3, device=device)
    rows, step = schedule(ROWS["everything"], device=device), at(0, device)
    grad = torch.randn(2, 3, H, W, device=device)
    gradient = adjoint(grad, rows, step)
    difference = ops.view(images + direction, rows, step).double() - ops.view(images - direction, rows, step).double()
    assert (gradient.double() * direction).sum().item() == pytest.approx(((difference / 2) * grad).sum().item(), rel=1e-5, abs=1e-4)


@pytest.mark.parametrize("shape", [(0, 3, 8, 8), (2, 0, 8, 8), (2, 3, 0, 8)])
def test_empty(shape: tuple[int, ...], device: torch.device) -> None:
    seen = ops.view(torch.zeros(shape, device=device), schedule((0, 0, 8, 8, 0, 1, 1), device=device), at(0, device), torch.bfloat16)
    assert (seen.shape, seen.dtype) == (shape, torch.bfloat16)


def test_the_step_selects_the_row(device: torch.device) -> None:
    images, rows = pixels(1, 3, device=device), schedule(*ROWS.values(), device=device)
    for step in range(len(ROWS)):
        torch.testing.assert_close(
            ops.view(images, rows, at(step, device)), reference.view(images, rows, at(step, device)), rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_again_for_any_number_of_threads(dtype: torch.dtype, device: torch.device) -> None:
    images = torch.randn(7, 3, 64, 64, device=device)
    results = []
    for threads in (1, 2, 3, 1):
        torch.set_num_threads(threads)
        results.append(run(ops.view, images, (9, 3, 40, 51, 1, 4, 60), dtype))
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(layout: str, dtype: torch.dtype) -> None:
    ops.load()
    rows = schedule(*ROWS.values())
    for step in (1, 7):
        images = pixels(2, 3, layout)
        torch.library.opcheck(torch.ops.dwa_fast.view.default, (images, rows, at(step), dtype))


def test_meta_tensors_have_the_right_shape() -> None:
    seen = ops.view(pixels(2, 3, device="meta"), schedule(ROWS["roll"], device="meta"), at(0, "meta"), torch.bfloat16)
    assert (seen.shape, seen.dtype, seen.device.type) == ((2, 3, H, W), torch.bfloat16, "meta")
    assert seen.is_contiguous(memory_format=torch.channels_last)


GOOD: dict[str, Any] = {"images": torch.zeros(2, 3, H, W), "rows": schedule(ROWS["roll"]), "step": at(0), "dtype": None}
WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"images": None}, TypeError, "images must be a tensor, got NoneType"),
    ({"images": torch.zeros(2, 3, H, W).double()}, TypeError, "images must be float32, got float64"),
    ({"images": torch.zeros(3, H, W)}, ValueError, "images must be [N, C, H, W], got shape (3, 20, 15)"),
    ({"images": torch.zeros(2, 3, H, W, requires_grad=True)}, ValueError, "view is not differentiable"),
    ({"rows": torch.zeros(1, 7)}, TypeError, "rows must be int32, got float32"),
    ({"rows": schedule((1, 2, 3))}, ValueError, "rows must be [T, 7], got shape (1, 3)"),
    ({"rows": schedule(ROWS["roll"], device="meta")}, ValueError, "rows must be on the device of images, cpu, got meta"),
    ({"step": 0}, TypeError, "step must be a tensor, got int"),
    ({"step": torch.tensor([0])}, ValueError, "step must be [], got shape (1,)"),
    ({"step": at(1)}, IndexError, "step must be one of the rows, 0 to 0, got 1"),
    ({"step": at(-1)}, IndexError, "step must be one of the rows, 0 to 0, got -1"),
    ({"dtype": "bfloat16"}, TypeError, "dtype must be a torch.dtype, got str"),
    ({"dtype": torch.float16}, TypeError, "dtype must be float32 or bfloat16 on cpu, got float16"),
    (
        {"rows": schedule((10, 0, 11, W, 0, 0, 0))},
        ValueError,
        "the crop of row 0 must lie inside the images, 20 x 15, got top 10, left 0, height 11, width 15",
    ),
    ({"rows": schedule((0, -1, H, 3, 0, 0, 0))}, ValueError, "the crop of row 0 must lie inside the images"),
    ({"rows": schedule((0, 0, 0, W, 0, 0, 0))}, ValueError, "the crop of row 0 must lie inside the images"),
]


@pytest.mark.parametrize(("change", "kind", "message"), WRONG)
def test_wrong_input(change: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=re.escape(message)):
        ops.view(**(GOOD | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": torch.zeros(3, H, W)}, r"images must be \[N, C, H, W\], got shape \[3, 20, 15\]"),
        ({"images": torch.zeros(2, 3, H, W).double()}, "images must be float32, got Double"),
        ({"rows": torch.zeros(1, 7)}, r"rows must be Int \[T, 7\], got Float \[1, 7\]"),
        ({"step": torch.tensor([0])}, r"step must be a Long scalar, got Long \[1\]"),
        ({"dtype": torch.float16}, "dtype must be float32 or bfloat16 on a CPU, got Half"),
    ],
)
def test_the_operator_checks_for_itself(change: dict[str, Any], message: str) -> None:
    ops.load()
    with pytest.raises(RuntimeError, match=message):
        torch.ops.dwa_fast.view(**(GOOD | {"dtype": torch.float32} | change))


@pytest.mark.gpu
def test_captured_in_a_cuda_graph() -> None:
    """One captured view follows the counter through the schedule."""
    images, rows, step = pixels(2, 3, device="cuda"), schedule(*ROWS.values(), device="cuda"), at(0, "cuda")
    ops.view(images, rows, step)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        seen = ops.view(images, rows, step)
    for expected in range(len(ROWS)):
        step.fill_(expected)
        graph.replay()
        assert torch.equal(seen, ops.view(images, rows, at(expected, "cuda")))
