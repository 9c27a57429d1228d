"""Views and states of Adam that several kernels are tried on."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

BETAS, EPS = (0.5, 0.9), 1e-8
Launches = Iterator[tuple[str, Callable[[], object]]]  # a name and a call of a launcher on meta tensors, for test_compile
Row = tuple[int, int, int, int, int, int, int]  # top, left, height, width; flip; roll down, right

# Shape of the images, and one view of them.
VIEWS: list[tuple[tuple[int, int, int, int], Row]] = [
    ((1, 1, 1, 1), (0, 0, 1, 1, 0, 0, 0)),
    ((1, 1, 1, 1), (0, 0, 1, 1, 1, 3, 2)),
    ((2, 3, 8, 8), (0, 0, 8, 8, 0, 0, 0)),
    ((2, 3, 8, 8), (0, 0, 8, 8, 0, 4, 3)),
    ((2, 3, 8, 8), (0, 0, 8, 8, 1, 0, 0)),
    ((2, 3, 8, 8), (2, 1, 5, 6, 1, 1, 7)),
    ((2, 3, 8, 8), (3, 4, 1, 1, 1, 2, 5)),  # one pixel
    ((1, 3, 8, 8), (7, 0, 1, 8, 0, 1, 0)),  # one line
    ((1, 3, 8, 8), (0, 7, 8, 1, 1, 0, 1)),  # one column
    ((1, 3, 8, 8), (0, 0, 4, 4, 0, 9, -3)),  # rolls past the size, and backwards
    ((3, 2, 9, 13), (4, 6, 5, 7, 1, 2, 4)),
    ((1, 5, 13, 6), (0, 0, 12, 6, 0, 0, 1)),
    ((1, 17, 4, 5), (1, 0, 3, 4, 1, 1, 1)),
    ((1, 3, 3, 140), (0, 30, 2, 100, 1, 1, 32)),  # wider than a program
    ((1, 3, 32, 32), (10, 3, 9, 10, 1, 4, 4)),  # the smallest published crop
]
CASES = [pytest.param(shape, row, id=f"{'x'.join(map(str, shape))}-{','.join(map(str, row))}") for shape, row in VIEWS]


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor without memory, channels-last where it has four dimensions."""
    made = torch.empty(shape, dtype=dtype, device="meta")
    return made.contiguous(memory_format=torch.channels_last) if made.dim() == 4 else made


def schedule(row: Row, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Three rows, of which the step selects the middle one; the others are no legal crops."""
    return torch.tensor([[-1] * 7, row, [99] * 7], dtype=torch.int32, device=device), torch.tensor(1, device=device)


class State:
    """Images, gradient and Adam's moments as they are in the middle of a run, with the schedule and the bounds of the pixels."""

    def __init__(self, shape: tuple[int, ...], device: torch.device | str, layout: torch.memory_format, iterations: int = 2000) -> None:
        def tensor(scale: float) -> Tensor:
            return (scale * torch.randn(shape)).to(device).contiguous(memory_format=layout)

        self.images, self.gradient, self.exp_avg = tensor(1.0), tensor(1e-4), tensor(1e-4)
        self.exp_avg_sq = tensor(1e-4).square()
        self.learning_rates = 0.25 * (1 + torch.arange(iterations).mul(math.pi / iterations).cos()).div(2).to(device)
        self.low = torch.linspace(-2.0, -1.0, shape[1]).to(device)
        self.high = torch.linspace(1.0, 2.5, shape[1]).to(device)

    def changing(self, dtype: torch.dtype = torch.float32) -> list[Tensor]:
        return [tensor.to(dtype, copy=True) for tensor in (self.images, self.exp_avg, self.exp_avg_sq)]
