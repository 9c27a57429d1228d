"""Sums per channel that the programs of a kernel leave in rows, and the launch that adds the rows up."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dwa_fast.kernels.layout import WARPS, Tiles, sum_of_rows

_ROWS = 128
_CHANNELS = 16


@triton.jit(do_not_specialize=["count"])
def _add_up_kernel(
    partials, sums, var, eps, weight, shares, values, count, channels, BLOCK_ROWS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr
):  # fmt: skip
    """sums_c = Σ partials over the `count` rows of sum program_id(1), always in the same order; with var, sum 0 is divided by √(v + ε).

    shares as `add_up` says.
    """
    moment = tl.program_id(1)
    channel = tl.program_id(0) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    result = sum_of_rows(partials + moment * count * channels, count, channels, channel, BLOCK_ROWS, BLOCK_CHANNELS)
    if var is not None:
        deviation = tl.sqrt(tl.load(var + channel, mask=channel < channels, other=1.0).to(tl.float64) + eps)
        result = tl.where(moment == 0, result / deviation, result)
    if shares is not None:
        share = -result / deviation / values
        if weight is not None:
            share *= tl.load(weight + channel, mask=channel < channels, other=0.0).to(tl.float64)
        share = tl.where(moment == 0, 0.5 * share / deviation, share)
        tl.store(shares + (1 - moment) * channels + channel, share.to(tl.float32), mask=(channel < channels) & (moment < 2))
    tl.store(sums + moment * channels + channel, result.to(tl.float32), mask=channel < channels)


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
    weight: Tensor | None = None,  # [C]
    shares: Tensor | None = None,  # [2, C], written
    values: int = 0,  # of a channel
) -> None:
    """Adds the programs' sums up; the first is divided by √(v + ε) where var is given.

    shares, where sums are the gradients of γ and β and v is the variance of a batch of n values: what Σ(y − μ) and Σ(y − μ)² take of the
    gradient of y, −γ/√(v + ε) · (∂L/∂β, ½ ∂L/∂γ/√(v + ε)) / n.
    """
    _add_up_kernel[(triton.cdiv(sums.shape[1], _CHANNELS), len(sums))](
        partials, sums, var, eps, weight, shares, values, partials.shape[1], sums.shape[1],
        BLOCK_ROWS=_ROWS, BLOCK_CHANNELS=_CHANNELS, num_warps=WARPS,
    )  # fmt: skip
