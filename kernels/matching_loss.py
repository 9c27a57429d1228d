"""Triton twin of dwa_fast.ops.matching_loss: one program per layer, in float64 because σ² − v is a difference of near equals."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dwa_fast.kernels.layout import on_device_of, sum_of_rows

_BLOCK = 512  # channels at a time
_TOTAL_BLOCK = 256  # layers at a time
_WARPS = 8


@triton.jit
def _gaps(sums, variances, means, channel, inside, n, total):
    """s₁/n, μ − m − a = s₁/n − a and σ² − v = s₂/n − (s₁/n)² − v of a block of channels, float64; a is 0 without means."""
    mean = tl.load(sums + channel, mask=inside, other=0.0).to(tl.float64) / n
    square = tl.load(sums + total + channel, mask=inside, other=0.0).to(tl.float64) / n
    variance = tl.load(variances + channel, mask=inside, other=0.0).to(tl.float64)
    mean_gap = mean
    if means is not None:
        mean_gap = mean - tl.load(means + channel, mask=inside, other=0.0).to(tl.float64)
    return mean, mean_gap, square - mean * mean - variance


@triton.jit
def _store_gradient(grad, sums, variances, means, n, w, norm_of_mean, norm_of_var, grad_sums, first, last, total, BLOCK: tl.constexpr):
    """∂s₂ = g_var w d/(n‖d‖),  ∂s₁ = g_mean w e/(n‖e‖) − 2(s₁/n) ∂s₂   with d = σ² − v, e = s₁/n − a; a term is 0 where its norm is 0."""
    mean_scale = tl.load(grad).to(tl.float64) * w / (n * tl.where(norm_of_mean == 0.0, 1.0, norm_of_mean))
    var_scale = tl.load(grad + 1).to(tl.float64) * w / (n * tl.where(norm_of_var == 0.0, 1.0, norm_of_var))
    mean_scale = tl.where(norm_of_mean == 0.0, 0.0, mean_scale)
    var_scale = tl.where(norm_of_var == 0.0, 0.0, var_scale)
    channel = first + tl.arange(0, BLOCK)
    left = last - first
    while left > 0:
        inside = channel < last
        mean, mean_gap, var_gap = _gaps(sums, variances, means, channel, inside, n, total)
        second = var_scale * var_gap
        tl.store(grad_sums + channel, (mean_scale * mean_gap - 2.0 * mean * second).to(tl.float32), mask=inside)
        tl.store(grad_sums + total + channel, second.to(tl.float32), mask=inside)
        channel += BLOCK
        left -= BLOCK


@triton.jit
def _store_sums(place, rows, channels, sums, total, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Σ over the rows of both matrices [rows, channels] of a layer; 8192 numbers at a time, 32 per thread."""
    start = 0
    while start < channels:
        column = start + tl.arange(0, COLUMNS)
        for moment in tl.static_range(2):
            sum = sum_of_rows(place + moment * rows * channels, rows, channels, column, ROWS, COLUMNS)
            tl.store(sums + moment * total + column, sum.to(tl.float32), mask=column < channels)
        start += COLUMNS


@triton.jit(do_not_specialize=["total", "layers"])
def _matching_loss_kernel(
    partials, places, sums, variances, means, channel_ptr, counts, weights, grad, norms, loss, grad_sums, finished, total, layers,
    BLOCK: tl.constexpr, TOTAL_BLOCK: tl.constexpr,
):  # fmt: skip
    """norms_l = (‖μ_l − m_l − a_l‖₂, ‖σ²_l − v_l‖₂) of layer l = program_id(0),   loss = Σ_l w_l norms_l.

    With partials first the sums of the layer, from its rows in the arena; with grad last their gradient. `finished` counts the programs
    that are done, and the last one, whichever it is, adds up all norms in the order of the layers and sets it back to 0.
    """
    layer = tl.program_id(0)
    first = tl.load(channel_ptr + layer)
    last = tl.load(channel_ptr + layer + 1)
    if partials is not None:
        place = partials + tl.load(places + layer)
        rows = tl.load(places + layers + layer)
        if last - first < 256:
            _store_sums(place, rows, last - first, sums + first, total, 128, 64)
        else:
            _store_sums(place, rows, last - first, sums + first, total, 32, 256)
        tl.debug_barrier()  # the program's own sums are read back, by other threads
    n = tl.load(counts + layer).to(tl.float64)
    channel = first + tl.arange(0, BLOCK)
    mean_squares = tl.zeros([BLOCK], dtype=tl.float64)
    var_squares = tl.zeros([BLOCK], dtype=tl.float64)
    left = last - first
    while left > 0:
        inside = channel < last
        _, mean_gap, var_gap = _gaps(sums, variances, means, channel, inside, n, total)
        mean_squares += tl.where(inside, mean_gap * mean_gap, 0.0)
        var_squares += tl.where(inside, var_gap * var_gap, 0.0)
        channel += BLOCK
        left -= BLOCK
    norm_of_mean = tl.sqrt(tl.sum(mean_squares, axis=0)).to(tl.float32)
    norm_of_var = tl.sqrt(tl.sum(var_squares, axis=0)).to(tl.float32)
    tl.store(norms + layer, norm_of_mean)
    tl.store(norms + layers + layer, norm_of_var)
    if grad is not None:
        w = tl.load(weights + layer).to(tl.float64)
        mean_norm, var_norm = norm_of_mean.to(tl.float64), norm_of_var.to(tl.float64)
        _store_gradient(grad, sums, variances, means, n, w, mean_norm, var_norm, grad_sums, first, last, total, BLOCK)
    tl.debug_barrier()
    if tl.atomic_add(finished, 1) == layers - 1:
        each = tl.arange(0, TOTAL_BLOCK)
        for term in tl.static_range(2):
            weighted = tl.zeros([TOTAL_BLOCK], dtype=tl.float64)
            start = 0
            while start < layers:
                inside = start + each < layers
                norm = tl.load(norms + term * layers + start + each, mask=inside, other=0.0).to(tl.float64)
                weighted += norm * tl.load(weights + start + each, mask=inside, other=0.0).to(tl.float64)
                start += TOTAL_BLOCK
            tl.store(loss + term, tl.sum(weighted, axis=0).to(tl.float32))
        tl.store(finished, 0)


