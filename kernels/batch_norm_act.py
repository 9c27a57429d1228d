"""Triton twin of dwa_fast.ops.batch_norm_act: BatchNorm in train mode, from the passes of `moments` and `bn_act` or `bn_act_pool`.

Three launches forward behind a small mean (moments, statistics, result) and three backward (sums, what they give, gradient).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from dwa_fast.kernels.bn_act import bn_act_backward, bn_act_forward
from dwa_fast.kernels.bn_act_pool import bn_act_pool_backward, bn_act_pool_forward
from dwa_fast.kernels.layout import WARPS, channels_last, on_device_of, partial_rows, sum_of_rows
from dwa_fast.kernels.moments import REGISTERS, moments_forward

_ROWS = 128
_CHANNELS = 16


@triton.jit(do_not_specialize=["count", "values"])
def _statistics_kernel(
    partials, near, mean, var, running_mean, running_var, momentum, count, values, channels,
    BLOCK_ROWS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """μ = m + Σ(y − m)/n,   σ² = Σ(y − m)²/n − (μ − m)²   from the `count` rows of both sums, m near μ; and the running statistics."""
    channel = tl.program_id(0) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    used = channel < channels
    first = sum_of_rows(partials, count, channels, channel, BLOCK_ROWS, BLOCK_CHANNELS) / values
    second = sum_of_rows(partials + count * channels, count, channels, channel, BLOCK_ROWS, BLOCK_CHANNELS) / values
    average = (first + tl.load(near + channel, mask=used, other=0.0).to(tl.float64)).to(tl.float32)
    variance = second - first * first
    variance = tl.where(variance < 0.0, 0.0, variance).to(tl.float32)  # NaN stays
    tl.store(mean + channel, average, mask=used)
    tl.store(var + channel, variance, mask=used)
    if running_mean is not None:
        before = tl.load(running_mean + channel, mask=used, other=0.0)
        tl.store(running_mean + channel, before + momentum * (average - before), mask=used)
        before = tl.load(running_var + channel, mask=used, other=0.0)
        unbiased = (variance.to(tl.float64) * values / (values - 1)).to(tl.float32)
        tl.store(running_var + channel, before + momentum * (unbiased - before), mask=used)


def batch_norm_act_forward(
    y: Tensor,  # [N, C, H, W] float32, bfloat16 or float16
    running_mean: Tensor | None,  # [C] float32, written
    running_var: Tensor | None,  # [C] float32, written
    weight: Tensor | None,  # [C] float32
    bias: Tensor | None,  # [C] float32
    momentum: float,
    eps: float,
    skip: Tensor | None,  # like y
    activation: str,
    slope: Tensor | None,  # [1] or [C] float32, with leaky_relu
    windows: Sequence[int] = (),  # k, s and p of a pooling; none: it has none
    averages: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """z like y or pooled, mean and biased variance of the batch, [C] float32, and the mask of `bn_act_forward` or the pooling's places."""
    channels = y.shape[1]
    near = y[:, :, 0, 0].mean(0, dtype=torch.float32)  # shifted by a value of this size, squares lose no digits
    partials = near.new_empty(2, partial_rows(y, REGISTERS), channels)
    moments_forward(channels_last(y), near, partials)
    mean, var = torch.empty_like(near), torch.empty_like(near)
    with on_device_of(y):
        _statistics_kernel[(triton.cdiv(channels, _CHANNELS),)](
            partials, near, mean, var, running_mean, running_var, momentum, partials.shape[1], y.numel() // channels, channels,
            BLOCK_ROWS=_ROWS, BLOCK_CHANNELS=_CHANNELS, num_warps=WARPS,
        )  # fmt: skip
    layer = y, mean, var, weight, bias, eps
    if windows:
        z, _, mask = bn_act_pool_forward(*layer, activation, slope, *windows, with_sums=False, averages=averages)
    else:
        z, _, mask = bn_act_forward(*layer, skip, activation, slope, with_sums=False)
    return z, mean, var, mask


def batch_norm_act_backward(
    grad_z: Tensor,  # [N, C, H, W]
    y: Tensor,  # [N, C, H, W]
    mean: Tensor,  # [C] float32, of the batch
    var: Tensor,  # [C] float32
    weight: Tensor | None,  # [C] float32
    bias: Tensor | None,  # [C] float32
    eps: float,
    skip: Tensor | None,  # as for `bn_act_backward`
    mask: Tensor,
    has_skip: bool,
    activation: str,
    slope: Tensor | None,
    windows: Sequence[int] = (),
    averages: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """grad_y, grad_skip, the gradients of γ and β and that of the slope, as `bn_act_backward` gives them, but for a batch's statistics."""
    layer, shares = (y, mean, var, weight, bias, eps), torch.empty(2, y.shape[1], dtype=torch.float32, device=y.device)
    if windows:
        behind = mask, activation, slope, *windows
        kind = {"averages": averages}
        _, grad_parameters, grad_slope = bn_act_pool_backward(grad_z, None, *layer, *behind, True, **kind, with_y=False, shares=shares)
        grad_y, *_ = bn_act_pool_backward(grad_z, shares, *layer, *behind, **kind)
        return grad_y, y.new_empty(0), grad_parameters, grad_slope
    _, grad_skip, grad_parameters, grad_slope = bn_act_backward(
        grad_z, None, *layer, skip, mask, has_skip, activation, slope, True, with_y=False, shares=shares
    )
    if not has_skip:
        grad_y = bn_act_backward(grad_z, shares, *layer, None, mask, False, activation, slope)[0]
    else:
        gradient = grad_z if activation == "none" else grad_skip
        grad_y = bn_act_backward(gradient, shares, *layer, None, mask, False, "none", None)[0]
    return grad_y, grad_skip, grad_parameters, grad_slope
