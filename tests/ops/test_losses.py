"""The plain twins of cross_entropy and log_losses_ against PyTorch, and what the operators refuse."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dwa_fast import ops
from dwa_fast.reference import ops as reference


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_cross_entropy_has_pytorchs_bits(dtype: torch.dtype) -> None:
    logits, labels = torch.randn(7, 10).to(dtype).requires_grad_(), torch.arange(7)
    loss = F.cross_entropy(logits.to(torch.promote_types(dtype, torch.float32)), labels)
    (expected,) = torch.autograd.grad(loss * 2.0**14, logits)
    losses, gradient = reference.cross_entropy(logits, labels, 2.0**14)
    assert torch.equal(losses, loss.detach()[None])
    assert torch.equal(gradient, expected)


def test_log_losses() -> None:
    losses, step = torch.zeros(2, 3), torch.tensor(1)
    reference.log_losses_(losses, step, torch.tensor([1.0, 3.0]), torch.tensor([4.0, 5.0]))
    assert (losses.tolist(), step.item()) == ([[0.0] * 3, [2.0, 4.0, 5.0]], 0)


LOGITS, LABELS = torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64)


@pytest.mark.parametrize(
    ("logits", "labels", "kind", "message"),
    [
        (LOGITS.double(), LABELS, TypeError, "logits must be float32, bfloat16 or float16, got float64"),
        (LOGITS, LABELS.int(), TypeError, "labels must be int64, got int32"),
        (LOGITS, LABELS[:1], ValueError, "logits and labels must be [N, C] and [N] on one device, got (2, 3) on cpu and (1,) on cpu"),
        (LOGITS[0], LABELS, ValueError, "logits and labels must be [N, C] and [N] on one device"),
    ],
)
def test_wrong_logits(logits: Tensor, labels: Tensor, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=re.escape(message)):
        ops.cross_entropy(logits, labels, 1.0)


LOSSES, STEP, MATCHING = torch.zeros(4, 3), torch.tensor(0), torch.zeros(2)


@pytest.mark.parametrize(
    ("losses", "step", "image_losses", "matching", "kind", "message"),
    [
        (LOSSES.double(), STEP, MATCHING, MATCHING, TypeError, "losses must be float32, got float64"),
        (LOSSES, STEP.int(), MATCHING, MATCHING, TypeError, "step must be int64, got int32"),
        (LOSSES.T, STEP, MATCHING, MATCHING, ValueError, "losses must be contiguous, got strides (1, 3)"),
        (LOSSES, STEP, MATCHING, MATCHING[:1], ValueError, "must be [T, 3], [], [N] and [2], got (4, 3), (), (2,), (1,)"),
    ],
)
def test_wrong_losses(losses: Tensor, step: Tensor, image_losses: Tensor, matching: Tensor, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=re.escape(message)):
        ops.log_losses_(losses, step, image_losses, matching)
