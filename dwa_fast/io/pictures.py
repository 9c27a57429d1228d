"""Grids of images."""

from __future__ import annotations

import torch
from torch import Tensor

GAP = 2  # pixels between images


def mosaic(
    images: Tensor,  # [rows × columns, C, H, W] uint8, row after row
    columns: int,
    times: int = 1,
) -> Tensor:  # [rows·(H·times + gap) − gap, columns·(W·times + gap) − gap, 3] uint8
    """Arrange images in a grid with white gaps, each pixel as a square of `times` pixels."""
    images = images.repeat_interleave(times, 2).repeat_interleave(times, 3)
    count, _, height, width = images.shape
    rows = count // columns
    tiles = torch.full((rows, columns, 3, height + GAP, width + GAP), 255, dtype=torch.uint8)
    tiles[..., :height, :width] = images.expand(count, 3, height, width).view(rows, columns, 3, height, width)
    sheet = tiles.permute(0, 3, 1, 4, 2).reshape(rows * (height + GAP), columns * (width + GAP), 3)
    return sheet[:-GAP, :-GAP]
