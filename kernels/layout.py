"""What the kernels share: memory order of activations and images, how features are cut into programs, sums, the device to launch on."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_COLUMNS = 64  # 128 bytes of bfloat16
BLOCK_ROWS = 32  # a tile of 2048 elements: 16 per thread, two loads of 16 bytes in flight
WARPS = 4
MULTIPROCESSORS = 132  # of an H100 or H200: where there is no GPU
_REGISTERS = 65536  # of a multiprocessor
_TILES_EACH = 4  # of a program that leaves none; few, so that the last programs end at about the same time
ALIGNED = 16  # elements, of which the columns of a tile are a multiple
_MOST_PROGRAMS = 65535  # of the second axis of a grid


def channels_last(tensor: Tensor) -> Tensor:
    """The tensor itself where its memory is already [N, H, W, C], else a copy that is."""
    return tensor.contiguous(memory_format=torch.channels_last)


def laid_out_like(result: Tensor, like: Tensor) -> Tensor:
    """A channels-last result with the strides that torch.empty_like(like) has; a copy only where `like` is not channels-last."""
    if like.is_contiguous(memory_format=torch.channels_last):
        return result
    return torch.empty_like(like, dtype=result.dtype).copy_(result)


def dense(tensor: Tensor) -> Tensor:
    """The tensor itself where its memory is contiguous or channels-last without gaps, else a contiguous copy."""
    return tensor if tensor.is_contiguous(memory_format=torch.channels_last) else tensor.contiguous()


def gradient_to_read(
    gradient: Tensor,  # [N, C, ⌈H/s⌉, ⌈W/s⌉]
    stride: int,  # s
    y: Tensor,  # [N, C, H, W]
) -> tuple[Tensor, int]:  # stride 0: [N, C], of which each value is that of all pixels
    """A gradient as the kernels read it, and its stride; where a row of the tiles is several pixels, as large as y."""
    channels = y.shape[1]
    by_pixel = channels % ALIGNED == 0 and channels >= BLOCK_COLUMNS and y.numel() < 2**31 * channels  # counted in 32 bits
    if stride == 1:
        same = by_pixel and gradient.stride()[2:] == (0, 0)  # as the gradient of a mean
        return (gradient[:, :, 0, 0].contiguous(), 0) if same else (channels_last(gradient), 1)
    if by_pixel:
        return channels_last(gradient), stride
    whole = torch.zeros_like(y)
    whole[:, :, ::stride, ::stride] = gradient
    return whole, 1


def gradients_to_read(
    y: Tensor,  # [N, C, H, W]
    z: Tensor,  # like y
    alias: Tensor | None,  # [N, C, ⌈H/s⌉, ⌈W/s⌉]
    alias_stride: int,  # s
    later: Tensor | None,  # like y
    later_mask: Tensor | None,  # uint8 [⌈numel/8⌉]
) -> tuple[list[Tensor | None], dict[str, int]]:
    """What `bn_layer.gradient_of_z` puts ∂L/∂z together from: the tensors as it reads them, and the strides of the gradients."""
    if (later is None) != (later_mask is None):
        raise ValueError("grad_later and later_mask must be given together")
    if later_mask is not None and later_mask.numel() != triton.cdiv(y.numel(), 8):
        raise ValueError(f"later_mask must have a bit per element, {triton.cdiv(y.numel(), 8)} bytes, got {later_mask.numel()}")
    given = {"Z_STRIDE": (z, 1), "ALIAS_STRIDE": (alias, alias_stride), "LATER_STRIDE": (later, 1)}
    read = {name: (None, 1) if each is None else gradient_to_read(each, stride, y) for name, (each, stride) in given.items()}
    return [*(each for each, _ in read.values()), later_mask], {name: stride for name, (_, stride) in read.items()}


class Tiles(NamedTuple):
    """Features as a matrix [rows, columns] in memory order, cut into programs.

    A row of channels-last features is a whole number of pixels: C times the power of two that makes it a multiple of 16 and at least 64
    elements. A row of contiguous features is one image. Column j belongs to channel ⌊j / inner⌋ mod C.
    """

    rows: int
    columns: int
    inner: int  # H·W where contiguous, 1 where channels-last
    programs: int  # along the rows; each takes every programs-th tile, and all take equally many, give or take one
    column_blocks: int


def resident(device: torch.device, registers: int) -> int:
    """How many programs a GPU holds at once, if each of their threads takes that many registers."""
    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else MULTIPROCESSORS
    return multiprocessors * (_REGISTERS // (32 * WARPS * registers))


def tiles(
    features: Tensor,  # [N, C, H, W], dense
    *,
    registers: int | None = None,
) -> Tiles:
    """How features are cut for a kernel.

    Args:
        registers: of a thread, where the programs leave sums: no more programs than a GPU holds at once. None: as many as it takes.
    """
    if features.is_contiguous(memory_format=torch.channels_last):
        return _channels_last_tiles(features.shape, features.device, registers)
    inner = features.shape[2] * features.shape[3]
    return _cut(features.numel(), features.numel() // len(features), inner, features.device, registers)


def partial_rows(
    features: Tensor,  # [N, C, H, W]
    registers: int,
) -> int:
    """Rows of partial sums, [rows, C], that the programs of a kernel leave of such features, channels-last."""
    cut = _channels_last_tiles(features.shape, features.device, registers)
    return cut.programs * cut.columns // features.shape[1]


def _channels_last_tiles(shape: torch.Size, device: torch.device, registers: int | None) -> Tiles:
    repeat = ALIGNED // math.gcd(shape[1], ALIGNED)
    while repeat * shape[1] < BLOCK_COLUMNS:
        repeat *= 2
    return _cut(shape.numel(), repeat * shape[1], 1, device, registers)


def _cut(count: int, columns: int, inner: int, device: torch.device, registers: int | None) -> Tiles:
    rows, column_blocks = triton.cdiv(count, columns), triton.cdiv(columns, BLOCK_COLUMNS)
    blocks = triton.cdiv(rows, BLOCK_ROWS)
    if registers is None:
        each = max(_TILES_EACH, triton.cdiv(blocks, _MOST_PROGRAMS))
    else:
        each = triton.cdiv(blocks, max(1, resident(device, registers) // column_blocks))
    return Tiles(rows, columns, inner, triton.cdiv(blocks, each), column_blocks)


@triton.jit
def left_behind(count, base):
    """How many of `count` elements lie behind the first `base`, at most 2³¹ − 1: a number of 32 bits, as places in a tile are."""
    return tl.minimum(count - base, 2147483647).to(tl.int32)


@triton.jit
def sum_of_rows(place, rows, columns, column, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Σ over the rows of some columns of a matrix [rows, columns], float64, always in the same order."""
    row = tl.arange(0, ROWS)
    total = tl.zeros([ROWS, COLUMNS], dtype=tl.float64)
    start = 0
    while start < rows:
        inside = (start + row < rows)[:, None] & (column < columns)[None, :]
        total += tl.load(place + (start + row)[:, None] * columns + column[None, :], mask=inside, other=0.0).to(tl.float64)
        start += ROWS
    return tl.sum(total, axis=0)


def on_device_of(tensor: Tensor) -> torch.cuda.device_of:
    """Triton launches on the current device: this makes it the tensor's."""
    return torch.cuda.device_of(tensor)
