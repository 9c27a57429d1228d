"""BatchNorm in eval mode, skip and activation in one pass, with the moments that the matching loss needs (Eq. 3)."""

from __future__ import annotations

import importlib
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dwa_fast.ops import _library
from dwa_fast.ops.activation import Activation
from dwa_fast.ops.checks import check_activation, check_alias, check_layer, check_skip, check_sums


def bn_act(
    y: Tensor,  # [N, C, H, W]
    mean: Tensor,  # [C], float32
    var: Tensor,  # [C], float32
    weight: Tensor | None,  # [C], float32
    bias: Tensor | None,  # [C], float32
    eps: float,
    skip: Tensor | None = None,  # [N, C, H, W]
    activation: Activation = "none",
    slope: Tensor | None = None,  # [1] or [C], float32
    partials: Tensor | None = None,  # [2, R, C], float32, written
    with_alias: bool = False,
    alias_stride: int = 1,
    with_sums: bool = True,
    leaves_skip: bool = False,
) -> tuple[Tensor, ...]:  # z [N, C, H, W], with_alias an alias [N, C, ⌈H/s⌉, ⌈W/s⌉] of z, sums [2, C] float32
    """BatchNorm in eval mode with what follows it, and the shifted moments of its input, in one read of the input.

        x = γ(y − m)/√(v + ε) + β [+ skip],   z = f(x),   sums = (Σ(y − m), Σ(y − m)²) over N, H and W

    Differentiable in y, skip, weight, bias and slope, once; y and the gradient of z are read once:

        ∂L/∂skip = f'(x) · ∂L/∂z,   ∂L/∂y = f'(x) · γ/√(v + ε) · ∂L/∂z + ∂L/∂sums₁ + 2 ∂L/∂sums₂ (y − m)
        ∂L/∂γ = Σ f'(x) · ∂L/∂z (y − m)/√(v + ε),   ∂L/∂β = Σ f'(x) · ∂L/∂z,   ∂L/∂slope = Σ ∂L/∂z min(x, 0)

    x is never stored: the backward pass computes it again from y and skip, but for a ReLU behind a skip, where one bit per element is
    stored. At the corners of f, f' is what PyTorch takes.

    Arithmetic is float32, rounded once. Channels-last tensors are read where they are, others through a copy. NaN propagates as in the
    plain operations. The same input gives the same bits on the same device, for any number of threads.

    Args:
        y: output of a convolution, float32 or bfloat16, on CUDA also float16; any strides; may be empty.
        mean, var: running statistics m and v, which are constants.
        weight, bias: γ and β; None: 1 and 0.
        eps: ε.
        skip: added before the activation; shape, precision and device of y.
        activation: f: none, relu, relu6, silu, hardswish, gelu (by the error function), gelu_tanh or leaky_relu, which with a learned slope
            is PReLU.
        slope: the slope of leaky_relu below 0, one or one per channel; None for all others.
        partials: on CUDA alone, memory for R = `partial_rows` rows of partial sums, which `matching_gradient` adds up for all layers at
            once. The values of sums are then undefined; its gradient is that of the sums.
        with_alias: return z as two tensors in the same memory, one for each of two uses. The backward pass adds their gradients itself,
            rounded to their precision: the bits of PyTorch's sum, without its pass over memory.
        alias_stride: s: the alias has the pixels in every s-th row and column of z alone, and its gradient no more, as for a strided 1×1
            convolution.
        with_sums: whether the moments are wanted; if not, sums is empty.
        leaves_skip: on CUDA alone, and where the skip is the alias of another layer's result and has no other use: with a ReLU its gradient
            is never written. The backward pass of that layer, `bn_act` or `bn_act_join`, puts it together, bit for bit, from what it
            consists of. Autograd sees something else of its shape, so that nobody may ask for it; another use of the skip, or a hook,
            ends that backward pass with a RuntimeError. Where gradients of weights are taken too, it is written as ever.
    Returns:
        z in the precision and memory format of y, with_alias an alias of it, and sums, [2, C], float32.
    Raises:
        TypeError: an argument has the wrong type or precision.
        ValueError: shapes or devices do not fit, there is no such activation, leaky_relu has no slope or another one has, or a gradient of
            mean or var is required; alias_stride is less than 1, or not 1 without an alias; leaves_skip is given without a skip, or
            partials without sums.
        ImportError: the compiled operators, or Triton on CUDA, cannot be used here.
    """
    check_layer(y, mean, var, weight, bias)
    check_skip(skip, y)
    if leaves_skip and skip is None:
        raise ValueError("leaves_skip belongs to a skip, got it without one")
    check_activation(activation, slope, y)
    check_sums(partials, with_sums)
    check_alias(with_alias, alias_stride)
    _library.load()
    layer = LayerConstants(mean, var, float(eps), activation, partials, with_alias, alias_stride, with_sums, leaves_skip)
    z, alias, sums = _BnAct.apply(y, weight, bias, skip, slope, layer)
    return (z, alias, sums) if with_alias else (z, sums)


