"""BatchNorm in eval mode, skip and ReLU in one pass, with the moments that the matching loss needs (Eq. 3)."""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dwa_fast.ops import _library

_CPU_DTYPES = (torch.float32, torch.bfloat16)
_CUDA_DTYPES = (*_CPU_DTYPES, torch.float16)


def bn_act(
    y: Tensor,  # [N, C, H, W]
    mean: Tensor,  # [C], float32
    var: Tensor,  # [C], float32
    weight: Tensor | None,  # [C], float32
    bias: Tensor | None,  # [C], float32
    eps: float,
    skip: Tensor | None = None,  # [N, C, H, W]
    relu: bool = False,
) -> tuple[Tensor, Tensor]:  # z [N, C, H, W], sums [2, C] float32
    """BatchNorm in eval mode with what follows it, and the shifted moments of its input, in one read of the input.

        z = relu(γ(y − m)/√(v + ε) + β [+ skip]),   sums = (Σ(y − m), Σ(y − m)²) over N, H and W

    Differentiable in y, skip, weight and bias, once; y and the gradient of z are read once:

        ∂L/∂skip = mask · ∂L/∂z,   ∂L/∂y = mask · γ/√(v + ε) · ∂L/∂z + ∂L/∂sums₁ + 2 ∂L/∂sums₂ (y − m)
        ∂L/∂γ = Σ mask · ∂L/∂z (y − m)/√(v + ε),   ∂L/∂β = Σ mask · ∂L/∂z

    Arithmetic is float32, rounded once. Channels-last tensors are read where they are, others through a copy. NaN propagates as in the
    plain operations. The same input gives the same bits on the same device, for any number of threads.

    Args:
        y: output of a convolution, float32 or bfloat16, on CUDA also float16; any strides; may be empty.
        mean, var: running statistics m and v, which are constants.
        weight, bias: γ and β; None: 1 and 0.
        eps: ε.
        skip: added before the ReLU; shape, precision and device of y.
        relu: apply the ReLU.
    Returns:
        z in the precision and memory format of y, and sums, [2, C], float32.
    Raises:
        TypeError: an argument has the wrong type or precision.
        ValueError: shapes or devices do not fit, or a gradient of mean or var is asked for.
        ImportError: the compiled operators, or Triton on CUDA, cannot be used here.
    """
    _check(y, mean, var, weight, bias, skip)
    z, sums = _BnAct.apply(y, mean, var, weight, bias, float(eps), skip, relu)
    return z, sums


class _BnAct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        mean: Tensor,
        var: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        skip: Tensor | None,
        relu: bool,
    ) -> tuple[Tensor, Tensor]:
        if y.is_cuda:
            z, sums, mask = _triton().bn_act_forward(y, mean, var, weight, bias, eps, skip, relu)
        else:
            _library.load()
            z, sums, mask = torch.ops.dwa_fast.bn_act_forward.default(y, mean, var, weight, bias, eps, skip, relu)
        ctx.save_for_backward(y, mean, var, weight, bias, mask)
        ctx.eps, ctx.has_skip, ctx.relu = eps, skip is not None, relu
        ctx.set_materialize_grads(False)
        return z, sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_z: Tensor | None, grad_sums: Tensor | None) -> tuple[Tensor | None, ...]:
        y, mean, var, weight, bias, mask = ctx.saved_tensors
        needs_y, _, _, needs_weight, needs_bias, _, needs_skip, _ = ctx.needs_input_grad
        if grad_z is None:
            grad_z = torch.zeros_like(y)
        layer = y, mean, var, weight, bias, ctx.eps, mask, ctx.has_skip, ctx.relu
        masked, parameters = ctx.has_skip and ctx.relu, needs_weight or needs_bias
        grad_y = grad_skip = both = None
        if needs_y or parameters or (needs_skip and masked):
            backward = _triton().bn_act_backward if y.is_cuda else torch.ops.dwa_fast.bn_act_backward.default
            grad_y, grad_skip, both = backward(grad_z, grad_sums, *layer, parameters)
        if not masked:
            grad_skip = grad_z
        grad_weight = both[0] if both is not None and needs_weight else None
        grad_bias = both[1] if both is not None and needs_bias else None
        return (grad_y if needs_y else None), None, None, grad_weight, grad_bias, None, (grad_skip if needs_skip else None), None


@functools.cache
def _triton() -> Any:
    return importlib.import_module("dwa_fast.kernels.bn_act")


@_library.fake("bn_act_forward")
def _forward_fake(
    y: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, skip: Tensor | None, relu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    bits = y.numel() if skip is not None and relu else 0
    sums = torch.empty((2, y.shape[1]), dtype=torch.float32, device=y.device)
    return torch.empty_like(y), sums, torch.empty((bits + 7) // 8, dtype=torch.uint8, device=y.device)


@_library.fake("bn_act_backward")
def _backward_fake(
    grad_z: Tensor,
    grad_sums: Tensor | None,
    y: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    mask: Tensor,
    has_skip: bool,
    relu: bool,
    parameters: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    of_parameters = torch.empty((2, y.shape[1]) if parameters else 0, dtype=torch.float32, device=y.device)
    return torch.empty_like(y), torch.empty_like(y) if has_skip and relu else y.new_empty(0), of_parameters


def _check(y: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, skip: Tensor | None) -> None:
    if not isinstance(y, Tensor):
        raise TypeError(f"y must be a tensor, got {type(y).__name__}")
    dtypes = _CUDA_DTYPES if y.is_cuda else _CPU_DTYPES
    if y.dtype not in dtypes:
        raise TypeError(f"y must be {_names(dtypes)} on {y.device.type}, got {_names((y.dtype,))}")
    if y.dim() != 4:
        raise ValueError(f"y must be [N, C, H, W], got shape {tuple(y.shape)}")
    shape, device = (y.size(1),), y.device
    for name, tensor in (("mean", mean), ("var", var), ("weight", weight), ("bias", bias)):
        if tensor is None and (name == "weight" or name == "bias"):
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if tensor.dtype is not torch.float32:
            raise TypeError(f"{name} must be float32, got {_names((tensor.dtype,))}")
        if tensor.shape != shape:
            raise ValueError(f"{name} must be [C] with C = {shape[0]}, got shape {tuple(tensor.shape)}")
        if tensor.device != device:
            raise ValueError(f"{name} must be on the device of y, {device}, got {tensor.device}")
    if mean.requires_grad or var.requires_grad:
        raise ValueError("bn_act is not differentiable in mean and var: pass them detached")
    if skip is None:
        return
    if not isinstance(skip, Tensor):
        raise TypeError(f"skip must be a tensor, got {type(skip).__name__}")
    if skip.dtype is not y.dtype:
        raise TypeError(f"skip must have the precision of y, {_names((y.dtype,))}, got {_names((skip.dtype,))}")
    if skip.shape != y.shape:
        raise ValueError(f"skip must have the shape of y, {tuple(y.shape)}, got {tuple(skip.shape)}")
    if skip.device != device:
        raise ValueError(f"skip must be on the device of y, {device}, got {skip.device}")


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    names = [str(dtype).removeprefix("torch.") for dtype in dtypes]
    return " or ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
