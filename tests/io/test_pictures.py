"""Grids of images."""

from __future__ import annotations

import torch

from dwa_fast.io.pictures import mosaic


def test_mosaic_lays_images_out_in_rows() -> None:
    images = torch.arange(6, dtype=torch.uint8).view(6, 1, 1, 1).expand(6, 1, 2, 2)
    sheet = mosaic(images, 3)
    assert sheet.shape == (2 * 2 + 2, 3 * 2 + 4, 3)
    assert sheet[0, ::4, 0].tolist() == [0, 1, 2]
    assert sheet[4, ::4, 0].tolist() == [3, 4, 5]
    assert sheet[2:4].unique().tolist() == [255]
