"""Checks of the arguments that several operators have, each with one sentence of error."""

from __future__ import annotations

import torch
from torch import Tensor

from dwa_fast.ops.activation import ACTIVATIONS

_CPU_DTYPES = (torch.float32, torch.bfloat16)
_CUDA_DTYPES = (*_CPU_DTYPES, torch.float16)


def check_features(
    y: Tensor,  # [N, C, H, W]
) -> None:
    """Raise TypeError or ValueError unless y is a four-dimensional tensor in a precision that the operators take on its device."""
    if not isinstance(y, Tensor):
        raise TypeError(f"y must be a tensor, got {type(y).__name__}")
    dtypes = _CUDA_DTYPES if y.is_cuda else _CPU_DTYPES
    if y.dtype not in dtypes:
        raise TypeError(f"y must be {_names(dtypes)} on {y.device.type}, got {_names((y.dtype,))}")
    if y.dim() != 4:
        raise ValueError(f"y must be [N, C, H, W], got shape {tuple(y.shape)}")


def check_per_channel(
    name: str,
    values: Tensor,  # [C], float32
    y: Tensor,  # [N, C, H, W]
) -> None:
    """Raise TypeError or ValueError unless there is one number for each channel of y, on its device."""
    if not isinstance(values, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(values).__name__}")
    if values.dtype is not torch.float32:
        raise TypeError(f"{name} must be float32, got {_names((values.dtype,))}")
    if values.shape != (y.size(1),):
        raise ValueError(f"{name} must be [C] with C = {y.size(1)}, got shape {tuple(values.shape)}")
    if values.device != y.device:
        raise ValueError(f"{name} must be on the device of y, {y.device}, got {values.device}")


def check_layer(y: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, *, prefix: str = "") -> None:
    """Raise TypeError or ValueError unless these are the input, statistics and parameters of a BatchNorm layer in eval mode.

    Args:
        prefix: of the names of the last four in the messages.
    """
    check_features(y)
    check_per_channel(f"{prefix}mean", mean, y)
    check_per_channel(f"{prefix}var", var, y)
    for name, values in (("weight", weight), ("bias", bias)):
        if values is not None:
            check_per_channel(prefix + name, values, y)
    if mean.requires_grad or var.requires_grad:
        raise ValueError("bn_act is not differentiable in mean and var: pass them detached")


def check_skip(skip: Tensor | None, y: Tensor) -> None:
    """Raise TypeError or ValueError unless the skip can be added to y."""
    if skip is None:
        return
    if not isinstance(skip, Tensor):
        raise TypeError(f"skip must be a tensor, got {type(skip).__name__}")
    if skip.dtype is not y.dtype:
        raise TypeError(f"skip must have the precision of y, {_names((y.dtype,))}, got {_names((skip.dtype,))}")
    if skip.shape != y.shape:
        raise ValueError(f"skip must have the shape of y, {tuple(y.shape)}, got {tuple(skip.shape)}")
    if skip.device != y.device:
        raise ValueError(f"skip must be on the device of y, {y.device}, got {skip.device}")


def check_activation(activation: str, slope: Tensor | None, y: Tensor) -> None:
    """Raise TypeError or ValueError unless there is such an activation, with a slope where it needs one and only there."""
    if not isinstance(activation, str):
        raise TypeError(f"activation must be a name, got {type(activation).__name__}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    if activation != "leaky_relu":
        if slope is not None:
            raise ValueError(f"slope belongs to the activation leaky_relu, got one with {activation}")
        return
    if slope is None:
        raise ValueError("the activation leaky_relu needs a slope, [1] or [C]")
    if not isinstance(slope, Tensor):
        raise TypeError(f"slope must be a tensor, got {type(slope).__name__}")
    if slope.dtype is not torch.float32:
        raise TypeError(f"slope must be float32, got {_names((slope.dtype,))}")
    if slope.shape not in ((1,), (y.size(1),)):
        raise ValueError(f"slope must be [1] or [C] with C = {y.size(1)}, got shape {tuple(slope.shape)}")
    if slope.device != y.device:
        raise ValueError(f"slope must be on the device of y, {y.device}, got {slope.device}")


def check_sums(partials: Tensor | None, with_sums: bool) -> None:
    """Refuse memory for sums that are not wanted."""
    if partials is not None and not with_sums:
        raise ValueError("partials belong to with_sums, got them without it")


def check_alias(with_alias: bool, alias_stride: int) -> None:
    """Refuse what cannot be the stride of an alias."""
    if isinstance(alias_stride, bool) or not isinstance(alias_stride, int):
        raise TypeError(f"alias_stride must be an integer, got {type(alias_stride).__name__}")
    if alias_stride < 1:
        raise ValueError(f"alias_stride must be at least 1, got {alias_stride}")
    if alias_stride > 1 and not with_alias:
        raise ValueError(f"alias_stride belongs to with_alias, got {alias_stride} without it")


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    names = [str(dtype).removeprefix("torch.") for dtype in dtypes]
    return " or ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
