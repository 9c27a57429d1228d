"""conv3x3: near to float64, with every gradient, in tiles of both sizes, on every instruction set."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dwa_fast import ops
from dwa_fast.ops.conv3x3 import tile_of
from dwa_fast.reference.ops import Operators
from tests.ops.conftest import LEVELS

# images, inputs, outputs, height, width: odd and even sides, one pixel, numbers of panels that no group of them divides, several blocks;
# tiles of 2 pixels, then tiles of 4, some of which have one, two or three of their columns and rows in the image
SHAPES = [(1, 16, 16, 1, 1), (2, 16, 48, 5, 4), (3, 80, 32, 7, 9), (2, 32, 16, 2, 3), (4, 256, 64, 4, 4)]
LARGE = [(5, 48, 80, 12, 16), (9, 96, 64, 31, 17), (3, 16, 48, 19, 22), (2, 256, 128, 8, 8)]


def fused(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """As trainings call it, with tiles of both sizes."""
    return ops.conv3x3(x, weight, bias, large_tiles=True)


def problem(shape: tuple[int, int, int, int, int], seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, w, b and ∂L/∂y."""
    n, c, o, h, w = shape
    source = torch.Generator().manual_seed(seed)
    sizes = [(n, c, h, w), (o, c, 3, 3), (o,), (n, o, h, w)]
    x, weight, bias, gradient = (torch.randn(size, generator=source) for size in sizes)
    return x, weight / math.sqrt(9 * c), bias, gradient


def results(operator: Callable[..., Tensor], x: Tensor, weight: Tensor, bias: Tensor | None, gradient: Tensor) -> list[Tensor]:
    """y, ∂L/∂x, ∂L/∂w and, with a bias, ∂L/∂b."""
    leaves = [each.detach().clone().requires_grad_() for each in (x, weight, bias) if each is not None]
    y = operator(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, gradient.to(y))]


def distance(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


def allowed(plain: float, height: int, width: int) -> float:
    """Relative error of a result in float32: with tiles of 2 pixels about that of PyTorch, with tiles of 4 up to seven times as much."""
    return max(2 * plain, {2: 4e-7, 4: 2e-6}[tile_of(height, width)])


def test_tiles_of_four_pixels_where_they_save_products() -> None:
    for side in (8, 11, 12, 16, 28, 32, 56, 224):
        assert tile_of(side, side) == 4
    for side in (1, 4, 7, 9, 10, 14):  # too many weights for the pixels, or tiles that reach too far beyond the map
        assert tile_of(side, side) == 2
    assert [tile_of(*shape[3:]) for shape in LARGE] == [4, 4, 4, 4]
    assert {tile_of(*shape[3:]) for shape in SHAPES} == {2}
    assert tile_of(4, 64) == tile_of(64, 4) == 2


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("shape", SHAPES + LARGE, ids=str)
def test_near_to_float64(shape: tuple[int, int, int, int, int], level: str, use_level: Callable[[str], None]) -> None:
    use_level(level)
    given = problem(shape)
    exact = results(Operators("reference").conv3x3, *(each.double() for each in given))
    theirs, ours = results(Operators("reference").conv3x3, *given), results(fused, *given)
    for own, plain, expected in zip(ours, theirs, exact, strict=True):
        assert own.shape == expected.shape
        assert distance(own, expected) <= allowed(distance(plain, expected), *shape[3:])


KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    "rectified": torch.relu,
    "far from zero": lambda x: 10 + x / 100,
    "few": lambda x: torch.where(x > 2, x, 0),
    "heavy tails": lambda x: x.pow(5),
    "small": lambda x: x * 1e-30,
}


