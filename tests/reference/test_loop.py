"""The published loop: each quirk switch changes what it should, and nothing else does."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from dwa_fast.reference.loop import LoopResult, Quirks, recover
from tests.nets import real_images, small_recipe, small_teacher


def run(quirks: Quirks | None = None, count: int = 12, **settings: Any) -> LoopResult:
    images, labels = real_images(count)
    config = small_recipe(**{"rho": 0.5, **settings})
    return recover(small_teacher(), images.double(), labels, config, quirks=quirks)


def drift(result: LoopResult) -> float:
    """Distance of the weights after the loop from the trained ones."""
    trained = small_teacher().double().parameters()
    return math.sqrt(sum(float((p - q.detach()).square().sum()) for p, q in zip(result.parameters, trained, strict=True)))


def test_quirks_are_off_by_default() -> None:
    assert torch.equal(run().images, run(Quirks()).images)
    assert Quirks.published() == Quirks(keep_adjusted_weights=True, keep_weight_gradients=True, leak_image_gradient=True)


def test_kept_weights_drift_from_batch_to_batch() -> None:
    plain, kept = run(), run(Quirks(keep_adjusted_weights=True))
    assert torch.equal(plain.images[:6], kept.images[:6])
    assert not torch.allclose(plain.images[6:], kept.images[6:], atol=1e-3)
    assert drift(plain) == pytest.approx(0.5, rel=0.3)  # one batch's steps, not quite straight
    assert drift(kept) > 1.2 * drift(plain)


def test_kept_gradients_leak_into_the_next_batch_alone() -> None:
    plain, leaking = run(), run(Quirks(keep_weight_gradients=True))
    assert torch.equal(plain.images[:6], leaking.images[:6])
    assert not torch.allclose(plain.losses[1], leaking.losses[1])


def test_kept_gradients_change_nothing_without_an_ascent() -> None:
    assert torch.equal(run(rho=0.0).images, run(Quirks(keep_weight_gradients=True), rho=0.0).images)


def test_leaked_image_gradient_changes_the_first_step_of_adam() -> None:
    """After one iteration from zero moments the step is lr·sign(g): where the leak turns a sign, the pixel goes the other way."""
    settings: dict[str, Any] = {"iterations": 1, "learning_rate": 0.05, "count": 6}
    plain, leaking = run(**settings), run(Quirks(leak_image_gradient=True), **settings)
    assert torch.equal(plain.losses, leaking.losses)
    turned = (plain.images - leaking.images).abs()
    assert 0 < (turned > 0.05).double().mean() < 0.9


def test_quirks_exclude_the_fast_path() -> None:
    """The fast path does what the loop does without quirks, so with them the two must differ."""
    from dwa_fast import synthesize

    images, labels = real_images()
    fast = synthesize(small_teacher(), images.double(), labels, small_recipe(rho=0.5, precision="fp64"))
    assert torch.allclose(fast.images, run().images, atol=1e-6)
    assert not torch.allclose(fast.images, run(Quirks.published()).images, atol=1e-2)
