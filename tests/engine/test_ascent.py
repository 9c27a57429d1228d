"""Directed weight adjustment: direction, length and the way back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from dwa_fast import InputError
from dwa_fast.engine.ascent import Ascent, check_norms
from dwa_fast.engine.backend import resolve
from dwa_fast.engine.teacher import prepare
from dwa_fast.models.architectures import build
from dwa_fast.seeding import generator
from tests.nets import SIZE, real_images, small_recipe, small_teacher


def make(precision: str = "fp32", **changes: Any) -> tuple[Ascent, torch.Tensor, torch.Tensor]:
    images, labels = real_images()
    config = small_recipe(precision=precision, **changes).synthesis
    execution = resolve(config.backend, config.precision, config.device)
    network, _ = prepare(small_teacher(), images, execution)
    return Ascent(network, config, execution), images, labels


@pytest.mark.parametrize(("backend", "precision"), [("reference", "fp32"), ("fused", "fp32"), ("fused", "bf16")])
@pytest.mark.parametrize("ascent", ["directed", "random"])
def test_weights_come_back_bit_for_bit(ascent: str, backend: str, precision: str) -> None:
    adjust, images, labels = make(ascent=ascent, backend=backend, precision=precision, rho=0.7)
    images = images.to(adjust.execution.dtype)
    before = [p.detach().clone() for p in adjust.network.parameters()]
    adjust.adjust(images, labels, generator(0, "ascent", 0))
    assert any(not torch.equal(p, old) for p, old in zip(adjust.network.parameters(), before, strict=True))
    adjust.arena.restore()
    assert all(torch.equal(p, old) for p, old in zip(adjust.network.parameters(), before, strict=True))


def test_every_batch_starts_from_the_trained_weights() -> None:
    adjust, images, labels = make(rho=0.5)
    adjust.adjust(images, labels, generator(0, "ascent", 0))
    first = adjust.arena.weights.clone()
    adjust.adjust(images[:3], labels[:3], generator(0, "ascent", 1))
    assert not torch.equal(adjust.arena.weights, first)
    adjust.adjust(images, labels, generator(0, "ascent", 0))
    assert torch.equal(adjust.arena.weights, first)


def test_ascent_raises_the_cross_entropy() -> None:
    adjust, images, labels = make(rho=0.2, steps=5)
    before = F.cross_entropy(adjust.network(images), labels)
    norms = adjust.adjust(images, labels, generator(0, "ascent", 0))
    assert norms.shape == (5,)
    assert F.cross_entropy(adjust.network(images), labels) > before + 0.01


def test_one_step_moves_by_rho_along_the_gradient() -> None:
    adjust, images, labels = make(rho=0.1, steps=1)
    adjust.network.requires_grad_(True)
    gradients = torch.autograd.grad(F.cross_entropy(adjust.network(images), labels), list(adjust.network.parameters()))
    direction = torch.cat([g.flatten() for g in gradients])
    before = [p.detach().clone() for p in adjust.network.parameters()]
    adjust.adjust(images, labels, generator(0, "ascent", 0))
    moved = torch.cat([(p.detach() - old).flatten() for p, old in zip(adjust.network.parameters(), before, strict=True)])
    assert float(moved.norm()) == pytest.approx(0.1, rel=1e-3)
    assert float(F.cosine_similarity(moved, direction, dim=0)) == pytest.approx(1, abs=1e-4)


def test_random_step_has_length_rho() -> None:
    adjust, images, labels = make(ascent="random", rho=0.1)
    adjust.adjust(images, labels, generator(0, "ascent", 0))
    assert float((adjust.arena.weights - adjust.arena.original).norm()) == pytest.approx(0.1, rel=1e-3)


@pytest.mark.parametrize("name", ["small-resnet", "convnet128", "mobilenet-v2-cifar"])
def test_random_step_is_the_same_on_every_back_end(name: str) -> None:
    """A trace lists the parameters in another order than the teacher, and may leave layers out that its forward pass does not use."""
    teacher = build(name, classes=10, channels=1, size=SIZE).eval()
    teacher.register_module("unused", torch.nn.Linear(3, 2))
    images, labels = real_images()
    moved = []
    for backend in ("reference", "fused"):
        config = small_recipe(backend=backend, precision="fp32", ascent="random", rho=0.1).synthesis
        execution = resolve(config.backend, config.precision, config.device)
        network, _ = prepare(teacher, images, execution)
        adjust = Ascent(network, config, execution)
        before = {p: p.detach().clone() for p in network.parameters()}
        adjust.adjust(images, labels, generator(0, "ascent", 0))
        steps = [(p.detach() - before[p]).contiguous().flatten().double() for p in network.drawn if p in before]
        moved.append(torch.cat([step for step in steps if step.numel() not in (2, 6)]))  # without those of the unused layer
    assert float(F.cosine_similarity(*moved, dim=0)) == pytest.approx(1, abs=1e-5)


def test_weights_are_frozen_afterwards() -> None:
    adjust, images, labels = make()
    adjust.adjust(images, labels, generator(0, "ascent", 0))
    assert not any(p.requires_grad for p in adjust.network.parameters())


def test_gradient_that_is_not_finite_is_named() -> None:
    adjust, images, labels = make(rho=1e30, steps=2)
    norms = adjust.adjust(images, labels, generator(0, "ascent", 0))
    with pytest.raises(InputError, match=r"gradient of the ascent is not finite in step 2 of 2 \(norm (nan|inf)\); lower rho"):
        check_norms(norms, "fp32")
