"""BatchNorm in eval mode, activation and max- or mean-pooling in one pass, with the moments that the matching loss needs (Eq. 3)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dwa_fast.ops import _library
from dwa_fast.ops.activation import Activation
from dwa_fast.ops.bn_act import LayerConstants
from dwa_fast.ops.checks import check_activation, check_layer, check_sums

LARGEST_WINDOW = 3  # pixels of a side: a kernel of a GPU has a load for each pixel of a window


def bn_act_pool(
    y: Tensor,  # [N, C, H, W]
    mean: Tensor,  # [C], float32
    var: Tensor,  # [C], float32
    weight: Tensor | None,  # [C], float32
    bias: Tensor | None,  # [C], float32
    eps: float,
    window: int,
    stride: int,
    padding: int,
    activation: Activation = "none",
    slope: Tensor | None = None,  # [1] or [C], float32
    partials: Tensor | None = None,  # [2, R, C], float32, written
    with_alias: bool = False,
    with_sums: bool = True,
    averages: bool = False,
) -> tuple[Tensor, ...]:  # z [N, C, H', W'], with_alias an alias of z, sums [2, C] float32
    """`bn_act` and a pooling behind it; what is pooled is never stored, nor is its gradient.

        x = γ(y − m)/√(v + ε) + β,   z = the largest f(x) of each window, or their mean,   sums = (Σ(y − m), Σ(y − m)²) over N, H and W

    with H' = ⌊(H + 2p − k)/s⌋ + 1 for windows of k × k pixels at every s-th pixel, p pixels beyond the border, where nothing counts.
    Differentiable as bn_act, once. Of equals the first in a window takes the gradient, and NaN wins, as in PyTorch's max_pool2d; the place
    is stored in 8 bits, and x is computed again in the backward pass. Means are of windows side by side, and of f(x) in the precision of
    y; pixels on the right and below that fill no window count in the sums alone. Precision and bits are as bn_act's; the result is
    channels-last.

    Args:
        y, mean, var, weight, bias, eps, activation, slope, partials, with_sums: as of bn_act.
        window: k, 1 to 3.
        stride: s, at least 1.
        padding: p, 0 to k/2.
        with_alias: return z as two tensors in the same memory, one for each of two uses, whose gradients the backward pass adds.
        averages: the mean of each window in place of the largest; s must be k and p 0.
    Raises:
        TypeError: an argument has the wrong type or precision.
        ValueError: as bn_act, or window, stride or padding are out of range, or y has no room for a window.
        ImportError: the compiled operators, or Triton on CUDA, cannot be used here.
    """
    check_layer(y, mean, var, weight, bias)
    check_activation(activation, slope, y)
    check_sums(partials, with_sums)
    check_windows(y, window, stride, padding, averages)
    _library.load()
    layer = LayerConstants(mean, var, float(eps), activation, partials, with_alias, with_sums=with_sums)
    z, alias, sums = _BnActPool.apply(y, weight, bias, slope, layer, (window, stride, padding), averages)
    return (z, alias, sums) if with_alias else (z, sums)


class _BnActPool(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        slope: Tensor | None,
        layer: LayerConstants,
        windows: tuple[int, int, int],
        averages: bool,
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        mean, var, eps, activation, partials, *_ = layer
        forward = torch.ops.dwa_fast.bn_act_pool_forward.default
        z, sums, index = forward(y, mean, var, weight, bias, eps, activation, slope, *windows, partials, layer.with_sums, averages)
        ctx.save_for_backward(y, mean, var, weight, bias, index, slope)
        ctx.eps, ctx.activation, ctx.windows, ctx.averages, ctx.shape = eps, activation, windows, averages, z.shape
        ctx.set_materialize_grads(False)
        return z, layer.alias(z), sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_z: Tensor | None, grad_alias: Tensor | None, grad_sums: Tensor | None) -> tuple[Tensor | None, ...]:
        y, mean, var, weight, bias, index, slope = ctx.saved_tensors
        needs_y, needs_weight, needs_bias, needs_slope, *_ = ctx.needs_input_grad
        if grad_z is None:
            grad_z, grad_alias = y.new_zeros(ctx.shape) if grad_alias is None else grad_alias, None
        layer = y, mean, var, weight, bias, ctx.eps, index, ctx.activation, slope, *ctx.windows
        parameters = needs_weight or needs_bias or needs_slope
        backward = torch.ops.dwa_fast.bn_act_pool_backward.default
        grad_y, grad_parameters, grad_slope = backward(grad_z, grad_sums, *layer, parameters, grad_alias, ctx.averages)
        return (
            grad_y if needs_y else None,
            grad_parameters[0] if needs_weight else None,
            grad_parameters[1] if needs_bias else None,
            grad_slope if needs_slope else None,
            None,
            None,
            None,
        )


@_library.fake("bn_act_pool_forward", triton="bn_act_pool")
def _forward_fake(
    y: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: Activation,
    slope: Tensor | None,
    window: int,
    stride: int,
    padding: int,
    partials: Tensor | None = None,
    with_sums: bool = True,
    averages: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    z = pooled_like(y, window, stride, padding)
    sums = torch.empty((2, y.shape[1]) if with_sums else 0, dtype=torch.float32, device=y.device)
    return z, sums, places_of(z, averages)


@_library.fake("bn_act_pool_backward", triton="bn_act_pool")
def _backward_fake(
    grad_z: Tensor,
    grad_sums: Tensor | None,
    y: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    index: Tensor,
    activation: Activation,
    slope: Tensor | None,
    window: int,
    stride: int,
    padding: int,
    parameters: bool = False,
    grad_alias: Tensor | None = None,
    averages: bool = False,
    with_y: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_parameters = torch.empty((2, y.shape[1]) if parameters else 0, dtype=torch.float32, device=y.device)
    grad_slope = torch.empty(len(slope) if parameters and slope is not None else 0, dtype=torch.float32, device=y.device)
    return torch.empty_like(y) if with_y else y.new_empty(0), grad_parameters, grad_slope


def pooled_like(y: Tensor, window: int, stride: int, padding: int) -> Tensor:
    """Memory for what is left of y, channels-last."""
    shape = *y.shape[:2], *((size + 2 * padding - window) // stride + 1 for size in y.shape[2:])
    return torch.empty(shape, dtype=y.dtype, device=y.device, memory_format=torch.channels_last)


def places_of(z: Tensor, averages: bool) -> Tensor:
    """Memory for the places in their windows that the backward pass needs: none of means."""
    return torch.empty(0, dtype=torch.uint8, device=z.device) if averages else torch.empty_like(z, dtype=torch.uint8)


def check_windows(y: Tensor, window: int, stride: int, padding: int, averages: bool) -> None:
    """Raise TypeError or ValueError unless `bn_act_pool` can pool y so."""
    for name, number in (("window", window), ("stride", stride), ("padding", padding)):
        if isinstance(number, bool) or not isinstance(number, int):
            raise TypeError(f"{name} must be an integer, got {type(number).__name__}")
    if not 1 <= window <= LARGEST_WINDOW:
        raise ValueError(f"window must be 1 to {LARGEST_WINDOW}, got {window}")
    if stride < 1:
        raise ValueError(f"stride must be at least 1, got {stride}")
    if not 0 <= 2 * padding <= window:
        raise ValueError(f"padding must be 0 to half of the window, got {padding} with window {window}")
    if averages and (stride, padding) != (window, 0):
        raise ValueError(f"stride must be {window} and padding 0 for means of {window} × {window} pixels, got {stride} and {padding}")
    if min(y.shape[2:]) + 2 * padding < window:
        raise ValueError(f"y must have room for a window of {window} pixels, got shape {tuple(y.shape)}")
