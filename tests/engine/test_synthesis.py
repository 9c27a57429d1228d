"""`synthesize` against the reference loop, and what it promises about seeds, batches and the teacher."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dwa_fast import synthesize
from dwa_fast.engine.refine import mean_norm, total_variation
from dwa_fast.reference.loop import recover
from tests.nets import assert_as_near, real_images, small_recipe, small_teacher

SETTINGS: dict[str, dict[str, Any]] = {
    "DWA": {},
    "Eq. 15 to the letter": {"matching_weights": "original", "rho": 0.3},
    "random step": {"ascent": "random", "rho": 0.3},
    "no step": {"ascent": "none"},
    "plain gradient": {"normalize_ascent": False, "rho": 0.001},
    "noise start": {"initial": "noise"},
    "crops": {"view": "crop"},
    "SRe2L with crops": {"view": "crop", "initial": "noise", "rho": 0.0, "lambda_var": 0.01},
    "priors": {"tv_l2": 0.05, "l2_scale": 0.2},
    "no matching": {"lambda_mean": 0.0, "lambda_var": 0.0},
    "uneven last batch": {"batch_size": 5},
}


def distance(got: Tensor, wanted: Tensor) -> float:
    return float((got - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_equals_reference_loop(settings: dict[str, Any], device: torch.device) -> None:
    """In double precision the two agree to rounding over 24 iterations and two batches."""
    images, labels = real_images()
    config = small_recipe(precision="fp64", device=device.type, **settings)
    got = synthesize(small_teacher(), images.double().to(device), labels.to(device), config, seed=3)
    wanted = recover(small_teacher(), images.double().to(device), labels.to(device), config, seed=3)
    assert distance(got.losses, wanted.losses) < 1e-6
    assert distance(got.images, wanted.images) < 1e-8
    assert distance(got.images, images.double().to(device)) > 0.1


@pytest.mark.parametrize("settings", [{}, {"view": "crop", "tv_l2": 0.05, "l2_scale": 0.2}])
@pytest.mark.parametrize("backend", ["reference", "fused"])
def test_equals_reference_loop_in_single_precision(backend: str, settings: dict[str, Any], device: torch.device) -> None:
    images, labels = real_images()
    images, labels = images.to(device), labels.to(device)
    config = small_recipe(backend=backend, precision="fp32", device=device.type, iterations=8, learning_rate=0.01, **settings)
    got = synthesize(small_teacher(), images, labels, config)
    assert_as_near(got, recover(small_teacher(), images, labels, config), recover(small_teacher(), images.double(), labels, config))


@pytest.mark.parametrize(("prior", "measure"), [("tv_l2", total_variation), ("l2_scale", mean_norm)])
def test_a_prior_lowers_what_it_measures(prior: str, measure: Callable[[Tensor], Tensor]) -> None:
    images, labels = real_images()
    settings = [small_recipe(batch_size=12, **{prior: weight}) for weight in (0.0, 0.02, 1.0)]
    without, little, much = (synthesize(small_teacher(), images, labels, each).images for each in settings)
    assert measure(without) > measure(little) > measure(much)


def test_losses_fall_and_have_their_shape() -> None:
    images, labels = real_images()
    config = small_recipe(iterations=60)
    result = synthesize(small_teacher(), images, labels, config)
    assert result.losses.shape == (2, 60, 3)
    assert result.images.shape == images.shape
    total = result.losses @ torch.tensor([1.0, config.synthesis.lambda_mean, config.synthesis.lambda_var])
    assert (total[:, -5:].mean(1) < 0.9 * total[:, :5].mean(1)).all()


def test_same_seed_same_bits_other_seed_other_images() -> None:
    images, labels = real_images()
    first, again, other = (synthesize(small_teacher(), images, labels, small_recipe(), seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.images, again.images)
    assert torch.equal(first.losses, again.losses)
    assert distance(other.images, first.images) > 1e-3


def test_batches_do_not_depend_on_each_other() -> None:
    """θ is restored: the first batch gives the same bits whether another one follows or not, and no drift reaches the second."""
    images, labels = real_images()
    both = synthesize(small_teacher(), images, labels, small_recipe(rho=0.5))
    alone = synthesize(small_teacher(), images[:6], labels[:6], small_recipe(rho=0.5))
    assert torch.equal(both.images[:6], alone.images)


@pytest.mark.parametrize("matching_weights", ["adjusted", "original"])
def test_teacher_and_images_stay_as_they_were(matching_weights: str) -> None:
    images, labels = real_images()
    teacher, before_images = small_teacher(), images.clone()
    before = copy.deepcopy(teacher.state_dict())
    synthesize(teacher, images, labels, small_recipe(matching_weights=matching_weights))
    assert torch.equal(images, before_images)
    for name, value in teacher.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(p.requires_grad and p.grad is None for p in teacher.parameters())


def test_matching_weights_make_a_difference() -> None:
    images, labels = real_images()
    results = [synthesize(small_teacher(), images, labels, small_recipe(rho=0.5, matching_weights=w)) for w in ("adjusted", "original")]
    assert distance(results[0].images, results[1].images) > 1e-3
    assert results[0].losses[0, 0, 0] == results[1].losses[0, 0, 0]  # cross-entropy is on θ̃ in both
    assert results[0].losses[0, 0, 1] != results[1].losses[0, 0, 1]


def test_pixels_stay_between_black_and_white() -> None:
    images, labels = real_images()
    config = small_recipe(learning_rate=2.0)
    result = synthesize(small_teacher(), images, labels, config)
    (low,), (high,) = config.data.bounds
    assert result.images.min() == pytest.approx(low)
    assert result.images.max() == pytest.approx(high)


def test_teacher_in_train_mode_is_used_in_eval_mode(caplog: pytest.LogCaptureFixture) -> None:
    images, labels = real_images()
    teacher = small_teacher()
    expected = synthesize(teacher, images, labels, small_recipe())
    got = synthesize(teacher.train(), images, labels, small_recipe())
    assert torch.equal(got.images, expected.images)
    assert teacher.training
    assert "a copy of it in eval mode is used" in caplog.text


def test_progress_counts_every_iteration() -> None:
    images, labels = real_images()
    seen: list[tuple[int, int]] = []
    synthesize(small_teacher(), images, labels, small_recipe(), progress=lambda done, total: seen.append((done, total)))
    assert seen == [(done, 48) for done in range(1, 49)]
