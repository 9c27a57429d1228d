"""How the results of a kernel are judged."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

PRECISIONS = [torch.float32, torch.bfloat16, torch.float16]


def error(result: Tensor, expected: Tensor, size: Tensor | None = None) -> float:
    """‖result − expected‖ / ‖size‖; without a size that of expected."""
    difference = torch.linalg.vector_norm(result.double() - expected)
    return (difference / torch.linalg.vector_norm(expected if size is None else size).clamp_min(1e-300)).item()


def assert_as_good_as_pytorch(result: Tensor, plain: Tensor, expected: Tensor, size: Tensor | None = None) -> None:
    """The error against float64 is at most twice that of PyTorch's own operators in the same precision, or one rounding.

    A sum of rounded products that may cancel is given with the size that it has where it does not, and may be four roundings off it:
    those of a factor, the product, the sum and the result.
    Triton's interpreter cuts bfloat16 off where a GPU rounds, which doubles the error of a rounding.
    """
    assert result.shape == expected.shape
    assert result.dtype == plain.dtype
    cut = 2 if result.dtype == torch.bfloat16 and os.environ.get("TRITON_INTERPRET") == "1" else 1
    roundings = 1 if size is None else 4
    allowed = cut * max(2 * error(plain, expected, size), roundings * torch.finfo(result.dtype).eps / 2)
    found = error(result, expected, size)
    assert found <= allowed


def captured(call: Callable[[], Any]) -> Any:
    """What a call leaves behind when it is replayed from a CUDA graph; the graph is captured after one ordinary call."""
    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()
    graph.replay()
    torch.cuda.synchronize()
    return results
