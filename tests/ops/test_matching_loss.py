"""matching_loss: the decoupled distances of all layers' statistics and their gradients, in C++, against float64."""

from __future__ import annotations

import itertools
import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from dwa_fast import ops
from dwa_fast.reference import ops as reference
from tests.ops.layers import error

RESNET18 = [64] * 5 + [128] * 5 + [256] * 5 + [512] * 5
LAYERS = [[1], [3], [64], [7, 1, 33], RESNET18, [5, 0, 5]]
Inputs = dict[str, Tensor]


def make(channels: list[int], device: torch.device | str = "cpu", *, means: bool = False) -> Inputs:
    """Sums of layers whose statistics are some way off the running ones; with means others than the running ones to aim at."""
    counts = torch.tensor([50 * (4 + layer) ** 2 for layer in range(len(channels))], dtype=torch.int64)
    total = sum(channels)
    per_channel = counts.repeat_interleave(torch.tensor(channels, dtype=torch.int64)).double()
    variances = torch.rand(total) * 2 + 0.05
    mean_gap = 0.3 * torch.randn(total).double()
    var_gap = 0.2 * variances.double() * torch.randn(total).double()
    sums = torch.stack([per_channel * mean_gap, per_channel * (variances + var_gap + mean_gap.square())]).float()
    weights = torch.ones(len(channels))
    weights[:1] = 10
    channel_ptr = torch.tensor([0, *itertools.accumulate(channels)])
    tensors = {"sums": sums, "variances": variances, "channel_ptr": channel_ptr, "counts": counts, "weights": weights}
    tensors |= {"means": 0.3 * torch.randn(total)} if means else {}
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def run(operator: Any, inputs: Inputs, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """The loss, and the gradient of 0.01 R_mean + 0.11 R_var."""
    converted = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in inputs.items()}
    sums = converted["sums"].detach().requires_grad_()
    loss = operator(**(converted | {"sums": sums}))
    (gradient,) = torch.autograd.grad(loss, sums, torch.tensor([0.01, 0.11]).to(loss))
    return loss.detach(), gradient


@pytest.mark.parametrize("means", [False, True])
@pytest.mark.parametrize("channels", LAYERS, ids=lambda channels: f"{len(channels)}x{channels[0]}")
def test_matches_float64(channels: list[int], means: bool, device: torch.device) -> None:
    inputs = make(channels, device, means=means)
    results, plain, expected = (
        run(ops.matching_loss, inputs),
        run(reference.matching_loss, inputs),
        run(reference.matching_loss, inputs, torch.float64),
    )
    for ours, theirs, exact in zip(results, plain, expected, strict=True):
        assert (ours.shape, ours.dtype, ours.device) == (exact.shape, torch.float32, inputs["sums"].device)
        assert error(ours, exact) <= max(2 * error(theirs, exact), 2**-23)


@pytest.mark.parametrize("means", [False, True])
@pytest.mark.parametrize("channels", LAYERS, ids=lambda channels: f"{len(channels)}x{channels[0]}")
def test_loss_and_gradient_at_once(channels: list[int], means: bool, device: torch.device) -> None:
    inputs = make(channels, device, means=means)
    grad = torch.tensor([0.01, 0.11], device=device)
    for result, expected in zip(ops.matching_gradient(**inputs, grad=grad), run(ops.matching_loss, inputs), strict=True):
        assert torch.equal(result, expected)
    if device.type == "cpu":
        torch.library.opcheck(torch.ops.dwa_fast.matching_gradient.default, (), {**inputs, "grad": grad})
        with pytest.raises(RuntimeError, match="on a CPU sums are complete"):
            ops.matching_gradient(**(inputs | {"sums": torch.zeros(9)}), grad=grad, places=torch.zeros(2, len(channels), dtype=torch.int64))
    with pytest.raises(ValueError, match=r"sums in an arena must be \[S\]"):
        ops.matching_gradient(**inputs, grad=grad, places=grad)


def test_hand_computed() -> None:
    """n = 2: μ − m = (3, 4)/2, and σ² − v = (26, 34)/2 − (9, 16)/4 − v."""
    sums = torch.tensor([[3.0, 4.0], [26.0, 34.0]])
    v = torch.tensor([26 / 2 - 9 / 4 - 6, 34 / 2 - 16 / 4 - 8])
    loss = ops.matching_loss(sums, v, torch.tensor([0, 2]), torch.tensor([2]), torch.tensor([10.0]))
    torch.testing.assert_close(loss, torch.tensor([25.0, 100.0]))


