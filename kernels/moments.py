"""Triton twin of dwa_fast.ops.moments: the shifted moments per channel in one read of the features, the gradient in one pass.

Memory is a matrix [rows, columns], whatever the layout. A contiguous tensor has one image per row, and C·H·W columns; a channels-last one
a whole number of pixels, so many that there are at least 64 columns, a multiple of 16. Column j belongs to channel ⌊j / inner⌋ mod C,
with inner = H·W or 1.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dwa_fast.kernels.layout import on_device_of

_BLOCK_COLUMNS = 64  # 128 bytes of bfloat16
_BLOCK_ROWS = 32  # a tile of 2048 elements: 16 per thread, two loads of 16 bytes in flight
_WARPS = 4
_PROGRAMS = 1024  # about what an A100, H100 or H200 holds at once; more tiles than that are looped over


@triton.jit(do_not_specialize=["count", "rows", "programs"])
def _forward_kernel(
    y, mean, partials, count, rows, columns, channels, inner, programs,
    RAGGED: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """partials = (Σ(y − m), Σ(y − m)²) of every column over the rows of this program."""
    column = tl.program_id(0) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    used = column < columns
    m = tl.load(mean + column // inner % channels, mask=used, other=0.0)
    row = tl.arange(0, BLOCK_ROWS)
    offset = row.to(tl.int64)[:, None] * columns + column[None, :]
    first = tl.zeros([BLOCK_ROWS // 2, BLOCK_COLUMNS], dtype=tl.float32)
    second = tl.zeros([BLOCK_ROWS // 2, BLOCK_COLUMNS], dtype=tl.float32)
    start = tl.program_id(1) * BLOCK_ROWS
    while start < rows:
        base = start.to(tl.int64) * columns
        inside = (start + row < rows)[:, None] & used[None, :]
        if RAGGED:
            inside = inside & (base + offset < count)
        value = tl.load(y + base + offset, mask=inside, other=0.0).to(tl.float32)
        shifted = tl.where(inside, value - m[None, :], 0.0)
        # Rows that one thread holds are added at once: half the registers that a sum per element of the tile would take.
        halves = tl.reshape(shifted, [2, BLOCK_ROWS // 2, BLOCK_COLUMNS])
        first += tl.sum(halves, axis=0)
        second += tl.sum(halves * halves, axis=0)
        start += programs * BLOCK_ROWS
    place = partials + tl.program_id(1).to(tl.int64) * columns + column
    tl.store(place, tl.sum(first, axis=0), mask=used)
    tl.store(place + programs.to(tl.int64) * columns, tl.sum(second, axis=0), mask=used)


@triton.jit(do_not_specialize=["count", "rows", "programs"])
def _backward_kernel(
    grad_sums, y, mean, grad_y, count, rows, columns, channels, inner, programs, moment_stride,
    RAGGED: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """grad_y = gs1 + 2·gs2·(y − m)."""
    column = tl.program_id(0) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    used = column < columns
    channel = column // inner % channels
    m = tl.load(mean + channel, mask=used, other=0.0)
    gs1 = tl.load(grad_sums + channel, mask=used, other=0.0)
    gs2 = 2.0 * tl.load(grad_sums + moment_stride + channel, mask=used, other=0.0)
    row = tl.arange(0, BLOCK_ROWS)
    offset = row.to(tl.int64)[:, None] * columns + column[None, :]
    start = tl.program_id(1) * BLOCK_ROWS
    while start < rows:
        base = start.to(tl.int64) * columns
        inside = (start + row < rows)[:, None] & used[None, :]
        if RAGGED:
            inside = inside & (base + offset < count)
        shifted = tl.load(y + base + offset, mask=inside, other=0.0).to(tl.float32) - m[None, :]
        out = tl.fma(shifted, gs2[None, :], gs1[None, :])
        tl.store(grad_y + base + offset, out.to(grad_y.dtype.element_ty), mask=inside)
        start += programs * BLOCK_ROWS


class _Plan(NamedTuple):
    """How the memory of one tensor is read as a matrix, and cut into programs."""

    rows: int
    columns: int
    inner: int
    programs: int  # along the rows; each takes every programs-th tile
    column_blocks: int


def _dense(y: Tensor) -> Tensor:
    """The tensor itself where its memory has no gaps, else a contiguous copy."""
    return y if y.is_contiguous(memory_format=torch.channels_last) else y.contiguous()


def _plan(y: Tensor) -> _Plan:
    channels = y.shape[1]
    if y.is_contiguous(memory_format=torch.channels_last):
        repeat = 16 // math.gcd(channels, 16)
        while repeat * channels < _BLOCK_COLUMNS:
            repeat *= 2
        columns, inner = repeat * channels, 1
    else:
        columns, inner = y.numel() // y.shape[0], y.shape[2] * y.shape[3]
    rows, column_blocks = triton.cdiv(y.numel(), columns), triton.cdiv(columns, _BLOCK_COLUMNS)
    tiles = triton.cdiv(rows, _BLOCK_ROWS)
    tiles_each = triton.cdiv(tiles, max(1, _PROGRAMS // column_blocks))
    return _Plan(rows, columns, inner, triton.cdiv(tiles, tiles_each), column_blocks)


def moments_forward(
    y: Tensor,  # [N, C, H, W] float32, bfloat16 or float16
    mean: Tensor,  # [C] float32
) -> Tensor:  # [2, C] float32
    """One launch over y, and PyTorch's sum of the programs' partial sums."""
    channels, y = y.shape[1], _dense(y)
    if y.numel() == 0:
        return torch.zeros(2, channels, device=y.device)
    plan = _plan(y)
    partials = torch.empty(2, plan.programs * plan.columns, dtype=torch.float32, device=y.device)
    with on_device_of(y):
        _forward_kernel[(plan.column_blocks, plan.programs)](
            y, mean.contiguous(), partials, y.numel(), plan.rows, plan.columns, channels, plan.inner, plan.programs,
            RAGGED=y.numel() % plan.columns != 0, BLOCK_ROWS=_BLOCK_ROWS, BLOCK_COLUMNS=_BLOCK_COLUMNS, num_warps=_WARPS,
        )  # fmt: skip
    return partials.view(2, -1, channels, plan.inner).sum((1, 3), dtype=torch.float64).float()


def moments_backward(
    grad_sums: Tensor,  # [2, C] float32
    y: Tensor,  # [N, C, H, W]
    mean: Tensor,  # [C] float32
) -> Tensor:  # like y
    """∂L/∂y = gs₁ + 2 gs₂ (y − m), in one launch."""
    channels, y = y.shape[1], _dense(y)
    grad_y = torch.empty_like(y)
    if y.numel() == 0:
        return grad_y
    grad_sums = grad_sums if grad_sums.stride(1) == 1 else grad_sums.contiguous()
    plan = _plan(y)
    with on_device_of(y):
        _backward_kernel[(plan.column_blocks, plan.programs)](
            grad_sums, y, mean.contiguous(), grad_y, y.numel(), plan.rows, plan.columns, channels, plan.inner, plan.programs,
            grad_sums.stride(0),
            RAGGED=y.numel() % plan.columns != 0, BLOCK_ROWS=_BLOCK_ROWS, BLOCK_COLUMNS=_BLOCK_COLUMNS, num_warps=_WARPS,
        )  # fmt: skip
    return grad_y
