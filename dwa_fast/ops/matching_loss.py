"""Decoupled matching of BatchNorm statistics over all layers at once (Eq. 3)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dwa_fast.ops import _library


def matching_loss(
    sums: Tensor,  # [2, ΣC], float32, from bn_act, layer after layer
    variances: Tensor,  # [ΣC], float32
    channel_ptr: Tensor,  # [L + 1], int64
    counts: Tensor,  # [L], int64
    weights: Tensor,  # [L], float32
    means: Tensor | None = None,  # [ΣC], float32
) -> Tensor:  # [2], float32
    """Distances between the statistics of a batch and those that the teacher has learnt.

        R_mean = Σ_l w_l ‖μ_l − m_l − a_l‖₂,   R_var = Σ_l w_l ‖σ²_l − v_l‖₂,   μ − m = s₁/n,   σ² = s₂/n − (s₁/n)²

    Arithmetic is float64, rounded once. Differentiable in sums, once; the gradient of a norm that is 0 is 0. On CUDA nothing is read
    on the host, so it can be captured in a CUDA graph. The same input gives the same bits.

    Args:
        sums: Σ(y − m) and Σ(y − m)² of every channel.
        variances: variances v of every channel that are aimed at, such as the running ones.
        channel_ptr: layer l has the channels channel_ptr[l] … channel_ptr[l + 1] − 1; not decreasing, from 0 up to ΣC.
        counts: n = N·H·W of each layer, ≥ 1.
        weights: w of each layer.
        means: a of every channel: by how much the mean that is aimed at exceeds the m of the sums. None: 0, the running means are aimed at.
    Returns:
        R_mean and R_var.
    Raises:
        TypeError: an argument has the wrong type or precision.
        ValueError: shapes or devices do not fit, or, on a CPU, channel_ptr points beyond sums.
        ImportError: the compiled operators, or Triton on CUDA, cannot be used here.
    """
    _check(sums, variances, channel_ptr, counts, weights, means)
    _library.load()
    loss: Tensor = _MatchingLoss.apply(sums, variances, channel_ptr, counts, weights, means)
    return loss


def matching_gradient(
    sums: Tensor,  # [2, ΣC], float32, from bn_act, layer after layer; with places an arena, float32
    variances: Tensor,  # [ΣC], float32
    channel_ptr: Tensor,  # [L + 1], int64
    counts: Tensor,  # [L], int64
    weights: Tensor,  # [L], float32
    grad: Tensor,  # [2], float32
    places: Tensor | None = None,  # [2, L], int64
    finished: Tensor | None = None,  # [1], int32
    means: Tensor | None = None,  # [ΣC], float32
) -> tuple[Tensor, Tensor]:  # loss [2], gradient [2, ΣC], float32
    """`matching_loss` and the gradient of the sums, for a gradient of the loss that is known ahead: on CUDA one launch.

    Args:
        sums: as in `matching_loss`. On CUDA alone, with places: the arena that holds each layer's rows of partial sums, [2, R, C].
        grad: of R_mean and R_var.
        places: where each layer's rows begin in the arena, and how many they are.
        finished: a counter of the kernel's, 0 before and after; None: one is made. Calls that may run at the same time need one each.
        means: as in `matching_loss`.
    Returns:
        loss and gradient, not differentiable.
    Raises:
        as `matching_loss`.
    """
    _check(sums, variances, channel_ptr, counts, weights, means, in_arena=places is not None)
    _library.load()
    layers = variances, channel_ptr, counts, weights
    loss, gradient = torch.ops.dwa_fast.matching_gradient.default(sums.detach(), *layers, grad, places, finished, means)
    return loss, gradient


class _MatchingLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, sums: Tensor, variances: Tensor, channel_ptr: Tensor, counts: Tensor, weights: Tensor, means: Tensor | None
    ) -> Tensor:
        loss, norms = torch.ops.dwa_fast.matching_loss_forward.default(sums, variances, channel_ptr, counts, weights, means)
        ctx.save_for_backward(sums, variances, channel_ptr, counts, weights, norms, means)
        return loss  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return torch.ops.dwa_fast.matching_loss_backward.default(grad, *ctx.saved_tensors), None, None, None, None, None


@_library.fake("matching_loss_forward", triton="matching_loss")
def _forward_fake(
    sums: Tensor, variances: Tensor, channel_ptr: Tensor, counts: Tensor, weights: Tensor, means: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    return sums.new_empty(2), sums.new_empty((2, counts.shape[0]))


@_library.fake("matching_loss_backward", triton="matching_loss")
def _backward_fake(
    grad: Tensor,
    sums: Tensor,
    variances: Tensor,
    channel_ptr: Tensor,
    counts: Tensor,
    weights: Tensor,
    norms: Tensor,
    means: Tensor | None = None,
) -> Tensor:
    return sums.new_empty(sums.shape)


@_library.fake("matching_gradient", triton="matching_loss")
def _gradient_fake(
    sums: Tensor,
    variances: Tensor,
    channel_ptr: Tensor,
    counts: Tensor,
    weights: Tensor,
    grad: Tensor,
    places: Tensor | None = None,
    finished: Tensor | None = None,
    means: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    return sums.new_empty(2), sums.new_empty((2, variances.shape[0]))


def _check(
    sums: Tensor,
    variances: Tensor,
    channel_ptr: Tensor,
    counts: Tensor,
    weights: Tensor,
    means: Tensor | None,
    *,
    in_arena: bool = False,
) -> None:
    optional = [] if means is None else [("means", means, torch.float32)]
    for name, tensor, dtype in (
        ("sums", sums, torch.float32),
        ("variances", variances, torch.float32),
        ("channel_ptr", channel_ptr, torch.int64),
        ("counts", counts, torch.int64),
        ("weights", weights, torch.float32),
        *optional,
    ):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if tensor.dtype is not dtype:
            raise TypeError(f"{name} must be {str(dtype).removeprefix('torch.')}, got {str(tensor.dtype).removeprefix('torch.')}")
        if tensor.device != sums.device:
            raise ValueError(f"{name} must be on the device of sums, {sums.device}, got {tensor.device}")
    if in_arena and sums.dim() != 1:
        raise ValueError(f"sums in an arena must be [S], got shape {tuple(sums.shape)}")
    if not in_arena and (sums.dim() != 2 or sums.size(0) != 2):
        raise ValueError(f"sums must be [2, C], got shape {tuple(sums.shape)}")
    if counts.dim() != 1:
        raise ValueError(f"counts must be [L], got shape {tuple(counts.shape)}")
    layers, channels = counts.size(0), variances.size(0) if in_arena and variances.dim() == 1 else sums.size(-1)
    for name, tensor, size in (
        ("variances", variances, channels),
        ("channel_ptr", channel_ptr, layers + 1),
        ("weights", weights, layers),
        *((name, tensor, channels) for name, tensor, _ in optional),
    ):
        if tensor.dim() != 1 or tensor.size(0) != size:
            raise ValueError(f"{name} must be [{size}], got shape {tuple(tensor.shape)}")
    if variances.requires_grad or weights.requires_grad or (means is not None and means.requires_grad):
        raise ValueError("matching_loss is not differentiable in variances, weights and means: pass them detached")
