"""Cross-entropy with its gradient, and the log of the losses, on CUDA alone; elsewhere PyTorch's own operators do it (reference/ops.py)."""

from __future__ import annotations

import torch
from torch import Tensor

from dwa_fast.ops import _library

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def cross_entropy(
    logits: Tensor,  # [N, C]
    labels: Tensor,  # [N], int64
    scale: float,
) -> tuple[Tensor, Tensor]:  # [N], float32; [N, C], like the logits
    """Cross-entropy of every image, and the gradient of scale times their mean, in one launch, on CUDA alone.

        loss_i = log Σ_c exp(x_ic) − x_iy,   gradient_ic = scale/N · (softmax(x_i)_c − [c = y_i])

    Arithmetic is float32, rounded once. NaN propagates. The same input gives the same bits.

    Args:
        logits: float32, bfloat16 or float16; any strides.
        labels: a class in 0 … C − 1 each; of a label outside of these the softmax alone counts.
        scale: of the loss.
    Returns:
        losses and gradient, not differentiable.
    Raises:
        TypeError: an argument has the wrong type or precision.
        ValueError: shapes or devices do not fit.
        ImportError: the compiled operators, or Triton, cannot be used here.
    """
    if logits.dtype not in _DTYPES:
        raise TypeError(f"logits must be float32, bfloat16 or float16, got {str(logits.dtype).removeprefix('torch.')}")
    if labels.dtype is not torch.int64:
        raise TypeError(f"labels must be int64, got {str(labels.dtype).removeprefix('torch.')}")
    if logits.dim() != 2 or labels.shape != logits.shape[:1] or labels.device != logits.device:
        raise ValueError(
            f"logits and labels must be [N, C] and [N] on one device, got {tuple(logits.shape)} on {logits.device} "
            f"and {tuple(labels.shape)} on {labels.device}"
        )
    _library.load()
    losses, gradient = torch.ops.dwa_fast.cross_entropy.default(logits.detach(), labels, float(scale))
    return losses, gradient


def log_losses_(
    losses: Tensor,  # [T, 3], float32, row t written
    step: Tensor,  # [], int64: t, advanced
    image_losses: Tensor,  # [N], float32
    matching: Tensor,  # [2], float32
) -> None:
    """losses_t = (mean of image_losses, R_mean, R_var), then t ← (t + 1) mod T, in one launch, on CUDA alone.

    Raises:
        TypeError: an argument has the wrong precision.
        ValueError: shapes do not fit.
        ImportError: the compiled operators, or Triton, cannot be used here.
    """
    for name, tensor, dtype in (
        ("losses", losses, torch.float32),
        ("step", step, torch.int64),
        ("image_losses", image_losses, torch.float32),
        ("matching", matching, torch.float32),
    ):
        if tensor.dtype is not dtype:
            raise TypeError(f"{name} must be {str(dtype).removeprefix('torch.')}, got {str(tensor.dtype).removeprefix('torch.')}")
        if not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got strides {tensor.stride()}")
    if losses.dim() != 2 or losses.size(1) != 3 or step.dim() != 0 or image_losses.dim() != 1 or matching.shape != (2,):
        shapes = ", ".join(str(tuple(each.shape)) for each in (losses, step, image_losses, matching))
        raise ValueError(f"losses, step, image_losses and matching must be [T, 3], [], [N] and [2], got {shapes}")
    _library.load()
    torch.ops.dwa_fast.log_losses_.default(losses, step, image_losses, matching)


@_library.fake("cross_entropy", triton="losses", schema="(Tensor logits, Tensor labels, float scale) -> (Tensor losses, Tensor gradient)")
def _cross_entropy_fake(logits: Tensor, labels: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return logits.new_empty(len(logits), dtype=torch.float32), torch.empty_like(logits, memory_format=torch.contiguous_format)


@_library.fake("log_losses_", triton="losses", schema="(Tensor(a!) losses, Tensor(b!) step, Tensor image_losses, Tensor matching) -> ()")
def _log_losses_fake(losses: Tensor, step: Tensor, image_losses: Tensor, matching: Tensor) -> None:
    return None
