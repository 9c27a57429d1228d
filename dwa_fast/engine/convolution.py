"""A teacher's convolutions, which keep their inputs for the backward pass only where their weights learn."""

from __future__ import annotations

from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dwa_fast.models.modules import has_hooks, replace_layers


class LeanConv(nn.Module):
    """A Conv2d that lets go of its input while its weights are frozen; PyTorch's own holds it. Weights under the same names.

    The gradient of a convolution's input follows from the weights alone. So of two large tensors per layer, input and output of its
    BatchNorm, refinement keeps one: half the memory. The calls of the library, and so all bits, are those of the layer.
    """

    def __init__(self, layer: nn.Conv2d) -> None:
        super().__init__()
        assert not isinstance(layer.padding, str)
        self.weight, self.bias = layer.weight, layer.bias
        self.stride, self.padding, self.dilation, self.groups = layer.stride, layer.padding, layer.dilation, layer.groups

    @staticmethod
    def suits(layer: nn.Module | None) -> TypeGuard[nn.Conv2d]:
        """Whether the layer is a Conv2d and nothing else: zeros around, weights of its own, and no hooks that would be lost."""
        if type(layer) is not nn.Conv2d or isinstance(layer.padding, str) or layer.padding_mode != "zeros":
            return False
        return isinstance(layer.weight, nn.Parameter) and not has_hooks(layer)

    def forward(
        self,
        x: Tensor,  # [N, C, H, W]
    ) -> Tensor:  # [N, O, H', W']
        """The convolution."""
        y: Tensor = _LeanConv.apply(x, self.weight, self.bias, self)
        return y

    def gradients(
        self,
        gradient: Tensor,  # [N, O, H', W']
        weight: Tensor,
        x: Tensor,  # [N, C, H, W]; without a gradient of the weights only its shape and strides are looked at
        wanted: list[bool],  # of the input, of the weights, of the bias
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Gradients of the three; None where none is wanted."""
        sizes = [len(weight)] if self.bias is not None else None
        shape = self.stride, self.padding, self.dilation, False, [0, 0], self.groups
        found = torch.ops.aten.convolution_backward(gradient, x, weight, sizes, *shape, wanted)
        of_input, of_weight, of_bias = (each if asked else None for each, asked in zip(found, wanted, strict=True))
        return of_input, of_weight, of_bias


class _LeanConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, layer: LeanConv) -> Tensor:
        ctx.save_for_backward(weight, x if ctx.needs_input_grad[1] else None)
        ctx.layer, ctx.shape, ctx.strides = layer, x.shape, x.stride()
        return F.conv2d(x, weight, bias, layer.stride, layer.padding, layer.dilation, layer.groups)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        weight, x = ctx.saved_tensors
        if x is None:  # memory for this one call, which nobody reads or writes
            x = torch.empty_strided(ctx.shape, ctx.strides, dtype=gradient.dtype, device=gradient.device)
        return *ctx.layer.gradients(gradient, weight, x, list(ctx.needs_input_grad[:3])), None


def replace_convolutions(module: nn.Module) -> None:
    """Replace every suitable convolution below `module`."""
    replace_layers(module, lambda layer: LeanConv(layer) if LeanConv.suits(layer) else None)
