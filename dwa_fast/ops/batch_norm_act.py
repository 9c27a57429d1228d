"""BatchNorm in train mode with the skip, activation and pooling behind it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dwa_fast.ops import _library
from dwa_fast.ops.activation import Activation
from dwa_fast.ops.bn_act_pool import check_windows, places_of, pooled_like
from dwa_fast.ops.checks import check_activation, check_features, check_per_channel, check_skip


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
    windows: tuple[int, int, int] | None = None,  # k, s and p
    averages: bool = False,
) -> Tensor:  # [N, C, H, W], or [N, C, H', W'] with windows
    """BatchNorm in train mode with what follows it: two reads of the input forward, two of it and of the gradient backward.

        μ, σ² = mean and biased variance of y over N, H and W,   x = γ(y − μ)/√(σ² + ε) + β [+ skip],   z = f(x) [pooled]
        running_mean ← (1 − k) running_mean + k μ,   running_var ← (1 − k) running_var + k σ² n/(n − 1),   n = N·H·W

    Differentiable in y, skip, weight, bias and slope, once, with g = f'(x) · ∂L/∂f(x):

        ∂L/∂skip = g,   ∂L/∂β = Σ g,   ∂L/∂γ = Σ g (y − μ)/√(σ² + ε)
        ∂L/∂y = γ/√(σ² + ε) · (g − ∂L/∂β / n − (y − μ)/√(σ² + ε) · ∂L/∂γ / n)

    Args:
        y: output of a convolution, float32 or bfloat16, on CUDA also float16; any strides.
        running_mean, running_var: running statistics; None: they are not kept.
        momentum: k.
        eps: ε.
        skip, activation, slope: as in `bn_act`.
        windows, averages: of a pooling behind it, as in `bn_act_pool`; not with a skip.
    Returns:
        z in the precision of y, and its memory format; pooled, channels-last.
    Raises:
        TypeError: an argument has the wrong type or precision.
        ValueError: a channel has a single value, from which no variance can be computed, or an argument does not fit.
        ImportError: the compiled operators cannot be used here.
    """
    check_features(y)
    given = {"running_mean": running_mean, "running_var": running_var, "weight": weight, "bias": bias}
    for name, values in given.items():
        if values is not None:
            check_per_channel(name, values, y)
    check_skip(skip, y)
    check_activation(activation, slope, y)
    count = y.numel() // max(1, y.size(1))
    if count < 2:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {y.size()}")
    if windows:
        if skip is not None:
            raise ValueError("what is added to a skip cannot be pooled in the same pass: skip or windows must be left out")
        check_windows(y, *windows, averages)
    _library.load()
    behind = skip, activation, slope, list(windows or ()), averages
    z: Tensor = _BatchNormAct.apply(y, running_mean, running_var, weight, bias, float(momentum), float(eps), *behind)
    return z


class _BatchNormAct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        momentum: float,
        eps: float,
        skip: Tensor | None,
        activation: Activation,
        slope: Tensor | None,
        windows: list[int],
        averages: bool,
    ) -> Tensor:
        forward = torch.ops.dwa_fast.batch_norm_act_forward.default
        behind = skip, activation, slope, windows, averages
        z, mean, var, mask = forward(y, running_mean, running_var, weight, bias, momentum, eps, *behind)
        reads_skip = skip is not None and activation not in ("none", "relu")
        ctx.save_for_backward(y, mean, var, weight, bias, skip if reads_skip else None, mask, slope)
        ctx.eps, ctx.has_skip, ctx.activation, ctx.pooling = eps, skip is not None, activation, (windows, averages)
        return z  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_z: Tensor) -> tuple[Tensor | None, ...]:
        *layer, skip, mask, slope = ctx.saved_tensors
        backward = torch.ops.dwa_fast.batch_norm_act_backward.default
        grads = backward(grad_z, *layer, ctx.eps, skip, mask, ctx.has_skip, ctx.activation, slope, *ctx.pooling)
        grad_y, grad_skip, (grad_weight, grad_bias), grad_slope = grads
        needs_y, _, _, needs_weight, needs_bias, _, _, needs_skip, _, needs_slope, *_ = ctx.needs_input_grad
        return (
            grad_y if needs_y else None,
            None,
            None,
            grad_weight if needs_weight else None,
            grad_bias if needs_bias else None,
            None,
            None,
            (grad_z if ctx.activation == "none" else grad_skip) if needs_skip else None,
            None,
            grad_slope if needs_slope else None,
            None,
            None,
        )


def _forward(
    y: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    momentum: float,
    eps: float,
    skip: Tensor | None,
    activation: Activation,
    slope: Tensor | None,
    windows: Sequence[int] = (),
    averages: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """z, mean and biased variance of the batch, and the mask of `bn_act` or places of `bn_act_pool`, from their passes and `moments`."""
    count = y.numel() // y.shape[1]
    near = y[:, :, 0, 0].mean(0, dtype=torch.float32)  # shifted by a value of this size, squares lose no digits
    first, second = torch.ops.dwa_fast.moments_forward.default(y, near).double() / count
    mean, var = (near + first).float(), (second - first.square()).clamp_min_(0).float()
    layer = y, mean, var, weight, bias, eps
    if windows:
        forward = torch.ops.dwa_fast.bn_act_pool_forward.default
        z, _, mask = forward(*layer, activation, slope, *windows, None, False, averages)
    else:
        z, _, mask = torch.ops.dwa_fast.bn_act_forward.default(*layer, skip, activation, slope)
    if running_mean is not None and running_var is not None:
        running_mean.lerp_(mean, momentum)
        running_var.lerp_(var * (count / (count - 1)), momentum)
    return z, mean, var, mask


def _backward(
    grad_z: Tensor,
    y: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    skip: Tensor | None,
    mask: Tensor,
    has_skip: bool,
    activation: Activation,
    slope: Tensor | None,
    windows: Sequence[int] = (),
    averages: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of y and, with an activation behind a skip, of the skip; those of γ and β, [2, C], and of the slope; else empty."""
    layer = y, mean, var, weight, bias, eps
    if windows:
        backward, behind = torch.ops.dwa_fast.bn_act_pool_backward.default, (mask, activation, slope, *windows)
        _, grad_parameters, grad_slope = backward(grad_z, None, *layer, *behind, True, averages=averages, with_y=False)
        grad_y, *_ = backward(grad_z, _shares(y, var, weight, eps, grad_parameters), *layer, *behind, averages=averages)
        return grad_y, y.new_empty(0), grad_parameters, grad_slope
    backward, behind = torch.ops.dwa_fast.bn_act_backward.default, (has_skip, activation, slope)
    grad_skip, grad_parameters, grad_slope = backward(grad_z, None, *layer, skip, mask, *behind, True, with_y=False)[1:]
    shares = _shares(y, var, weight, eps, grad_parameters)
    if not has_skip:
        grad_y = backward(grad_z, shares, *layer, None, mask, *behind)[0]
    else:
        gradient = grad_z if activation == "none" else grad_skip
        grad_y = backward(gradient, shares, *layer, None, mask.new_empty(0), False, "none", None)[0]
    return grad_y, grad_skip, grad_parameters, grad_slope


