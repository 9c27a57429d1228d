"""One ascent step of all weights (Eq. 11, Algorithm 1): checks and dispatch; arithmetic in csrc/ and kernels/."""

from __future__ import annotations

import math
from numbers import Real

import torch
from torch import Tensor

from dwa_fast.ops import _library


def ascend_(
    weights: Tensor,  # [P], float32, updated in place
    gradients: Tensor,  # [P], float32
    radius: float,
    *,
    normalize: bool = True,
    compute: Tensor | None = None,  # [P], bfloat16 or float16, rewritten
) -> Tensor:
    """Moves all weights along their gradient by one common length, in place, and returns the norm of the gradient.

        w ← w + radius · g / (‖g‖₂ + 1e-12)        one norm over the whole arena;  normalize=False: w ← w + radius · g

    NaN and infinity propagate as in the plain operations; where the gradient is zero the weights keep their bits. The result does not
    depend on the number of threads.

    Args:
        weights: all weights in one arena, [P], contiguous; P may be 0.
        gradients: their gradients, [P], contiguous, same device.
        radius: length of the step (ρ/K), finite, ≥ 0, in the unit of the weights; with normalize=False the factor of the gradient.
        normalize: divide by the norm.
        compute: copy of the weights in compute precision, [P], contiguous, same device; rewritten with the new weights, rounded to nearest.
    Returns:
        ‖g‖₂ before the step, scalar, float32, on the same device.
    Raises:
        TypeError: an argument has the wrong type or precision.
        ValueError: shapes, devices or layouts do not fit, radius is negative or not finite, or a result would need differentiating.
        ImportError: the compiled operators, or Triton on CUDA, cannot be used here.
    """
    _check_arena("weights", weights, weights, (torch.float32,))
    _check_arena("gradients", gradients, weights, (torch.float32,))
    if compute is not None:
        _check_arena("compute", compute, weights, (torch.bfloat16, torch.float16))
    if isinstance(radius, bool) or not isinstance(radius, Real):
        raise TypeError(f"radius must be a number, got {type(radius).__name__}")
    if not math.isfinite(radius) or radius < 0:
        raise ValueError(f"radius must be finite and not negative, got {radius}")
    if torch.is_grad_enabled() and (weights.requires_grad or gradients.requires_grad):
        raise ValueError("ascend_ is not differentiable: call it under torch.no_grad(), or with tensors that do not require grad")
    _library.load()
    norm: Tensor = torch.ops.dwa_fast.ascend_(weights, gradients, float(radius), normalize, compute)
    return norm


@_library.fake("ascend_", triton="ascend")
def _ascend_fake(weights: Tensor, gradients: Tensor, radius: float, normalize: bool = True, compute: Tensor | None = None) -> Tensor:
    return weights.new_empty(())


def _check_arena(name: str, arena: Tensor, weights: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    if not isinstance(arena, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(arena).__name__}")
    if arena.dtype not in dtypes:
        expected = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{name} must be {expected}, got {str(arena.dtype).removeprefix('torch.')}")
    if arena.dim() != 1:
        raise ValueError(f"{name} must be [P], got shape {tuple(arena.shape)}")
    if not arena.is_contiguous():
        raise ValueError(f"{name} must be contiguous, got stride {arena.stride(0)}")
    if arena.numel() != weights.numel():
        raise ValueError(f"{name} must have as many elements as weights, {weights.numel()}, got {arena.numel()}")
    if arena.device != weights.device:
        raise ValueError(f"{name} must be on the device of weights, {weights.device}, got {arena.device}")
