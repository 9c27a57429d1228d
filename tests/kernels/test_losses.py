"""cross_entropy and log_losses_ in Triton, interpreted on a CPU and real on a GPU, against their plain twins in float64."""

from __future__ import annotations

import importlib
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dwa_fast.reference import ops as reference
from tests.kernels.cases import Launches, meta
from tests.kernels.support import PRECISIONS, assert_as_good_as_pytorch, captured

pytest.importorskip("triton", reason="this PyTorch comes without Triton")
kernel = importlib.import_module("dwa_fast.kernels.losses")

SCALE = 2.0**14


@pytest.mark.parametrize("shape", [(1, 1), (3, 2), (7, 10), (5, 100), (4, 1000), (2, 4097)])
@pytest.mark.parametrize("dtype", PRECISIONS)
def test_matches_float64(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
    logits, labels = (3 * torch.randn(shape)).to(device, dtype), torch.randint(shape[1], shape[:1], device=device)
    losses, gradient = kernel.cross_entropy(logits, labels, SCALE)
    exact = F.cross_entropy(logits.double(), labels, reduction="none")
    assert_as_good_as_pytorch(losses, F.cross_entropy(logits.float(), labels, reduction="none"), exact, exact + 1)
    _, plain = reference.cross_entropy(logits, labels, SCALE)
    _, expected = reference.cross_entropy(logits.double(), labels, SCALE)
    assert_as_good_as_pytorch(gradient, plain, expected, expected.abs() + SCALE / shape[0] * 2**-20)


def test_extremes(device: torch.device) -> None:
    """Large logits overflow nothing; NaN and infinity propagate."""
    logits = torch.tensor([[1e4, -1e4, 0.0], [torch.nan, 0.0, 1.0], [torch.inf, 0.0, 1.0]], device=device)
    losses, gradient = kernel.cross_entropy(logits, torch.tensor([1, 0, 0], device=device), 3.0)
    assert losses[0].item() == 2e4
    assert gradient[0].tolist() == [1.0, -1.0, 0.0]
    assert losses[1:].isnan().all()
    assert gradient[1:].isnan().any(1).all()


@pytest.mark.parametrize("images", [1, 3, 257])
def test_log_losses(images: int, device: torch.device) -> None:
    losses, step = torch.zeros(3, 3, device=device), torch.tensor(1, device=device)
    for t in (1, 2, 0):
        assert step.item() == t
        image_losses, matching = torch.rand(images, device=device), torch.rand(2, device=device)
        kernel.log_losses_(losses, step, image_losses, matching)
        expected = [image_losses.double().mean().float(), *matching]
        assert torch.equal(losses[t], torch.stack(expected))
    assert losses.all()


def both(logits: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
    losses, step = torch.zeros(2, 3, device=logits.device), torch.zeros((), dtype=torch.int64, device=logits.device)
    image_losses, gradient = kernel.cross_entropy(logits, labels, 1.0)
    kernel.log_losses_(losses, step, image_losses, image_losses[:2])
    return losses, step, gradient


def test_same_bits_again(device: torch.device) -> None:
    given = torch.randn(9, 20, device=device), torch.arange(9, device=device)
    assert all(torch.equal(*each) for each in zip(both(*given), both(*given), strict=True))


@pytest.mark.gpu
def test_captured_in_a_cuda_graph() -> None:
    given = torch.randn(9, 20, device="cuda"), torch.arange(9, device="cuda")
    called = both(*given)
    assert all(torch.equal(*each) for each in zip(called, captured(lambda: both(*given)), strict=True))


def launches() -> Launches:
    """A batch of 100 images of 10, 100 and 1000 classes."""
    for dtype in PRECISIONS:
        for classes in (10, 100, 1000):
            labels = meta(100, dtype=torch.int64)
            yield f"{dtype} {classes} classes", partial(kernel.cross_entropy, meta(100, classes, dtype=dtype), labels, 1.0)
    yield "2000 iterations", partial(kernel.log_losses_, meta(2000, 3), meta(dtype=torch.int64), meta(100), meta(2))
