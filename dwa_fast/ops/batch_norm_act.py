"""BatchNorm in train mode with the skip and activation behind it, from the operators `moments` and `bn_act`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dwa_fast.ops import _library
from dwa_fast.ops.activation import Activation


def batch_norm_act(
    y: Tensor,  # [N, C, H, W]
    running_mean: Tensor | None,  # [C], float32, written
    running_var: Tensor | None,  # [C], float32, written
    weight: Tensor | None,  # [C], float32
    bias: Tensor | None,  # [C], float32
    momentum: float,
    eps: float,
    skip: Tensor | None = None,  # [N, C, H, W]
    activation: Activation = "none",
    slope: Tensor | None = None,  # [1] or [C], float32
) -> Tensor:  # [N, C, H, W]
    """BatchNorm in train mode with what follows it: two reads of the input forward, two of it and of the gradient backward.

        μ, σ² = mean and biased variance of y over N, H and W,   x = γ(y − μ)/√(σ² + ε) + β [+ skip],   z = f(x)
        running_mean ← (1 − k) running_mean + k μ,   running_var ← (1 − k) running_var + k σ² n/(n − 1),   n = N·H·W

    Differentiable in y, skip, weight, bias and slope, once, with g = f'(x) · ∂L/∂z:

        ∂L/∂skip = g,   ∂L/∂β = Σ g,   ∂L/∂γ = Σ g (y − μ)/√(σ² + ε)
        ∂L/∂y = γ/√(σ² + ε) · (g − ∂L/∂β / n − (y − μ)/√(σ² + ε) · ∂L/∂γ / n)

    Args:
        y: output of a convolution, float32 or bfloat16; any strides.
        running_mean, running_var: running statistics; None: they are not kept.
        momentum: k.
        eps: ε.
        skip, activation, slope: as in `bn_act`.
    Returns:
        z in the precision and memory format of y.
    Raises:
        ValueError: a channel has a single value, from which no variance can be computed, or an argument does not fit.
        ImportError: the compiled operators cannot be used here.
    """
    count = y.numel() // max(1, y.size(1))
    if count < 2:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {y.size()}")
    _library.load()
    z, mean, var = _BatchNormAct.apply(y, weight, bias, float(eps), skip, activation, slope)
    if running_mean is not None and running_var is not None:
        running_mean.lerp_(mean, momentum)
        running_var.lerp_(var * (count / (count - 1)), momentum)
    return z  # type: ignore[no-any-return]


class _BatchNormAct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        skip: Tensor | None,
        activation: Activation,
        slope: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        count = y.numel() // y.shape[1]
        near = y[:, :, 0, 0].mean(0, dtype=torch.float32)  # shifted by a value of this size, squares lose no digits
        first, second = torch.ops.dwa_fast.moments_forward.default(y, near).double() / count
        mean, var = (near + first).float(), (second - first.square()).clamp_min_(0).float()
        layer = y, mean, var, weight, bias, eps, skip, activation, slope
        z, _, mask = torch.ops.dwa_fast.bn_act_forward.default(*layer)
        reads_skip = skip is not None and activation not in ("none", "relu")
        ctx.save_for_backward(y, mean, var, weight, bias, skip if reads_skip else None, mask, slope)
        ctx.eps, ctx.has_skip, ctx.activation = eps, skip is not None, activation
        ctx.mark_non_differentiable(mean, var)
        return z, mean, var

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_z: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        y, mean, var, weight, bias, skip, mask, slope = ctx.saved_tensors
        layer = y, mean, var, weight, bias, ctx.eps
        behind = ctx.has_skip, ctx.activation, slope
        backward = torch.ops.dwa_fast.bn_act_backward.default
        grad_skip, grad_parameters, grad_slope = backward(grad_z, None, *layer, skip, mask, *behind, True)[1:]
        deviation = (var.double() + ctx.eps).sqrt()
        scale = -(deviation.reciprocal() if weight is None else weight / deviation) * (y.shape[1] / y.numel())
        grad_weight, grad_bias = grad_parameters[0], grad_parameters[1]
        shares = torch.stack([scale * grad_bias, 0.5 * scale * grad_weight / deviation]).float()  # of Σ(y − μ) and Σ(y − μ)²
        if not ctx.has_skip:
            grad_y = backward(grad_z, shares, *layer, None, mask, *behind)[0]
        else:
            grad_skip = grad_z if ctx.activation == "none" else grad_skip
            grad_y = backward(grad_skip, shares, *layer, None, mask.new_empty(0), False, "none", None)[0]
        needs_y, needs_weight, needs_bias, _, needs_skip, _, needs_slope = ctx.needs_input_grad
        return (
            grad_y if needs_y else None,
            grad_weight if needs_weight else None,
            grad_bias if needs_bias else None,
            None,
            grad_skip if needs_skip else None,
            None,
            grad_slope if needs_slope else None,
        )
