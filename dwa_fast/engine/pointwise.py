"""Strided 1×1 convolutions of few or odd channels, whose weight gradient oneDNN writes beyond its memory."""

from __future__ import annotations

from typing import TypeGuard

import torch.nn.functional as F
from torch import Tensor, nn

from dwa_fast.models.modules import has_hooks, replace_layers

_BLOCK = 16  # channels that oneDNN's kernels take at a time


class StridedPointwise(nn.Module):
    """A 1×1 Conv2d of stride s as the same convolution, of stride 1, of every s-th pixel; weights under the same names."""

    def __init__(self, layer: nn.Conv2d) -> None:
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias
        self.stride = layer.stride

    @staticmethod
    def suits(layer: nn.Module) -> TypeGuard[nn.Conv2d]:
        """Whether the layer is one of those that crash: channels-last, fp32, with 6 or 8 channels in a ResNet's strided skips."""
        if type(layer) is not nn.Conv2d or has_hooks(layer) or layer.kernel_size != (1, 1) or layer.stride == (1, 1):
            return False
        own = isinstance(layer.weight, nn.Parameter)  # not computed from other weights
        return own and layer.padding in ((0, 0), "valid") and layer.groups == 1 and layer.in_channels % _BLOCK != 0

    def forward(
        self,
        x: Tensor,  # [N, C, H, W]
    ) -> Tensor:  # [N, O, ⌈H/s⌉, ⌈W/s⌉]
        """The convolution."""
        down, right = self.stride
        return F.conv2d(x[:, :, ::down, ::right], self.weight, self.bias)


def replace_strided_pointwise(module: nn.Module) -> None:
    """Replace every such layer below `module`."""
    replace_layers(module, lambda layer: StridedPointwise(layer) if StridedPointwise.suits(layer) else None)