def test_other_means_hand_computed(device: torch.device) -> None:
    """n = 2: μ − m = (1.5, 2), less a = (−1.5, −2) is (3, 4) of norm 5; σ² = s₂/2 − (2.25, 4) does not know a; σ² − v = (0, 2)."""
    sums = torch.tensor([[3.0, 4.0], [8.5, 16.0]], device=device, requires_grad=True)
    v, means = torch.tensor([2.0, 2.0], device=device), torch.tensor([-1.5, -2.0], device=device)
    layers = torch.tensor([0, 2], device=device), torch.tensor([2], device=device), torch.tensor([10.0], device=device)
    loss = ops.matching_loss(sums, v, *layers, means)
    assert loss.tolist() == [50.0, 20.0]
    (gradient,) = torch.autograd.grad(loss.sum(), sums)
    assert gradient.cpu().tolist() == [[3.0, 4.0 - 20.0], [0.0, 5.0]]  # 10·(3, 4)/(2·5), and −2·(1.5, 2) · 10·(0, 2)/(2·2)
    loss = ops.matching_loss(sums.detach(), v, *layers, torch.tensor([1.5, 2.0], device=device))
    assert loss.tolist() == [0.0, 20.0]


@pytest.mark.parametrize("channels", LAYERS, ids=lambda channels: f"{len(channels)}x{channels[0]}")
def test_means_of_zero_change_no_bit(channels: list[int], device: torch.device) -> None:
    inputs = make(channels, device)
    zero = torch.zeros_like(inputs["variances"])
    for result, expected in zip(run(ops.matching_loss, inputs | {"means": zero}), run(ops.matching_loss, inputs), strict=True):
        assert torch.equal(result, expected)


@pytest.mark.parametrize("term", [0, 1])
def test_gradient_is_that_of_the_loss(term: int, device: torch.device) -> None:
    inputs = make([7, 1, 33], device)
    sums = inputs["sums"].requires_grad_()
    (gradient,) = torch.autograd.grad(ops.matching_loss(**inputs)[term], sums)
    per_channel = inputs["counts"].repeat_interleave(torch.tensor([7, 1, 33], device=device))
    direction = torch.randn_like(sums) * per_channel
    with torch.no_grad():
        values = [ops.matching_loss(**(inputs | {"sums": sums + sign * 1e-3 * direction}))[term].double() for sign in (1, -1)]
    assert (gradient * direction).sum().item() == pytest.approx((values[0] - values[1]).item() / 2e-3, rel=1e-2, abs=1e-3)


@pytest.mark.parametrize("zero", ["mean", "both", "means"])
def test_gradient_of_a_zero_norm_is_zero(zero: str, device: torch.device) -> None:
    inputs = make([4, 4], device)
    inputs["sums"][0, :4] = 0
    if zero == "both":
        inputs["variances"][:4] = 1
        inputs["sums"][1, :4] = inputs["counts"][0].float()
    if zero == "means":
        inputs["sums"][0, :4] = inputs["counts"][0].float()
        inputs["means"] = torch.tensor([1.0] * 4 + [0.5] * 4, device=device)
        inputs["variances"][:4] = 1
        inputs["sums"][1, :4] = 2 * inputs["counts"][0].float()
    _, gradient = run(ops.matching_loss, inputs)
    _, expected = run(reference.matching_loss, inputs, torch.float64)
    assert not gradient[0, :4].any()
    assert (not gradient[1, :4].any()) == (zero != "mean")
    assert error(gradient, expected) < 1e-6


def test_no_layers(device: torch.device) -> None:
    loss, gradient = run(ops.matching_loss, make([], device))
    assert torch.equal(loss, torch.zeros(2, device=device))
    assert gradient.shape == (2, 0)


def test_channels_of_no_layer_have_no_gradient() -> None:
    inputs = make([4, 4])
    inputs["channel_ptr"] = torch.tensor([1, 3, 6])
    _, gradient = run(ops.matching_loss, inputs)
    assert torch.equal(gradient.ne(0).any(0), torch.tensor([False, True, True, True, True, True, False, False]))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_and_infinity_propagate(value: float, device: torch.device) -> None:
    inputs = make([4, 5], device)
    inputs["sums"][0, 2] = value
    loss, gradient = run(ops.matching_loss, inputs)
    assert not torch.isfinite(loss).any()
    assert not torch.isfinite(gradient[:, :4]).all()
    assert torch.isfinite(gradient[:, 4:]).all()


def test_sums_of_any_strides(device: torch.device) -> None:
    inputs = make([7, 1, 33], device)
    expected = run(ops.matching_loss, inputs)
    wide = torch.full((41, 4), math.nan, device=device)
    wide[:, 1:3] = inputs["sums"].T
    results = run(ops.matching_loss, inputs | {"sums": wide.T[1:3]})
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(results, expected, strict=True))


