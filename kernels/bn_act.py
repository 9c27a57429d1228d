"""Triton twin of dwa_fast.ops.bn_act: BatchNorm in eval mode, skip, activation and the shifted moments in one pass over the features;
the gradients, where asked those of γ, β and the slope too, in a second one.

Features are channels-last. Since a row of `layout.Tiles` is a multiple of 16 elements, loads are 16 bytes wide and no byte of the mask
straddles two rows, whatever C is.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dwa_fast.kernels.layout import (
    BLOCK_COLUMNS,
    BLOCK_ROWS,
    WARPS,
    Tiles,
    channels_last,
    laid_out_like,
    on_device_of,
    sum_of_rows,
    tiles,
)

_FINAL_ROWS = 128
_FINAL_CHANNELS = 16


@triton.jit
def _constants(mean, var, weight, bias, eps, channel, used):
    """m, a = γ/√(v + ε) and β of the columns of a tile, float32; forward and backward share them, bit for bit."""
    m = tl.load(mean + channel, mask=used, other=0.0).to(tl.float32)
    v = tl.load(var + channel, mask=used, other=1.0).to(tl.float32)
    a = tl.div_rn(1.0, tl.sqrt_rn(v + eps))
    b = tl.zeros_like(a)
    if weight is not None:
        a = a * tl.load(weight + channel, mask=used, other=0.0).to(tl.float32)
    if bias is not None:
        b = tl.load(bias + channel, mask=used, other=0.0).to(tl.float32)
    return m, a, b


@triton.jit
def _activated(x, slope, ACTIVATION: tl.constexpr):
    """f(x); slope, [columns], is read by leaky_relu alone."""
    if ACTIVATION == "relu":
        return tl.where(x <= 0.0, 0.0, x)
    if ACTIVATION == "relu6":
        return tl.where(x <= 0.0, 0.0, tl.where(x >= 6.0, 6.0, x))
    if ACTIVATION == "silu":
        return tl.div_rn(x, 1.0 + tl.exp(-x))
    if ACTIVATION == "hardswish":
        return tl.div_rn(x * tl.where(x <= -3.0, 0.0, tl.where(x >= 3.0, 6.0, x + 3.0)), 6.0)
    if ACTIVATION == "gelu":
        return x * (0.5 * (1.0 + tl.erf(x * 0.7071067811865476)))
    if ACTIVATION == "gelu_tanh":  # x/(1 + e^(−2u)), u = √(2/π)(x + 0.044715 x³)
        return tl.div_rn(x, 1.0 + tl.exp(-1.5957691216057308 * x * (1.0 + 0.044715 * x * x)))
    if ACTIVATION == "leaky_relu":
        return tl.where(x > 0.0, x, x * slope[None, :])
    return x


@triton.jit
def _derived(x, gradient, slope, ACTIVATION: tl.constexpr):
    """f'(x)·gradient; at a corner the derivative that PyTorch takes."""
    if ACTIVATION == "relu":
        return tl.where(x <= 0.0, 0.0, gradient)
    if ACTIVATION == "relu6":
        return tl.where(tl.minimum(tl.maximum(x, 1.401298464324817e-45), 5.9999995) == x, gradient, 0.0)  # 0 < x < 6, without a spill
    if ACTIVATION == "silu":
        s = tl.div_rn(1.0, 1.0 + tl.exp(-x))
        return gradient * s * tl.fma(x, 1.0 - s, tl.full(s.shape, 1.0, tl.float32))
    if ACTIVATION == "hardswish":
        return gradient * tl.where(x <= -3.0, 0.0, tl.where(x >= 3.0, 1.0, tl.div_rn(x, 3.0) + 0.5))
    if ACTIVATION == "gelu":
        density = 0.3989422804014327 * tl.exp(-0.5 * x * x)
        return gradient * (0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * density)
    if ACTIVATION == "gelu_tanh":
        e = tl.exp(-1.5957691216057308 * x * (1.0 + 0.044715 * x * x))
        s = tl.div_rn(1.0, 1.0 + e)
        product = tl.where(e > 1e30, 0.0, s * (e * s))  # s(1 − s), without its cancellation
        return gradient * (s + x * product * (1.5957691216057308 * (1.0 + 0.134145 * x * x)))
    if ACTIVATION == "leaky_relu":
        return tl.where(x > 0.0, gradient, gradient * slope[None, :])
    return gradient


