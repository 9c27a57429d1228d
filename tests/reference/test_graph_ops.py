"""The operators of the compiled back-end against the plain ones, in float64."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dwa_fast.reference import graph_ops, ops
from dwa_fast.schedule import make_schedule
from tests.nets import small_recipe


@pytest.mark.parametrize("shape", [(2, 3, 9, 14), (1, 1, 16, 16), (2, 3, 70, 9), (1, 2, 33, 81)])  # multiplied and gathered
@pytest.mark.parametrize("view", ["roll", "crop"])
def test_view_and_its_gradient(view: str, shape: tuple[int, ...]) -> None:
    rows = make_schedule(small_recipe(view=view, jitter=5, iterations=40).synthesis, shape[2], shape[3], seed=0, batch=0).rows
    images = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(shape, dtype=torch.float64)
    for step in range(len(rows)):
        got, wanted = (each.view(images, rows, torch.tensor(step)) for each in (graph_ops, ops))
        assert torch.allclose(got, wanted, atol=1e-12)
        gradients = [torch.autograd.grad((seen * weights).sum(), images)[0] for seen in (got, wanted)]
        assert torch.allclose(*gradients, atol=1e-12)


def test_view_of_large_images_multiplies_nothing() -> None:
    """At 224 pixels the products of both axes would be a million operations for each line of an image."""
    rows = make_schedule(small_recipe(view="crop", iterations=1).synthesis, 224, 224, seed=0, batch=0).rows
    images = torch.randn(2, 3, 224, 224).contiguous(memory_format=torch.channels_last)
    with FlopCounterMode(display=False) as counter:
        seen = graph_ops.view(images, rows, torch.tensor(0), torch.bfloat16)
    assert counter.get_total_flops() == 0
    assert seen.is_contiguous(memory_format=torch.channels_last)
    assert torch.allclose(seen, ops.view(images, rows, torch.tensor(0), torch.bfloat16), rtol=2**-7, atol=1e-4)


@pytest.mark.parametrize("means", [None, torch.linspace(-1, 1, 9, dtype=torch.float64)], ids=["running means", "other means"])
def test_matching_loss_and_its_gradient(means: torch.Tensor | None) -> None:
    sums = torch.randn(2, 9, dtype=torch.float64)
    variances = torch.rand(9, dtype=torch.float64)
    sums[:, 2:5], variances[2:5] = 0, 0  # both norms of the second layer are 0
    sums.requires_grad_(True)
    layers = torch.tensor([0, 2, 5, 9]), torch.tensor([4, 8, 3]), torch.tensor([10.0, 1.0, 1.0], dtype=torch.float64)
    losses = [each.matching_loss(sums, variances, *layers, means) for each in (graph_ops, ops)]
    assert torch.allclose(*losses, rtol=1e-12)
    gradients = [torch.autograd.grad(loss @ torch.tensor([0.3, 0.7], dtype=torch.float64), sums)[0] for loss in losses]
    assert torch.allclose(*gradients, rtol=1e-12)
    assert torch.isfinite(gradients[0]).all()


def test_adam_clip() -> None:
    states = [[torch.zeros(2, 3, 4, 4, dtype=torch.float64) for _ in range(3)] for _ in range(2)]
    rates, low, high = torch.rand(6, dtype=torch.float64), -torch.rand(3, dtype=torch.float64), torch.rand(3, dtype=torch.float64)
    for step in range(6):
        gradient = torch.randn(2, 3, 4, 4, dtype=torch.float64)
        for each, (images, first, second) in zip((graph_ops, ops), states, strict=True):
            each.adam_clip_(images, gradient, first, second, rates, torch.tensor(step), low, high)
    for got, wanted in zip(*states, strict=True):
        assert torch.allclose(got, wanted, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("loss_scale", [1.0, 2.0**14])
@pytest.mark.parametrize("view", ["roll", "crop"])
def test_view_adam_clip(view: str, loss_scale: float) -> None:
    schedule = make_schedule(small_recipe(view=view, jitter=5, iterations=10).synthesis, 9, 14, seed=0, batch=0)
    states = [[torch.zeros(2, 3, 9, 14, dtype=torch.float64) for _ in range(3)] for _ in range(2)]
    low, high = -torch.rand(3, dtype=torch.float64), torch.rand(3, dtype=torch.float64)
    for step in range(10):
        gradient = torch.randn(2, 3, 9, 14)
        for each, (images, first, second) in zip((graph_ops, ops), states, strict=True):
            given = images, gradient, first, second, schedule.rows, schedule.learning_rates, torch.tensor(step)
            each.view_adam_clip_(*given, low, high, loss_scale)
    for got, wanted in zip(*states, strict=True):
        assert torch.allclose(got, wanted, rtol=1e-10, atol=1e-13)