def partial_rows(
    y: Tensor,  # [N, C, H, W]
    activation: Activation = "none",
    *,
    skip: bool = False,
    joins: bool = False,
    pools: bool = False,
    moments: bool = False,
) -> int:
    """Rows of partial sums, [R, C], that an operator leaves on CUDA: `bn_act` as it is given, `bn_act_join`, `bn_act_pool`, or `moments`.

    `moments` leaves them of channels-last features alone. R depends on the shape, and on how many programs the GPU holds at once.

    Raises:
        ImportError: Triton cannot be used here.
    """
    if moments:
        registers = importlib.import_module("dwa_fast.kernels.moments").REGISTERS
    elif joins:
        registers = importlib.import_module("dwa_fast.kernels.bn_act_join").registers(activation)
    elif pools:
        registers = importlib.import_module("dwa_fast.kernels.bn_act_pool").registers(activation)
    else:
        registers = importlib.import_module("dwa_fast.kernels.bn_act").registers(skip, activation)
    rows: int = importlib.import_module("dwa_fast.kernels.layout").partial_rows(y, registers)
    return rows


class LayerConstants(NamedTuple):
    """The arguments of an operator on a layer that have no gradient."""

    mean: Tensor  # [C]
    var: Tensor  # [C]
    eps: float
    activation: Activation
    partials: Tensor | None
    with_alias: bool
    alias_stride: int = 1
    with_sums: bool = True
    leaves_skip: bool = False

    def alias(self, z: Tensor) -> Tensor | None:
        """The second result, in the memory of the first."""
        return z.detach()[:, :, :: self.alias_stride, :: self.alias_stride] if self.with_alias else None


class _BnAct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, y: Tensor, weight: Tensor | None, bias: Tensor | None, skip: Tensor | None, slope: Tensor | None, layer: LayerConstants
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        mean, var, eps, activation, partials, *_ = layer
        forward = torch.ops.dwa_fast.bn_act_forward.default
        z, sums, mask = forward(y, mean, var, weight, bias, eps, skip, activation, slope, partials, layer.with_sums)
        ctx.save_for_backward(y, mean, var, weight, bias, skip if _reads_skip(skip is not None, activation) else None, mask, slope)
        ctx.eps, ctx.has_skip, ctx.activation, ctx.alias_stride = eps, skip is not None, activation, layer.alias_stride
        ctx.before = _layer_before(skip) if skip is not None and layer.leaves_skip and activation == "relu" else None
        ctx.takes_later, ctx.later = layer.alias_stride == 1 and (skip is None or activation != "none"), None
        ctx.set_materialize_grads(False)
        return z, layer.alias(z), sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_z: Tensor | None, grad_alias: Tensor | None, grad_sums: Tensor | None) -> tuple[Tensor | None, ...]:
        y, mean, var, weight, bias, skip, mask, slope = ctx.saved_tensors
        needs_y, needs_weight, needs_bias, needs_skip, needs_slope, _ = ctx.needs_input_grad
        grad_z, grad_alias, alias_stride, *later = gradients_of_z(ctx, grad_z, grad_alias, y)
        if grad_alias is not None and ctx.has_skip and ctx.activation == "none":  # the gradient of the skip is the sum itself
            grad_z, grad_alias = _added(grad_z, grad_alias, alias_stride), None
        layer = y, mean, var, weight, bias, ctx.eps, skip, mask, ctx.has_skip, ctx.activation, slope
        changes_skip, parameters = ctx.has_skip and ctx.activation != "none", needs_weight or needs_bias or needs_slope
        leaves = ctx.before is not None and needs_skip and not parameters and later[0] is None
        grad_y = grad_skip = grad_weight = grad_bias = grad_slope = None
        if needs_y or parameters or (needs_skip and changes_skip):
            backward = torch.ops.dwa_fast.bn_act_backward.default
            gradients = backward(grad_z, grad_sums, *layer, parameters, grad_alias, alias_stride, True, not leaves, *later)
            grad_y, grad_skip, grad_parameters, grad_slope = gradients
            grad_weight = grad_parameters[0] if needs_weight else None
            grad_bias = grad_parameters[1] if needs_bias else None
        if ctx.before is not None:
            ctx.before.later = (grad_alias, alias_stride, grad_z, mask) if leaves else None
        if not changes_skip or leaves:
            grad_skip = grad_z
        return (
            grad_y if needs_y else None,
            grad_weight,
            grad_bias,
            grad_skip if needs_skip else None,
            grad_slope if needs_slope else None,
            None,
        )