@triton.jit(do_not_specialize=["total", "layers"])
def _matching_loss_backward_kernel(
    grad, sums, variances, means, channel_ptr, counts, weights, norms, grad_sums, total, layers, BLOCK: tl.constexpr
):
    """The gradient of the sums of layer l = program_id(0), whose norms are known."""
    layer = tl.program_id(0)
    first = tl.load(channel_ptr + layer)
    last = tl.load(channel_ptr + layer + 1)
    n = tl.load(counts + layer).to(tl.float64)
    w = tl.load(weights + layer).to(tl.float64)
    norm_of_mean = tl.load(norms + layer).to(tl.float64)
    norm_of_var = tl.load(norms + layers + layer).to(tl.float64)
    _store_gradient(grad, sums, variances, means, n, w, norm_of_mean, norm_of_var, grad_sums, first, last, total, BLOCK)


def matching_loss_forward(
    sums: Tensor,  # [2, ΣC] float32
    variances: Tensor,  # [ΣC] float32
    channel_ptr: Tensor,  # [L + 1] int64
    counts: Tensor,  # [L] int64
    weights: Tensor,  # [L] float32
    means: Tensor | None = None,  # [ΣC] float32
) -> tuple[Tensor, Tensor]:
    """loss [2] and norms [2, L], float32. One launch behind the zero of its counter; nothing is read on the host."""
    loss, norms, _ = _launch(sums.contiguous(), variances, channel_ptr, counts, weights, None, None, None, means)
    return loss, norms


def matching_gradient(
    sums: Tensor,  # [2, ΣC] float32, or with places the arena
    variances: Tensor,  # [ΣC] float32
    channel_ptr: Tensor,  # [L + 1] int64
    counts: Tensor,  # [L] int64
    weights: Tensor,  # [L] float32
    grad: Tensor,  # [2] float32, of the loss
    places: Tensor | None = None,  # [2, L] int64: where each layer's partial sums begin in the arena, and how many rows they are
    finished: Tensor | None = None,  # [1] int32, 0 before and after
    means: Tensor | None = None,  # [ΣC] float32
) -> tuple[Tensor, Tensor]:
    """loss [2] and the gradient of the sums, [2, ΣC]. One launch where `finished` is given."""
    loss, _, grad_sums = _launch(sums.contiguous(), variances, channel_ptr, counts, weights, grad.contiguous(), places, finished, means)
    assert grad_sums is not None
    return loss, grad_sums


def _launch(
    sums: Tensor,
    variances: Tensor,
    channel_ptr: Tensor,
    counts: Tensor,
    weights: Tensor,
    grad: Tensor | None,
    places: Tensor | None,
    finished: Tensor | None,
    means: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """loss [2], norms [2, L], and with grad the gradient of the sums."""
    layers, total = counts.numel(), variances.numel()
    partials, sums = (None, sums) if places is None else (sums, torch.empty(2, total, dtype=torch.float32, device=sums.device))
    grad_sums = None if grad is None else torch.empty_like(sums)
    if layers == 0:
        loss, norms = torch.zeros(2, device=sums.device), torch.zeros(2, 0, device=sums.device)
        return loss, norms, None if grad_sums is None else grad_sums.zero_()
    if finished is None:
        finished = torch.zeros(1, dtype=torch.int32, device=sums.device)
    loss = torch.empty(2, dtype=torch.float32, device=sums.device)
    norms = torch.empty(2, layers, dtype=torch.float32, device=sums.device)
    with on_device_of(sums):
        _matching_loss_kernel[(layers,)](
            partials, places, sums, variances, means, channel_ptr, counts, weights, grad, norms, loss, grad_sums, finished, total, layers,
            BLOCK=_BLOCK, TOTAL_BLOCK=_TOTAL_BLOCK, num_warps=_WARPS,
        )  # fmt: skip
    return loss, norms, grad_sums


def matching_loss_backward(
    grad: Tensor,  # [2] float32
    sums: Tensor,  # [2, ΣC] float32
    variances: Tensor,  # [ΣC] float32
    channel_ptr: Tensor,  # [L + 1] int64
    counts: Tensor,  # [L] int64
    weights: Tensor,  # [L] float32
    norms: Tensor,  # [2, L] float32, of the forward pass
    means: Tensor | None = None,  # [ΣC] float32
) -> Tensor:
    """grad_sums [2, ΣC], float32. One launch."""
    layers = counts.numel()
    sums, grad = sums.contiguous(), grad.contiguous()
    if layers == 0:
        return torch.zeros_like(sums)
    grad_sums = torch.empty_like(sums)
    with on_device_of(sums):
        _matching_loss_backward_kernel[(layers,)](
            grad, sums, variances, means, channel_ptr, counts, weights, norms, grad_sums, sums.shape[1], layers,
            BLOCK=_BLOCK, num_warps=_WARPS,
        )  # fmt: skip
    return grad_sums
