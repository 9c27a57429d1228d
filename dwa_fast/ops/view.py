"""Crop, resize, flip and roll of a batch by one row of the schedule."""

from __future__ import annotations

import torch
from torch import Tensor

from dwa_fast.ops import _library

_CPU_DTYPES = (torch.float32, torch.bfloat16)
_CUDA_DTYPES = (*_CPU_DTYPES, torch.float16)


def view(
    images: Tensor,  # [N, C, H, W], float32
    rows: Tensor,  # [T, 7], int32
    step: Tensor,  # [], int64
    dtype: torch.dtype | None = None,
) -> Tensor:  # [N, C, H, W]
    """The view of one iteration: crop, bilinear resize to the size of the images, horizontal flip, roll, shared by the whole batch.

    Not differentiable: `view_adam_clip_` applies the adjoint. On CUDA rows and step are read by the kernel, so it can be captured in a
    CUDA graph. A row that only rolls copies bits.

    Args:
        images: any strides; may be empty.
        rows: the schedule (schedule.Schedule): top, left, height and width of the crop, inside the images; flip 0 or 1; roll down, right.
        step: the row to use, 0 … T − 1; on the device of images, as rows.
        dtype: of the result, float32 or bfloat16, on CUDA also float16; None: float32.
    Returns:
        the view, channels-last.
    Raises:
        TypeError: an argument has the wrong type or precision.
        ValueError: shapes or devices do not fit, images require a gradient, or, on a CPU, the crop leaves the images.
        IndexError: on a CPU, there is no such row.
        ImportError: the compiled operators, or Triton on CUDA, cannot be used here.
    """
    wanted = torch.float32 if dtype is None else dtype
    _check(images, rows, step, wanted)
    _library.load()
    result: Tensor = torch.ops.dwa_fast.view.default(images, rows, step, wanted)
    return result


@_library.fake("view", triton="view")
def _view_fake(images: Tensor, rows: Tensor, step: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty(images.shape, dtype=dtype, device=images.device, memory_format=torch.channels_last)


def check_schedule(images: Tensor, rows: Tensor, step: Tensor) -> None:
    """Refuse images of the wrong kind, and a schedule that does not fit them."""
    for name, tensor, wanted in (("images", images, torch.float32), ("rows", rows, torch.int32), ("step", step, torch.int64)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if tensor.dtype is not wanted:
            raise TypeError(f"{name} must be {_name(wanted)}, got {_name(tensor.dtype)}")
        if tensor.device != images.device:
            raise ValueError(f"{name} must be on the device of images, {images.device}, got {tensor.device}")
    if images.dim() != 4:
        raise ValueError(f"images must be [N, C, H, W], got shape {tuple(images.shape)}")
    if rows.dim() != 2 or rows.size(1) != 7:
        raise ValueError(f"rows must be [T, 7], got shape {tuple(rows.shape)}")
    if step.dim() != 0:
        raise ValueError(f"step must be [], got shape {tuple(step.shape)}")


def check_precision(name: str, dtype: torch.dtype, device: torch.device) -> None:
    """Refuse a precision that a view cannot have on that device."""
    offered = _CUDA_DTYPES if device.type == "cuda" else _CPU_DTYPES
    if dtype not in offered:
        raise TypeError(f"{name} must be {' or '.join(map(_name, offered))} on {device.type}, got {_name(dtype)}")


def _check(images: Tensor, rows: Tensor, step: Tensor, dtype: torch.dtype) -> None:
    check_schedule(images, rows, step)
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype must be a torch.dtype, got {type(dtype).__name__}")
    check_precision("dtype", dtype, images.device)
    if torch.is_grad_enabled() and images.requires_grad:
        raise ValueError("view is not differentiable: call it under torch.no_grad(), or with images that require none")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
