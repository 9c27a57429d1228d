"""Triton twin of dwa_fast.ops.matching_loss: one program per layer, in float64 because σ² − v is a difference of near equals."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dwa_fast.kernels.layout import on_device_of

_BLOCK = 512  # channels at a time
_TOTAL_BLOCK = 256  # layers at a time
_WARPS = 4


@triton.jit
def _gaps(sums, variances, channel, inside, n, total):
    """μ − m = s₁/n and σ² − v = s₂/n − (s₁/n)² − v of a block of channels, float64."""
    mean_gap = tl.load(sums + channel, mask=inside, other=0.0).to(tl.float64) / n
    square = tl.load(sums + total + channel, mask=inside, other=0.0).to(tl.float64) / n
    variance = tl.load(variances + channel, mask=inside, other=0.0).to(tl.float64)
    return mean_gap, square - mean_gap * mean_gap - variance


@triton.jit(do_not_specialize=["total", "layers"])
def _norms_kernel(sums, variances, channel_ptr, counts, norms, total, layers, BLOCK: tl.constexpr):
    """norms_l = (‖μ_l − m_l‖₂, ‖σ²_l − v_l‖₂) of layer l = program_id(0)."""
    layer = tl.program_id(0)
    channel = tl.load(channel_ptr + layer) + tl.arange(0, BLOCK)
    last = tl.load(channel_ptr + layer + 1)
    n = tl.load(counts + layer).to(tl.float64)
    of_mean = tl.zeros([BLOCK], dtype=tl.float64)
    of_var = tl.zeros([BLOCK], dtype=tl.float64)
    left = last - tl.load(channel_ptr + layer)
    while left > 0:
        inside = channel < last
        mean_gap, var_gap = _gaps(sums, variances, channel, inside, n, total)
        of_mean += tl.where(inside, mean_gap * mean_gap, 0.0)
        of_var += tl.where(inside, var_gap * var_gap, 0.0)
        channel += BLOCK
        left -= BLOCK
    tl.store(norms + layer, tl.sqrt(tl.sum(of_mean, axis=0)).to(tl.float32))
    tl.store(norms + layers + layer, tl.sqrt(tl.sum(of_var, axis=0)).to(tl.float32))


@triton.jit(do_not_specialize=["layers"])
def _total_kernel(norms, weights, loss, layers, BLOCK: tl.constexpr):
    """loss = Σ_l w_l norms_l   of the mean (program 0) and of the variance (program 1), always in the same order."""
    term = tl.program_id(0)
    layer = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], dtype=tl.float64)
    start = 0
    while start < layers:
        inside = start + layer < layers
        norm = tl.load(norms + term * layers + start + layer, mask=inside, other=0.0).to(tl.float64)
        total += norm * tl.load(weights + start + layer, mask=inside, other=0.0).to(tl.float64)
        start += BLOCK
    tl.store(loss + term, tl.sum(total, axis=0).to(tl.float32))


@triton.jit(do_not_specialize=["total", "layers"])
def _gradient_kernel(grad, sums, variances, channel_ptr, counts, weights, norms, grad_sums, total, layers, BLOCK: tl.constexpr):
    """∂s₂ = g_var w d/(n‖d‖),  ∂s₁ = g_mean w (s₁/n)/(n‖s₁/n‖) − 2(s₁/n) ∂s₂   with d = σ² − v; a term is 0 where its norm is 0."""
    layer = tl.program_id(0)
    channel = tl.load(channel_ptr + layer) + tl.arange(0, BLOCK)
    last = tl.load(channel_ptr + layer + 1)
    n = tl.load(counts + layer).to(tl.float64)
    w = tl.load(weights + layer).to(tl.float64)
    norm_of_mean = tl.load(norms + layer).to(tl.float64)
    norm_of_var = tl.load(norms + layers + layer).to(tl.float64)
    of_mean = tl.load(grad).to(tl.float64) * w / (n * tl.where(norm_of_mean == 0.0, 1.0, norm_of_mean))
    of_var = tl.load(grad + 1).to(tl.float64) * w / (n * tl.where(norm_of_var == 0.0, 1.0, norm_of_var))
    of_mean = tl.where(norm_of_mean == 0.0, 0.0, of_mean)
    of_var = tl.where(norm_of_var == 0.0, 0.0, of_var)
    left = last - tl.load(channel_ptr + layer)
    while left > 0:
        inside = channel < last
        mean_gap, var_gap = _gaps(sums, variances, channel, inside, n, total)
        second = of_var * var_gap
        tl.store(grad_sums + channel, (of_mean * mean_gap - 2.0 * mean_gap * second).to(tl.float32), mask=inside)
        tl.store(grad_sums + total + channel, second.to(tl.float32), mask=inside)
        channel += BLOCK
        left -= BLOCK


def matching_loss_forward(
    sums: Tensor,  # [2, ΣC] float32
    variances: Tensor,  # [ΣC] float32
    channel_ptr: Tensor,  # [L + 1] int64
    counts: Tensor,  # [L] int64
    weights: Tensor,  # [L] float32
) -> tuple[Tensor, Tensor]:
    """loss [2] and norms [2, L], float32. Two launches; nothing is read on the host."""
    layers = counts.numel()
    if layers == 0:
        return torch.zeros(2, device=sums.device), torch.zeros(2, 0, device=sums.device)
    loss = torch.empty(2, dtype=torch.float32, device=sums.device)
    norms = torch.empty(2, layers, dtype=torch.float32, device=sums.device)
    sums = sums.contiguous()
    with on_device_of(sums):
        _norms_kernel[(layers,)](sums, variances, channel_ptr, counts, norms, sums.shape[1], layers, BLOCK=_BLOCK, num_warps=_WARPS)
        _total_kernel[(2,)](norms, weights, loss, layers, BLOCK=_TOTAL_BLOCK, num_warps=_WARPS)
    return loss, norms


def matching_loss_backward(
    grad: Tensor,  # [2] float32
    sums: Tensor,  # [2, ΣC] float32
    variances: Tensor,  # [ΣC] float32
    channel_ptr: Tensor,  # [L + 1] int64
    counts: Tensor,  # [L] int64
    weights: Tensor,  # [L] float32
    norms: Tensor,  # [2, L] float32, of the forward pass
) -> Tensor:
    """grad_sums [2, ΣC], float32. One launch."""
    layers = counts.numel()
    sums, grad = sums.contiguous(), grad.contiguous()
    if layers == 0:
        return torch.zeros_like(sums)
    grad_sums = torch.empty_like(sums)
    with on_device_of(sums):
        _gradient_kernel[(layers,)](
            grad, sums, variances, channel_ptr, counts, weights, norms, grad_sums, sums.shape[1], layers, BLOCK=_BLOCK, num_warps=_WARPS
        )
    return grad_sums
