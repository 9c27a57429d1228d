"""The shifted moments of features per channel in one read, for layers that stay as they are (Eq. 3)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dwa_fast.ops import _library

_CPU_DTYPES = (torch.float32, torch.bfloat16)
_CUDA_DTYPES = (*_CPU_DTYPES, torch.float16)


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
    _check(y, mean)
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


def _check(y: Tensor, mean: Tensor) -> None:
    for name, tensor in (("y", y), ("mean", mean)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if y.dtype not in (_CUDA_DTYPES if y.is_cuda else _CPU_DTYPES):
        expected = "float32, bfloat16 or float16" if y.is_cuda else "float32 or bfloat16"
        raise TypeError(f"y must be {expected} on {y.device.type}, got {str(y.dtype).removeprefix('torch.')}")
    if y.dim() != 4:
        raise ValueError(f"y must be [N, C, H, W], got shape {tuple(y.shape)}")
    if mean.dtype is not torch.float32:
        raise TypeError(f"mean must be float32, got {str(mean.dtype).removeprefix('torch.')}")
    if mean.shape != (y.size(1),):
        raise ValueError(f"mean must be [C] with C = {y.size(1)}, got shape {tuple(mean.shape)}")
    if mean.device != y.device:
        raise ValueError(f"mean must be on the device of y, {y.device}, got {mean.device}")
    if mean.requires_grad:
        raise ValueError("moments is not differentiable in mean: pass it detached")
