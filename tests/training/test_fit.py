"""What the training of teachers and of students shares."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dwa_fast.training.fit import cosine, new_network, predict, resolve_precision, triangle
from tests.nets import real_images, small_teacher

CPU = torch.device("cpu")


def test_learning_rate_warms_up_and_falls() -> None:
    assert [cosine(step, 10, 4) for step in (0, 2, 4, 7, 10)] == pytest.approx([0.01, 0.505, 1.0, 0.5, 0.0], abs=1e-12)


def test_learning_rate_rises_and_falls_in_straight_lines() -> None:
    assert [triangle(step, 10, 3) for step in range(11)] == pytest.approx([0.25, 0.5, 0.75, *(left / 7 for left in range(7, -1, -1))])
    assert [triangle(step, 2, 0) for step in range(3)] == [1, 0.5, 0]
    assert triangle(0, 1, 0) == 1


def test_fresh_weights_depend_on_the_seed_alone() -> None:
    torch.manual_seed(1)
    before = torch.rand(1)
    torch.manual_seed(1)
    first, again, other = (new_network("small-resnet", classes=10, channels=1, size=8, seed=seed, device=CPU) for seed in (5, 5, 6))
    assert torch.equal(torch.rand(1), before)
    assert torch.equal(first.get_parameter("fc.weight"), again.get_parameter("fc.weight"))
    assert not torch.equal(first.get_parameter("fc.weight"), other.get_parameter("fc.weight"))


@torch.no_grad()
def test_bf16_computes_in_bf16_and_gives_fp32() -> None:
    teacher, (images, _) = small_teacher(), real_images()
    seen: list[torch.dtype] = []
    next(m for m in teacher.modules() if isinstance(m, nn.Conv2d)).register_forward_hook(lambda _m, _i, out: seen.append(out.dtype))
    exact, rounded = predict(teacher, images, "fp32"), predict(teacher, images, "bf16")
    assert seen == [torch.float32, torch.bfloat16]
    assert rounded.dtype == torch.float32
    assert not torch.equal(exact, rounded)
    assert torch.allclose(exact, rounded, atol=0.1 * float(exact.abs().max()))


def test_precision_is_fp32_on_a_cpu_unless_asked_for() -> None:
    assert [resolve_precision(each, CPU) for each in ("auto", "fp32", "bf16")] == ["fp32", "fp32", "bf16"]  # type: ignore[arg-type]
