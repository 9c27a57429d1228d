"""Convolutions of a teacher or student that our own operators compute faster on a CPU."""

from __future__ import annotations

from typing import TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dwa_fast.engine.backend import bf16_instructions
from dwa_fast.engine.layers import LeanConv
from dwa_fast.models.modules import replace_layers
from dwa_fast.ops import cpu_level
from dwa_fast.ops.conv3x3 import MULTIPLE
from dwa_fast.reference.ops import Operators

_LEAST_SIDE = 4  # pixels, from which on a 3×3 convolution with fewer multiplications takes less time
# Pixels of the result up to which a product of bf16 matrices takes less time on AMX than oneDNN's convolution, by side of the kernel
_PRODUCTS = {1: 256, 3: 16}
_CHANNELS_PER_PIXEL = 4  # of the result, from which on the gradient of the weights takes less time as a product


class CpuConv(LeanConv):
    """A Conv2d that computes on a CPU as its precision and the size of its map ask; otherwise as a LeanConv.

    In float32 a 3×3 kernel of stride 1 with fewer multiplications, in bf16 (also under autocast) small maps as matrix products.
    """

    def __init__(
        self, layer: nn.Conv2d, operators: Operators, *, winograd: bool = True, products: bool = True, large_tiles: bool = False
    ) -> None:
        super().__init__(layer)
        self.operators, self.large_tiles = operators, large_tiles
        self.winograd, self.products = winograd and self.is_3x3(layer), products and self.may_be_product(layer)

    @staticmethod
    def is_3x3(layer: nn.Module | None) -> TypeGuard[nn.Conv2d]:
        """Whether `conv3x3` computes the layer."""
        if not CpuConv.may_be_product(layer) or layer.kernel_size != (3, 3) or layer.stride != (1, 1):
            return False
        return layer.in_channels % MULTIPLE == layer.out_channels % MULTIPLE == 0

    @staticmethod
    def may_be_product(layer: nn.Module | None) -> TypeGuard[nn.Conv2d]:
        """Whether `conv_product` computes the layer."""
        if not LeanConv.suits(layer) or layer.groups != 1 or layer.dilation != (1, 1) or layer.stride[0] != layer.stride[1]:
            return False
        return (layer.kernel_size, layer.padding) in (((1, 1), (0, 0)), ((3, 3), (1, 1)))

    def forward(
        self,
        x: Tensor,  # [N, C, H, W]
    ) -> Tensor:  # [N, O, ⌈H/s⌉, ⌈W/s⌉]
        """The convolution."""
        autocast = torch.is_autocast_enabled(x.device.type)
        dtype = torch.get_autocast_dtype(x.device.type) if autocast else x.dtype
        if x.device.type == "cpu" and dtype is torch.bfloat16 and self.products and any(parts := self._parts(x)):
            bias = None if self.bias is None else self.bias.to(dtype)
            return self.operators.conv_product(x.to(dtype), self.weight.to(dtype), bias, self.stride[0], *parts)
        if autocast:
            return F.conv2d(x, self.weight, self.bias, self.stride, self.padding)
        if x.device.type == "cpu" and dtype is torch.float32 and self.winograd and min(x.shape[2:]) >= _LEAST_SIDE:
            return self.operators.conv3x3(x, self.weight, self.bias, self.large_tiles)
        return super().forward(x)

    def _parts(self, x: Tensor) -> tuple[bool, bool, bool]:
        """What is faster as a product: the result, the gradient of x, that of the weights."""
        stride, kernel = self.stride[0], self.weight.shape[-1]
        pixels = -(-x.shape[2] // stride) * -(-x.shape[3] // stride)
        of_x = pixels <= _PRODUCTS[kernel] and (kernel == 1 or stride == 1)
        return pixels <= _PRODUCTS[kernel] * stride**2, of_x, self.weight.requires_grad and _CHANNELS_PER_PIXEL * pixels <= len(self.weight)


def replace_cpu_convolutions(module: nn.Module, operators: Operators, *, large_tiles: bool = False) -> None:
    """Replace every suitable convolution below `module`; call this before `replace_convolutions`. `large_tiles` as in `conv3x3`.

    None by `conv3x3` on the baseline instruction set, where the library's own kernels may use wider vectors than ours, and none by
    `conv_product` without AMX, where they keep the processor busy.
    """
    winograd, products = cpu_level() != "baseline", bf16_instructions() == "AMX"

    def replacement(layer: nn.Module) -> CpuConv | None:
        if (winograd and CpuConv.is_3x3(layer)) or (products and CpuConv.may_be_product(layer)):
            return CpuConv(layer, operators, winograd=winograd, products=products, large_tiles=large_tiles)
        return None

    replace_layers(module, replacement)