def _layer_before(skip: Tensor) -> Any:
    """The node of autograd whose second result, an alias, the skip is; None where that one cannot take its gradient in parts."""
    node = skip.grad_fn
    return node if getattr(node, "takes_later", False) and skip.output_nr == 1 else None


def gradients_of_z(
    ctx: Any, grad_z: Tensor | None, grad_alias: Tensor | None, like: Tensor
) -> tuple[Tensor, Tensor | None, int, Tensor | None, Tensor | None]:
    """What ∂L/∂z is put together from: grad_z, grad_alias and its stride, and, where a later layer has left it, grad_later and its mask."""
    left, ctx.later = ctx.later, None
    if left is not None and grad_alias is None:  # left by a backward pass that ended before this layer
        left = None
    if left is not None and grad_alias is not left[2]:
        raise RuntimeError("a skip whose gradient leaves_skip leaves to the layer before has another use or a hook; expected neither")
    if left is None and grad_z is None and grad_alias is not None and ctx.alias_stride == 1:
        return grad_alias, None, 1, None, None
    return torch.zeros_like(like) if grad_z is None else grad_z, *(left or (grad_alias, ctx.alias_stride, None, None))


def _added(grad_z: Tensor, grad_alias: Tensor, alias_stride: int) -> Tensor:
    if alias_stride == 1:
        return grad_z + grad_alias
    total = grad_z.clone()
    total[:, :, ::alias_stride, ::alias_stride] += grad_alias
    return total


def _reads_skip(has_skip: bool, activation: Activation) -> bool:
    """Whether the backward pass computes what the activation was applied to from the skip again."""
    return has_skip and activation not in ("none", "relu")


@_library.fake("bn_act_forward", triton="bn_act")
def _forward_fake(
    y: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    skip: Tensor | None,
    activation: Activation,
    slope: Tensor | None,
    partials: Tensor | None = None,
    with_sums: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    bits = y.numel() if skip is not None and activation == "relu" else 0
    sums = torch.empty((2, y.shape[1]) if with_sums else 0, dtype=torch.float32, device=y.device)
    return torch.empty_like(y), sums, torch.empty((bits + 7) // 8, dtype=torch.uint8, device=y.device)


@_library.fake("bn_act_backward", triton="bn_act")
def _backward_fake(
    grad_z: Tensor,
    grad_sums: Tensor | None,
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
    parameters: bool = False,
    grad_alias: Tensor | None = None,
    alias_stride: int = 1,
    with_y: bool = True,
    with_skip: bool = True,
    grad_later: Tensor | None = None,
    later_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad_parameters = torch.empty((2, y.shape[1]) if parameters else 0, dtype=torch.float32, device=y.device)
    grad_slope = torch.empty(len(slope) if parameters and slope is not None else 0, dtype=torch.float32, device=y.device)
    makes_skip = has_skip and activation != "none" and with_skip
    grad_y, grad_skip = (torch.empty_like(y) if wanted else y.new_empty(0) for wanted in (with_y, makes_skip))
    return grad_y, grad_skip, grad_parameters, grad_slope
