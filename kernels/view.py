"""Triton twin of dwa_fast.ops.view: crop, bilinear resize, flip and roll as one gather, and its adjoint as one gather.

Coordinates are exact integers: output pixel y of a crop of h pixels resized to H reads the source at num/(2H), num = (2y + 1)h − H, clamped
to [0, h − 1] as F.interpolate(align_corners=False) does; both directions round the same interpolation weights once. Images may have up to
32767 pixels a side.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dwa_fast.kernels.layout import channels_last, on_device_of

_TILE = 1024  # elements of a program, 8 per thread
_COLUMNS = 128  # pixels of one image row that a program takes at most
_CHANNELS = 16  # channels that a program takes at most
_WARPS = 4


@triton.jit
def _wrapped(position, shift, size):
    """(position + shift) mod size for 0 ≤ position < size and any shift."""
    moved = position + (shift % size + size) % size
    return tl.where(moved >= size, moved - size, moved)


@triton.jit
def _numerator(position, crop, size):
    """2·size times the source coordinate of an output pixel, clamped to the crop; an exact integer."""
    return tl.minimum(tl.maximum((2 * position + 1) * crop - size, 0), 2 * size * (crop - 1))


@triton.jit(do_not_specialize=["lines"])
def _forward_kernel(
    images, rows, step, out, lines, channels, height, width, image_stride, channel_stride, line_stride, pixel_stride,
    LINES: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """out = roll(flip(resize(crop(images))))   with the parameters in row `step` of the schedule; out is [N, H, W, C] in memory."""
    row = rows + tl.load(step) * 7
    top, left, crop_height, crop_width = tl.load(row), tl.load(row + 1), tl.load(row + 2), tl.load(row + 3)
    flip, down, right = tl.load(row + 4), tl.load(row + 5), tl.load(row + 6)
    line = (tl.program_id(0) * LINES + tl.arange(0, LINES))[:, None, None]
    column = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :, None]
    channel = (tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS))[None, None, :]
    inside = (line < lines) & (column < width) & (channel < channels)

    y = _numerator(_wrapped(line % height, -down, height), crop_height, height)
    x = _wrapped(column, -right, width)
    x = _numerator(tl.where(flip != 0, width - 1 - x, x), crop_width, width)
    upper, first = y // (2 * height), x // (2 * width)
    lower, second = tl.minimum(upper + 1, crop_height - 1), tl.minimum(first + 1, crop_width - 1)
    below = tl.div_rn((y - upper * 2 * height).to(tl.float32), (2 * height).to(tl.float32))
    beyond = tl.div_rn((x - first * 2 * width).to(tl.float32), (2 * width).to(tl.float32))

    source = images + (line // height).to(tl.int64) * image_stride + channel.to(tl.int64) * channel_stride
    upper_line, lower_line = (top + upper).to(tl.int64) * line_stride, (top + lower).to(tl.int64) * line_stride
    first_pixel, second_pixel = (left + first).to(tl.int64) * pixel_stride, (left + second).to(tl.int64) * pixel_stride
    a = tl.load(source + upper_line + first_pixel, mask=inside, other=0.0)
    b = tl.load(source + upper_line + second_pixel, mask=inside, other=0.0)
    c = tl.load(source + lower_line + first_pixel, mask=inside, other=0.0)
    d = tl.load(source + lower_line + second_pixel, mask=inside, other=0.0)
    value = (1.0 - below) * ((1.0 - beyond) * a + beyond * b) + below * ((1.0 - beyond) * c + beyond * d)
    target = out + (line.to(tl.int64) * width + column) * channels + channel
    tl.store(target, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _first_reader(position, crop, size):
    """The first output pixel that may read source pixel `position` of the crop: the least y ≥ 0 with num(y) > 2·size·(position − 1)."""
    bound = size * (2 * position - 1) - crop
    return tl.where(bound < 0, 0, bound // (2 * crop) + 1)


@triton.jit
def _most_readers(crop, size):
    """How many output pixels may read one source pixel, at most: they lie in an open interval of length 2·size/crop."""
    return tl.where(crop == size, 1, tl.minimum((2 * size + crop - 1) // crop, size))


@triton.jit
def _share(reader, position, crop, size):
    """The weight max(0, 1 − |source coordinate − position|) with which output pixel `reader` reads source pixel `position` of the crop."""
    distance = tl.abs(_numerator(reader, crop, size) - 2 * size * position)
    exists = (position >= 0) & (position < crop) & (reader < size)
    return tl.div_rn(tl.where(exists, tl.maximum(2 * size - distance, 0), 0).to(tl.float32), (2 * size).to(tl.float32))


@triton.jit(do_not_specialize=["lines"])
def _backward_kernel(
    grad, rows, step, grad_images, lines, channels, height, width,
    LINES: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """grad_images_s = Σ weight(o, s) grad_o   over the output pixels o that read source pixel s; both are [N, H, W, C] in memory."""
    row = rows + tl.load(step) * 7
    top, left, crop_height, crop_width = tl.load(row), tl.load(row + 1), tl.load(row + 2), tl.load(row + 3)
    flip, down, right = tl.load(row + 4), tl.load(row + 5), tl.load(row + 6)
    line = (tl.program_id(0) * LINES + tl.arange(0, LINES))[:, None, None]
    column = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :, None]
    channel = (tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS))[None, None, :]
    y, x = line % height - top, column - left
    image = grad + (line // height).to(tl.int64) * height * width * channels + channel
    inside = (line < lines) & (channel < channels)

    total = tl.zeros([LINES, COLUMNS, CHANNELS], dtype=tl.float32)
    reader_y = _first_reader(y, crop_height, height)
    left_y = _most_readers(crop_height, height)
    while left_y > 0:
        share_y = _share(reader_y, y, crop_height, height)
        seen_line = image + _wrapped(reader_y, down, height) * width * channels
        reads_line = inside & (share_y > 0.0)
        reader_x = _first_reader(x, crop_width, width)
        left_x = _most_readers(crop_width, width)
        while left_x > 0:
            share_x = _share(reader_x, x, crop_width, width)
            seen = _wrapped(tl.where(flip != 0, width - 1 - reader_x, reader_x), right, width)
            value = tl.load(seen_line + seen * channels, mask=reads_line & (share_x > 0.0), other=0.0).to(tl.float32)
            total += share_y * share_x * value
            reader_x += 1
            left_x -= 1
        reader_y += 1
        left_y -= 1
    target = grad_images + (line.to(tl.int64) * width + column) * channels + channel
    tl.store(target, total, mask=inside & (column < width))


def _tile(width: int, channels: int) -> dict[str, int]:
    """Shape of the tile of one program; narrow images take several lines at once."""
    of_channels = min(triton.next_power_of_2(channels), _CHANNELS)
    of_columns = min(triton.next_power_of_2(width), _COLUMNS)
    return {"LINES": max(1, _TILE // (of_channels * of_columns)), "COLUMNS": of_columns, "CHANNELS": of_channels}


def _grid(lines: int, width: int, channels: int, tile: dict[str, int]) -> tuple[int, int, int]:
    return triton.cdiv(lines, tile["LINES"]), triton.cdiv(width, tile["COLUMNS"]), triton.cdiv(channels, tile["CHANNELS"])


def view_forward(
    images: Tensor,  # [N, C, H, W] float32, any strides
    rows: Tensor,  # [T, 7] int32
    step: Tensor,  # [] int64
    dtype: torch.dtype,  # of the result
) -> Tensor:
    """The view of one iteration, [N, C, H, W], channels-last. One launch."""
    out = torch.empty_like(images, dtype=dtype, memory_format=torch.channels_last)
    if images.numel() == 0:
        return out
    count, channels, height, width = images.shape
    tile = _tile(width, channels)
    with on_device_of(images):
        _forward_kernel[_grid(count * height, width, channels, tile)](
            images, rows.contiguous(), step, out, count * height, channels, height, width, *images.stride(), **tile, num_warps=_WARPS
        )
    return out


def view_backward(
    grad: Tensor,  # [N, C, H, W] float32, bfloat16 or float16
    rows: Tensor,  # [T, 7] int32
    step: Tensor,  # [] int64
) -> Tensor:
    """Gradient of the images, [N, C, H, W], float32, channels-last. One launch."""
    grad = channels_last(grad)
    grad_images = torch.empty_like(grad, dtype=torch.float32, memory_format=torch.channels_last)
    if grad.numel() == 0:
        return grad_images
    count, channels, height, width = grad.shape
    tile = _tile(width, channels)
    with on_device_of(grad):
        _backward_kernel[_grid(count * height, width, channels, tile)](
            grad, rows.contiguous(), step, grad_images, count * height, channels, height, width, **tile, num_warps=_WARPS
        )
    return grad_images
