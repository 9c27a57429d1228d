"""What the training of teachers and of students shares."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from dwa_fast.data.datasets import digits
from dwa_fast.data.images import MemorySet
from dwa_fast.data.pixels import normalise
from dwa_fast.training import fit
from dwa_fast.training.fit import cosine, mean_logits, new_network, predict, resolve_precision, triangle
from tests.nets import DIGITS, SIZE, real_images, small_teacher

CPU = torch.device("cpu")


def test_learning_rate_warms_up_and_falls() -> None:
    assert [cosine(step, 10, 4) for step in (0, 2, 4, 7, 10)] == pytest.approx([0.01, 0.505, 1.0, 0.5, 0.0], abs=1e-12)


@pytest.mark.parametrize(("stretch", "last"), [(1.0, 0.0), (2.0, 0.5), (4.0, 0.5 + 0.25 * 2**0.5)])
def test_a_stretched_cosine_ends_above_0(stretch: float, last: float) -> None:
    """½(1 + cos(πi/(ζE)))."""
    assert cosine(0, 10, stretch=stretch) == 1
    assert cosine(10, 10, stretch=stretch) == pytest.approx(last, abs=1e-12)
    assert cosine(5, 10, stretch=stretch) == pytest.approx(math.cos(math.pi / 4 / stretch) ** 2)
    assert [cosine(step, 10, 4, stretch) for step in (0, 4, 10)] == pytest.approx([0.01, 1, last], abs=1e-12)


def test_mean_logits_of_several_teachers() -> None:
    one, two = torch.randn(5, 3), 7 * torch.randn(5, 3)
    assert mean_logits([one], "balanced") is one
    assert torch.equal(mean_logits([one, two], "plain"), (one + two) / 2)
    norms = [float(each.double().square().sum().sqrt()) for each in (one, two)]
    expected = sum(each.double() * (sum(norms) / 2 / norm) for each, norm in zip((one, two), norms, strict=True)) / 2
    assert torch.allclose(mean_logits([one, two], "balanced").double(), expected, rtol=1e-6)


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


def test_many_images_are_tested_by_the_fused_form(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same accuracy, and the network stays as it was; an odd number of images, in several batches."""
    data, network = digits("train", SIZE), small_teacher().train()
    data = MemorySet(data.pixels[:1003], data.labels[:1003], data.class_names)
    before, forms = copy.deepcopy(network.state_dict()), []
    make = fit.training_form
    monkeypatch.setattr(fit, "training_form", lambda *given: forms.append(given) or make(*given))
    accuracy = fit.top1(network, data, DIGITS.data, CPU)
    assert len(forms) == 1
    with torch.no_grad():
        expected = (network(normalise(data.pixels, DIGITS.data)).argmax(1) == data.labels).double().mean()
    assert accuracy == pytest.approx(100 * float(expected))
    assert 0 < accuracy < 100
    assert not network.training
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    fit.top1(network, MemorySet(data.pixels[:999], data.labels[:999], data.class_names), DIGITS.data, CPU)
    assert len(forms) == 1
