"""Triton twin of dwa_fast.ops.adam_clip_: Adam with the learning rate of the row, then the clamp of every channel, in one pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dwa_fast.kernels.layout import on_device_of

_BLOCK = 1024  # 8 elements per thread, two 16-byte accesses to each of the four tensors
_WARPS = 4


@triton.jit
def _power(base, exponent):
    """base^exponent in float64 by repeated squaring: for 0 < base < 1 within a few units of 1e-16, without a transcendental function."""
    result = tl.full([], 1.0, tl.float64)
    factor = tl.full([], base, tl.float64)
    while exponent > 0:
        result = tl.where(exponent % 2 == 1, result * factor, result)
        factor = factor * factor
        exponent = exponent // 2
    return result


@triton.jit
def adam_rates(learning_rates, step, BETA1: tl.constexpr, BETA2: tl.constexpr):
    """lr_t/(1−β₁^(t+1)) and √(1−β₂^(t+1)) of step t = `step`."""
    row = tl.load(step)
    rate = tl.load(learning_rates + row).to(tl.float64) / (1.0 - _power(BETA1, row + 1))
    root = tl.sqrt(1.0 - _power(BETA2, row + 1))
    return rate.to(tl.float32), root.to(tl.float32)


@triton.jit
def adam_step(x, g, m, v, rate, root, lowest, highest, BETA1: tl.constexpr, BETA2: tl.constexpr, EPS: tl.constexpr):
    """x, m and v after a step with gradient g. NaN stays NaN."""
    m += (g - m) * (1.0 - BETA1)
    v = v * BETA2 + g * g * (1.0 - BETA2)
    x -= rate * tl.div_rn(m, tl.div_rn(tl.sqrt_rn(v), root) + EPS)
    return tl.where(x < lowest, lowest, tl.where(x > highest, highest, x)), m, v


@triton.jit
def _adam_clip_kernel(
    images, gradient, exp_avg, exp_avg_sq, learning_rates, step, low, high, count, inner,
    CHANNELS: tl.constexpr, BETA1: tl.constexpr, BETA2: tl.constexpr, EPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """m ← β₁m + (1−β₁)g,  v ← β₂v + (1−β₂)g²,  x ← clamp(x − lr_t · m/(1−β₁^(t+1)) / (√(v/(1−β₂^(t+1))) + ε), low_c, high_c).

    Element i of the memory belongs to channel ⌊i/inner⌋ mod CHANNELS. NaN stays NaN.
    """
    base = tl.program_id(0).to(tl.int64) * BLOCK
    lane = tl.arange(0, BLOCK)
    inside = base + lane < count
    g = tl.load(gradient + base + lane, mask=inside)
    m = tl.load(exp_avg + base + lane, mask=inside)
    v = tl.load(exp_avg_sq + base + lane, mask=inside)
    x = tl.load(images + base + lane, mask=inside)
    rate, root = adam_rates(learning_rates, step, BETA1, BETA2)
    channel = ((base % (inner * CHANNELS)).to(tl.int32) + lane) // inner % CHANNELS
    lowest = tl.load(low + channel, mask=inside)
    highest = tl.load(high + channel, mask=inside)

    x, m, v = adam_step(x, g, m, v, rate, root, lowest, highest, BETA1, BETA2, EPS)
    tl.store(exp_avg + base + lane, m, mask=inside)
    tl.store(exp_avg_sq + base + lane, v, mask=inside)
    tl.store(images + base + lane, x, mask=inside)


def adam_clip_(
    images: Tensor,  # [N, C, H, W] float32, changed in place
    gradient: Tensor,  # [N, C, H, W] float32
    exp_avg: Tensor,  # [N, C, H, W] float32, changed in place
    exp_avg_sq: Tensor,  # [N, C, H, W] float32, changed in place
    learning_rates: Tensor,  # [T] float32
    step: Tensor,  # [] int64, counted from 0
    low: Tensor,  # [C] float32
    high: Tensor,  # [C] float32
    beta1: float,
    beta2: float,
    eps: float,
) -> None:
    """One launch; arguments as in dwa_fast.ops.adam_clip_.

    Tensors that lie otherwise in memory than the images are copied, and copied back.
    """
    if images.numel() == 0:
        return
    channels, height, width = images.shape[1:]
    is_channels_last = not images.is_contiguous() and images.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if is_channels_last else torch.contiguous_format
    given = (images, exp_avg, exp_avg_sq)
    x, m, v = (tensor.contiguous(memory_format=layout) for tensor in given)
    with on_device_of(images):
        _adam_clip_kernel[(triton.cdiv(x.numel(), _BLOCK),)](
            x, gradient.contiguous(memory_format=layout), m, v, learning_rates, step, low, high,
            x.numel(), 1 if is_channels_last else height * width,
            CHANNELS=channels, BETA1=beta1, BETA2=beta2, EPS=eps, BLOCK=_BLOCK, num_warps=_WARPS,
        )  # fmt: skip
    for tensor, worked_on in zip(given, (x, m, v), strict=True):
        if worked_on is not tensor:
            tensor.copy_(worked_on)
