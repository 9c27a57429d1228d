"""3×3 convolutions by Winograd's algorithm, which multiplies less than half as often as the sum that they are."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dwa_fast.ops import _library

MULTIPLE = 16  # of which numbers of channels must be multiples
_LARGE_FROM = 8  # pixels, a side, from which on large tiles may take less time: below, the weights are most of what is read
_LARGE_GAIN = 1.5  # times fewer products, from which on they do


def tile_of(height: int, width: int) -> int:
    """Side of the tiles, pixels, in which a map of that size is computed in trainings: 4 where that saves time, else 2."""
    products = {tile: -(-height // tile) * -(-width // tile) * (tile + 2) ** 2 for tile in (2, 4)}
    return 4 if min(height, width) >= _LARGE_FROM and products[2] >= _LARGE_GAIN * products[4] else 2


def conv3x3(
    x: Tensor,  # [N, C, H, W]
    weight: Tensor,  # [O, C, 3, 3]
    bias: Tensor | None = None,  # [O]
    large_tiles: bool = False,
) -> Tensor:  # [N, O, H, W]
    """A convolution with a 3×3 kernel, stride 1 and one pixel of zeros around: Winograd's F(2×2, 3×3) or F(4×4, 3×3), arXiv 1509.09308.

    y[n, o, i, j] = b[o] + Σ_c,k,l w[o, c, k, l] · x[n, c, i + k − 1, j + l − 1]. Differentiable in all three, once; x is kept for the
    backward pass only where the weights have a gradient.

    On a CPU in float32 alone. Maps are cut into tiles of 2×2 pixels, with 16 products where the sum has 36 and errors like PyTorch's.
    Channels-last tensors are read where they are, others through a copy, and results are channels-last. The same bits for any number of
    threads, but for ∂L/∂b, which is PyTorch's sum; y and ∂L/∂x of an image have the same bits whatever the other images are.

    Args:
        x: features; any strides; may be empty.
        weight: numbers of outputs O and of inputs C are multiples of 16.
        large_tiles: whether maps that `tile_of` names are cut into tiles of 4×4, with 36 products where the sum has 144 and errors of up to
            2e-6 of the result's norm, three to seven times PyTorch's: for trainings, not for a synthesis, whose first steps make a whole
            step of any gradient above Adam's ε of 1e-8, also where all of it is an error.
    Raises:
        TypeError: an argument is no float32 tensor.
        ValueError: a shape is not as above, or a tensor is not on a CPU.
        ImportError: the compiled operators cannot be used here.
    """
    _check(x, weight, bias)
    _library.load()
    once = weight.requires_grad or not torch.is_grad_enabled()  # else a capture arranges frozen weights once for all its iterations
    y: Tensor = _Conv3x3.apply(x, weight, bias, once, tile_of(*x.shape[2:]) if large_tiles else 2)
    return y


class _Conv3x3(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, once: bool, tile: int) -> Tensor:
        ctx.save_for_backward(weight, x if ctx.needs_input_grad[1] else None)
        ctx.once, ctx.tile = once, tile
        return _convolved(x, weight, bias, False, once, tile)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        weight, x = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad[:3]
        return (
            _convolved(gradient, weight, None, True, ctx.once, ctx.tile) if of_x else None,
            torch.ops.dwa_fast.conv3x3_weight_gradient.default(gradient, x, ctx.tile) if of_weight else None,
            gradient.sum((0, 2, 3)) if of_bias else None,
            None,
            None,
        )


def _convolved(x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool, once: bool, tile: int) -> Tensor:
    operators = torch.ops.dwa_fast
    y: Tensor
    if once:
        y = operators.conv3x3_once.default(x, weight, bias, transposed, tile)
    else:
        y = operators.conv3x3_forward.default(x, operators.conv3x3_weights.default(weight, transposed, tile), bias)
    return y


@_library.fake("conv3x3_weights")
def _weights_fake(weight: Tensor, transposed: bool, tile: int) -> Tensor:
    outputs, inputs = weight.shape[:2] if not transposed else weight.shape[1::-1]
    return weight.new_empty((outputs // MULTIPLE, (tile + 2) ** 2, inputs, MULTIPLE))


@_library.fake("conv3x3_forward")
def _forward_fake(x: Tensor, arranged: Tensor, bias: Tensor | None) -> Tensor:
    return _channels_last(x, (len(x), arranged.shape[0] * MULTIPLE, *x.shape[2:]))


@_library.fake("conv3x3_once")
def _once_fake(x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool, tile: int) -> Tensor:
    return _channels_last(x, (len(x), weight.shape[1 if transposed else 0], *x.shape[2:]))


@_library.fake("conv3x3_weight_gradient")
def _weight_gradient_fake(grad_y: Tensor, x: Tensor, tile: int) -> Tensor:
    return _channels_last(x, (grad_y.shape[1], x.shape[1], 3, 3))


def _channels_last(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    for name, each in {"x": x, "weight": weight, "bias": bias}.items():
        if each is None and name == "bias":
            continue
        if not isinstance(each, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(each).__name__}")
        if each.dtype is not torch.float32:
            raise TypeError(f"{name} must be float32, got {str(each.dtype).removeprefix('torch.')}")
        if each.device.type != "cpu":
            raise ValueError(f"{name} must be on a CPU, got {each.device}; elsewhere use conv2d")
    if x.dim() != 4 or x.shape[1] % MULTIPLE:
        raise ValueError(f"x must be [N, C, H, W] with C a multiple of {MULTIPLE}, got shape {tuple(x.shape)}")
    wanted = (*weight.shape[:1], x.shape[1], 3, 3)
    if weight.shape != wanted or len(weight) % MULTIPLE:
        raise ValueError(f"weight must be [O, {x.shape[1]}, 3, 3] with O a multiple of {MULTIPLE}, got shape {tuple(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be [{len(weight)}], got shape {tuple(bias.shape)}")
