"""What the kernels that begin with a BatchNorm share: the constants of a layer, the activations with their derivatives, its parameters."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from dwa_fast.kernels.layout import left_behind


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
def mask_bytes(start, rows, columns, count, base, RAGGED: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr):
    """Where the bytes of the mask of a tile lie behind byte base/8, and which of them exist."""
    row = tl.arange(0, BLOCK_ROWS)
    group = tl.program_id(0) * (BLOCK_COLUMNS // 8) + tl.arange(0, BLOCK_COLUMNS // 8)
    byte = row[:, None] * (columns // 8) + group[None, :]
    exists = (start + row < rows)[:, None] & (group * 8 < columns)[None, :]
    if RAGGED:
        exists = exists & (byte * 8 < left_behind(count, base))
    return byte, exists


@triton.jit
def passes(bits, start, rows, columns, count, base, RAGGED: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr):
    """Whether the mask lets the elements of a tile pass."""
    byte, exists = mask_bytes(start, rows, columns, count, base, RAGGED, BLOCK_ROWS, BLOCK_COLUMNS)
    packed = tl.load(bits + base // 8 + byte, mask=exists, other=0).to(tl.int32)
    single = (packed[:, :, None] >> tl.arange(0, 8)[None, None, :]) & 1
    return tl.reshape(single, [BLOCK_ROWS, BLOCK_COLUMNS]) != 0


@triton.jit
def _gradient(gradient, base, inner, inside, pixel, channel, channels, height, width, STRIDE: tl.constexpr):
    """A tile of a gradient in float32, as `layout.gradient_to_read` gives it; where STRIDE is not 1, each row of the tile is one pixel."""
    if STRIDE == 1:
        return tl.load(gradient + base + inner, mask=inside, other=0.0).to(tl.float32)
    if STRIDE == 0:
        at = (pixel // (height * width)).to(tl.int64)[:, None] * channels + channel[None, :]
        return tl.load(gradient + at, mask=inside, other=0.0).to(tl.float32)
    h, w = pixel // width % height, pixel % width
    exists = (h % STRIDE == 0) & (w % STRIDE == 0)
    lines, each = (height + STRIDE - 1) // STRIDE, (width + STRIDE - 1) // STRIDE
    place = (pixel // width // height * lines + h // STRIDE) * each + w // STRIDE
    at = place.to(tl.int64)[:, None] * channels + channel[None, :]
    return tl.load(gradient + at, mask=inside & exists[:, None], other=0.0).to(tl.float32)


@triton.jit
def gradient_of_z(
    grad_z, grad_alias, grad_later, later_mask, start, base, inner, inside, channel, count, rows, columns, channels, height, width,
    Z_STRIDE: tl.constexpr, ALIAS_STRIDE: tl.constexpr, LATER_STRIDE: tl.constexpr, RAGGED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """∂L/∂z of a tile: grad_z + grad_alias, or grad_z + mask·(grad_later + grad_alias), where either of the last two may be missing.

    Each sum is rounded to their precision, as PyTorch would have added them.
    """
    pixel = start + tl.arange(0, BLOCK_ROWS)
    gradient = _gradient(grad_z, base, inner, inside, pixel, channel, channels, height, width, Z_STRIDE)
    if grad_alias is not None:
        again = _gradient(grad_alias, base, inner, inside, pixel, channel, channels, height, width, ALIAS_STRIDE)
    if grad_later is not None:
        later = _gradient(grad_later, base, inner, inside, pixel, channel, channels, height, width, LATER_STRIDE)
        if grad_alias is not None:
            later = (later + again).to(grad_z.dtype.element_ty).to(tl.float32)
        again = tl.where(passes(later_mask, start, rows, columns, count, base, RAGGED, BLOCK_ROWS, BLOCK_COLUMNS), later, 0.0)
    if grad_alias is not None or grad_later is not None:
        gradient = (gradient + again).to(grad_z.dtype.element_ty).to(tl.float32)
    return gradient


def per_channel(slope: Tensor | None, channels: int) -> Tensor | None:
    return None if slope is None else slope.expand(channels).contiguous()


def parameter_gradients(sums: Tensor, slope: Tensor | None) -> tuple[Tensor, Tensor]:
    """Gradients of γ and β, [2, C] or more, and, from the last row, of the slope, shaped like it; each empty where it is not wanted."""
    if slope is None or sums.dim() == 1:
        return sums, sums.new_empty(0)
    return sums[:-1], sums[-1] if len(slope) == sums.shape[1] else sums[-1].sum(0, keepdim=True)