@pytest.mark.parametrize("sides", [(14, 9), (17, 16)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_numbers_of_any_kind(kind: str, sides: tuple[int, int]) -> None:
    """Also the largest error of a single pixel, and where the weights cancel a constant."""
    x, weight, _, gradient = problem((4, 96, 32, *sides))
    for kernel in (weight, weight - weight.mean((2, 3), keepdim=True)):
        given = KINDS[kind](x), kernel, None, gradient
        exact = results(Operators("reference").conv3x3, *(each if each is None else each.double() for each in given))
        theirs, ours = results(Operators("reference").conv3x3, *given), results(fused, *given)
        for own, plain, expected in zip(ours, theirs, exact, strict=True):
            assert distance(own, expected) <= allowed(distance(plain, expected), *sides)
            largest, theirs_largest = (float((each - expected).abs().max() / expected.abs().max()) for each in (own, plain))
            assert largest <= 2.5 * allowed(theirs_largest, *sides)


def test_a_gradient_of_many_tiles_is_a_sum_of_sums() -> None:
    """The error of one long sum in float32 would be several times as large."""
    for sides in ((62, 62), (64, 64)):
        given = problem((30, 16, 16, *sides))
        exact = results(Operators("reference").conv3x3, *(each.double() for each in given))[2]
        assert distance(results(fused, *given)[2], exact) < {2: 1e-6, 4: 1.5e-6}[tile_of(*sides)]


def test_any_layout_and_channels_last_results() -> None:
    x, weight, _, gradient = problem((2, 32, 48, 6, 7))
    expected = results(fused, x, weight, None, gradient)
    wide = torch.full((2, 32, 6, 14), math.nan)
    wide[..., ::2] = x
    for each in (x.contiguous(memory_format=torch.channels_last), wide[..., ::2]):
        for layout in (torch.contiguous_format, torch.channels_last):
            found = results(fused, each, weight.contiguous(memory_format=layout), None, gradient.contiguous(memory_format=layout))
            assert all(map(torch.equal, found, expected))
    assert all(each.is_contiguous(memory_format=torch.channels_last) for each in expected)


@pytest.mark.parametrize("sides", [(9, 10), (11, 16)], ids=str)
def test_same_bits_for_any_number_of_threads_and_any_company(sides: tuple[int, int]) -> None:
    x, weight, _, gradient = problem((7, 48, 80, *sides))
    found = []
    for threads in (1, 2, 3, 1):
        torch.set_num_threads(threads)
        found.append(results(fused, x, weight, None, gradient))
    for each in found[1:]:
        assert all(map(torch.equal, each, found[0]))
    alone = results(fused, x[2:3], weight, None, gradient[2:3])
    assert torch.equal(alone[0], found[0][0][2:3])
    assert torch.equal(alone[1], found[0][1][2:3])


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("shape", [(9, 352, 400, 3, 4), (4, 256, 240, 12, 8)], ids=str)
def test_weights_that_are_used_once_give_the_same_bits(
    shape: tuple[int, int, int, int, int], level: str, use_level: Callable[[str], None]
) -> None:
    """Many weights for few tiles of both sizes, the last group of outputs being a half; enough threads that none has a group, too."""
    use_level(level)
    x, weight, bias, gradient = problem(shape)
    ops.load()
    operators, tile = torch.ops.dwa_fast, tile_of(*shape[3:])
    for threads in (40, 2, 1):
        torch.set_num_threads(threads)
        for given, added, transposed in ((x, bias, False), (gradient, None, True)):
            expected = operators.conv3x3_forward(given, operators.conv3x3_weights(weight, transposed, tile), added)
            assert torch.equal(operators.conv3x3_once(given, weight, added, transposed, tile), expected)
        y, of_x, _, _ = results(fused, x, weight, bias, gradient)
        with torch.no_grad():
            assert torch.equal(fused(x, weight, bias), y)
        assert torch.equal(of_x, expected)


def test_tiles_are_small_unless_it_is_asked_for_large_ones() -> None:
    """As near to float64 as PyTorch, on a map that trainings compute in tiles of four pixels."""
    given = problem((4, 96, 32, 16, 16))
    exact = results(Operators("reference").conv3x3, *(each.double() for each in given))
    theirs, ours, large = (results(operator, *given) for operator in (Operators("reference").conv3x3, ops.conv3x3, fused))
    for mine, plain, other, expected in zip(ours[:3], theirs, large, exact, strict=False):
        assert distance(mine, expected) <= max(2 * distance(plain, expected), 4e-7)
        assert not torch.equal(mine, other)


def test_only_what_is_needed_is_computed_and_kept() -> None:
    x, weight, bias, gradient = problem((2, 16, 16, 4, 4))
    leaf = x.requires_grad_() * 1
    frozen = ops.conv3x3(leaf, weight, bias)
    assert frozen.grad_fn is not None
    assert not any(each is not None and each.data_ptr() == leaf.data_ptr() for each in frozen.grad_fn.saved_tensors)
    learning = weight.clone().requires_grad_()
    y = ops.conv3x3(leaf, learning, bias)
    assert any(each is not None and each.data_ptr() == leaf.data_ptr() for each in y.grad_fn.saved_tensors)
    expected = results(Operators("reference").conv3x3, x, weight, None, gradient)[2]
    torch.testing.assert_close(torch.autograd.grad(y, learning, gradient)[0], expected)


@pytest.mark.parametrize("shape", [(0, 16, 32, 4, 4), (2, 16, 32, 0, 4)], ids=str)
def test_nothing_to_read(shape: tuple[int, int, int, int, int]) -> None:
    y, of_x, of_weight, of_bias = results(fused, *problem(shape))
    assert y.shape == (shape[0], shape[2], *shape[3:])
    assert of_x.shape == (shape[0], shape[1], *shape[3:])
    assert not of_weight.any()
    assert not of_bias.any()


def test_opcheck() -> None:
    ops.load()
    x, weight, bias, gradient = problem((2, 32, 48, 5, 4))
    for tile in (2, 4):
        for transposed in (False, True):
            torch.library.opcheck(torch.ops.dwa_fast.conv3x3_weights.default, (weight, transposed, tile))
            torch.library.opcheck(torch.ops.dwa_fast.conv3x3_once.default, (gradient if transposed else x, weight, None, transposed, tile))
        arranged = torch.ops.dwa_fast.conv3x3_weights(weight, False, tile)
        for each in (None, bias):
            torch.library.opcheck(torch.ops.dwa_fast.conv3x3_forward.default, (x, arranged, each))
        torch.library.opcheck(torch.ops.dwa_fast.conv3x3_weight_gradient.default, (gradient, x, tile))


@pytest.mark.parametrize(
    ("changed", "kind", "message"),
    [
        ({0: [1.0]}, TypeError, "x must be a tensor, got list"),
        ({0: torch.zeros(2, 16, 4, 4).bfloat16()}, TypeError, "x must be float32, got bfloat16"),
        ({1: torch.zeros(16, 16, 3, 3).double()}, TypeError, "weight must be float32, got float64"),
        ({2: torch.zeros(16, device="meta")}, ValueError, "bias must be on a CPU, got meta"),
        ({0: torch.zeros(16, 4, 4)}, ValueError, "x must be [N, C, H, W] with C a multiple of 16, got shape (16, 4, 4)"),
        ({0: torch.zeros(2, 24, 4, 4)}, ValueError, "x must be [N, C, H, W] with C a multiple of 16, got shape (2, 24, 4, 4)"),
        ({1: torch.zeros(8, 16, 3, 3)}, ValueError, "weight must be [O, 16, 3, 3] with O a multiple of 16, got shape (8, 16, 3, 3)"),
        ({1: torch.zeros(16, 16, 1, 1)}, ValueError, "weight must be [O, 16, 3, 3] with O a multiple of 16, got shape (16, 16, 1, 1)"),
        ({2: torch.zeros(15)}, ValueError, "bias must be [16], got shape (15,)"),
    ],
)
def test_wrong_input(changed: dict[int, object], kind: type[Exception], message: str) -> None:
    arguments: list[object] = [torch.zeros(2, 16, 4, 4), torch.zeros(16, 16, 3, 3), torch.zeros(16)]
    for place, value in changed.items():
        arguments[place] = value
    with pytest.raises(kind, match=re.escape(message)):
        ops.conv3x3(*arguments)  # type: ignore[arg-type]


def test_operators_refuse_what_the_function_refuses() -> None:
    ops.load()
    with pytest.raises(RuntimeError, match="arranged must be from conv3x3_weights, for 16 inputs"):
        torch.ops.dwa_fast.conv3x3_forward(torch.zeros(1, 16, 4, 4), torch.zeros(1, 16, 32, 16), None)
    with pytest.raises(RuntimeError, match="arranged must be from conv3x3_weights, for 16 inputs"):
        torch.ops.dwa_fast.conv3x3_forward(torch.zeros(1, 16, 4, 4), torch.zeros(1, 25, 16, 16), None)
    with pytest.raises(RuntimeError, match="x must have 32 channels, got shape"):
        torch.ops.dwa_fast.conv3x3_once(torch.zeros(1, 16, 4, 4), torch.zeros(16, 32, 3, 3), None, False, 2)
    for operator, tensors in (("weights", (torch.zeros(16, 16, 3, 3), False)), ("weight_gradient", (torch.zeros(1, 16, 4, 4),) * 2)):
        with pytest.raises(RuntimeError, match="tile must be 2 or 4, got 3"):
            getattr(torch.ops.dwa_fast, f"conv3x3_{operator}")(*tensors, 3)
    with pytest.raises(RuntimeError, match="grad_y must have the images and pixels of x"):
        torch.ops.dwa_fast.conv3x3_weight_gradient(torch.zeros(1, 16, 4, 4), torch.zeros(1, 16, 4, 5), 2)