@triton.jit
def _bytes(start, rows, columns, count, base, RAGGED: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr):
    """Where the bytes of the mask of a tile lie behind byte base/8, and which of them exist."""
    row = tl.arange(0, BLOCK_ROWS)
    group = tl.program_id(0) * (BLOCK_COLUMNS // 8) + tl.arange(0, BLOCK_COLUMNS // 8)
    byte = row[:, None] * (columns // 8) + group[None, :]
    exists = (start + row < rows)[:, None] & (group * 8 < columns)[None, :]
    if RAGGED:
        exists = exists & (base + byte * 8 < count)
    return byte, exists


@triton.jit(do_not_specialize=["count", "rows", "programs"])
def _bn_act_forward_kernel(
    y, skip, z, bits, partials, mean, var, weight, bias, slope, eps,
    count, rows, columns, channels, programs,
    ACTIVATION: tl.constexpr, RAGGED: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """z = f(a(y − m) + β [+ skip]),   partials = (Σ(y − m), Σ(y − m)²) over the rows of this program.

    Bit i of the mask, in memory order, says whether a ReLU lets element i pass; NaN passes, as in PyTorch.
    """
    column = tl.program_id(0) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    used = column < columns
    channel = column % channels
    m, a, b = _constants(mean, var, weight, bias, eps, channel, used)
    s = None if slope is None else tl.load(slope + channel, mask=used, other=0.0)
    row = tl.arange(0, BLOCK_ROWS)
    inner = row[:, None] * columns + column[None, :]
    first = tl.zeros([BLOCK_ROWS // 2, BLOCK_COLUMNS], dtype=tl.float32)
    second = tl.zeros([BLOCK_ROWS // 2, BLOCK_COLUMNS], dtype=tl.float32)
    start = tl.program_id(1) * BLOCK_ROWS
    while start < rows:
        base = start.to(tl.int64) * columns
        inside = (start + row < rows)[:, None] & used[None, :]
        if RAGGED:
            inside = inside & (base + inner < count)
        value = tl.load(y + base + inner, mask=inside, other=0.0).to(tl.float32)
        if skip is not None:
            added = tl.load(skip + base + inner, mask=inside, other=0.0).to(tl.float32)
        shifted = tl.where(inside, value - m[None, :], 0.0)
        # Rows that one thread holds are added at once: half the registers that a sum per element of the tile would take.
        halves = tl.reshape(shifted, [2, BLOCK_ROWS // 2, BLOCK_COLUMNS])
        first += tl.sum(halves, axis=0)
        second += tl.sum(halves * halves, axis=0)
        out = tl.fma(shifted, a[None, :], b[None, :])
        if skip is not None:
            out += added
        if ACTIVATION == "relu":
            blocked = out <= 0.0
            out = tl.where(blocked, 0.0, out)
            if bits is not None:
                passes = tl.reshape((inside & ~blocked).to(tl.int32), [BLOCK_ROWS, BLOCK_COLUMNS // 8, 8])
                packed = tl.sum(passes << tl.arange(0, 8)[None, None, :], axis=2)
                byte, written = _bytes(start, rows, columns, count, base, RAGGED, BLOCK_ROWS, BLOCK_COLUMNS)
                tl.store(bits + base // 8 + byte, packed.to(tl.uint8), mask=written)
        else:
            out = _activated(out, s, ACTIVATION)
        tl.store(z + base + inner, out.to(z.dtype.element_ty), mask=inside)
        start += programs * BLOCK_ROWS
    place = partials + tl.program_id(1) * columns + column
    tl.store(place, tl.sum(first, axis=0), mask=used)
    tl.store(place + programs * columns, tl.sum(second, axis=0), mask=used)


@triton.jit(do_not_specialize=["count"])
def _bn_act_sums_kernel(partials, sums, var, eps, count, channels, BLOCK_ROWS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr):
    """sums_c = Σ partials over the `count` rows of sum program_id(1), always in the same order; with var, sum 0 is divided by √(v + ε)."""
    moment = tl.program_id(1)
    channel = tl.program_id(0) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    result = sum_of_rows(partials + moment * count * channels, count, channels, channel, BLOCK_ROWS, BLOCK_CHANNELS)
    if var is not None:
        v = tl.load(var + channel, mask=channel < channels, other=1.0).to(tl.float64)
        result = tl.where(moment == 0, result / tl.sqrt(v + eps), result)
    tl.store(sums + moment * channels + channel, result.to(tl.float32), mask=channel < channels)


@triton.jit(do_not_specialize=["count", "rows", "programs"])
def _bn_act_backward_kernel(
    grad_z, grad_again, grad_sums, y, skip, bits, grad_y, grad_skip, partials, mean, var, weight, bias, slope, eps,
    count, rows, columns, channels, programs, moment_stride,
    ACTIVATION: tl.constexpr, RAGGED: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """grad_skip = f'(x)·grad_z,   grad_y = a·f'(x)·grad_z + gs1 + 2·gs2·(y − m); without stored bits x comes from y and skip.

    With grad_again grad_z stands for their sum, rounded to their precision, as PyTorch would have added them.
    Where asked, partials = (Σ f'(x)·grad_z·(y − m), Σ f'(x)·grad_z[, Σ grad_z·min(x, 0) with a slope]) over the rows of this program.
    """
    column = tl.program_id(0) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    used = column < columns
    channel = column % channels
    m, a, b = _constants(mean, var, weight, bias, eps, channel, used)
    s = None if slope is None else tl.load(slope + channel, mask=used, other=0.0)
    if grad_sums is not None:
        gs1 = tl.load(grad_sums + channel, mask=used, other=0.0).to(tl.float32)
        gs2 = 2.0 * tl.load(grad_sums + moment_stride + channel, mask=used, other=0.0).to(tl.float32)
    row = tl.arange(0, BLOCK_ROWS)
    inner = row[:, None] * columns + column[None, :]
    if partials is not None:
        first = tl.zeros([BLOCK_ROWS // 2, BLOCK_COLUMNS], dtype=tl.float32)
        second = tl.zeros([BLOCK_ROWS // 2, BLOCK_COLUMNS], dtype=tl.float32)
        if slope is not None:
            third = tl.zeros([BLOCK_ROWS // 2, BLOCK_COLUMNS], dtype=tl.float32)
    start = tl.program_id(1) * BLOCK_ROWS
    while start < rows:
        base = start.to(tl.int64) * columns
        inside = (start + row < rows)[:, None] & used[None, :]
        if RAGGED:
            inside = inside & (base + inner < count)
        gradient = tl.load(grad_z + base + inner, mask=inside, other=0.0).to(tl.float32)
        if grad_again is not None:
            gradient += tl.load(grad_again + base + inner, mask=inside, other=0.0).to(tl.float32)
            gradient = gradient.to(grad_z.dtype.element_ty).to(tl.float32)
        if grad_sums is not None or partials is not None or (ACTIVATION != "none" and bits is None):
            shifted = tl.load(y + base + inner, mask=inside, other=0.0).to(tl.float32) - m[None, :]
        if ACTIVATION != "none":
            if bits is not None:
                byte, exists = _bytes(start, rows, columns, count, base, RAGGED, BLOCK_ROWS, BLOCK_COLUMNS)
                packed = tl.load(bits + base // 8 + byte, mask=exists, other=0).to(tl.int32)
                passes = (packed[:, :, None] >> tl.arange(0, 8)[None, None, :]) & 1
                gradient = tl.where(tl.reshape(passes, [BLOCK_ROWS, BLOCK_COLUMNS]) != 0, gradient, 0.0)
            else:
                x = tl.fma(shifted, a[None, :], b[None, :])
                if skip is not None:
                    x += tl.load(skip + base + inner, mask=inside, other=0.0).to(tl.float32)
                if partials is not None and slope is not None:
                    below = tl.where(inside & ~(x > 0.0), gradient * x, 0.0)
                    third += tl.sum(tl.reshape(below, [2, BLOCK_ROWS // 2, BLOCK_COLUMNS]), axis=0)
                gradient = _derived(x, gradient, s, ACTIVATION)
            if grad_skip is not None:
                tl.store(grad_skip + base + inner, gradient.to(grad_skip.dtype.element_ty), mask=inside)
        if partials is not None:
            halves = tl.reshape(gradient, [2, BLOCK_ROWS // 2, BLOCK_COLUMNS])
            first += tl.sum(halves * tl.reshape(shifted, [2, BLOCK_ROWS // 2, BLOCK_COLUMNS]), axis=0)
            second += tl.sum(halves, axis=0)
        out = gradient * a[None, :]
        if grad_sums is not None:
            out = tl.fma(gradient, a[None, :], tl.fma(shifted, gs2[None, :], gs1[None, :]))
        tl.store(grad_y + base + inner, out.to(grad_y.dtype.element_ty), mask=inside)
        start += programs * BLOCK_ROWS
    if partials is not None:
        place = partials + tl.program_id(1) * columns + column
        tl.store(place, tl.sum(first, axis=0), mask=used)
        tl.store(place + programs * columns, tl.sum(second, axis=0), mask=used)
        if slope is not None:
            tl.store(place + 2 * programs * columns, tl.sum(third, axis=0), mask=used)


def registers(has_skip: bool, activation: str) -> int:
    """Of a thread of the forward kernel, compiled for sm_90, at most: from this follows how many programs a GPU holds."""
    return 96 if has_skip or activation not in ("none", "relu", "relu6") else 72


def backward_registers(activation: str) -> int:
    """Of a thread of the backward kernel where it leaves sums."""
    return 160 if activation in ("relu6", "gelu_tanh") else 128


def sums_to_write(partials: Tensor | None, cut: Tiles, y: Tensor, sums: int) -> Tensor:  # [sums, programs · columns / C, C]
    """Where the programs leave that many sums per channel: what was given, if it fits, else new memory."""
    shape = sums, cut.programs * cut.columns // y.shape[1], y.shape[1]
    if partials is None:
        return torch.empty(shape, dtype=torch.float32, device=y.device)
    if partials.shape != shape or partials.dtype is not torch.float32 or not partials.is_contiguous():
        raise ValueError(f"partials must be contiguous float32 {list(shape)}, got {partials.dtype} {list(partials.shape)}")
    return partials


def add_up(
    partials: Tensor,  # [S, programs · columns / C, C]
    sums: Tensor,  # [S, C], written
    var: Tensor | None = None,  # [C]
    eps: float = 0.0,
) -> None:
    """Adds the programs' sums up; the first is divided by √(v + ε) where var is given."""
    _bn_act_sums_kernel[(triton.cdiv(sums.shape[1], _FINAL_CHANNELS), len(sums))](
        partials, sums, var, eps, partials.shape[1], sums.shape[1],
        BLOCK_ROWS=_FINAL_ROWS, BLOCK_CHANNELS=_FINAL_CHANNELS, num_warps=WARPS,
    )  # fmt: skip


def bn_act_forward(
    y: Tensor,  # [N, C, H, W] float32, bfloat16 or float16
    mean: Tensor,  # [C] float32
    var: Tensor,  # [C] float32
    weight: Tensor | None,  # [C] float32
    bias: Tensor | None,  # [C] float32
    eps: float,
    skip: Tensor | None,  # like y
    activation: str,
    slope: Tensor | None,  # [1] or [C] float32, with leaky_relu
    partials: Tensor | None = None,  # [2, R, C] float32, written
) -> tuple[Tensor, Tensor, Tensor]:
    """z like y, sums [2, C] float32, and with skip and ReLU the mask, uint8 [⌈numel/8⌉] in channels-last order (else empty).

    One launch, the pass over y, which leaves a row of partial sums per program; without `partials` another one, which adds them up.
    With it nothing is written to sums: they are the sums of its rows.
    """
    channels = y.shape[1]
    model, y = y, channels_last(y)
    skip = None if skip is None else channels_last(skip)
    keeps_mask = activation == "relu" and skip is not None
    z = torch.empty_like(y)
    bits = torch.empty(triton.cdiv(y.numel(), 8) if keeps_mask else 0, dtype=torch.uint8, device=y.device)
    if y.numel() == 0:
        if partials is not None:
            partials.zero_()
        return torch.empty_like(model), torch.zeros(2, channels, device=y.device), bits
    cut = tiles(y, registers=registers(skip is not None, activation))
    sums = torch.empty(2, channels, dtype=torch.float32, device=y.device)
    rows = sums_to_write(partials, cut, y, 2)
    with on_device_of(y):
        _bn_act_forward_kernel[(cut.column_blocks, cut.programs)](
            y, skip, z, bits if keeps_mask else None, rows, mean, var, weight, bias, _per_channel(slope, channels), eps,
            y.numel(), cut.rows, cut.columns, channels, cut.programs,
            ACTIVATION=activation, RAGGED=y.numel() % cut.columns != 0,
            BLOCK_ROWS=BLOCK_ROWS, BLOCK_COLUMNS=BLOCK_COLUMNS, num_warps=WARPS,
        )  # fmt: skip
        if partials is None:
            add_up(rows, sums)
    return laid_out_like(z, model), sums, bits


def bn_act_backward(
    grad_z: Tensor,  # [N, C, H, W]
    grad_sums: Tensor | None,  # [2, C] float32; None: zero
    y: Tensor,  # [N, C, H, W]
    mean: Tensor,  # [C] float32
    var: Tensor,  # [C] float32
    weight: Tensor | None,  # [C] float32
    bias: Tensor | None,  # [C] float32
    eps: float,
    skip: Tensor | None,  # like y: of the forward pass, where it had one before an activation other than ReLU
    mask: Tensor,  # uint8 [⌈numel/8⌉] of the forward pass where it had skip and ReLU
    has_skip: bool,
    activation: str,
    slope: Tensor | None,  # [1] or [C] float32, with leaky_relu
    parameters: bool = False,  # whether the gradients of γ, β and the slope are wanted
    grad_again: Tensor | None = None,  # [N, C, H, W]: added to grad_z
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """grad_y like y; grad_skip like y with skip and activation (else empty: it is grad_z); those of γ and β, [2, C], and of the slope.

    One launch; with the gradients of γ and β a second one, which adds up the programs' partial sums.
    """
    channels = y.shape[1]
    model, y, grad_z = y, channels_last(y), channels_last(grad_z)
    grad_again = None if grad_again is None else channels_last(grad_again)
    changes_skip, keeps_mask = has_skip and activation != "none", has_skip and activation == "relu"
    skip = channels_last(skip) if skip is not None and changes_skip and not keeps_mask else None
    sums = 0 if not parameters else 2 if slope is None else 3
    of_parameters = torch.empty((sums, channels) if parameters else 0, dtype=torch.float32, device=y.device)
    if y.numel() == 0:
        empty = torch.empty_like(model) if changes_skip else y.new_empty(0)
        return torch.empty_like(model), empty, *_of_layer(of_parameters.zero_(), slope)
    if grad_sums is not None and grad_sums.stride(1) != 1:
        grad_sums = grad_sums.contiguous()
    grad_y = torch.empty_like(y)
    grad_skip = torch.empty_like(y) if changes_skip else None
    cut = tiles(y, registers=backward_registers(activation) if parameters else None)
    partials = sums_to_write(None, cut, y, sums) if parameters else None
    with on_device_of(y):
        _bn_act_backward_kernel[(cut.column_blocks, cut.programs)](
            grad_z, grad_again, grad_sums, y, skip, mask if keeps_mask else None, grad_y, grad_skip, partials,
            mean, var, weight, bias, _per_channel(slope, channels), eps,
            y.numel(), cut.rows, cut.columns, channels, cut.programs, 0 if grad_sums is None else grad_sums.stride(0),
            ACTIVATION=activation, RAGGED=y.numel() % cut.columns != 0,
            BLOCK_ROWS=BLOCK_ROWS, BLOCK_COLUMNS=BLOCK_COLUMNS, num_warps=WARPS,
        )  # fmt: skip
        if partials is not None:
            add_up(partials, of_parameters, var, eps)
    behind = y.new_empty(0) if grad_skip is None else laid_out_like(grad_skip, model)
    return laid_out_like(grad_y, model), behind, *_of_layer(of_parameters, slope)


def _per_channel(slope: Tensor | None, channels: int) -> Tensor | None:
    return None if slope is None else slope.expand(channels).contiguous()


def _of_layer(sums: Tensor, slope: Tensor | None) -> tuple[Tensor, Tensor]:
    """Gradients of γ and β, [2, C], and of the slope, shaped like it; each empty where it is not wanted."""
    if slope is None or sums.dim() == 1:
        return sums, sums.new_empty(0)
    return sums[:2], sums[2] if len(slope) == sums.shape[1] else sums[2].sum(0, keepdim=True)
