"""bn_act in Triton, interpreted on a CPU and real on a GPU, against its plain twin in float64."""

from __future__ import annotations

import itertools
import math
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor

from dwa_fast import ops
from dwa_fast.ops.activation import ACTIVATIONS, Activation
from dwa_fast.reference import ops as reference
from tests.kernels.cases import Launches, meta
from tests.kernels.layers import (
    EPS,
    LARGER,
    NO_EPS,
    SMALL,
    assert_matches,
    batch,
    both_ways,
    kernel,
    kernel_layout,
    layer,
    plainly,
    slope_of,
    spread,
)
from tests.kernels.support import PRECISIONS, captured, error

pytest.importorskip("triton", reason="this PyTorch comes without Triton")


CASES = [(shape, activation) for shape in SMALL for activation in ACTIVATIONS if activation in ("none", "relu") or shape in SMALL[1:4:2]]


@pytest.mark.parametrize(("shape", "activation"), CASES)
@pytest.mark.parametrize("has_skip", [False, True])
@pytest.mark.parametrize("dtype", PRECISIONS)
def test_matches_float64(shape: tuple[int, ...], dtype: torch.dtype, has_skip: bool, activation: Activation, device: torch.device) -> None:
    y, skip = batch(shape, dtype, device), batch(shape, dtype, device) if has_skip else None
    assert_matches(y, layer(shape[1], device), skip, activation, torch.randn(2, shape[1], device=device))


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize(("skip", "z", "passes"), [(-2.0, 7.0, 1.0), (-20.0, 0.0, 0.0)])
def test_one_element_by_hand(skip: float, z: float, passes: float, dtype: torch.dtype, device: torch.device) -> None:
    y, m, v, weight, bias = (torch.tensor([value], device=device) for value in (3.0, 1.0, 0.25, 2.0, 1.0))
    y, added = y.to(dtype).view(1, 1, 1, 1), torch.full((1, 1, 1, 1), skip, dtype=dtype, device=device)
    out, sums, mask = kernel.bn_act_forward(y, m, v, weight, bias, 0.0, added, "relu", None)
    assert (out.item(), sums.tolist(), mask.tolist()) == (z, [[2.0], [4.0]], [int(passes)])
    grad_sums = torch.tensor([[0.5], [0.25]], device=device)
    behind = None, mask, True, "relu", None, True
    grad_y, grad_skip, parameters, _ = kernel.bn_act_backward(y, grad_sums, y, m, v, weight, bias, 0.0, *behind)
    assert (grad_y.item(), grad_skip.item()) == (12 * passes + 1.5, 3 * passes)
    assert parameters.tolist() == [[12 * passes], [3 * passes]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", LARGER)
def test_several_column_blocks(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    y, skip = batch(shape, dtype, device), batch(shape, dtype, device)
    assert_matches(y, layer(shape[1], device), skip, "relu", torch.randn(2, shape[1], device=device))


@pytest.mark.parametrize("programs", [1, 2, 3])
def test_programs_loop_over_tiles(programs: int, monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    """Fewer programs than tiles: each takes several, the last ones not all equally many."""
    monkeypatch.setattr("dwa_fast.kernels.layout.resident", lambda *_: programs)
    y, skip = batch((3, 64, 9, 7), torch.float32, device), batch((3, 64, 9, 7), torch.float32, device)
    assert_matches(y, layer(64, device), skip, "relu", torch.randn(2, 64, device=device))


def test_programs_without_sums_take_few_tiles(device: torch.device) -> None:
    """As many as it takes, up to what a grid can have; the pointwise gradients keep their bits."""
    y = batch((9, 64, 9, 9), torch.float32, device)  # 23 tiles
    assert (kernel_layout.tiles(y, registers=96).programs, kernel_layout.tiles(y).programs) == (23, 6)
    many = torch.empty(2**31 // (64 * 1024) + 3, 64, 32, 32, dtype=torch.bfloat16, device="meta", memory_format=torch.channels_last)
    assert kernel_layout.tiles(many).programs < 2**16
    values, skip, grad_sums = layer(64, device), torch.randn_like(y), torch.randn(2, 64, device=device)
    _, _, mask = kernel.bn_act_forward(y, *values, EPS, skip, "relu", None)
    behind = grad_sums, y, *values, EPS, None, mask, True, "relu", None
    frozen, asked = kernel.bn_act_backward(skip, *behind), kernel.bn_act_backward(skip, *behind, True)
    assert all(torch.equal(*each) for each in zip(frozen[:2], asked[:2], strict=True))


def test_programs_that_leave_sums_are_those_that_a_gpu_holds_at_once() -> None:
    """A multiprocessor has 65536 registers; a program of four warps takes 128 times those of a thread."""
    many = torch.empty(2**10, 64, 32, 32, device="meta", memory_format=torch.channels_last)  # 32768 tiles
    cpu = torch.device("cpu")
    held = {registers: kernel_layout.resident(cpu, registers) for registers in (64, 72, 96, 128)}
    assert held == {64: 8 * 132, 72: 7 * 132, 96: 5 * 132, 128: 4 * 132}
    for registers, most in held.items():
        programs = kernel_layout.tiles(many, registers=registers).programs
        assert most * 0.95 < programs <= most
        assert kernel_layout.partial_rows(many, registers) == programs
    assert [ops.partial_rows(many, "relu", skip=skip) for skip in (False, True)] == [
        kernel_layout.partial_rows(many, registers) for registers in (72, 96)
    ]


@pytest.mark.parametrize("shape", [(1, 3, 2, 2), (5, 24, 9, 7)])
def test_partial_sums_in_memory_that_is_given(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    """Their rows add up to the sums, and nothing else changes; memory of another shape is refused."""
    monkeypatch.setattr("dwa_fast.kernels.layout.resident", lambda *_: 2)
    y, values = batch(shape, torch.float32, device), layer(shape[1], device)
    partials = torch.full((2, ops.partial_rows(y, "relu"), shape[1]), math.nan, device=device)
    z, _, _ = kernel.bn_act_forward(y, *values, EPS, None, "relu", None, partials)
    expected, sums, _ = kernel.bn_act_forward(y, *values, EPS, None, "relu", None)
    assert torch.equal(z, expected)
    torch.testing.assert_close(partials.double().sum(1).float(), sums)
    with pytest.raises(ValueError, match="partials must be contiguous float32"):
        kernel.bn_act_forward(y, *values, EPS, None, "relu", None, partials[:, :, 1:])


@pytest.mark.parametrize("missing", [(2,), (3,), (2, 3)])
@pytest.mark.parametrize("activation", ["none", "relu", "silu", "leaky_relu"])
def test_without_weight_or_bias(missing: tuple[int, ...], activation: Activation, device: torch.device) -> None:
    values: list[Tensor | None] = [*layer(20, device)]
    for position in missing:
        values[position] = None
    assert_matches(batch((2, 20, 5, 5), torch.float32, device), values, None, activation, torch.randn(2, 20, device=device))


@pytest.mark.parametrize("activation", ["none", "relu", "silu", "leaky_relu"])
@pytest.mark.parametrize("has_skip", [False, True])
def test_without_gradient_of_the_sums(has_skip: bool, activation: Activation, device: torch.device) -> None:
    y, skip = batch((2, 20, 5, 5), torch.float32, device), batch((2, 20, 5, 5), torch.float32, device) if has_skip else None
    assert_matches(y, layer(20, device), skip, activation, None)


@pytest.mark.parametrize("activation", ["none", "relu", "silu", "leaky_relu"])
@pytest.mark.parametrize("has_skip", [False, True])
def test_gradients_of_weight_and_bias_only_where_asked(has_skip: bool, activation: Activation, device: torch.device) -> None:
    """Frozen weights cost nothing, and the other gradients keep every bit."""
    y, grad_z = batch((2, 20, 5, 5), torch.float32, device), batch((2, 20, 5, 5), torch.float32, device)
    values, skip = layer(20, device), batch((2, 20, 5, 5), torch.float32, device) if has_skip else None
    for grad_sums in (None, torch.randn(2, 20, device=device)):
        asked = both_ways(y, values, skip, activation, grad_z, grad_sums)
        slope = slope_of(activation, y)
        mask = kernel.bn_act_forward(y, *values, EPS, skip, activation, slope)[2]
        behind = skip, mask, has_skip, activation, slope
        grad_y, grad_skip, parameters, grad_slope = kernel.bn_act_backward(grad_z, grad_sums, y, *values, EPS, *behind)
        assert parameters.shape == grad_slope.shape == (0,)
        assert torch.equal(grad_y, asked["grad_y"])
        assert torch.equal(grad_skip, asked["grad_skip"]) if has_skip and activation != "none" else grad_skip.shape == (0,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("activation", ["none", "relu", "silu"])
@pytest.mark.parametrize("has_skip", [False, True])
def test_gradients_of_two_uses(has_skip: bool, activation: Activation, dtype: torch.dtype, device: torch.device) -> None:
    """They are added as PyTorch adds them, bit for bit."""
    y, grad, more = (batch((2, 20, 5, 5), dtype, device) for _ in range(3))
    values, grad_sums = layer(20, device), torch.randn(2, 20, device=device)
    skip = batch((2, 20, 5, 5), dtype, device) if has_skip else None
    _, _, mask = kernel.bn_act_forward(y, *values, EPS, skip, activation, None)
    behind = grad_sums, y, *values, EPS, skip, mask, has_skip, activation, None, True
    for result, expected in zip(kernel.bn_act_backward(grad, *behind, more), kernel.bn_act_backward(grad + more, *behind), strict=True):
        assert torch.equal(result, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("has_skip", "activation"), [(True, "relu"), (False, "relu"), (True, "silu")])
@pytest.mark.parametrize(("shape", "stride"), [((1, 3, 5, 7), 2), ((2, 64, 5, 4), 2), ((1, 128, 4, 5), 3), ((2, 64, 1, 3), 4)])
def test_gradient_of_a_sampled_use(
    shape: tuple[int, ...], stride: int, has_skip: bool, activation: Activation, dtype: torch.dtype, device: torch.device
) -> None:
    """The same bits as with zeros between the pixels that it has; a row of a tile is one pixel, or with 3 channels many."""
    y, grad, skip = (batch(shape, dtype, device) for _ in range(3))
    sampled = batch(y[:, :, ::stride, ::stride].shape, dtype, device)
    values, skip = layer(shape[1], device), skip if has_skip else None
    _, _, mask = kernel.bn_act_forward(y, *values, EPS, skip, activation, None)
    behind = torch.randn(2, shape[1], device=device), y, *values, EPS, skip, mask, has_skip, activation, None, True
    found = kernel.bn_act_backward(grad, *behind, sampled, stride)
    expected = kernel.bn_act_backward(grad + spread(sampled, y, stride), *behind)
    assert all(torch.equal(*both) for both in zip(found, expected, strict=True))


def test_one_slope_for_all_channels(device: torch.device) -> None:
    """It is that slope in every channel, and its gradient the sum of theirs."""
    y, values = batch((2, 20, 5, 5), torch.float32, device), layer(20, device)
    found = []
    for slope in (torch.tensor([0.25], device=device), torch.full((20,), 0.25, device=device)):
        z, sums, mask = kernel.bn_act_forward(y, *values, EPS, None, "leaky_relu", slope)
        found.append((z, *kernel.bn_act_backward(y, sums, y, *values, EPS, None, mask, False, "leaky_relu", slope, True)))
    (z, grad_y, _, parameters, shared), (z_each, grad_y_each, _, parameters_each, each) = found
    assert torch.equal(z, z_each)
    assert torch.equal(grad_y, grad_y_each)
    assert torch.equal(parameters, parameters_each)
    assert (shared.shape, each.shape) == ((1,), (20,))
    torch.testing.assert_close(shared[0], each.sum())


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("has_skip", [False, True])
def test_corners_and_extremes(activation: Activation, has_skip: bool, device: torch.device) -> None:
    """At 0, ±3 and 6 the gradient is PyTorch's own; far from 0 nothing is NaN that is not NaN there."""
    points = torch.tensor([0.0, -0.0, 3, -3, 6, 2.9999998, -2.9999998, 5.9999995, 6.0000005, 1e4, -1e4, 100, -100, 1e-30, -1e-30, 0.5])
    y = points.view(1, 1, 1, 16).to(device)
    values = [torch.zeros(1, device=device), torch.ones(1, device=device), None, None]
    skip, slope = torch.zeros_like(y) if has_skip else None, torch.tensor([0.1], device=device) if activation == "leaky_relu" else None
    z, _, mask = kernel.bn_act_forward(y, *values, 0.0, skip, activation, slope)
    behind = skip, mask, has_skip, activation, slope
    grad_y, grad_skip, *_ = kernel.bn_act_backward(torch.ones_like(y), None, y, *values, 0.0, *behind)
    leaf = y.double().requires_grad_()
    one = torch.ones(1, dtype=torch.float64, device=device)
    slopes = None if slope is None else slope.double()
    expected, _ = reference.bn_act(leaf, 0 * one, one, None, None, NO_EPS, None, activation, slopes)
    (gradient,) = torch.autograd.grad(expected.sum(), leaf)
    torch.testing.assert_close(z.double(), expected, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(grad_y.double(), gradient, rtol=1e-5, atol=1e-6)
    if grad_skip.numel():
        assert torch.equal(grad_skip, grad_y)


@pytest.mark.parametrize("ratio", [30.0, 100.0])
def test_gradient_of_weight_far_from_zero(ratio: float, device: torch.device) -> None:
    """Σ g(y − m) keeps its precision where Σ gy − mΣ g would lose it; a tiny variance is no trouble."""
    y, values = (ratio + torch.randn(4, 8, 16, 16)).to(device), [torch.full((8,), ratio, device=device), *layer(8, device)[1:]]
    values[1][3] = 0
    grad_z = 1 + 0.1 * torch.randn_like(y)
    ours, expected = both_ways(y, values, None, "none", grad_z, None), plainly(y, values, None, "none", grad_z, None, torch.float64)
    assert error(ours["grad_weight"], expected["grad_weight"]) < 1e-6
    assert error(ours["grad_bias"], expected["grad_bias"]) < 1e-6


def test_gradient_of_the_sums_is_a_slice_of_all_layers(device: torch.device) -> None:
    y, values = batch((2, 20, 5, 5), torch.float32, device), layer(20, device)
    all_grad_sums = torch.randn(2, 100, device=device)
    grad_z = torch.randn_like(y)
    expected = both_ways(y, values, None, "relu", grad_z, all_grad_sums[:, 37:57].contiguous())
    for grad_sums in (all_grad_sums[:, 37:57], all_grad_sums[:, 37:57].t().contiguous().t()):
        assert torch.equal(both_ways(y, values, None, "relu", grad_z, grad_sums)["grad_y"], expected["grad_y"])
    same = torch.randn(1, 20, device=device).expand(2, 20)
    assert torch.equal(
        both_ways(y, values, None, "relu", grad_z, same)["grad_y"], both_ways(y, values, None, "relu", grad_z, same.contiguous())["grad_y"]
    )


@pytest.mark.parametrize("layout", ["contiguous", "slice", "transposed"])
def test_any_memory_layout(layout: str, device: torch.device) -> None:
    """Results equal those of channels-last input bit for bit, and lie in memory as torch.empty_like would."""
    whole = torch.randn(3, 12, 6, 10, device=device)
    given = {"contiguous": whole, "slice": whole[:, 1:11, :, ::2], "transposed": whole.transpose(2, 3)}[layout]
    skip, grad_z = torch.randn_like(given), torch.randn_like(given)
    values, grad_sums = layer(given.shape[1], device), torch.randn(2, given.shape[1], device=device)
    ours = both_ways(given, values, skip, "relu", grad_z, grad_sums)
    same = [tensor.contiguous(memory_format=torch.channels_last) for tensor in (given, skip, grad_z)]
    expected = both_ways(same[0], values, same[1], "relu", same[2], grad_sums)
    for name, result in ours.items():
        assert torch.equal(result, expected[name])
    for name in ("z", "grad_y", "grad_skip"):
        assert ours[name].stride() == torch.empty_like(given).stride()


@pytest.mark.parametrize("activation", ["relu", "gelu", "leaky_relu"])
@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 0, 4, 4), (2, 3, 0, 4), (0, 0, 0, 0)])
def test_empty(shape: tuple[int, ...], activation: Activation, device: torch.device) -> None:
    y, values = torch.zeros(shape, device=device), layer(shape[1], device)
    slope = slope_of(activation, y)
    z, sums, mask = kernel.bn_act_forward(y, *values, EPS, y, activation, slope)
    behind = y, mask, True, activation, slope, True
    grad_y, grad_skip, parameters, grad_slope = kernel.bn_act_backward(y, sums, y, *values, EPS, *behind)
    assert grad_slope.tolist() == [0] * (0 if slope is None else shape[1])
    assert z.shape == grad_y.shape == grad_skip.shape == y.shape
    assert torch.equal(sums, torch.zeros(2, shape[1], device=device))
    assert torch.equal(parameters, torch.zeros(2, shape[1], device=device))
    assert mask.shape == (0,)


@pytest.mark.parametrize("shape", [(1, 1, 1, 3), (2, 3, 5, 7), (2, 64, 8, 8), (1, 130, 3, 3)])
def test_mask_is_one_bit_per_element_in_memory_order(shape: tuple[int, ...], device: torch.device) -> None:
    y, skip = batch(shape, torch.float32, device), batch(shape, torch.float32, device)
    z, _, mask = kernel.bn_act_forward(y, *layer(shape[1], device), EPS, skip, "relu", None)
    in_memory = z.permute(0, 2, 3, 1).flatten().cpu().numpy() > 0
    np.testing.assert_array_equal(mask.cpu().numpy(), np.packbits(in_memory, bitorder="little"))


@pytest.mark.parametrize(("has_skip", "activation"), [(False, "none"), (False, "relu"), (True, "none"), (True, "silu")])
def test_no_mask_where_it_follows_from_y(has_skip: bool, activation: Activation, device: torch.device) -> None:
    y, values = batch((2, 8, 4, 4), torch.bfloat16, device), layer(8, device)
    z, sums, mask = kernel.bn_act_forward(y, *values, EPS, y if has_skip else None, activation, None)
    assert mask.numel() == 0
    assert mask.dtype == torch.uint8
    grad_skip = kernel.bn_act_backward(z, sums, y, *values, EPS, y if has_skip else None, mask, has_skip, activation, None)[1]
    assert grad_skip.numel() == (y.numel() if has_skip and activation != "none" else 0)


def test_mask_of_forward_and_backward_agree_bit_for_bit(device: torch.device) -> None:
    """Without stored bits the backward pass finds the very elements that the forward pass let through."""
    y, values = batch((4, 32, 16, 16), torch.float32, device), layer(32, device)
    values[3] = values[0] * values[2] * (values[1] + EPS).rsqrt()  # many results next to 0
    y = torch.where(torch.rand_like(y) < 0.5, y * 1e-7, y)
    z, _, mask = kernel.bn_act_forward(y, *values, EPS, None, "relu", None)
    behind = None, mask, False, "relu", None, True
    grad_y, _, parameters, _ = kernel.bn_act_backward(torch.ones_like(y), None, y, *values, EPS, *behind)
    assert torch.equal(grad_y != 0, z > 0)
    assert torch.equal(parameters[1], (z > 0).sum((0, 2, 3)).float())


@pytest.mark.parametrize("shape", [(1, 3, 5, 7), (2, 64, 5, 4)])
@pytest.mark.parametrize("has_skip", [False, True])
def test_without_sums(has_skip: bool, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    """One launch, which leaves none; the other results have the same bits."""
    y, skip, values = (
        batch(shape, torch.float32, device),
        batch(shape, torch.float32, device) if has_skip else None,
        layer(shape[1], device),
    )
    z, _, mask = kernel.bn_act_forward(y, *values, EPS, skip, "relu", None)
    for name in ("add_up", "sums_to_write"):
        monkeypatch.setattr(kernel, name, None)
    found, sums, found_mask = kernel.bn_act_forward(y, *values, EPS, skip, "relu", None, None, False)
    assert torch.equal(found, z)
    assert torch.equal(found_mask, mask)
    assert sums.shape == (0,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("shape", "read"), [((2, 3, 5, 7), 35), ((2, 64, 5, 4), 1), ((3, 128, 3, 3), 1)])
@pytest.mark.parametrize("has_skip", [False, True])
def test_gradient_of_a_mean(has_skip: bool, shape: tuple[int, ...], read: int, dtype: torch.dtype, device: torch.device) -> None:
    """One value per image and channel is read as such where a row of a tile is a pixel, with the bits of the whole."""
    y, skip, values = batch(shape, dtype, device), batch(shape, dtype, device) if has_skip else None, layer(shape[1], device)
    grad_z, grad_sums = batch((*shape[:2], 1, 1), dtype, device).expand(shape), torch.randn(2, shape[1], device=device)
    found = both_ways(y, values, skip, "relu", grad_z, grad_sums)
    expected = both_ways(y, values, skip, "relu", grad_z.contiguous(memory_format=torch.channels_last), grad_sums)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert kernel_layout.gradient_to_read(grad_z, 1, y)[0].numel() == shape[0] * shape[1] * read


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (2, 64, 5, 4), (5, 24, 9, 7)])
@pytest.mark.parametrize("last", ["one use", "a strided one", "a mean"])
def test_gradient_of_a_skip_that_is_not_written(last: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    """The layer that the skip comes from puts it together, with the same bits; the other results do not change."""
    y, skip, later, grad_z, own = (batch(shape, dtype, device) for _ in range(5))
    values, grad_sums, alias = layer(shape[1], device), torch.randn(2, shape[1], device=device), (None, 1)
    if last == "a strided one":
        alias = batch(grad_z[:, :, ::2, ::2].shape, dtype, device), 2
    elif last == "a mean":
        grad_z = grad_z[:, :, :1, :1].expand(shape)
    mask, own_mask = (kernel.bn_act_forward(each, *values, EPS, skip, "relu", None)[2] for each in (later, y))
    behind = later, *values, EPS, None, mask, True, "relu", None, False, *alias
    grad_later, whole, *_ = kernel.bn_act_backward(grad_z, grad_sums, *behind)
    found_later, nothing, *_ = kernel.bn_act_backward(grad_z, grad_sums, *behind, True, False)
    assert torch.equal(found_later, grad_later)
    assert nothing.shape == (0,)
    before = y, *values, EPS, None, own_mask, True, "relu", None, False
    expected = kernel.bn_act_backward(own, grad_sums, *before, whole)
    found = kernel.bn_act_backward(own, grad_sums, *before, *alias, True, True, grad_z, mask)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    ("later", "mask", "message"),
    [
        (True, None, "grad_later and later_mask must be given together"),
        (False, 15, "grad_later and later_mask must be given together"),
        (True, 14, "later_mask must have a bit per element, 15 bytes, got 14"),
    ],
)
def test_a_gradient_without_its_mask_is_refused(later: bool, mask: int | None, message: str) -> None:
    y, values = batch((2, 3, 4, 5), torch.float32, "cpu"), layer(3, "cpu")
    bits = None if mask is None else torch.zeros(mask, dtype=torch.uint8)
    behind = None, torch.zeros(15, dtype=torch.uint8), True, "relu", None, False, None, 1, True, True, y if later else None, bits
    with pytest.raises(ValueError, match=message):
        kernel.bn_act_backward(y, None, y, *values, EPS, *behind)


@pytest.mark.parametrize("ratio", [30.0, 100.0])
def test_moments_far_from_zero(ratio: float, device: torch.device) -> None:
    """Σ(y − m)² keeps its precision where E[y²] − E[y]² would lose it."""
    y = (ratio + torch.randn(4, 8, 16, 16)).to(device)
    values = [torch.full((8,), ratio, device=device), *layer(8, device)[1:]]
    _, sums, _ = kernel.bn_act_forward(y, *values, EPS, None, "none", None)
    shifted = y.double() - ratio
    assert error(sums[1], shifted.square().sum((0, 2, 3))) < 1e-6
    assert error(sums[0], shifted.sum((0, 2, 3))) < 1e-6


def test_dead_channels_pass_the_gradient_of_the_sums(device: torch.device) -> None:
    """γ = 0 and v = 0 are ordinary values: nothing is divided by a."""
    y, values = batch((2, 4, 5, 5), torch.float32, device), layer(4, device)
    values[2][1], values[1][2] = 0, 0
    assert_matches(y, values, None, "relu", torch.randn(2, 4, device=device))


@pytest.mark.parametrize("has_skip", [False, True])
def test_nan_propagates_as_in_pytorch(has_skip: bool, device: torch.device) -> None:
    y, values = batch((2, 8, 4, 4), torch.float32, device), layer(8, device)
    y[1, 5, 2, 3], y[0, 2, 0, 0] = math.nan, math.inf
    skip, grad_z = batch((2, 8, 4, 4), torch.float32, device) if has_skip else None, torch.randn_like(y)
    ours = both_ways(y, values, skip, "relu", grad_z, torch.ones(2, 8, device=device))
    plain = plainly(y, values, skip, "relu", grad_z, torch.ones(2, 8, device=device), torch.float32)
    for name, result in ours.items():
        torch.testing.assert_close(result, plain[name], equal_nan=True, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", PRECISIONS)
def test_same_bits_again(dtype: torch.dtype, device: torch.device) -> None:
    y, skip, grad_z = (batch((2, 40, 9, 9), dtype, device) for _ in range(3))
    values, grad_sums = layer(40, device), torch.randn(2, 40, device=device)
    first, second = (both_ways(y, values, skip, "relu", grad_z, grad_sums) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("shape", [(100, 64, 32, 32), (100, 512, 4, 4), (8, 2048, 7, 7), (3, 58, 28, 28), (100, 64, 112, 112)])
def test_real_sizes(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    for has_skip in (False, True):
        y, skip = batch(shape, dtype, "cuda"), batch(shape, dtype, "cuda") if has_skip else None
        assert_matches(y, layer(shape[1], "cuda"), skip, "relu", torch.randn(2, shape[1], device="cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("has_skip", [False, True])
def test_captured_in_a_cuda_graph(has_skip: bool) -> None:
    y, grad_z = batch((8, 64, 16, 16), torch.bfloat16, "cuda"), batch((8, 64, 16, 16), torch.bfloat16, "cuda")
    skip = batch((8, 64, 16, 16), torch.bfloat16, "cuda") if has_skip else None
    values, grad_sums = layer(64, "cuda"), torch.randn(2, 64, device="cuda")
    called = both_ways(y, values, skip, "relu", grad_z, grad_sums)
    replayed = captured(lambda: both_ways(y, values, skip, "relu", grad_z, grad_sums))
    assert all(torch.equal(called[name], replayed[name]) for name in called)


@pytest.mark.gpu
def test_more_than_two_to_the_31_elements() -> None:
    needed = 14 * 2**31  # bytes: y, skip, z, the gradients, in bfloat16, and the mask
    if torch.cuda.mem_get_info()[0] < 1.1 * needed:
        pytest.skip(f"needs {1.1 * needed / 2**30:.0f} GiB of free GPU memory")
    images = 2**31 // (64 * 1024) + 3
    y = torch.ones(images, 64, 32, 32, dtype=torch.bfloat16, device="cuda").contiguous(memory_format=torch.channels_last)
    values = [torch.zeros(64, device="cuda"), torch.ones(64, device="cuda"), None, None]
    z, sums, mask = kernel.bn_act_forward(y, *values, 0.0, y, "relu", None)
    assert bool((z == 2).all())
    assert bool((mask == 255).all())
    torch.testing.assert_close(sums, torch.full_like(sums, images * 1024))
    behind = None, mask, True, "relu", None, True
    grad_y, grad_skip, parameters, _ = kernel.bn_act_backward(y, torch.ones_like(sums), y, *values, 0.0, *behind)
    assert bool((grad_y == 4).all())
    assert bool((grad_skip == 1).all())
    torch.testing.assert_close(parameters, torch.full_like(parameters, images * 1024))


def launches() -> Launches:
    """A ResNet-18 for CIFAR and a ResNet-50 at 224 pixels, batch 100; and odd sizes."""

    def both_ways(shape: tuple[int, ...], dtype: torch.dtype, has_skip: bool, activation: Activation) -> None:
        y, values = meta(*shape, dtype=dtype), [meta(shape[1]) for _ in range(4)]
        skip, slope = y if has_skip else None, meta(shape[1]) if activation == "leaky_relu" else None
        _, _, mask = kernel.bn_act_forward(y, *values, 1e-5, skip, activation, slope)
        kernel.bn_act_forward(y, *values, 1e-5, skip, activation, slope, None, False)
        all_grad_sums, behind = meta(2, 4800), (skip, mask, has_skip, activation, slope)
        kernel.bn_act_backward(y, all_grad_sums[:, : shape[1]], y, *values, 1e-5, *behind)
        if activation == "relu":  # both branches of a residual block
            kernel.bn_act_backward(y, all_grad_sums[:, : shape[1]], y, *values, 1e-5, *behind, False, y)
            sampled = meta(*y[:, :, ::2, ::2].shape, dtype=dtype)  # one of which begins with a strided 1×1 convolution
            kernel.bn_act_backward(y, all_grad_sums[:, : shape[1]], y, *values, 1e-5, *behind, False, sampled, 2)
            kernel.bn_act_backward(y, None, y, *values, 1e-5, *behind, True, sampled, 2)
            of_mean = meta(shape[0], shape[1], 1, 1, dtype=dtype).expand(shape)
            for last in (y, None, 1, False), (y, sampled, 2, False), (of_mean, None, 1, False):  # leave the gradient of the skip
                kernel.bn_act_backward(last[0], all_grad_sums[:, : shape[1]], y, *values, 1e-5, *behind, False, *last[1:3], True, last[3])
            later_mask = meta(math.ceil(y.numel() / 8), dtype=torch.uint8)
            for *alias, later in (None, 1, y), (sampled, 2, y), (None, 1, of_mean):  # and put it together
                parts = *alias, True, True, later, later_mask
                kernel.bn_act_backward(y, all_grad_sums[:, : shape[1]], y, *values, 1e-5, *behind, False, *parts)
            kernel.bn_act_backward(of_mean, None, y, *values, 1e-5, *behind, True)
        # During the ascent the moments go unused and γ and β take gradients.
        kernel.bn_act_backward(y, None, y, *values, 1e-5, *behind, True)

    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for has_skip, activation in itertools.product([False, True], ACTIVATIONS):
            for shape in [(100, 64, 32, 32), (100, 128, 16, 16), (100, 256, 8, 8), (100, 512, 4, 4), (100, 2048, 7, 7)]:
                if (dtype != torch.float16 or (has_skip and activation == "relu")) and (activation in ("none", "relu") or shape[1] == 64):
                    case = f"{dtype}{' skip' * has_skip} {activation} C={shape[1]}"
                    yield case, partial(both_ways, shape, dtype, has_skip, activation)
    yield "torch.bfloat16 skip relu C=58, odd size", partial(both_ways, (3, 58, 7, 7), torch.bfloat16, True, "relu")
