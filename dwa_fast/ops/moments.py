"""The shifted moments of features per channel in one read, for layers that stay as they are (Eq. 3)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dwa_fast.ops import _library
from dwa_fast.ops.checks import check_features, check_per_channel


def moments(
    y: Tensor,  # [N, C, H, W]
    mean: Tensor,  # [C], float32
    partials: Tensor | None = None,  # [2, R, C], float32, written
) -> Tensor:  # [2, C] float32
    """Σ(y − m) and Σ(y − m)² over N, H and W, in one read of y.

    Differentiable in y, once; the gradient is one pointwise pass:  ∂L/∂y = ∂L/∂sums₁ + 2 ∂L/∂sums₂ (y − m).

    Arithmetic is float32. Contiguous and channels-last tensors are read where they are, others through a copy. The same input gives the
    same bits on the same device, for any number of threads.

    Args:
        y: features, float32 or bfloat16, on CUDA also float16; any strides; may be empty.
        mean: m, a constant near the means of the channels, such as a BatchNorm layer's running mean.
        partials: as in `bn_act`; y must be channels-last.
    Returns:
        sums, [2, C], float32.
    Raises:
        TypeError: an argument has the wrong type or precision.
        ValueError: shapes or devices do not fit, or a gradient of mean is required.
        ImportError: the compiled operators, or Triton on CUDA, cannot be used here.
    """
    check_features(y)
    check_per_channel("mean", mean, y)
    if mean.requires_grad:
        raise ValueError("moments is not differentiable in mean: pass it detached")
    _library.load()
    sums: Tensor = _Moments.apply(y, mean, partials)
    return sums


class _Moments(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, mean: Tensor, partials: Tensor | None) -> Tensor:
        ctx.save_for_backward(y, mean)
        sums: Tensor = torch.ops.dwa_fast.moments_forward.default(y, mean, partials)
        return sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_sums: Tensor) -> tuple[Tensor, None, None]:
        y, mean = ctx.saved_tensors
        return torch.ops.dwa_fast.moments_backward.default(grad_sums, y, mean), None, None


@_library.fake("moments_forward", triton="moments")
def _forward_fake(y: Tensor, mean: Tensor, partials: Tensor | None = None) -> Tensor:
    return torch.empty((2, y.shape[1]), dtype=torch.float32, device=y.device)


@_library.fake("moments_backward", triton="moments")
def _backward_fake(grad_sums: Tensor, y: Tensor, mean: Tensor) -> Tensor:
    dense = y.is_contiguous() or y.is_contiguous(memory_format=torch.channels_last)
    return torch.empty_like(y) if dense else torch.empty_like(y, memory_format=torch.contiguous_format)