def test_same_bits_again_for_any_number_of_threads(device: torch.device) -> None:
    inputs = make(RESNET18, device)
    results = []
    for threads in (1, 2, 1):
        torch.set_num_threads(threads)
        results.append(run(ops.matching_loss, inputs))
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def test_opcheck() -> None:
    ops.load()
    inputs = tuple(make([7, 1, 33]).values())
    torch.library.opcheck(torch.ops.dwa_fast.matching_loss_forward.default, inputs)
    norms = torch.ops.dwa_fast.matching_loss_forward(*inputs)[1]
    torch.library.opcheck(torch.ops.dwa_fast.matching_loss_backward.default, (torch.randn(2), *inputs, norms))
    means = torch.randn(41)
    torch.library.opcheck(torch.ops.dwa_fast.matching_loss_forward.default, (*inputs, means))
    torch.library.opcheck(torch.ops.dwa_fast.matching_loss_backward.default, (torch.randn(2), *inputs, norms, means))


def test_meta_tensors_have_the_right_shape() -> None:
    loss = ops.matching_loss(**make([3, 4], "meta"))
    assert (loss.shape, loss.dtype, loss.device.type) == ((2,), torch.float32, "meta")


WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"sums": 1.0}, TypeError, "sums must be a tensor, got float"),
    ({"sums": torch.zeros(2, 7).double()}, TypeError, "sums must be float32, got float64"),
    ({"sums": torch.zeros(7)}, ValueError, "sums must be [2, C], got shape (7,)"),
    ({"sums": torch.zeros(2, 8)}, ValueError, "variances must be [8], got shape (7,)"),
    ({"variances": torch.zeros(7, requires_grad=True)}, ValueError, "matching_loss is not differentiable in variances, weights and means"),
    ({"means": torch.zeros(7, requires_grad=True)}, ValueError, "matching_loss is not differentiable in variances, weights and means"),
    ({"means": [0.0] * 7}, TypeError, "means must be a tensor, got list"),
    ({"means": torch.zeros(7).double()}, TypeError, "means must be float32, got float64"),
    ({"means": torch.zeros(2, 7)}, ValueError, "means must be [7], got shape (2, 7)"),
    ({"means": torch.zeros(7, device="meta")}, ValueError, "means must be on the device of sums, cpu, got meta"),
    ({"channel_ptr": torch.zeros(3)}, TypeError, "channel_ptr must be int64, got float32"),
    ({"channel_ptr": torch.tensor([0, 3])}, ValueError, "channel_ptr must be [3], got shape (2,)"),
    ({"channel_ptr": torch.tensor([0, 3, 8])}, ValueError, "channel_ptr must not decrease and lie in 0 to 7, got 8 in place 2"),
    ({"channel_ptr": torch.tensor([0, 5, 3])}, ValueError, "channel_ptr must not decrease and lie in 0 to 7, got 3 in place 2"),
    ({"channel_ptr": torch.tensor([-1, 3, 7])}, ValueError, "channel_ptr must not decrease and lie in 0 to 7, got -1 in place 0"),
    ({"counts": torch.ones(2, 1, dtype=torch.int64)}, ValueError, "counts must be [L], got shape (2, 1)"),
    ({"weights": torch.ones(3)}, ValueError, "weights must be [2], got shape (3,)"),
    ({"weights": torch.ones(2, device="meta")}, ValueError, "weights must be on the device of sums, cpu, got meta"),
]


@pytest.mark.parametrize(("change", "kind", "message"), WRONG, ids=[row[-1] for row in WRONG])
def test_wrong_input(change: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=re.escape(message)):
        ops.matching_loss(**(make([3, 4]) | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sums": torch.zeros(7)}, r"sums must be \[2, C\], got shape \[7\]"),
        ({"variances": torch.zeros(6)}, r"variances must be \[7\], got shape \[6\]"),
        ({"counts": torch.zeros(2)}, "counts must be Long, got Float"),
        ({"means": torch.zeros(8)}, r"means must be \[7\], got shape \[8\]"),
    ],
)
def test_the_operator_checks_for_itself(change: dict[str, Any], message: str) -> None:
    ops.load()
    with pytest.raises(RuntimeError, match=message):
        torch.ops.dwa_fast.matching_loss_forward(**(make([3, 4]) | change))


@pytest.mark.gpu
def test_captured_in_a_cuda_graph() -> None:
    inputs = make(RESNET18, "cuda")
    called, _ = run(ops.matching_loss, inputs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = ops.matching_loss(**inputs)
    graph.replay()
    assert torch.equal(captured, called)
