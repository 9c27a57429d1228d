"""The adjoint of the view and one step of Adam on the pixels in one pass, so that the gradient of the images is never written."""

from __future__ import annotations

import functools
import importlib
import math
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from dwa_fast.ops import _library
from dwa_fast.ops.adam_clip import check_numbers, check_state
from dwa_fast.ops.view import check_precision, check_schedule


def view_adam_clip_(
    images: Tensor,  # [N, C, H, W], float32, changed in place
    gradient: Tensor,  # [N, C, H, W], with respect to the view
    exp_avg: Tensor,  # [N, C, H, W], float32, changed in place
    exp_avg_sq: Tensor,  # [N, C, H, W], float32, changed in place
    rows: Tensor,  # [T, 7], int32
    learning_rates: Tensor,  # [T], float32
    step: Tensor,  # [], int64
    low: Tensor,  # [C], float32
    high: Tensor,  # [C], float32
    loss_scale: float = 1.0,
    betas: tuple[float, float] = (0.5, 0.9),
    eps: float = 1e-8,
) -> None:
    """The adjoint of the row's view, divided by the scale of the loss, then `adam_clip_` with it: one pass over the pixels.

        g_s = Σ_o weight(o, s) gradient_o / loss_scale   over the pixels o of the view that read source pixel s; m, v and x as in adam_clip_

    Every sum has the order that it has in the adjoint of `view`. On CUDA row, learning rate and step are read by the kernel, so it can
    be captured in a CUDA graph. NaN stays NaN.

    Args:
        images: x, channels-last without a copy, any other strides through one; so are exp_avg (m), exp_avg_sq (v) and gradient.
        gradient: of the scaled loss, in the precision of the view: float32 or bfloat16, on CUDA also float16.
        rows, learning_rates: the schedule (views.Schedule), as `view` and `adam_clip_` read it.
        step: the row of both, counted from 0, 0 … T − 1.
        low, high: bounds of every channel, in normalised pixels.
        loss_scale: what the loss was multiplied with before its backward pass, > 0.
        betas: β₁ and β₂, each in [0, 1).
        eps: ε, ≥ 0.
    Raises:
        TypeError: an argument has the wrong type or precision.
        ValueError: shapes or devices do not fit, numbers are out of range, images would need differentiating, or, on a CPU, the crop
            leaves the images.
        IndexError: on a CPU, there is no such row.
        ImportError: the compiled operators, or Triton on CUDA, cannot be used here.
    """
    check_state(images, gradient, exp_avg, exp_avg_sq, learning_rates, step, low, high)
    check_schedule(images, rows, step)
    check_precision("gradient", gradient.dtype, images.device)
    if rows.size(0) != learning_rates.size(0):
        raise ValueError(f"rows and learning_rates must be of one length, got {rows.size(0)} and {learning_rates.size(0)}")
    if torch.is_grad_enabled() and (images.requires_grad or gradient.requires_grad):
        raise ValueError("view_adam_clip_ is not differentiable: call it under torch.no_grad(), or with tensors that do not require grad")
    if not isinstance(loss_scale, Real):
        raise TypeError(f"loss_scale must be a number, got {type(loss_scale).__name__}")
    if not 0 < loss_scale < math.inf:
        raise ValueError(f"loss_scale must be positive and finite, got {loss_scale}")
    beta1, beta2 = check_numbers(betas, eps)
    if images.is_cuda:
        update = _triton().view_adam_clip_
    else:
        _library.load()
        update = torch.ops.dwa_fast.view_adam_clip_.default
    state = images, gradient, exp_avg, exp_avg_sq
    update(*state, rows, learning_rates, step, low, high, float(loss_scale), beta1, beta2, float(eps))


@functools.cache
def _triton() -> Any:
    return importlib.import_module("dwa_fast.kernels.view_adam_clip")


@_library.fake("view_adam_clip_")
def _view_adam_clip_fake(
    images: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    rows: Tensor,
    learning_rates: Tensor,
    step: Tensor,
    low: Tensor,
    high: Tensor,
    loss_scale: float,
    beta1: float,
    beta2: float,
    eps: float,
) -> None:
    return None
