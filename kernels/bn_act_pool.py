"""Triton twin of dwa_fast.ops.bn_act_pool: BatchNorm in eval mode, activation, pooling and the shifted moments in one pass each way.

Features are channels-last. A program takes some channels of some pixels; what neighbouring windows share comes from the cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dwa_fast.kernels.bn_act import backward_registers
from dwa_fast.kernels.bn_layer import activated, activation_gradient, constants, parameter_gradients, per_channel
from dwa_fast.kernels.layout import ALIGNED, WARPS, channels_last, laid_out_like, on_device_of, tiles
from dwa_fast.kernels.partial_sums import add_up, sums_to_write

_CHANNELS = 64  # 128 bytes of bfloat16
_TILE = 1024  # elements of z, in the backward pass of y, at a time: 8 per thread, and a load of 16 bytes for each pixel or window
_TILES_EACH = 4  # of a program that leaves no sums
_MOST = 2**31 - 2**24  # pixels: they are counted in 32 bits


@triton.jit(do_not_specialize=["count", "programs"])
def _bn_act_pool_forward_kernel(
    y, z, index, partials, mean, var, weight, bias, slope, eps,
    count, height, width, channels, pooled_height, pooled_width, lines, columns, programs,
    ACTIVATION: tl.constexpr, WINDOW: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr, EXTENT: tl.constexpr,
    AVERAGES: tl.constexpr, BLOCK_WINDOWS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """z = max f(a(y − m) + β) over each window, index its place there; where asked partials = (Σ(y − m), Σ(y − m)²) over its pixels.

    With AVERAGES z is their mean, and there is no index.
    `count` windows lie in `lines` and `columns` of each image. Those beyond the pooled ones are there for the sums, of which each has its
    stride² pixels; a place is the first of equals, or the last NaN, as PyTorch chooses.
    """
    channel = tl.program_id(1) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    used = channel < channels
    m, a, b = constants(mean, var, weight, bias, eps, channel, used)
    s = None if slope is None else tl.load(slope + channel, mask=used, other=0.0)
    if partials is not None:
        first = tl.zeros([BLOCK_WINDOWS, BLOCK_CHANNELS], dtype=tl.float32)
        second = tl.zeros([BLOCK_WINDOWS, BLOCK_CHANNELS], dtype=tl.float32)
    start = tl.program_id(0) * BLOCK_WINDOWS
    while start < count:
        each = start + tl.arange(0, BLOCK_WINDOWS)
        i, j = each // columns % lines, each % columns
        image = (each // columns // lines).to(tl.int64)
        top, left = i * STRIDE - PADDING, j * STRIDE - PADDING
        best = tl.full([BLOCK_WINDOWS, BLOCK_CHANNELS], 0.0 if AVERAGES else float("-inf"), tl.float32)
        place = (tl.maximum(-top, 0) * WINDOW + tl.maximum(-left, 0))[:, None] + tl.zeros([BLOCK_WINDOWS, BLOCK_CHANNELS], tl.int32)
        for down in range(EXTENT):  # not unrolled: a line of a window at a time keeps to the registers
            h = top + down
            exists = (each < count) & (h >= 0) & (h < height)
            line = (image * height + h) * width
            for right in tl.static_range(EXTENT):
                w = left + right
                inside = (exists & (w >= 0) & (w < width))[:, None] & used[None, :]
                value = tl.load(y + (line + w)[:, None] * channels + channel[None, :], mask=inside, other=0.0).to(tl.float32)
                shifted = tl.where(inside, value - m[None, :], 0.0)
                if partials is not None and right >= PADDING and right < PADDING + STRIDE:
                    own = tl.where((down >= PADDING) & (down < PADDING + STRIDE), shifted, 0.0)
                    first += own
                    second += own * own
                if right < WINDOW:
                    out = activated(tl.fma(shifted, a[None, :], b[None, :]), s, ACTIVATION)
                    out = out.to(z.dtype.element_ty).to(tl.float32)
                    counts = inside & (down < WINDOW)
                    if AVERAGES:
                        best += tl.where(counts, out, 0.0)
                    else:
                        above = counts & ((out > best) | (out != out))
                        best = tl.where(above, out, best)
                        place = tl.where(above, down * WINDOW + right, place)
        written = ((each < count) & (i < pooled_height) & (j < pooled_width))[:, None] & used[None, :]
        to = ((image * pooled_height + i) * pooled_width + j)[:, None] * channels + channel[None, :]
        if AVERAGES:
            best = best / (WINDOW * WINDOW)
        else:
            tl.store(index + to, place.to(tl.uint8), mask=written)
        tl.store(z + to, best.to(z.dtype.element_ty), mask=written)
        start += programs * BLOCK_WINDOWS
    if partials is not None:
        row = partials + tl.program_id(0).to(tl.int64) * channels + channel
        tl.store(row, tl.sum(first, axis=0), mask=used)
        tl.store(row + programs.to(tl.int64) * channels, tl.sum(second, axis=0), mask=used)


@triton.jit(do_not_specialize=["count", "programs"])
def _bn_act_pool_backward_kernel(
    grad_z, grad_alias, grad_sums, y, index, grad_y, partials, mean, var, weight, bias, slope, eps,
    count, height, width, channels, pooled_height, pooled_width, programs, moment_stride,
    ACTIVATION: tl.constexpr, WINDOW: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr, REACH: tl.constexpr,
    AVERAGES: tl.constexpr, BLOCK_PIXELS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """g = f'(x)·Σ grad_z over the windows that chose the pixel,   grad_y = a·g + gs1 + 2·gs2·(y − m);   x = a(y − m) + β.

    With AVERAGES g is f'(x)·grad_z/k² of the pixel's own window of k × k.
    With grad_alias grad_z stands for their sum, rounded to their precision, as PyTorch would have added them.
    Where asked, partials = (Σ g·(y − m), Σ g[, Σ grad·min(x, 0) with a slope]) over the `count` pixels' part of this program.
    """
    channel = tl.program_id(1) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    used = channel < channels
    m, a, b = constants(mean, var, weight, bias, eps, channel, used)
    s = None if slope is None else tl.load(slope + channel, mask=used, other=0.0)
    if grad_sums is not None:
        gs1 = tl.load(grad_sums + channel, mask=used, other=0.0).to(tl.float32)
        gs2 = 2.0 * tl.load(grad_sums + moment_stride + channel, mask=used, other=0.0).to(tl.float32)
    if partials is not None:
        first = tl.zeros([BLOCK_PIXELS // 2, BLOCK_CHANNELS], dtype=tl.float32)
        second = tl.zeros([BLOCK_PIXELS // 2, BLOCK_CHANNELS], dtype=tl.float32)
        if slope is not None:
            third = tl.zeros([BLOCK_PIXELS // 2, BLOCK_CHANNELS], dtype=tl.float32)
    start = tl.program_id(0) * BLOCK_PIXELS
    while start < count:
        pixel = start + tl.arange(0, BLOCK_PIXELS)
        image = (pixel // width // height).to(tl.int64)
        h, w = pixel // width % height + PADDING, pixel % width + PADDING
        inside = (pixel < count)[:, None] & used[None, :]
        at = pixel.to(tl.int64)[:, None] * channels + channel[None, :]
        if grad_sums is not None or partials is not None or ACTIVATION != "none":
            shifted = tl.load(y + at, mask=inside, other=0.0).to(tl.float32) - m[None, :]
        gradient = tl.zeros([BLOCK_PIXELS, BLOCK_CHANNELS], dtype=tl.float32)
        for before in range(REACH):  # neither loop is unrolled: that keeps to the registers
            i = h // STRIDE - (REACH - 1 - before)
            for beside in range(REACH):
                j = w // STRIDE - (REACH - 1 - beside)
                down, right = h - i * STRIDE, w - j * STRIDE
                exists = (i >= 0) & (i < pooled_height) & (down < WINDOW) & (j >= 0) & (j < pooled_width) & (right < WINDOW)
                holds = inside & exists[:, None]
                place = ((image * pooled_height + i) * pooled_width + j)[:, None] * channels + channel[None, :]
                part = tl.load(grad_z + place, mask=holds, other=0.0).to(tl.float32)
                if grad_alias is not None:
                    part += tl.load(grad_alias + place, mask=holds, other=0.0).to(tl.float32)
                    part = part.to(grad_z.dtype.element_ty).to(tl.float32)
                if AVERAGES:
                    gradient += part / (WINDOW * WINDOW)
                else:
                    chosen = tl.load(index + place, mask=holds, other=0).to(tl.int32) == (down * WINDOW + right)[:, None]
                    gradient += tl.where(holds & chosen, part, 0.0)
        if ACTIVATION != "none":
            x = tl.fma(shifted, a[None, :], b[None, :])
            if partials is not None and slope is not None:
                below = tl.where(inside & ~(x > 0.0), gradient * x, 0.0)
                third += tl.sum(tl.reshape(below, [2, BLOCK_PIXELS // 2, BLOCK_CHANNELS]), axis=0)
            gradient = activation_gradient(x, gradient, s, ACTIVATION)
        if partials is not None:
            halves = tl.reshape(gradient, [2, BLOCK_PIXELS // 2, BLOCK_CHANNELS])
            first += tl.sum(halves * tl.reshape(shifted, [2, BLOCK_PIXELS // 2, BLOCK_CHANNELS]), axis=0)
            second += tl.sum(halves, axis=0)
        if grad_y is not None:
            out = gradient * a[None, :]
            if grad_sums is not None:
                out = tl.fma(gradient, a[None, :], tl.fma(shifted, gs2[None, :], gs1[None, :]))
            tl.store(grad_y + at, out.to(grad_y.dtype.element_ty), mask=inside)
        start += programs * BLOCK_PIXELS
    if partials is not None:
        row = partials + tl.program_id(0).to(tl.int64) * channels + channel
        tl.store(row, tl.sum(first, axis=0), mask=used)
        tl.store(row + programs.to(tl.int64) * channels, tl.sum(second, axis=0), mask=used)
        if slope is not None:
            tl.store(row + 2 * programs.to(tl.int64) * channels, tl.sum(third, axis=0), mask=used)


def registers(activation: str) -> int:
    """Of a thread of the forward kernel, compiled for sm_90, at most."""
    return 160 if activation in ("gelu", "hardswish") else 128


def bn_act_pool_forward(
    y: Tensor,  # [N, C, H, W] float32, bfloat16 or float16
    mean: Tensor,  # [C] float32
    var: Tensor,  # [C] float32
    weight: Tensor | None,  # [C] float32
    bias: Tensor | None,  # [C] float32
    eps: float,
    activation: str,
    slope: Tensor | None,  # [1] or [C] float32, with leaky_relu
    window: int,
    stride: int,
    padding: int,
    partials: Tensor | None = None,  # [2, R, C] float32, written
    with_sums: bool = True,
    averages: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """z [N, C, H', W'], sums [2, C] float32 or, not with_sums, empty, and the place of each z in its window, uint8 like z; none of means.

    One launch, as bn_act_forward, and as many rows of partial sums; without `partials` another one, which adds them up.
    """
    (images, channels, height, width), y = y.shape, channels_last(y)
    shape = images, channels, *((size + 2 * padding - window) // stride + 1 for size in (height, width))
    z = torch.empty(shape, dtype=y.dtype, device=y.device, memory_format=torch.channels_last)
    index = torch.empty(0, dtype=torch.uint8, device=y.device) if averages else torch.empty_like(z, dtype=torch.uint8)
    if y.numel() == 0:
        if partials is not None:
            partials.zero_()
        return z, torch.zeros((2, channels) if with_sums else 0, device=y.device), index
    _check_size(y)
    sums = torch.empty((2, channels) if with_sums else 0, dtype=torch.float32, device=y.device)
    rows = sums_to_write(partials, tiles(y, registers=registers(activation)), y, 2) if with_sums else None
    lines, columns = (max(pooled, triton.cdiv(size, stride)) for pooled, size in zip(z.shape[2:], (height, width), strict=True))
    block, windows = min(_CHANNELS, triton.next_power_of_2(channels)), images * lines * columns
    programs = triton.cdiv(triton.cdiv(windows, _TILE // block), _TILES_EACH) if rows is None else rows.shape[1]
    with on_device_of(y):
        _bn_act_pool_forward_kernel[(programs, triton.cdiv(channels, block))](
            y, z, None if averages else index, rows, mean, var, weight, bias, per_channel(slope, channels), eps,
            windows, height, width, channels, *z.shape[2:], lines, columns, programs,
            ACTIVATION=activation, WINDOW=window, STRIDE=stride, PADDING=padding, EXTENT=max(window, padding + stride),
            AVERAGES=averages, BLOCK_WINDOWS=_TILE // block, BLOCK_CHANNELS=block, num_warps=WARPS,
        )  # fmt: skip
        if rows is not None and partials is None:
            add_up(rows, sums)
    return z, sums, index


def bn_act_pool_backward(
    grad_z: Tensor,  # [N, C, H', W']
    grad_sums: Tensor | None,  # [2, C] float32; None: zero
    y: Tensor,  # [N, C, H, W]
    mean: Tensor,  # [C] float32
    var: Tensor,  # [C] float32
    weight: Tensor | None,  # [C] float32
    bias: Tensor | None,  # [C] float32
    eps: float,
    index: Tensor,  # uint8 [N, C, H', W'] of the forward pass; of means [0]
    activation: str,
    slope: Tensor | None,  # [1] or [C] float32, with leaky_relu
    window: int,
    stride: int,
    padding: int,
    parameters: bool = False,  # whether the gradients of γ, β and the slope are wanted
    grad_alias: Tensor | None = None,  # [N, C, H', W']: added to grad_z
    averages: bool = False,
    with_y: bool = True,  # whether grad_y is wanted
    shares: Tensor | None = None,  # [2, C] float32, written with the gradients of γ and β: see `partial_sums.add_up`
) -> tuple[Tensor, Tensor, Tensor]:
    """grad_y like y; the gradients of γ and β, [2, C], and of the slope.

    What is not wanted is empty. One launch; with the gradients of γ and β a second one, which adds up the programs' partial sums.
    """
    channels, (height, width) = y.shape[1], y.shape[2:]
    like, y, grad_z = y, channels_last(y), channels_last(grad_z)
    grad_alias = None if grad_alias is None else channels_last(grad_alias)
    sums = 0 if not parameters else 2 if slope is None else 3
    grad_parameters = torch.empty((sums, channels) if parameters else 0, dtype=torch.float32, device=y.device)
    if y.numel() == 0:
        return torch.empty_like(like) if with_y else y.new_empty(0), *parameter_gradients(grad_parameters.zero_(), slope)
    _check_size(y)
    if grad_sums is not None and grad_sums.stride(1) != 1:
        grad_sums = grad_sums.contiguous()
    grad_y = torch.empty_like(y) if with_y else None
    partials = sums_to_write(None, tiles(y, registers=backward_registers(activation)), y, sums) if parameters else None
    block = min(_CHANNELS, triton.next_power_of_2(channels))
    pixels = y.numel() // channels
    tile = _TILE if channels % ALIGNED == 0 or partials is None else _TILE // 2  # sums, and addresses of single elements: many registers
    programs = triton.cdiv(triton.cdiv(pixels, tile // block), _TILES_EACH) if partials is None else partials.shape[1]
    with on_device_of(y):
        _bn_act_pool_backward_kernel[(programs, triton.cdiv(channels, block))](
            grad_z, grad_alias, grad_sums, y, None if averages else index, grad_y, partials,
            mean, var, weight, bias, per_channel(slope, channels), eps,
            pixels, height, width, channels, *grad_z.shape[2:], programs, 0 if grad_sums is None else grad_sums.stride(0),
            ACTIVATION=activation, WINDOW=window, STRIDE=stride, PADDING=padding, REACH=triton.cdiv(window, stride),
            AVERAGES=averages, BLOCK_PIXELS=tile // block, BLOCK_CHANNELS=block, num_warps=WARPS,
        )  # fmt: skip
        if partials is not None:
            add_up(partials, grad_parameters, var, eps, weight, shares, pixels)
    return y.new_empty(0) if grad_y is None else laid_out_like(grad_y, like), *parameter_gradients(grad_parameters, slope)


def _check_size(y: Tensor) -> None:
    pixels = y.numel() // y.shape[1]
    if pixels > _MOST:
        raise ValueError(f"y must have at most {_MOST} pixels in all images together, got {pixels}")
