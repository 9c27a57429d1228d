"""Two BatchNorm layers in eval mode whose sum is activated, in one pass, with the moments that the matching loss needs (Eq. 3)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dwa_fast.ops import _library
from dwa_fast.ops.activation import Activation
from dwa_fast.ops.bn_act import LayerConstants, gradients_of_z
from dwa_fast.ops.checks import check_activation, check_alias, check_layer, check_skip, check_sums


def bn_act_join(
    y: Tensor,  # [N, C, H, W]
    mean: Tensor,  # [C], float32
    var: Tensor,  # [C], float32
    weight: Tensor | None,  # [C], float32
    bias: Tensor | None,  # [C], float32
    eps: float,
    skip: Tensor,  # [N, C, H, W]
    skip_mean: Tensor,  # [C], float32
    skip_var: Tensor,  # [C], float32
    skip_weight: Tensor | None,  # [C], float32
    skip_bias: Tensor | None,  # [C], float32
    skip_eps: float,
    activation: Activation = "none",
    slope: Tensor | None = None,  # [1] or [C], float32
    partials: Tensor | None = None,  # [2, R, C], float32, written
    skip_partials: Tensor | None = None,  # [2, R, C], float32, written
    with_alias: bool = False,
    alias_stride: int = 1,
    with_sums: bool = True,
) -> tuple[Tensor, ...]:  # z [N, C, H, W], with_alias an alias [N, C, ⌈H/s⌉, ⌈W/s⌉] of z, sums and skip_sums, each [2, C] float32
    """`bn_act` of a skip that comes out of a BatchNorm of its own, as in a residual block that changes the shape: neither is stored.

        x = γ(y − m)/√(v + ε) + β + γ'(y' − m')/√(v' + ε') + β',   z = f(x),   sums = (Σ(y − m), Σ(y − m)²),   skip_sums those of y'

    where y' is the skip and m', v', γ', β' and ε' belong to its layer. Differentiable as bn_act, once, also in the parameters of both
    layers; the backward pass reads y, y' and the gradient of z once, and computes x again. Precision and bits are as bn_act's.

    Args:
        y, mean, var, weight, bias, eps, activation, slope, partials, with_alias, alias_stride, with_sums: as of bn_act.
        skip: the input of the second layer; shape, precision and device of y.
        skip_mean, skip_var, skip_weight, skip_bias, skip_eps: of the second layer, as those of the first.
        skip_partials: memory for the partial sums of the second layer, as many as of the first; given with those or not at all.
    Raises:
        TypeError: an argument has the wrong type or precision.
        ValueError: as bn_act, or only one layer's partial sums are given.
        ImportError: the compiled operators, or Triton on CUDA, cannot be used here.
    """
    check_layer(y, mean, var, weight, bias)
    if skip is None:
        raise TypeError("skip must be a tensor, got NoneType")
    check_skip(skip, y)
    check_layer(skip, skip_mean, skip_var, skip_weight, skip_bias, prefix="skip_")
    check_activation(activation, slope, y)
    check_sums(partials, with_sums)
    check_alias(with_alias, alias_stride)
    if (partials is None) != (skip_partials is None):
        raise ValueError("partials and skip_partials must be given together")
    _library.load()
    layer = LayerConstants(mean, var, float(eps), activation, partials, with_alias, alias_stride, with_sums)
    skip_layer = _SkipConstants(skip_mean, skip_var, float(skip_eps), skip_partials)
    z, alias, *sums = _BnActJoin.apply(y, weight, bias, skip, skip_weight, skip_bias, slope, layer, skip_layer)
    return (z, alias, *sums) if with_alias else (z, *sums)


class _SkipConstants(NamedTuple):
    """The arguments of the second layer that have no gradient."""

    mean: Tensor  # [C]
    var: Tensor  # [C]
    eps: float
    partials: Tensor | None


class _BnActJoin(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        skip: Tensor,
        skip_weight: Tensor | None,
        skip_bias: Tensor | None,
        slope: Tensor | None,
        layer: LayerConstants,
        skip_layer: _SkipConstants,
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        mean, var, eps, activation, partials, *_ = layer
        skip_mean, skip_var, skip_eps, skip_partials = skip_layer
        both = y, mean, var, weight, bias, eps, skip, skip_mean, skip_var, skip_weight, skip_bias, skip_eps, activation, slope
        z, sums = torch.ops.dwa_fast.bn_act_join_forward.default(*both, partials, skip_partials, layer.with_sums)
        ctx.save_for_backward(y, mean, var, weight, bias, skip, skip_mean, skip_var, skip_weight, skip_bias, slope)
        ctx.eps, ctx.skip_eps, ctx.activation, ctx.alias_stride = eps, skip_eps, activation, layer.alias_stride
        ctx.takes_later, ctx.later = layer.alias_stride == 1, None
        ctx.set_materialize_grads(False)
        return z, layer.alias(z), *(sums if layer.with_sums else (sums, sums.new_empty(0)))

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_z: Tensor | None, grad_alias: Tensor | None, grad_sums: Tensor | None, skip_grad_sums: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        y, mean, var, weight, bias, skip, skip_mean, skip_var, skip_weight, skip_bias, slope = ctx.saved_tensors
        needs_y, needs_weight, needs_bias, needs_skip, needs_skip_weight, needs_skip_bias, needs_slope, *_ = ctx.needs_input_grad
        grad_z, grad_alias, alias_stride, *later = gradients_of_z(ctx, grad_z, grad_alias, y)
        layer = y, mean, var, weight, bias, ctx.eps
        skip_layer = skip, skip_mean, skip_var, skip_weight, skip_bias, ctx.skip_eps
        parameters = needs_weight or needs_bias or needs_skip_weight or needs_skip_bias or needs_slope
        backward = torch.ops.dwa_fast.bn_act_join_backward.default
        grad_y, grad_skip, grad_parameters, grad_slope = backward(
            grad_z, grad_sums, skip_grad_sums, *layer, *skip_layer, ctx.activation, slope, parameters, grad_alias, alias_stride, *later
        )
        return (
            grad_y if needs_y else None,
            grad_parameters[0] if needs_weight else None,
            grad_parameters[1] if needs_bias else None,
            grad_skip if needs_skip else None,
            grad_parameters[2] if needs_skip_weight else None,
            grad_parameters[1].clone() if needs_skip_bias else None,  # that of the bias, in memory of its own
            grad_slope if needs_slope else None,
            None,
            None,
        )


@_library.fake("bn_act_join_forward", triton="bn_act_join")
def _forward_fake(
    y: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    skip: Tensor,
    skip_mean: Tensor,
    skip_var: Tensor,
    skip_weight: Tensor | None,
    skip_bias: Tensor | None,
    skip_eps: float,
    activation: Activation,
    slope: Tensor | None,
    partials: Tensor | None = None,
    skip_partials: Tensor | None = None,
    with_sums: bool = True,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(y), torch.empty((2, 2, y.shape[1]) if with_sums else 0, dtype=torch.float32, device=y.device)


@_library.fake("bn_act_join_backward", triton="bn_act_join")
def _backward_fake(
    grad_z: Tensor,
    grad_sums: Tensor | None,
    skip_grad_sums: Tensor | None,
    y: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    skip: Tensor,
    skip_mean: Tensor,
    skip_var: Tensor,
    skip_weight: Tensor | None,
    skip_bias: Tensor | None,
    skip_eps: float,
    activation: Activation,
    slope: Tensor | None,
    parameters: bool = False,
    grad_alias: Tensor | None = None,
    alias_stride: int = 1,
    grad_later: Tensor | None = None,
    later_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad_parameters = torch.empty((3, y.shape[1]) if parameters else 0, dtype=torch.float32, device=y.device)
    grad_slope = torch.empty(len(slope) if parameters and slope is not None else 0, dtype=torch.float32, device=y.device)
    return torch.empty_like(y), torch.empty_like(skip), grad_parameters, grad_slope
