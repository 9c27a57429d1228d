"""Triton twin of dwa_fast.ops.moments: the shifted moments per channel in one read of the features, the gradient in one pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dwa_fast.kernels.layout import BLOCK_COLUMNS, BLOCK_ROWS, WARPS, dense, on_device_of, tiles
from dwa_fast.kernels.partial_sums import add_up, sums_to_write

REGISTERS = 72  # of a thread of the forward kernel, at most


@triton.jit(do_not_specialize=["count", "rows", "programs"])
def _moments_forward_kernel(
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
def _moments_backward_kernel(
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


def moments_forward(
    y: Tensor,  # [N, C, H, W] float32, bfloat16 or float16
    mean: Tensor,  # [C] float32
    partials: Tensor | None = None,  # [2, R, C] float32, written where y is channels-last
) -> Tensor:  # [2, C] float32
    """One launch over y, which leaves a row of partial sums per program; without `partials` what adds them up.

    With it nothing is written to the result: the sums are those of its rows.
    """
    channels, y = y.shape[1], dense(y)
    if y.numel() == 0:
        if partials is not None:
            partials.zero_()
        return torch.zeros(2, channels, device=y.device)
    cut = tiles(y, registers=REGISTERS)
    sums = torch.empty(2, channels, dtype=torch.float32, device=y.device)
    by_rows = cut.inner == 1
    rows = sums_to_write(partials, cut, y, 2) if by_rows else torch.empty(2, cut.programs * cut.columns, device=y.device)
    if partials is not None and not by_rows:
        raise ValueError("partial sums are left of channels-last features alone")
    with on_device_of(y):
        _moments_forward_kernel[(cut.column_blocks, cut.programs)](
            y, mean.contiguous(), rows, y.numel(), cut.rows, cut.columns, channels, cut.inner, cut.programs,
            RAGGED=y.numel() % cut.columns != 0, BLOCK_ROWS=BLOCK_ROWS, BLOCK_COLUMNS=BLOCK_COLUMNS, num_warps=WARPS,
        )  # fmt: skip
        if by_rows and partials is None:
            add_up(rows, sums)
    return sums if by_rows else rows.view(2, -1, channels, cut.inner).sum((1, 3), dtype=torch.float64).float()


def moments_backward(
    grad_sums: Tensor,  # [2, C] float32
    y: Tensor,  # [N, C, H, W]
    mean: Tensor,  # [C] float32
) -> Tensor:  # like y
    """∂L/∂y = gs₁ + 2 gs₂ (y − m), in one launch."""
    channels, y = y.shape[1], dense(y)
    grad_y = torch.empty_like(y)
    if y.numel() == 0:
        return grad_y
    grad_sums = grad_sums if grad_sums.stride(1) == 1 else grad_sums.contiguous()
    cut = tiles(y)
    with on_device_of(y):
        _moments_backward_kernel[(cut.column_blocks, cut.programs)](
            grad_sums, y, mean.contiguous(), grad_y, y.numel(), cut.rows, cut.columns, channels, cut.inner, cut.programs,
            grad_sums.stride(0),
            RAGGED=y.numel() % cut.columns != 0, BLOCK_ROWS=BLOCK_ROWS, BLOCK_COLUMNS=BLOCK_COLUMNS, num_warps=WARPS,
        )  # fmt: skip
    return grad_y
