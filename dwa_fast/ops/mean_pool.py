"""Means over square windows that do not overlap, as ConvNet teachers have them between their blocks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dwa_fast.ops import _library

_DTYPES = (torch.float32, torch.bfloat16)


def mean_pool(
    y: Tensor,  # [N, C, H, W]
    window: int,
) -> Tensor:  # [N, C, H // window, W // window]
    """The mean of every window of `window` × `window` pixels; pixels on the right and below that fill no window are left out.

    z[n, c, i, j] = (1/k²) Σ y[n, c, k·i + a, k·j + b] over 0 ≤ a, b < k = window. Differentiable in y, once.

    On a CPU alone. Sums are float32; channels-last tensors are read where they are, others through a copy, and the result is
    channels-last. The same bits for any number of threads.

    Args:
        y: features, float32 or bfloat16, any strides; may be empty.
        window: pixels of a side, at least 1.
    Raises:
        TypeError: y is no tensor of such a precision, or window no integer.
        ValueError: y is not four-dimensional or not on a CPU, or window is below 1.
        ImportError: the compiled operators cannot be used here.
    """
    _check(y, window)
    _library.load()
    z: Tensor = _MeanPool.apply(y, window)
    return z


class _MeanPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, window: int) -> Tensor:
        ctx.window, ctx.size = window, y.shape[2:]
        z: Tensor = torch.ops.dwa_fast.mean_pool_forward.default(y, window)
        return z

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_z: Tensor) -> tuple[Tensor, None]:
        return torch.ops.dwa_fast.mean_pool_backward.default(grad_z, ctx.window, *ctx.size), None


@_library.fake("mean_pool_forward")
def _forward_fake(y: Tensor, window: int) -> Tensor:
    return _channels_last(y, y.shape[2] // window, y.shape[3] // window)


@_library.fake("mean_pool_backward")
def _backward_fake(grad_z: Tensor, window: int, height: int, width: int) -> Tensor:
    return _channels_last(grad_z, height, width)


def _channels_last(like: Tensor, height: int, width: int) -> Tensor:
    shape = (*like.shape[:2], height, width)
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


def _check(y: Tensor, window: int) -> None:
    if not isinstance(y, Tensor):
        raise TypeError(f"y must be a tensor, got {type(y).__name__}")
    if y.dtype not in _DTYPES:
        raise TypeError(f"y must be float32 or bfloat16, got {str(y.dtype).removeprefix('torch.')}")
    if y.dim() != 4:
        raise ValueError(f"y must be [N, C, H, W], got shape {tuple(y.shape)}")
    if y.device.type != "cpu":
        raise ValueError(f"y must be on a CPU, got {y.device}; on a GPU use avg_pool2d")
    if isinstance(window, bool) or not isinstance(window, int):
        raise TypeError(f"window must be an integer, got {type(window).__name__}")
    if window < 1:
        raise ValueError(f"window must be at least 1, got {window}")
