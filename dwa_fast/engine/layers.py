"""Replacements for layers of a teacher: the same function and bits, with less memory or time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeGuard

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

from dwa_fast.models.modules import has_hooks, replace_layers

_BLOCK = 2  # pixels per side that become channels of one vector or matrix instruction
_LANES = 16  # channels that such an instruction computes, needed or not
_ALIGNMENT = 8  # channels, in multiples of which a GPU's convolutions are fast
_ONEDNN_BLOCK = 16  # channels that oneDNN's kernels take at a time


class LeanConv(nn.Module):
    """A Conv2d that does not save its input for the backward pass while its weights are frozen. Parameters keep their names.

    The gradient of a convolution's input depends on the weights alone, so refinement saves one large tensor per layer instead of two (the
    input and the output of the BatchNorm before it): half the memory. The library calls, and so all bits, are those of the layer.
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
        x: Tensor,  # [N, C, H, W]; without a gradient of the weights only its shape and strides are read
        needed: list[bool],  # of the input, of the weights, of the bias
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Gradients of the three; None where it is not needed."""
        sizes = [len(weight)] if self.bias is not None else None
        shape = self.stride, self.padding, self.dilation, False, [0, 0], self.groups
        gradients = torch.ops.aten.convolution_backward(gradient, x, weight, sizes, *shape, needed)
        grad_input, grad_weight, grad_bias = (each if used else None for each, used in zip(gradients, needed, strict=True))
        return grad_input, grad_weight, grad_bias


class _LeanConv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,  # has the gradient
        weight: Tensor,
        bias: Tensor | None,
        layer: LeanConv,
        whole: Tensor | None = None,  # what x is a sample of, every step-th pixel of each line
        step: int = 1,
    ) -> Tensor:
        ctx.save_for_backward(weight, x if ctx.needs_input_grad[1] else None)
        dense = x if whole is None else torch.empty_like(x, device="meta")
        ctx.layer, ctx.shape, ctx.strides = layer, dense.shape, dense.stride()
        source, stride = (x, layer.stride) if whole is None else (whole, (step, step))
        return F.conv2d(source, weight, bias, stride, layer.padding, layer.dilation, layer.groups)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        weight, x = ctx.saved_tensors
        if x is None:  # the library needs its shape and strides; the values are never read
            x = torch.empty_strided(ctx.shape, ctx.strides, dtype=gradient.dtype, device=gradient.device)
        return *ctx.layer.gradients(gradient, weight, x, list(ctx.needs_input_grad[:3])), None, None, None


class SampledConv(LeanConv):
    """A 1×1 Conv2d of stride s > 1 whose gradient is that of the pixels that it reads, and no zeros between them.

    It is handed its input whole, and an alias of the pixels in every s-th row and column, as `bn_act` gives them: it reads the former and
    has the gradient of the latter, which is that of a convolution of stride 1. Weights and their gradients are as of LeanConv.
    """

    def __init__(self, layer: nn.Conv2d) -> None:
        super().__init__(layer)
        self.step, self.stride = layer.stride[0], (1, 1)

    @staticmethod
    def suits(layer: nn.Module | None) -> TypeGuard[nn.Conv2d]:
        """Whether the layer is such a convolution."""
        if not LeanConv.suits(layer) or layer.kernel_size != (1, 1) or layer.padding != (0, 0):
            return False
        return layer.stride[0] == layer.stride[1] > 1

    def forward(  # type: ignore[override]
        self,
        x: Tensor,  # [N, C, H, W]
        sampled: Tensor,  # [N, C, ⌈H/s⌉, ⌈W/s⌉]
    ) -> Tensor:  # [N, O, ⌈H/s⌉, ⌈W/s⌉]
        """The convolution."""
        y: Tensor = _LeanConv.apply(sampled, self.weight, self.bias, self, x.detach(), self.step)
        return y


def replace_convolutions(module: nn.Module) -> None:
    """Replace every suitable convolution below `module` by a LeanConv."""
    replace_layers(module, lambda layer: LeanConv(layer) if LeanConv.suits(layer) else None)


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
        self.arranged: Tensor | None = None  # the weights that `refresh` has arranged
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
        """Whether this gradient applies to the layer and costs less than the library's."""
        if not LeanConv.suits(layer):
            return False
        size, stride, padding = layer.kernel_size[0], layer.stride[0], int(layer.padding[0])
        square = layer.kernel_size == (size, size) and layer.stride == (stride, stride) and layer.padding == (padding, padding)
        plain = layer.groups == 1 and layer.dilation == (1, 1)
        return square and plain and stride in (1, 2) and stride <= size and padding < size and layer.in_channels * _BLOCK**2 <= _LANES

    def forward(
        self,
        x: Tensor,  # [N, C, H, W], or its blocks of pixels, [N, C, H/2, 2, W/2, 2], whose gradient then lies where it was computed
    ) -> Tensor:  # [N, O, H', W']
        """The convolution."""
        if x.dim() == 4:
            return super().forward(x)
        y: Tensor = _LeanConv.apply(x, self.weight, self.bias, self, _pixels(x.detach()), self.stride[0])
        return y

    def gradients(
        self,
        gradient: Tensor,  # [N, O, H', W']
        weight: Tensor,
        x: Tensor,  # [N, C, H, W], or its blocks; without a gradient of the weights only its shape is read
        needed: list[bool],  # of the input, of the weights, of the bias
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Gradients of the three; None where it is not needed."""
        blocks, pixels = x.dim() > 4, x if x.dim() == 4 else _pixels(x)
        _, grad_weight, grad_bias = super().gradients(gradient, weight, pixels, [False, *needed[1:]]) if any(needed[1:]) else (None,) * 3
        image_gradient = self.image_gradient(gradient, *pixels.shape[2:], blocks=blocks) if needed[0] else None
        return image_gradient, grad_weight, grad_bias

    def image_gradient(
        self,
        gradient: Tensor,  # [N, O, H', W']
        height: int,
        width: int,
        *,
        blocks: bool = False,
    ) -> Tensor:  # [N, C, H, W], or [N, C, H/2, 2, W/2, 2]
        """Adjoint of the convolution with its present weights."""
        weights = self._blocks() if self.arranged is None else self.arranged
        step = _BLOCK // self.stride[0]
        rows, columns = -(-height // _BLOCK), -(-width // _BLOCK)
        beyond = max((n - 1) * step + self.extent - m for n, m in ((rows, gradient.shape[2]), (columns, gradient.shape[3])))
        skipped = max(0, -(-(beyond - 2 * self.reach) // step))  # blocks before the first, where more padding is needed behind than before
        result = F.conv2d(gradient, weights, stride=step, padding=self.reach + skipped * step)
        channels = self.weight.shape[1] * _BLOCK**2
        result = result[:, :channels, skipped : skipped + rows, skipped : skipped + columns]
        if blocks:
            return result.view(len(result), -1, _BLOCK, _BLOCK, rows, columns).permute(0, 1, 4, 2, 5, 3)
        return F.pixel_shuffle(result, _BLOCK)[:, :, :height, :width]

    def refresh(self) -> None:
        """Arrange the weights for `image_gradient` once, until the next call: to be called whenever they have changed."""
        blocks = self._blocks()
        self.arranged = blocks if self.arranged is None else self.arranged.copy_(blocks)

    def _blocks(self) -> Tensor:  # [4·C, O, m, m]
        places = self.weight.detach().permute(0, 2, 3, 1).reshape(-1)
        return places.index_select(0, self.taps).view(self.holes.shape).masked_fill(self.holes, 0).permute(0, 3, 1, 2)


def replace_stems(traced: torch.fx.GraphModule) -> None:
    """Replace every suitable convolution whose input is the image itself."""
    for node in traced.graph.nodes:
        reads_image = node.op == "call_module" and len(node.args) == 1 and getattr(node.args[0], "op", "") == "placeholder"
        layer = traced.get_submodule(str(node.target)) if reads_image else None
        if StemConv.suits(layer):
            parent, _, name = str(node.target).rpartition(".")
            setattr(traced.get_submodule(parent), name, StemConv(layer))


class StridedPointwise(nn.Module):
    """A 1×1 Conv2d of stride s as the same convolution, of stride 1, of every s-th pixel; weights under the same names."""

    def __init__(self, layer: nn.Conv2d) -> None:
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias
        self.stride = layer.stride

    @staticmethod
    def suits(layer: nn.Module) -> TypeGuard[nn.Conv2d]:
        """Whether the layer may meet oneDNN's crash: strided, 1×1, and a number of channels that is no multiple of its block."""
        if type(layer) is not nn.Conv2d or has_hooks(layer) or layer.kernel_size != (1, 1) or layer.stride == (1, 1):
            return False
        own = isinstance(layer.weight, nn.Parameter)  # not computed from other weights
        return own and layer.padding in ((0, 0), "valid") and layer.groups == 1 and layer.in_channels % _ONEDNN_BLOCK != 0

    def forward(
        self,
        x: Tensor,  # [N, C, H, W]
    ) -> Tensor:  # [N, O, ⌈H/s⌉, ⌈W/s⌉]
        """The convolution."""
        down, right = self.stride
        return F.conv2d(x[:, :, ::down, ::right], self.weight, self.bias)


def replace_strided_pointwise(module: nn.Module) -> None:
    """Replace every layer below `module` that `StridedPointwise` suits."""
    replace_layers(module, lambda layer: StridedPointwise(layer) if StridedPointwise.suits(layer) else None)


class MeanPool(nn.Module):
    """An AvgPool2d whose square windows touch and do not overlap."""

    def __init__(self, window: int, operator: Callable[[Tensor, int], Tensor]) -> None:
        super().__init__()
        self.window, self.operator = window, operator

    @staticmethod
    def window_of(layer: nn.Module) -> int | None:
        """The side of the windows of a layer that can be replaced; None for others."""
        if type(layer) is not nn.AvgPool2d or has_hooks(layer) or layer.divisor_override is not None or layer.ceil_mode:
            return None
        sizes = {*_pair(layer.kernel_size), *_pair(layer.stride)}
        return sizes.pop() if len(sizes) == 1 and _pair(layer.padding) == (0, 0) else None

    def forward(
        self,
        y: Tensor,  # [N, C, H, W]
    ) -> Tensor:  # [N, C, H // window, W // window]
        """The means."""
        return self.operator(y, self.window)

    def extra_repr(self) -> str:
        """Its window."""
        return f"{self.window}"


def replace_pools(module: nn.Module, operator: Callable[[Tensor, int], Tensor]) -> None:
    """Replace every suitable mean pooling below `module`."""

    def replacement(layer: nn.Module) -> MeanPool | None:
        window = MeanPool.window_of(layer)
        return None if window is None else MeanPool(window, operator)

    replace_layers(module, replacement)


class GlobalMean(nn.Module):
    """An AdaptiveAvgPool2d that leaves one pixel: the same mean, without the zeros and the copy of PyTorch's backward pass."""

    @staticmethod
    def suits(layer: nn.Module) -> bool:
        """Whether it can take the place of the layer."""
        return type(layer) is nn.AdaptiveAvgPool2d and layer.output_size in (1, (1, 1)) and not has_hooks(layer)

    def forward(
        self,
        y: Tensor,  # [..., C, H, W]
    ) -> Tensor:  # [..., C, 1, 1]
        """The mean; its gradient is one value per channel in memory, and expanded."""
        mean: Tensor = _GlobalMean.apply(y)
        return mean.movedim(-1, -3)  # a view of what the function returns, not within it: layers behind may change it in place


class _GlobalMean(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        ctx.shape = y.shape
        return y.movedim(-3, -1).mean((-3, -2), keepdim=True)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        each: Tensor = gradient / (ctx.shape[-2] * ctx.shape[-1])
        return each.movedim(-1, -3).expand(ctx.shape)


def replace_global_means(module: nn.Module) -> None:
    """Replace every suitable adaptive pooling below `module`."""
    replace_layers(module, lambda layer: GlobalMean() if GlobalMean.suits(layer) else None)


def _pixels(blocks: Tensor) -> Tensor:
    """[N, C, H, W] of [N, C, H/2, 2, W/2, 2]."""
    return blocks.flatten(4, 5).flatten(2, 3)


def _pair(value: int | tuple[int, ...]) -> tuple[int, ...]:
    return value if isinstance(value, tuple) else (value, value)
