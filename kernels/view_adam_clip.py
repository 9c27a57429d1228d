"""Triton twin of dwa_fast.ops.view_adam_clip_: the adjoint of the view, Adam and the clamp in one pass over the pixels."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from dwa_fast.kernels.layout import channels_last, on_device_of
from dwa_fast.kernels.view import WARPS, adjoint, cut, element


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
def _adam_rates(learning_rates, step, BETA1: tl.constexpr, BETA2: tl.constexpr):
    """lr_t/(1−β₁^(t+1)) and √(1−β₂^(t+1)) of step t = `step`."""
    row = tl.load(step)
    rate = tl.load(learning_rates + row).to(tl.float64) / (1.0 - _power(BETA1, row + 1))
    root = tl.sqrt(1.0 - _power(BETA2, row + 1))
    return rate.to(tl.float32), root.to(tl.float32)


@triton.jit
def _adam_step(x, g, m, v, rate, root, lowest, highest, BETA1: tl.constexpr, BETA2: tl.constexpr, EPS: tl.constexpr):
    """x, m and v after a step with gradient g. NaN stays NaN."""
    m += (g - m) * (1.0 - BETA1)
    v = v * BETA2 + g * g * (1.0 - BETA2)
    x -= rate * tl.div_rn(m, tl.div_rn(tl.sqrt_rn(v), root) + EPS)
    return tl.where(x < lowest, lowest, tl.where(x > highest, highest, x)), m, v


@triton.jit(do_not_specialize=["lines", "pitch"])
def _view_adam_clip_kernel(
    images, gradient, exp_avg, exp_avg_sq, rows, learning_rates, step, low, high, lines, pitch, height, width,
    image_stride, channel_stride, two_lines, line_stride, two_pixels, pixel_stride,
    CHANNELS: tl.constexpr, GRADIENT_SCALE: tl.constexpr, BETA1: tl.constexpr, BETA2: tl.constexpr, EPS: tl.constexpr,
    LINES: tl.constexpr, SPAN: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """g_s = GRADIENT_SCALE · Σ weight(o, s) gradient_o   over the output pixels o that read source pixel s, then Adam and the clamp with g.

    All are [N, H, W, C] in memory, but for the gradient with BLOCKS, see `adjoint`. NaN stays NaN.
    """
    line, place = element(LINES, SPAN)
    inside = (line < lines) & (place < pitch)
    g = GRADIENT_SCALE * adjoint(
        gradient, rows, step, line, place, inside, pitch, height, width,
        image_stride, channel_stride, two_lines, line_stride, two_pixels, pixel_stride, CHANNELS, LINES, SPAN, BLOCKS,
    )  # fmt: skip

    # Loaded this late because the gather needs the registers: before it, half as many programs would fit a multiprocessor.
    offset = line.to(tl.int64) * pitch + place
    m = tl.load(exp_avg + offset, mask=inside)
    v = tl.load(exp_avg_sq + offset, mask=inside)
    x = tl.load(images + offset, mask=inside)
    rate, root = _adam_rates(learning_rates, step, BETA1, BETA2)
    lowest = tl.load(low + place % CHANNELS, mask=inside)
    highest = tl.load(high + place % CHANNELS, mask=inside)
    x, m, v = _adam_step(x, g, m, v, rate, root, lowest, highest, BETA1, BETA2, EPS)
    tl.store(exp_avg + offset, m, mask=inside)
    tl.store(exp_avg_sq + offset, v, mask=inside)
    tl.store(images + offset, x, mask=inside)


def view_adam_clip_(
    images: Tensor,  # [N, C, H, W] float32, changed in place
    gradient: Tensor,  # [N, C, H, W] or [N, C, H/2, 2, W/2, 2] float32, bfloat16 or float16, with respect to the view
    exp_avg: Tensor,  # [N, C, H, W] float32, changed in place
    exp_avg_sq: Tensor,  # [N, C, H, W] float32, changed in place
    rows: Tensor,  # [T, 7] int32
    learning_rates: Tensor,  # [T] float32
    step: Tensor,  # [] int64, counted from 0
    low: Tensor,  # [C] float32
    high: Tensor,  # [C] float32
    loss_scale: float,
    beta1: float,
    beta2: float,
    eps: float,
) -> None:
    """One launch; arguments as in dwa_fast.ops.view_adam_clip_. Tensors that are not channels-last are copied, and copied back."""
    if images.numel() == 0:
        return
    count, channels, height, width = images.shape
    lines, pitch = count * height, width * channels
    grid, tile = cut(lines, pitch)
    given = (images, exp_avg, exp_avg_sq)
    x, m, v = (channels_last(tensor) for tensor in given)
    blocks = gradient.dim() > images.dim()
    gradient, strides = (gradient, gradient.stride()) if blocks else (channels_last(gradient), [0] * 6)
    with on_device_of(images):
        _view_adam_clip_kernel[grid](
            x, gradient, m, v, rows.contiguous(), learning_rates, step, low, high, lines, pitch, height, width, *strides,
            CHANNELS=channels, BLOCKS=blocks, GRADIENT_SCALE=1 / loss_scale, BETA1=beta1, BETA2=beta2, EPS=eps, **tile, num_warps=WARPS,
        )  # fmt: skip
    for tensor, worked_on in zip(given, (x, m, v), strict=True):
        if worked_on is not tensor:
            tensor.copy_(worked_on)
