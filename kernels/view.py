"""Triton twin of dwa_fast.ops.view: crop, bilinear resize, flip and roll as one gather; its adjoint is part of view_adam_clip_.

Coordinates are exact integers: output pixel y of a crop of h pixels resized to H reads the source at num/(2H), num = (2y + 1)h − H, clamped
to [0, h − 1] as F.interpolate(align_corners=False) does; both directions round the same interpolation weights once. Images may have up to
32767 pixels a side.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dwa_fast.kernels.layout import on_device_of

_SPAN = 128  # elements of one image line, one per thread: what depends on the column is computed once for all lines of a program
_TILE = 1024  # elements of a program, 8 per thread
WARPS = 4


@triton.jit
def _wrapped(position, shift, size):
    """(position + shift) mod size for 0 ≤ position < size and any shift."""
    moved = position + (shift % size + size) % size
    return tl.where(moved >= size, moved - size, moved)


@triton.jit
def _numerator(position, crop, size):
    """2·size times the source coordinate of an output pixel, clamped to the crop; an exact integer."""
    return tl.minimum(tl.maximum((2 * position + 1) * crop - size, 0), 2 * size * (crop - 1))


@triton.jit
def _parameters(rows, step):
    """Crop (top, left, height, width), flip and roll (down, right) in row `step` of the schedule."""
    row = rows + tl.load(step) * 7
    top, left, height, width = tl.load(row), tl.load(row + 1), tl.load(row + 2), tl.load(row + 3)
    return top, left, height, width, tl.load(row + 4), tl.load(row + 5), tl.load(row + 6)


@triton.jit
def element(LINES: tl.constexpr, SPAN: tl.constexpr):
    """Line of the batch and place in that line of every element of a program; a vector, so that lanes lie along the line."""
    lane = tl.arange(0, LINES * SPAN)
    return tl.program_id(0) * LINES + lane // SPAN, tl.program_id(1) * SPAN + lane % SPAN


# An aligned pitch would widen the stores, and with them spread the lanes over the gathers, which cost more.
@triton.jit(do_not_specialize=["lines", "pitch"])
def _view_kernel(
    images, rows, step, out, lines, pitch, height, width, image_stride, channel_stride, line_stride, pixel_stride,
    CHANNELS: tl.constexpr, LINES: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """out = roll(flip(resize(crop(images))))   with the parameters in row `step` of the schedule; out is [N, H, W, C] in memory."""
    top, left, crop_height, crop_width, flip, down, right = _parameters(rows, step)
    line, place = element(LINES, SPAN)
    inside = (line < lines) & (place < pitch)

    y = _numerator(_wrapped(line % height, -down, height), crop_height, height)
    x = _wrapped(place // CHANNELS, -right, width)
    x = _numerator(tl.where(flip != 0, width - 1 - x, x), crop_width, width)
    upper, first = y // (2 * height), x // (2 * width)
    lower, second = tl.minimum(upper + 1, crop_height - 1), tl.minimum(first + 1, crop_width - 1)
    below = tl.div_rn((y - upper * 2 * height).to(tl.float32), (2 * height).to(tl.float32))
    beyond = tl.div_rn((x - first * 2 * width).to(tl.float32), (2 * width).to(tl.float32))

    image = images + (line // height).to(tl.int64) * image_stride
    channel = (place % CHANNELS).to(tl.int64) * channel_stride
    upper_line, lower_line = (top + upper).to(tl.int64) * line_stride, (top + lower).to(tl.int64) * line_stride
    first_pixel = channel + (left + first).to(tl.int64) * pixel_stride
    second_pixel = channel + (left + second).to(tl.int64) * pixel_stride
    a = tl.load(image + upper_line + first_pixel, mask=inside, other=0.0)
    b = tl.load(image + upper_line + second_pixel, mask=inside, other=0.0)
    c = tl.load(image + lower_line + first_pixel, mask=inside, other=0.0)
    d = tl.load(image + lower_line + second_pixel, mask=inside, other=0.0)
    value = (1.0 - below) * ((1.0 - beyond) * a + beyond * b) + below * ((1.0 - beyond) * c + beyond * d)
    tl.store(out + line.to(tl.int64) * pitch + place, value.to(out.dtype.element_ty), mask=inside)


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


@triton.jit
def adjoint(
    grad, rows, step, line, place, inside, pitch, height, width,
    image_stride, channel_stride, two_lines, line_stride, two_pixels, pixel_stride,
    CHANNELS: tl.constexpr, LINES: tl.constexpr, SPAN: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Σ weight(o, s) grad_o   over the output pixels o that read source pixel s, for the elements of a program.

    grad is [N, H, W, C] in memory, or with BLOCKS [N, C, H/2, 2, W/2, 2] with these strides.
    """
    top, left, crop_height, crop_width, flip, down, right = _parameters(rows, step)
    y, x = line % height - top, place // CHANNELS - left
    if BLOCKS:
        image = grad + (line // height).to(tl.int64) * image_stride + place % CHANNELS * channel_stride
    else:
        image = grad + (line // height).to(tl.int64) * height * pitch + place % CHANNELS

    # Scalars count the loops: what depends on the column alone is then the same in all lines, and the compiler computes it once.
    total = tl.zeros([LINES * SPAN], dtype=tl.float32)
    first_y, first_x = _first_reader(y, crop_height, height), _first_reader(x, crop_width, width)
    most_y, most_x = _most_readers(crop_height, height), _most_readers(crop_width, width)
    top_line, first_place = tl.program_id(0) * LINES % height, tl.program_id(1) * SPAN
    above = top_line + LINES <= top
    underneath = (top_line >= top + crop_height) & (top_line + LINES <= height)
    beside = (first_place + SPAN <= left * CHANNELS) | (first_place >= (left + crop_width) * CHANNELS)
    most_y = tl.where(above | underneath | beside, 0, most_y)  # nothing of this program lies in the crop
    next_y = 0
    while next_y < most_y:
        reader_y = first_y + next_y
        share_y = _share(reader_y, y, crop_height, height)
        seen_y = _wrapped(reader_y, down, height)
        seen_line = image + (seen_y // 2 * two_lines + seen_y % 2 * line_stride if BLOCKS else seen_y * pitch)
        reads_line = inside & (share_y > 0.0)
        next_x = 0
        while next_x < most_x:
            reader_x = first_x + next_x
            share_x = _share(reader_x, x, crop_width, width)
            seen_x = _wrapped(tl.where(flip != 0, width - 1 - reader_x, reader_x), right, width)
            seen = seen_x // 2 * two_pixels + seen_x % 2 * pixel_stride if BLOCKS else seen_x * CHANNELS
            value = tl.load(seen_line + seen, mask=reads_line & (share_x > 0.0), other=0.0).to(tl.float32)
            total += share_y * share_x * value
            next_x += 1
        next_y += 1
    return total


def cut(lines: int, pitch: int) -> tuple[tuple[int, int], dict[str, int]]:
    """The grid, and the lines and elements of a line that a program takes; short lines are taken more at a time."""
    span = min(triton.next_power_of_2(pitch), _SPAN)
    return (triton.cdiv(lines, _TILE // span), triton.cdiv(pitch, span)), {"LINES": _TILE // span, "SPAN": span}


def view(
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
    lines, pitch = count * height, width * channels
    grid, tile = cut(lines, pitch)
    with on_device_of(images):
        _view_kernel[grid](
            images, rows.contiguous(), step, out, lines, pitch, height, width, *images.stride(),
            CHANNELS=channels, **tile, num_warps=WARPS,
        )  # fmt: skip
    return out
