"""What the launchers share: memory order of activations and images, how features are cut into programs, the device to launch on."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
from torch import Tensor

BLOCK_COLUMNS = 64  # 128 bytes of bfloat16
BLOCK_ROWS = 32  # a tile of 2048 elements: 16 per thread, two loads of 16 bytes in flight
WARPS = 4
PROGRAMS = 1024  # about what an A100, H100 or H200 holds at once; more tiles than that are looped over


def channels_last(tensor: Tensor) -> Tensor:
    """The tensor itself where its memory is already [N, H, W, C], else a copy that is."""
    return tensor.contiguous(memory_format=torch.channels_last)


def laid_out_like(result: Tensor, model: Tensor) -> Tensor:
    """A channels-last result with the strides that torch.empty_like gives the model; a copy only where the model is not channels-last."""
    if model.is_contiguous(memory_format=torch.channels_last):
        return result
    return torch.empty_like(model, dtype=result.dtype).copy_(result)


def dense(tensor: Tensor) -> Tensor:
    """The tensor itself where its memory is contiguous or channels-last without gaps, else a contiguous copy."""
    return tensor if tensor.is_contiguous(memory_format=torch.channels_last) else tensor.contiguous()


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


def tiles(features: Tensor) -> Tiles:
    """How dense features, [N, C, H, W], are cut."""
    channels = features.shape[1]
    if features.is_contiguous(memory_format=torch.channels_last):
        repeat = 16 // math.gcd(channels, 16)
        while repeat * channels < BLOCK_COLUMNS:
            repeat *= 2
        columns, inner = repeat * channels, 1
    else:
        columns, inner = features.numel() // len(features), features.shape[2] * features.shape[3]
    rows, column_blocks = triton.cdiv(features.numel(), columns), triton.cdiv(columns, BLOCK_COLUMNS)
    count = triton.cdiv(rows, BLOCK_ROWS)
    count_each = triton.cdiv(count, max(1, PROGRAMS // column_blocks))
    return Tiles(rows, columns, inner, triton.cdiv(count, count_each), column_blocks)


def on_device_of(tensor: Tensor) -> torch.cuda.device_of:
    """Triton launches on the current device: this makes it the tensor's."""
    return torch.cuda.device_of(tensor)