def _shares(y: Tensor, var: Tensor, weight: Tensor | None, eps: float, grad_parameters: Tensor) -> Tensor:
    """What Σ(y − μ) and Σ(y − μ)² take of the gradient of y, [2, C]."""
    deviation = (var.double() + eps).sqrt()
    scale = -(deviation.reciprocal() if weight is None else weight / deviation) * (y.shape[1] / y.numel())
    grad_weight, grad_bias = grad_parameters
    return torch.stack([scale * grad_bias, 0.5 * scale * grad_weight / deviation]).float()


_FORWARD = (
    "(Tensor y, Tensor(a!)? running_mean, Tensor(b!)? running_var, Tensor? weight, Tensor? bias, float momentum, float eps, Tensor? skip, "
    "str activation, Tensor? slope, int[] windows=[], bool averages=False) -> (Tensor z, Tensor mean, Tensor var, Tensor mask)"
)
_BACKWARD = (
    "(Tensor grad_z, Tensor y, Tensor mean, Tensor var, Tensor? weight, Tensor? bias, float eps, Tensor? skip, Tensor mask, bool has_skip, "
    "str activation, Tensor? slope, int[] windows=[], bool averages=False) "
    "-> (Tensor grad_y, Tensor grad_skip, Tensor grad_parameters, Tensor grad_slope)"
)


@_library.fake("batch_norm_act_forward", triton="batch_norm_act", schema=_FORWARD, cpu=_forward)
def _forward_fake(
    y: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    momentum: float,
    eps: float,
    skip: Tensor | None,
    activation: Activation,
    slope: Tensor | None,
    windows: Sequence[int] = (),
    averages: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    bits = y.numel() if skip is not None and activation == "relu" else 0
    mean, var = (torch.empty(y.shape[1], dtype=torch.float32, device=y.device) for _ in range(2))
    if windows:
        z = pooled_like(y, *windows)
        return z, mean, var, places_of(z, averages)
    return torch.empty_like(y), mean, var, torch.empty((bits + 7) // 8, dtype=torch.uint8, device=y.device)


@_library.fake("batch_norm_act_backward", triton="batch_norm_act", schema=_BACKWARD, cpu=_backward)
def _backward_fake(
    grad_z: Tensor,
    y: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    skip: Tensor | None,
    mask: Tensor,
    has_skip: bool,
    activation: Activation,
    slope: Tensor | None,
    windows: Sequence[int] = (),
    averages: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad_parameters = torch.empty((2, y.shape[1]), dtype=torch.float32, device=y.device)
    grad_slope = torch.empty(0 if slope is None else len(slope), dtype=torch.float32, device=y.device)
    return torch.empty_like(y), torch.empty_like(y) if has_skip and activation != "none" else y.new_empty(0), grad_parameters, grad_slope
