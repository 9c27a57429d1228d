"""What the kernels that begin with a BatchNorm share: the constants of a layer, the activations with their derivatives, its parameters."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def constants(mean, var, weight, bias, eps, channel, used):
    """m, a = γ/√(v + ε) and β of the columns of a tile, float32; forward and backward share them, bit for bit."""
    m = tl.load(mean + channel, mask=used, other=0.0).to(tl.float32)
    v = tl.load(var + channel, mask=used, other=1.0).to(tl.float32)
    a = tl.div_rn(1.0, tl.sqrt_rn(v + eps))
    b = tl.zeros_like(a)
    if weight is not None:
        a = a * tl.load(weight + channel, mask=used, other=0.0).to(tl.float32)
    if bias is not None:
        b = tl.load(bias + channel, mask=used, other=0.0).to(tl.float32)
    return m, a, b


@triton.jit
def activated(x, slope, ACTIVATION: tl.constexpr):
    """f(x); slope, [columns], is read by leaky_relu alone."""
    if ACTIVATION == "relu":
        return tl.where(x <= 0.0, 0.0, x)
    if ACTIVATION == "relu6":
        return tl.where(x <= 0.0, 0.0, tl.where(x >= 6.0, 6.0, x))
    if ACTIVATION == "silu":
        return tl.div_rn(x, 1.0 + tl.exp(-x))
    if ACTIVATION == "hardswish":
        return tl.div_rn(x * tl.where(x <= -3.0, 0.0, tl.where(x >= 3.0, 6.0, x + 3.0)), 6.0)
    if ACTIVATION == "gelu":
        return x * (0.5 * (1.0 + tl.erf(x * 0.7071067811865476)))
    if ACTIVATION == "gelu_tanh":  # x/(1 + e^(−2u)), u = √(2/π)(x + 0.044715 x³)
        return tl.div_rn(x, 1.0 + tl.exp(-1.5957691216057308 * x * (1.0 + 0.044715 * x * x)))
    if ACTIVATION == "leaky_relu":
        return tl.where(x > 0.0, x, x * slope[None, :])
    return x


@triton.jit
def activation_gradient(x, gradient, slope, ACTIVATION: tl.constexpr):
    """f'(x)·gradient; at a corner the derivative that PyTorch takes."""
    if ACTIVATION == "relu":
        return tl.where(x <= 0.0, 0.0, gradient)
    if ACTIVATION == "relu6":
        return tl.where(tl.minimum(tl.maximum(x, 1.401298464324817e-45), 5.9999995) == x, gradient, 0.0)  # 0 < x < 6, without a spill
    if ACTIVATION == "silu":
        s = tl.div_rn(1.0, 1.0 + tl.exp(-x))
        return gradient * s * tl.fma(x, 1.0 - s, tl.full(s.shape, 1.0, tl.float32))
    if ACTIVATION == "hardswish":
        return gradient * tl.where(x <= -3.0, 0.0, tl.where(x >= 3.0, 1.0, tl.div_rn(x, 3.0) + 0.5))
    if ACTIVATION == "gelu":
        density = 0.3989422804014327 * tl.exp(-0.5 * x * x)
        return gradient * (0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * density)
    if ACTIVATION == "gelu_tanh":
        e = tl.exp(-1.5957691216057308 * x * (1.0 + 0.044715 * x * x))
        s = tl.div_rn(1.0, 1.0 + e)
        product = tl.where(e > 1e30, 0.0, s * (e * s))  # s(1 − s), without its cancellation
        return gradient * (s + x * product * (1.5957691216057308 * (1.0 + 0.134145 * x * x)))
    if ACTIVATION == "leaky_relu":
        return tl.where(x > 0.0, gradient, gradient * slope[None, :])
    return gradient


@triton.jit
def gradient_of_z(
    grad_z, grad_alias, base, inner, inside, pixel, channel, channels, height, width, ALIAS_STRIDE: tl.constexpr
):  # fmt: skip
    """grad_z of a tile; with grad_alias their sum, rounded to their precision, as PyTorch would have added them.

    grad_alias is that of the pixels in every ALIAS_STRIDE-th row and column; where that is not 1, each row of the tile is one pixel.
    """
    gradient = tl.load(grad_z + base + inner, mask=inside, other=0.0).to(tl.float32)
    if grad_alias is not None:
        if ALIAS_STRIDE == 1:
            again = tl.load(grad_alias + base + inner, mask=inside, other=0.0)
        else:
            h, w = pixel // width % height, pixel % width
            exists = (h % ALIAS_STRIDE == 0) & (w % ALIAS_STRIDE == 0)
            lines, each = (height + ALIAS_STRIDE - 1) // ALIAS_STRIDE, (width + ALIAS_STRIDE - 1) // ALIAS_STRIDE
            place = (pixel // width // height * lines + h // ALIAS_STRIDE) * each + w // ALIAS_STRIDE
            at = place.to(tl.int64)[:, None] * channels + channel[None, :]
            again = tl.load(grad_alias + at, mask=inside & exists[:, None], other=0.0)
        gradient = (gradient + again.to(tl.float32)).to(grad_z.dtype.element_ty).to(tl.float32)
    return gradient


def per_channel(slope: Tensor | None, channels: int) -> Tensor | None:
    return None if slope is None else slope.expand(channels).contiguous()


def parameter_gradients(sums: Tensor, slope: Tensor | None) -> tuple[Tensor, Tensor]:
    """Gradients of γ and β, [2, C] or more, and, from the last row, of the slope, shaped like it; each empty where it is not wanted."""
    if slope is None or sums.dim() == 1:
        return sums, sums.new_empty(0)
    return sums[:-1], sums[-1] if len(slope) == sums.shape[1] else sums[-1].sum(0, keepdim=True)
