"""Convolutions of small feature maps as one matrix product each."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from dwa_fast.ops import _library

_KERNELS = (1, 3)


def conv_product(
    x: Tensor,  # [N, C, H, W]
    weight: Tensor,  # [O, C, K, K]
    bias: Tensor | None = None,  # [O]
    stride: int = 1,
    of_y: bool = True,
    of_x: bool = True,
    of_weight: bool = True,
) -> Tensor:  # [N, O, ⌈H/s⌉, ⌈W/s⌉]
    """A convolution that keeps the size of the map, up to its stride, and whose result and gradients are matrix products where asked.

        y = X·Wᵀ + b,   ∂L/∂x = G·W′,   ∂L/∂w = gᵀ·X

    with the windows of x as rows of X [N·⌈H/s⌉·⌈W/s⌉, K²·C], those of g = ∂L/∂y as rows of G, the weights as W [O, K²·C], and turned by
    half a turn as W′ [K²·O, C]. What is not asked for is PyTorch's convolution: which is faster depends on the shapes. Differentiable in
    all three, once; x is kept for the backward pass only where the weights have a gradient. Products add as many terms as the convolution,
    in float32, round once, and are channels-last.

    Args:
        x: features, on a CPU; any strides; may be empty.
        weight: K is 1, or 3 with one pixel of zeros around x; precision of x.
        stride: s, the same in both directions.
        of_y, of_x, of_weight: which are products. ∂L/∂x is none of a 3×3 kernel with s > 1.
    Raises:
        TypeError: an argument is no tensor, or not of the precision of x.
        ValueError: a shape is not as above, or a tensor is not on a CPU.
        ImportError: the compiled operators cannot be used here.
    """
    _check(x, weight, bias, stride)
    _library.load()
    y: Tensor = _ConvProduct.apply(x, weight, bias, stride, of_y, of_x and (stride == 1 or weight.shape[-1] == 1), of_weight)
    return y


class _ConvProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, of_y: bool, of_x: bool, of_weight: bool) -> Tensor:
        ctx.save_for_backward(weight, x if ctx.needs_input_grad[1] else None)
        ctx.of_x, ctx.of_weight, ctx.shape, ctx.strides = of_x, of_weight, x.shape, x.stride()
        kernel = weight.shape[-1]
        ctx.settings = [stride, stride], [kernel // 2, kernel // 2], [1, 1], False, [0, 0], 1
        if not of_y:
            return F.conv2d(x, weight, bias, stride, kernel // 2)
        rows = _windows(x, kernel, stride)
        matrix = _pixels(weight).reshape(len(weight), -1).t()
        product = rows @ matrix if bias is None else torch.addmm(bias, rows, matrix)
        return _features(product, x.shape, stride)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        weight, x = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        kernel, stride = weight.shape[-1], ctx.settings[0][0]
        grad_x = grad_weight = None
        left = [needs_x and not ctx.of_x, needs_weight and not ctx.of_weight, False]
        if any(left):
            # Without a gradient of the weights the library needs the shape and strides of x, and reads no values.
            like = x if x is not None else gradient.new_empty_strided(ctx.shape, ctx.strides)
            grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(gradient, like, weight, None, *ctx.settings, left)
        if needs_x and ctx.of_x:
            turned = weight.flatten(1) if kernel == 1 else torch.ops.dwa_fast.conv_turned.default(weight)
            grad_x = _features(_windows(gradient, kernel, 1) @ turned, gradient.shape, 1)
            if stride > 1:
                read, grad_x = grad_x, torch.empty(ctx.shape, dtype=gradient.dtype, memory_format=torch.channels_last).zero_()
                grad_x[:, :, ::stride, ::stride] = read
        if needs_weight and ctx.of_weight:  # the windows of x are made again: kept, they would take K² times the memory of x
            product = _pixels(gradient).flatten(0, 2).t() @ _windows(x, kernel, stride)
            grad_weight = product.view(len(weight), kernel, kernel, weight.shape[1]).permute(0, 3, 1, 2)
        grad_bias = gradient.sum((0, 2, 3)) if needs_bias else None
        return grad_x, grad_weight, grad_bias, None, None, None, None


def _pixels(features: Tensor) -> Tensor:
    """[N, H, W, C], in this order in memory."""
    return features.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1)


def _windows(x: Tensor, kernel: int, stride: int) -> Tensor:
    """The windows of every output pixel as rows, [N·⌈H/s⌉·⌈W/s⌉, K²·C]."""
    if kernel == stride == 1:
        return _pixels(x).flatten(0, 2)
    rows: Tensor = torch.ops.dwa_fast.conv_windows.default(x, kernel, stride)
    return rows


def _features(rows: Tensor, shape: torch.Size, stride: int) -> Tensor:
    """Rows as features, for the shape of what the windows were taken from."""
    n, _, height, width = shape
    return rows.view(n, -(-height // stride), -(-width // stride), rows.shape[1]).permute(0, 3, 1, 2)


@_library.fake("conv_windows")
def _windows_fake(x: Tensor, kernel: int, stride: int) -> Tensor:
    n, c, height, width = x.shape
    return x.new_empty((n * -(-height // stride) * -(-width // stride), kernel * kernel * c))


@_library.fake("conv_turned")
def _turned_fake(weight: Tensor) -> Tensor:
    outputs, inputs, height, width = weight.shape
    return weight.new_empty((height * width * outputs, inputs))


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int) -> None:
    for name, each in {"x": x, "weight": weight, "bias": bias}.items():
        if each is None and name == "bias":
            continue
        if not isinstance(each, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(each).__name__}")
        if each.dtype is not x.dtype or not each.dtype.is_floating_point:
            wanted = "have the precision of x" if x.dtype.is_floating_point else "be of floating point"
            raise TypeError(f"{name} must {wanted}, got {str(each.dtype).removeprefix('torch.')}")
        if each.device.type != "cpu":
            raise ValueError(f"{name} must be on a CPU, got {each.device}; elsewhere use conv2d")
    if x.dim() != 4:
        raise ValueError(f"x must be [N, C, H, W], got shape {tuple(x.shape)}")
    if weight.dim() != 4 or weight.shape[1] != x.shape[1] or weight.shape[2] != weight.shape[3] or weight.shape[2] not in _KERNELS:
        raise ValueError(f"weight must be [O, {x.shape[1]}, K, K] with K 1 or 3, got shape {tuple(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be [{len(weight)}], got shape {tuple(bias.shape)}")
    if isinstance(stride, bool) or not isinstance(stride, int) or stride < 1:
        raise ValueError(f"stride must be a positive integer, got {stride!r}")
