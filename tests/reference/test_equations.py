"""The plain operators against the equations: cases computed by hand, closed forms in float64, and PyTorch's own Adam."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from dwa_fast.engine.refine import mean_norm, total_variation
from dwa_fast.reference import ops

INF = math.inf


def test_matching_loss_by_hand() -> None:
    y = torch.tensor([[[[1.0, 3.0]], [[0.0, 0.0]]]])  # [1, 2, 1, 2]: means 2 and 0, biased variances 1 and 0
    mean, var = torch.tensor([5.0, -4.0]), torch.tensor([1.0, 2.0])
    _, sums = ops.bn_act(y, mean, var, None, None, 1e-5)
    assert sums.tolist() == [[-6.0, 8.0], [20.0, 32.0]]  # Σ(y−m), Σ(y−m)²
    layers = torch.tensor([0, 2, 4]), torch.tensor([2, 2]), torch.tensor([10.0, 1.0])
    loss = ops.matching_loss(torch.cat([sums, sums], 1), torch.cat([var, var]), *layers)
    assert loss.tolist() == [11 * 5.0, 11 * 2.0]  # ‖(−3, 4)‖ = 5 and ‖(0, −2)‖ = 2
    means = torch.tensor([3.0, -4.0, -3.0, 4.0])  # aims at (8, −8), off by (−6, 8), and at (2, 0), which the second layer has
    assert ops.matching_loss(torch.cat([sums, sums], 1), torch.cat([var, var]), *layers, means).tolist() == [10 * 10.0, 11 * 2.0]


def test_bn_act_by_hand() -> None:
    y, skip = torch.tensor([4.0, -4.0]).view(2, 1, 1, 1), torch.tensor([1.0, -1.0]).view(2, 1, 1, 1)
    z, _ = ops.bn_act(y, torch.tensor([2.0]), torch.tensor([3.0]), torch.tensor([6.0]), torch.tensor([0.5]), 1.0, skip, "relu")
    assert z.flatten().tolist() == [6 * (4 - 2) / 2 + 0.5 + 1, 0.0]


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("with_skip", [False, True])
def test_backward_of_matching_is_pointwise(relu: bool, with_skip: bool) -> None:
    """∂L/∂y = mask · a · ∂L/∂z + A + B(y − m), the closed form that the fused backward is built on."""
    channels, weight, lambda_mean, lambda_var = 5, 10.0, 0.01, 0.11
    y = torch.randn(3, channels, 4, 2, dtype=torch.float64, requires_grad=True)
    skip = torch.randn_like(y) if with_skip else None
    m, gamma, beta = (torch.randn(channels, dtype=torch.float64) for _ in range(3))
    v = torch.rand(channels, dtype=torch.float64) + 0.1
    downstream = torch.randn(3, channels, 4, 2, dtype=torch.float64)
    z, sums = ops.bn_act(y, m, v, gamma, beta, 1e-5, skip, "relu" if relu else "none")
    n = y.numel() // channels
    layers = torch.tensor([0, channels]), torch.tensor([n]), torch.tensor([weight], dtype=torch.float64)
    mean, var = ops.matching_loss(sums, v, *layers)
    ((z * downstream).sum() + lambda_mean * mean + lambda_var * var).backward()

    per_channel = (slice(None), None, None)
    shifted = y.detach() - m[per_channel]
    mu, sigma2 = y.detach().mean((0, 2, 3)), y.detach().var((0, 2, 3), unbiased=False)
    b = 2 * weight * lambda_var * (sigma2 - v) / (n * (sigma2 - v).norm())
    a = weight * lambda_mean * (mu - m) / (n * (mu - m).norm()) - b * (mu - m)
    mask = (z > 0).double() if relu else torch.ones_like(z)
    scale = gamma / (v + 1e-5).sqrt()
    expected = mask * scale[per_channel] * downstream + a[per_channel] + b[per_channel] * shifted
    assert y.grad is not None
    assert (y.grad - expected).norm() < 1e-14 * expected.norm()


def test_zero_norm_has_zero_gradient() -> None:
    sums = torch.zeros(2, 3, requires_grad=True)
    ops.matching_loss(sums, torch.zeros(3), torch.tensor([0, 3]), torch.tensor([4]), torch.tensor([1.0])).sum().backward()
    assert sums.grad is not None
    assert sums.grad.tolist() == torch.zeros(2, 3).tolist()


@pytest.mark.parametrize("ratio", [1, 30, 100])
def test_shifted_moments_keep_their_precision(ratio: int) -> None:
    """E[y²] − E[y]² would lose 1e-4 at |μ|/σ = 30; the shifted form does not."""
    y = torch.randn(8, 2, 16, 16, dtype=torch.float64) + ratio
    mean = torch.full((2,), float(ratio))
    _, sums = ops.bn_act(y.float(), mean, torch.ones(2), None, None, 1e-5)
    n = y.numel() // 2
    var = sums[1] / n - (sums[0] / n).square()
    expected = y.float().double().var((0, 2, 3), unbiased=False)
    assert ((var - expected).abs() < 2e-6 * expected).all()


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ([0, 0, 2, 3, 0, 0, 0], [[0, 1, 2], [3, 4, 5]]),
        ([0, 0, 2, 3, 1, 0, 0], [[2, 1, 0], [5, 4, 3]]),
        ([0, 0, 2, 3, 0, 1, 2], [[4, 5, 3], [1, 2, 0]]),  # out[i, j] = in[(i − 1) mod 2, (j − 2) mod 3]
        ([0, 0, 2, 3, 1, 1, 1], [[3, 5, 4], [0, 2, 1]]),  # flip first, then roll
    ],
)
def test_view_by_hand(row: list[int], expected: list[list[int]]) -> None:
    images = torch.arange(6.0).view(1, 1, 2, 3)
    rows = torch.tensor([[9] * 7, row], dtype=torch.int32)
    assert ops.view(images, rows, torch.tensor(1))[0, 0].tolist() == expected


def test_view_resizes_bilinearly() -> None:
    """A 1 × 2 crop of a 4-pixel row: source position (j + ½)·2/4 − ½, clamped to the crop."""
    images = torch.tensor([[0.0, 10, 20, 40], [0.0, 10, 20, 40], [0.0, 10, 20, 40], [0.0, 10, 20, 40]]).view(1, 1, 4, 4)
    rows = torch.tensor([[1, 2, 1, 2, 0, 0, 0]], dtype=torch.int32)
    seen = ops.view(images, rows, torch.tensor(0))
    assert seen[0, 0].tolist() == [[20.0, 25.0, 35.0, 40.0]] * 4


def test_view_is_differentiable() -> None:
    rows = torch.tensor([[1, 0, 3, 2, 1, 2, 1]], dtype=torch.int32)
    images = torch.randn(2, 1, 5, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: ops.view(x, rows, torch.tensor(0)), images)


def test_adam_clip_is_adam_then_clamp() -> None:
    images = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    rates = torch.tensor([0.3, 0.2, 0.1], dtype=torch.float64)
    low, high = torch.tensor([-1.0, -0.5, -INF], dtype=torch.float64), torch.tensor([1.0, 0.5, INF], dtype=torch.float64)
    expected = nn.Parameter(images.clone())
    optimizer = torch.optim.Adam([expected], betas=(0.5, 0.9), eps=1e-8)
    exp_avg, exp_avg_sq = torch.zeros_like(images), torch.zeros_like(images)
    for step, rate in enumerate(rates):
        gradient = torch.randn_like(images)
        ops.adam_clip_(images, gradient, exp_avg, exp_avg_sq, rates, torch.tensor(step), low, high)
        optimizer.param_groups[0]["lr"] = float(rate)
        expected.grad = gradient
        optimizer.step()
        with torch.no_grad():
            for channel in range(3):
                expected[:, channel].clamp_(float(low[channel]), float(high[channel]))
        assert torch.allclose(images, expected, rtol=1e-12, atol=0)


def test_first_adam_step_by_hand() -> None:
    """From zero moments the first step has the length of the learning rate: m̂ = g, v̂ = g²."""
    images, gradient = torch.zeros(1, 1, 1, 2, dtype=torch.float64), torch.tensor([3.0, -4e-8], dtype=torch.float64).view(1, 1, 1, 2)
    state = torch.zeros_like(images), torch.zeros_like(images)
    bounds = torch.tensor([-1.0], dtype=torch.float64), torch.tensor([1.0], dtype=torch.float64)
    ops.adam_clip_(images, gradient, *state, torch.tensor([0.25], dtype=torch.float64), torch.tensor(0), *bounds)
    assert images.flatten().tolist() == pytest.approx([-0.25 * 3 / (3 + 1e-8), 0.25 * 4e-8 / (4e-8 + 1e-8)], rel=1e-12)


def test_view_adam_clip_collects_by_hand() -> None:
    """The view of test_view_resizes_bilinearly: columns 2 and 3 collect from all four, in the shares in which these read them."""
    rows = torch.tensor([[1, 2, 1, 2, 0, 0, 0]], dtype=torch.int32)
    images, exp_avg, exp_avg_sq = (torch.zeros(1, 1, 4, 4, dtype=torch.float64) for _ in range(3))
    gradient = torch.tensor([1.0, 10, 100, 1000]).expand(1, 1, 4, 4)
    rates, bounds = torch.tensor([0.25]), (torch.tensor([-0.125]), torch.tensor([0.125]))
    ops.view_adam_clip_(images, gradient, exp_avg, exp_avg_sq, rows, rates, torch.tensor(0), *bounds, loss_scale=4.0)
    collected = torch.zeros(4, 4)
    collected[1, 2:] = torch.tensor([1 + 7.5 + 25, 2.5 + 75 + 1000])  # times four lines, divided by the scale of the loss
    assert torch.equal(exp_avg[0, 0], 0.5 * collected.double())
    assert torch.allclose(exp_avg_sq[0, 0], 0.1 * collected.double().square(), rtol=1e-12)
    assert torch.equal(images[0, 0], -0.125 * (collected > 0))


@pytest.mark.parametrize("row", [[0, 0, 5, 4, 0, 3, 2], [1, 0, 3, 2, 1, 2, 1]])
def test_view_adam_clip_is_adam_on_a_loss_of_the_view(row: list[int]) -> None:
    rows, rates = torch.tensor([row] * 3, dtype=torch.int32), torch.tensor([0.3, 0.2, 0.1], dtype=torch.float64)
    images = torch.randn(2, 3, 5, 4, dtype=torch.float64)
    low, high = torch.tensor([-1.0, -0.5, -INF], dtype=torch.float64), torch.tensor([1.0, 0.5, INF], dtype=torch.float64)
    expected = nn.Parameter(images.clone())
    optimizer = torch.optim.Adam([expected], betas=(0.5, 0.9), eps=1e-8)
    exp_avg, exp_avg_sq = torch.zeros_like(images), torch.zeros_like(images)
    for step, rate in enumerate(rates):
        weights = torch.randn_like(images)
        ops.view_adam_clip_(images, 1024 * weights, exp_avg, exp_avg_sq, rows, rates, torch.tensor(step), low, high, loss_scale=1024.0)
        optimizer.param_groups[0]["lr"] = float(rate)
        optimizer.zero_grad()
        (ops.view(expected, rows, torch.tensor(step)) * weights).sum().backward()
        optimizer.step()
        with torch.no_grad():
            expected.copy_(torch.minimum(torch.maximum(expected, low[:, None, None]), high[:, None, None]))
        assert torch.allclose(images, expected, rtol=1e-12, atol=0)


def test_ascend_by_hand() -> None:
    weights, compute = torch.tensor([1.0, 2.0]), torch.empty(2, dtype=torch.bfloat16)
    norm = ops.ascend_(weights, torch.tensor([3.0, 4.0]), 0.5, compute=compute)
    assert norm == 5
    assert weights.tolist() == pytest.approx([1.3, 2.4])
    assert torch.equal(compute, weights.bfloat16())
    ops.ascend_(weights, torch.tensor([3.0, 4.0]), 0.5, normalize=False)
    assert weights.tolist() == pytest.approx([2.8, 4.4])


def test_total_variation_by_hand() -> None:
    """Of 1 2 / 4 8: right 1, 4; down 3, 6; up right 2; down right 7."""
    seen = torch.tensor([[1.0, 2.0], [4.0, 8.0]]).view(1, 1, 2, 2)
    assert float(total_variation(seen)) == pytest.approx(math.sqrt(1 + 16) + math.sqrt(9 + 36) + 2 + 7)


def test_mean_norm_by_hand() -> None:
    seen = torch.tensor([[3.0, 4.0], [5.0, 12.0]]).view(2, 1, 1, 2)
    assert float(mean_norm(seen)) == (5 + 13) / 2


@pytest.mark.parametrize("prior", [total_variation, mean_norm])
def test_priors_are_differentiable_also_where_they_are_0(prior: Callable[[Tensor], Tensor]) -> None:
    assert torch.autograd.gradcheck(prior, torch.randn(2, 3, 4, 3, dtype=torch.float64, requires_grad=True))
    flat = torch.zeros(2, 3, 4, 3, requires_grad=True)
    prior(flat).backward()
    assert flat.grad is not None
    assert not flat.grad.any()
