"""A teacher's first convolution, whose input has a few colour channels only, with a cheaper gradient for the image."""

from __future__ import annotations

from typing import TypeGuard

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

from dwa_fast.engine.convolution import LeanConv

_BLOCK = 2  # pixels per side that share the lanes of a vector or of a matrix unit
_LANES = 16  # channels that such a unit computes whether they are needed or not
_ALIGNMENT = 8  # channels, in multiples of which a GPU's convolutions are fast


class StemConv(LeanConv):
    """A Conv2d of stride s whose input gradient is a convolution that gives blocks of 2×2 pixels as channels, s = 1 or 2.

        ∂L/∂x[2q + r] = Σ_m w[r + p − s·m] · g[2q/s + m]        r = 0, 1;  w is 0 outside of the kernel

    per axis: the pixels of a block are 4·C channels of one convolution of g, with stride 2/s, instead of C ≤ 4 channels of a transposed
    one. The weights are those of the layer that it replaces, under the same names; their gradients are the library's.
    """

    taps: Tensor
    holes: Tensor

    def __init__(self, layer: nn.Conv2d) -> None:
        super().__init__(layer)
        size, stride, padding = layer.kernel_size[0], layer.stride[0], int(layer.padding[0])
        first = -((size - 1 - padding) // stride)
        last = (_BLOCK - 1 + padding) // stride
        self.reach = -first  # rows of g before the block's own
        self.extent = last - first + 1  # rows of g that a block needs
        r, m = torch.arange(_BLOCK)[:, None], torch.arange(first, last + 1)[None]
        kernel = r + padding - stride * m  # [r, m]: row of w
        inside = (kernel >= 0) & (kernel < size)
        kernel = kernel.clamp(0, size - 1)
        outputs, channels = layer.out_channels, layer.in_channels
        # [C, r, r, m, m, O] → place in w, which lies as [O, K, K, C]
        row, column = kernel[None, :, None, :, None, None], kernel[None, None, :, None, :, None]
        channel = torch.arange(channels).view(-1, 1, 1, 1, 1, 1)
        taps = ((torch.arange(outputs) * size + row) * size + column) * channels + channel
        holes = ~(inside[None, :, None, :, None, None] & inside[None, None, :, None, :, None]).expand_as(taps)
        missing = -channels * _BLOCK**2 % _ALIGNMENT if layer.weight.is_cuda else 0
        shape = (channels * _BLOCK**2, self.extent, self.extent, outputs)
        self.register_buffer(
            "taps", F.pad(taps.reshape(shape), (0, 0) * 3 + (0, missing)).flatten().to(layer.weight.device), persistent=False
        )
        self.register_buffer(
            "holes", F.pad(holes.reshape(shape), (0, 0) * 3 + (0, missing), value=True).to(layer.weight.device), persistent=False
        )

    @staticmethod
    def suits(layer: nn.Module | None) -> TypeGuard[nn.Conv2d]:
        """Whether a layer's image gradient can be had like that, and more cheaply."""
        if not LeanConv.suits(layer):
            return False
        size, stride, padding = layer.kernel_size[0], layer.stride[0], int(layer.padding[0])
        square = layer.kernel_size == (size, size) and layer.stride == (stride, stride) and layer.padding == (padding, padding)
        plain = layer.groups == 1 and layer.dilation == (1, 1)
        return square and plain and stride in (1, 2) and stride <= size and padding < size and layer.in_channels * _BLOCK**2 <= _LANES

    def gradients(
        self,
        gradient: Tensor,  # [N, O, H', W']
        weight: Tensor,
        x: Tensor,  # [N, C, H, W]; without a gradient of the weights only its shape is looked at
        wanted: list[bool],  # of the input, of the weights, of the bias
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Gradients of the three; None where none is wanted."""
        _, of_weight, of_bias = super().gradients(gradient, weight, x, [False, *wanted[1:]]) if any(wanted[1:]) else (None,) * 3
        return self.image_gradient(gradient, *x.shape[2:]) if wanted[0] else None, of_weight, of_bias

    def image_gradient(
        self,
        gradient: Tensor,  # [N, O, H', W']
        height: int,
        width: int,
    ) -> Tensor:  # [N, C, H, W]
        """Adjoint of the convolution with the weights that it has now."""
        places = self.weight.detach().permute(0, 2, 3, 1).reshape(-1)
        blocks = places.index_select(0, self.taps).view(self.holes.shape).masked_fill(self.holes, 0).permute(0, 3, 1, 2)
        step = _BLOCK // self.stride[0]
        rows, columns = -(-height // _BLOCK), -(-width // _BLOCK)
        beyond = max((n - 1) * step + self.extent - m for n, m in ((rows, gradient.shape[2]), (columns, gradient.shape[3])))
        skipped = max(0, -(-(beyond - 2 * self.reach) // step))  # blocks before the first, where more padding is needed behind than before
        result = F.conv2d(gradient, blocks, stride=step, padding=self.reach + skipped * step)
        channels = self.weight.shape[1] * _BLOCK**2
        result = result[:, :channels, skipped : skipped + rows, skipped : skipped + columns]
        return F.pixel_shuffle(result, _BLOCK)[:, :, :height, :width]


def replace_stems(traced: torch.fx.GraphModule) -> None:
    """Replace every suitable convolution that sees the image itself."""
    for node in traced.graph.nodes:
        sees_image = node.op == "call_module" and len(node.args) == 1 and getattr(node.args[0], "op", "") == "placeholder"
        layer = traced.get_submodule(str(node.target)) if sees_image else None
        if StemConv.suits(layer):
            parent, _, name = str(node.target).rpartition(".")
            setattr(traced.get_submodule(parent), name, StemConv(layer))
