"""The adjoint of the view and one step of Adam on the pixels in one pass, so that the gradient of the images is never written."""

from __future__ import annotations

import math
from numbers import Real

import torch
from torch import Tensor

from dwa_fast.ops import _library
from dwa_fast.ops.view import check_precision, check_schedule


def view_adam_clip_(
    images: Tensor,  # [N, C, H, W], float32, changed in place
    gradient: Tensor,  # [N, C, H, W] or [N, C, H/2, 2, W/2, 2], with respect to the view
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
    """The gradient of the images from that of their view, one step of Adam with it, and the clamp to [low, high]: one pass over the pixels.

        g_s = Σ_o weight(o, s) gradient_o / loss_scale   over the pixels o of the view that read source pixel s
        m ← β₁m + (1−β₁)g,   v ← β₂v + (1−β₂)g²,   x ← clamp(x − lr_t · m/(1−β₁^(t+1)) / (√(v/(1−β₂^(t+1))) + ε))

    Every sum has a fixed order. On CUDA row, learning rate and step are read by the kernel, so it can
    be captured in a CUDA graph. NaN stays NaN.

    Args:
        images: x, channels-last without a copy, any other strides through one; so are exp_avg (m), exp_avg_sq (v) and gradient.
        gradient: of the scaled loss, in the precision of the view: float32 or bfloat16, on CUDA also float16. Of blocks of 2×2 pixels, as
            StemConv has it, with any strides; on CUDA it is read where it is.
        rows, learning_rates: the schedule (schedule.Schedule): the view and lr_t of every iteration.
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
    _check_state(images, gradient, exp_avg, exp_avg_sq, learning_rates, step, low, high)
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
    beta1, beta2 = _check_numbers(betas, eps)
    _library.load()
    update = torch.ops.dwa_fast.view_adam_clip_.default
    state = images, gradient, exp_avg, exp_avg_sq
    update(*state, rows, learning_rates, step, low, high, float(loss_scale), beta1, beta2, float(eps))


@_library.fake("view_adam_clip_", triton="view_adam_clip")
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


def blocks_shape(images: Tensor) -> torch.Size | None:
    """[N, C, H/2, 2, W/2, 2] of images [N, C, H, W], whose pixels are then in blocks of 2×2; None where H or W is odd."""
    count, channels, height, width = images.shape
    return None if height % 2 or width % 2 else torch.Size((count, channels, height // 2, 2, width // 2, 2))


def _check_state(
    images: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    learning_rates: Tensor,
    step: Tensor,
    low: Tensor,
    high: Tensor,
) -> None:
    """Refuse tensors that do not fit the images; the precision of the gradient is left to the operator."""
    named = {
        "images": images,
        "gradient": gradient,
        "exp_avg": exp_avg,
        "exp_avg_sq": exp_avg_sq,
        "learning_rates": learning_rates,
        "step": step,
        "low": low,
        "high": high,
    }
    for name, tensor in named.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        expected = torch.int64 if name == "step" else torch.float32
        if tensor.dtype is not expected and name != "gradient":
            raise TypeError(f"{name} must be {str(expected).removeprefix('torch.')}, got {str(tensor.dtype).removeprefix('torch.')}")
        if tensor.device != images.device:
            raise ValueError(f"{name} must be on the device of images, {images.device}, got {tensor.device}")
    if images.dim() != 4:
        raise ValueError(f"images must be [N, C, H, W], got shape {tuple(images.shape)}")
    for name, tensor in (("gradient", gradient), ("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)):
        if name == "gradient" and tensor.shape == blocks_shape(images):
            continue
        if tensor.shape != images.shape:
            raise ValueError(f"{name} must have the shape of images, {tuple(images.shape)}, got {tuple(tensor.shape)}")
    for name, tensor in (("low", low), ("high", high)):
        if tensor.dim() != 1 or tensor.size(0) != images.size(1):
            raise ValueError(f"{name} must be [C] with C = {images.size(1)}, got shape {tuple(tensor.shape)}")
    if learning_rates.dim() != 1:
        raise ValueError(f"learning_rates must be [T], got shape {tuple(learning_rates.shape)}")
    if step.dim() != 0:
        raise ValueError(f"step must be [], got shape {tuple(step.shape)}")


def _check_numbers(betas: tuple[float, float], eps: float) -> tuple[float, float]:
    """β₁ and β₂ as numbers; refuses what Adam cannot use."""
    if not isinstance(betas, (tuple, list)) or len(betas) != 2 or not all(isinstance(beta, Real) for beta in betas):
        raise TypeError(f"betas must be two numbers, got {betas!r}")
    if not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas must lie in [0, 1), got {betas!r}")
    if not isinstance(eps, Real):
        raise TypeError(f"eps must be a number, got {type(eps).__name__}")
    if not eps >= 0:
        raise ValueError(f"eps must not be negative, got {eps}")
    return float(betas[0]), float(betas[1])
