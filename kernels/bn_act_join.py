"""Triton twin of dwa_fast.ops.bn_act_join: two BatchNorm layers in eval mode, the sum's activation and both layers' shifted moments in one
pass over the features; the gradients, where asked those of γ, β and the slope too, in a second one.

Features are channels-last, cut into tiles as bn_act's.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dwa_fast.kernels.bn_layer import activated, activation_gradient, constants, gradient_of_z, parameter_gradients, per_channel
from dwa_fast.kernels.layout import (
    BLOCK_COLUMNS,
    BLOCK_ROWS,
    WARPS,
    channels_last,
    gradients_to_read,
    laid_out_like,
    left_behind,
    on_device_of,
    tiles,
)
from dwa_fast.kernels.partial_sums import add_up, sums_to_write

_ROWS = BLOCK_ROWS // 2  # of a tile: two features, and four sums of them, take the registers of one with twice the rows


@triton.jit(do_not_specialize=["count", "rows", "programs"])
def _bn_act_join_forward_kernel(
    y, skip, z, partials, skip_partials, mean, var, weight, bias, eps, skip_mean, skip_var, skip_weight, skip_bias, skip_eps, slope,
    count, rows, columns, channels, programs,
    ACTIVATION: tl.constexpr, RAGGED: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """z = f(a(y − m) + a'(y' − m') + β + β'),   where y' is the skip.

    Where asked, partials = (Σ(y − m), Σ(y − m)²) over the rows of this program, and so of y'.
    """
    column = tl.program_id(0) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    used = column < columns
    channel = column % channels
    m, a, b = constants(mean, var, weight, bias, eps, channel, used)
    skip_m, skip_a, skip_b = constants(skip_mean, skip_var, skip_weight, skip_bias, skip_eps, channel, used)
    b += skip_b
    s = None if slope is None else tl.load(slope + channel, mask=used, other=0.0)
    row = tl.arange(0, BLOCK_ROWS)
    inner = row[:, None] * columns + column[None, :]
    if partials is not None:
        first = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], dtype=tl.float32)
        second = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], dtype=tl.float32)
        skip_first = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], dtype=tl.float32)
        skip_second = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], dtype=tl.float32)
    start = tl.program_id(1) * BLOCK_ROWS
    while start < rows:
        base = start.to(tl.int64) * columns
        inside = (start + row < rows)[:, None] & used[None, :]
        if RAGGED:
            inside = inside & (inner < left_behind(count, base))
        value = tl.load(y + base + inner, mask=inside, other=0.0).to(tl.float32)
        skip_value = tl.load(skip + base + inner, mask=inside, other=0.0).to(tl.float32)
        shifted = value - m[None, :]
        skip_shifted = skip_value - skip_m[None, :]
        if partials is not None:  # a place that does not exist adds nothing; masked always, one launch would spill on sm_100
            shifted = tl.where(inside, shifted, 0.0)
            skip_shifted = tl.where(inside, skip_shifted, 0.0)
            first += shifted
            second += shifted * shifted
            skip_first += skip_shifted
            skip_second += skip_shifted * skip_shifted
        x = tl.fma(shifted, a[None, :], tl.fma(skip_shifted, skip_a[None, :], b[None, :]))
        tl.store(z + base + inner, activated(x, s, ACTIVATION).to(z.dtype.element_ty), mask=inside)
        start += programs * BLOCK_ROWS
    if partials is not None:
        place = tl.program_id(1) * columns + column
        tl.store(partials + place, tl.sum(first, axis=0), mask=used)
        tl.store(partials + programs * columns + place, tl.sum(second, axis=0), mask=used)
        tl.store(skip_partials + place, tl.sum(skip_first, axis=0), mask=used)
        tl.store(skip_partials + programs * columns + place, tl.sum(skip_second, axis=0), mask=used)


@triton.jit
def _moment_gradients(grad_sums, moment_stride, channel, used):
    """gs1 and 2·gs2 of the columns of a tile."""
    constant = tl.load(grad_sums + channel, mask=used, other=0.0).to(tl.float32)
    return constant, 2.0 * tl.load(grad_sums + moment_stride + channel, mask=used, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["count", "rows", "programs", "height", "width"])
def _bn_act_join_backward_kernel(
    grad_z, grad_alias, grad_later, later_mask, grad_sums, skip_grad_sums, y, skip, grad_y, grad_skip, partials,
    mean, var, weight, bias, eps, skip_mean, skip_var, skip_weight, skip_bias, skip_eps, slope,
    count, rows, columns, channels, programs, height, width, moment_stride, skip_moment_stride,
    ACTIVATION: tl.constexpr, Z_STRIDE: tl.constexpr, ALIAS_STRIDE: tl.constexpr, LATER_STRIDE: tl.constexpr,
    RAGGED: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """g = f'(x)·grad_z,   grad_y = a·g + gs1 + 2·gs2·(y − m),   grad_skip = a'·g + gs1' + 2·gs2'·(y' − m')   with y', the skip.

    grad_z stands for the sum that `gradient_of_z` gives.
    Where asked, partials = (Σ g·(y − m), Σ g, Σ g·(y' − m')[, Σ grad_z·min(x, 0) with a slope]) over the rows of this program.
    """
    column = tl.program_id(0) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    used = column < columns
    channel = column % channels
    m, a, b = constants(mean, var, weight, bias, eps, channel, used)
    skip_m, skip_a, skip_b = constants(skip_mean, skip_var, skip_weight, skip_bias, skip_eps, channel, used)
    b += skip_b
    s = None if slope is None else tl.load(slope + channel, mask=used, other=0.0)
    if grad_sums is not None:
        gs1, gs2 = _moment_gradients(grad_sums, moment_stride, channel, used)
    if skip_grad_sums is not None:
        skip_gs1, skip_gs2 = _moment_gradients(skip_grad_sums, skip_moment_stride, channel, used)
    row = tl.arange(0, BLOCK_ROWS)
    inner = row[:, None] * columns + column[None, :]
    if partials is not None:
        first = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], dtype=tl.float32)
        second = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], dtype=tl.float32)
        third = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], dtype=tl.float32)
        if slope is not None:
            fourth = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], dtype=tl.float32)
    start = tl.program_id(1) * BLOCK_ROWS
    while start < rows:
        base = start.to(tl.int64) * columns
        inside = (start + row < rows)[:, None] & used[None, :]
        if RAGGED:
            inside = inside & (inner < left_behind(count, base))
        gradient = gradient_of_z(
            grad_z, grad_alias, grad_later, later_mask, start, base, inner, inside, channel, count, rows, columns, channels, height, width,
            Z_STRIDE, ALIAS_STRIDE, LATER_STRIDE, RAGGED, BLOCK_ROWS, BLOCK_COLUMNS
        )  # fmt: skip
        if grad_sums is not None or partials is not None or ACTIVATION != "none":
            shifted = tl.load(y + base + inner, mask=inside, other=0.0).to(tl.float32) - m[None, :]
        if skip_grad_sums is not None or partials is not None or ACTIVATION != "none":
            skip_shifted = tl.load(skip + base + inner, mask=inside, other=0.0).to(tl.float32) - skip_m[None, :]
        if ACTIVATION != "none":
            x = tl.fma(shifted, a[None, :], tl.fma(skip_shifted, skip_a[None, :], b[None, :]))
            if partials is not None and slope is not None:
                fourth += tl.where(inside & ~(x > 0.0), gradient * x, 0.0)
            gradient = activation_gradient(x, gradient, s, ACTIVATION)
        if partials is not None:
            first += gradient * shifted
            second += gradient
            third += gradient * skip_shifted
        out = gradient * a[None, :]
        if grad_sums is not None:
            out = tl.fma(gradient, a[None, :], tl.fma(shifted, gs2[None, :], gs1[None, :]))
        tl.store(grad_y + base + inner, out.to(grad_y.dtype.element_ty), mask=inside)
        out = gradient * skip_a[None, :]
        if skip_grad_sums is not None:
            out = tl.fma(gradient, skip_a[None, :], tl.fma(skip_shifted, skip_gs2[None, :], skip_gs1[None, :]))
        tl.store(grad_skip + base + inner, out.to(grad_skip.dtype.element_ty), mask=inside)
        start += programs * BLOCK_ROWS
    if partials is not None:
        place = partials + tl.program_id(1) * columns + column
        tl.store(place, tl.sum(first, axis=0), mask=used)
        tl.store(place + programs * columns, tl.sum(second, axis=0), mask=used)
        tl.store(place + 2 * programs * columns, tl.sum(third, axis=0), mask=used)
        if slope is not None:
            tl.store(place + 3 * programs * columns, tl.sum(fourth, axis=0), mask=used)


def registers(activation: str) -> int:
    """Of a thread of the forward kernel, compiled for sm_90, at most."""
    return 128


def backward_registers(activation: str) -> int:
    """Of a thread of the backward kernel where it leaves sums."""
    return 160 if activation in ("silu", "hardswish", "gelu_tanh") else 128


def bn_act_join_forward(
    y: Tensor,  # [N, C, H, W] float32, bfloat16 or float16
    mean: Tensor,  # [C] float32
    var: Tensor,  # [C] float32
    weight: Tensor | None,  # [C] float32
    bias: Tensor | None,  # [C] float32
    eps: float,
    skip: Tensor,  # like y; those of its layer follow
    skip_mean: Tensor,
    skip_var: Tensor,
    skip_weight: Tensor | None,
    skip_bias: Tensor | None,
    skip_eps: float,
    activation: str,
    slope: Tensor | None,  # [1] or [C] float32, with leaky_relu
    partials: Tensor | None = None,  # [2, R, C] float32, written
    skip_partials: Tensor | None = None,  # [2, R, C] float32, written; with partials alone
    with_sums: bool = True,
) -> tuple[Tensor, Tensor]:
    """z like y, and the sums of both layers, [2, 2, C] float32; not with_sums they are empty.

    One launch, as bn_act_forward; without `partials` two more, which add up those of each layer.
    """
    channels = y.shape[1]
    like, y, skip = y, channels_last(y), channels_last(skip)
    z = torch.empty_like(y)
    given = [] if partials is None or skip_partials is None else [partials, skip_partials]
    if y.numel() == 0:
        for each in given:
            each.zero_()
        return torch.empty_like(like), torch.zeros((2, 2, channels) if with_sums else 0, device=y.device)
    cut = tiles(y, registers=registers(activation) if with_sums else None)
    sums = torch.empty((2, 2, channels) if with_sums else 0, dtype=torch.float32, device=y.device)
    left = [sums_to_write(each, cut, y, 2) for each in given or (None, None)] if with_sums else []
    with on_device_of(y):
        _bn_act_join_forward_kernel[(cut.column_blocks, cut.programs)](
            y, skip, z, *(left or (None, None)), mean, var, weight, bias, eps, skip_mean, skip_var, skip_weight, skip_bias, skip_eps,
            per_channel(slope, channels), y.numel(), cut.rows, cut.columns, channels, cut.programs,
            ACTIVATION=activation, RAGGED=y.numel() % cut.columns != 0,
            BLOCK_ROWS=_ROWS if with_sums else BLOCK_ROWS, BLOCK_COLUMNS=BLOCK_COLUMNS, num_warps=WARPS,
        )  # fmt: skip
        if not given:
            for rows, both in zip(left, sums, strict=True):
                add_up(rows, both)
    return laid_out_like(z, like), sums


def bn_act_join_backward(
    grad_z: Tensor,  # [N, C, H, W]
    grad_sums: Tensor | None,  # [2, C] float32; None: zero
    skip_grad_sums: Tensor | None,  # [2, C] float32; None: zero
    y: Tensor,  # [N, C, H, W]
    mean: Tensor,  # [C] float32
    var: Tensor,  # [C] float32
    weight: Tensor | None,  # [C] float32
    bias: Tensor | None,  # [C] float32
    eps: float,
    skip: Tensor,  # like y; those of its layer follow
    skip_mean: Tensor,
    skip_var: Tensor,
    skip_weight: Tensor | None,
    skip_bias: Tensor | None,
    skip_eps: float,
    activation: str,
    slope: Tensor | None,  # [1] or [C] float32, with leaky_relu
    parameters: bool = False,  # whether the gradients of γ, β, γ', β' and the slope are wanted
    grad_alias: Tensor | None = None,  # [N, C, ⌈H/s⌉, ⌈W/s⌉]: added to grad_z in every s-th row and column
    alias_stride: int = 1,  # s
    grad_later: Tensor | None = None,  # this and the next one as of `bn_act_backward`
    later_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """grad_y and grad_skip; the gradients of γ, of β and of β', and of γ', [3, C], and of the slope, where they are wanted, else empty.

    One launch; with the gradients of γ and β two more, which add up the programs' partial sums of each layer.
    """
    channels = y.shape[1]
    like, skip_like = y, skip
    y, skip = channels_last(y), channels_last(skip)
    count = 0 if not parameters else 3 if slope is None else 4
    sums = torch.empty((count, channels) if parameters else 0, dtype=torch.float32, device=y.device)
    grad_y, grad_skip = torch.empty_like(y), torch.empty_like(skip)
    if y.numel() == 0:
        sums.zero_()
    else:
        if grad_sums is not None and grad_sums.stride(1) != 1:
            grad_sums = grad_sums.contiguous()
        if skip_grad_sums is not None and skip_grad_sums.stride(1) != 1:
            skip_grad_sums = skip_grad_sums.contiguous()
        read, strides = gradients_to_read(y, grad_z, grad_alias, alias_stride, grad_later, later_mask)
        cut = tiles(y, registers=backward_registers(activation) if parameters else None)
        partials = sums_to_write(None, cut, y, count) if parameters else None
        with on_device_of(y):
            _bn_act_join_backward_kernel[(cut.column_blocks, cut.programs)](
                *read, grad_sums, skip_grad_sums, y, skip, grad_y, grad_skip, partials,
                mean, var, weight, bias, eps, skip_mean, skip_var, skip_weight, skip_bias, skip_eps, per_channel(slope, channels),
                y.numel(), cut.rows, cut.columns, channels, cut.programs, *y.shape[2:],
                0 if grad_sums is None else grad_sums.stride(0), 0 if skip_grad_sums is None else skip_grad_sums.stride(0),
                ACTIVATION=activation, **strides, RAGGED=y.numel() % cut.columns != 0,
                BLOCK_ROWS=_ROWS, BLOCK_COLUMNS=BLOCK_COLUMNS, num_warps=WARPS,
            )  # fmt: skip
            if partials is not None:
                add_up(partials[:2], sums[:2], var, eps)
                add_up(partials[2:], sums[2:], skip_var, skip_eps)
    return laid_out_like(grad_y, like), laid_out_like(grad_skip, skip_like), *parameter_gradients(sums, slope)
