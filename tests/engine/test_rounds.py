"""Rounds that refine more and more images of each class (DELT), against the reference loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dwa_fast import InputError, distill, recipe, synthesize
from dwa_fast.data.manifest import read_manifest
from dwa_fast.engine.synthesis import Batch, Synthesizer
from dwa_fast.reference.loop import recover
from dwa_fast.schedule import joining_rounds, refined_counts
from tests.nets import assert_as_near, distance, real_images, small_recipe, small_set, small_teacher, stop_at

pytestmark = pytest.mark.usefixtures("two_threads")

SETTINGS: dict[str, dict[str, Any]] = {
    "directed step": {},
    "DELT": {"view": "crop", "curriculum": "cosine", "ascent": "none", "jitter": 0, "iterations": 11, "rounds": 4},
    "noise start, original weights": {"initial": "noise", "matching_weights": "original", "rho": 0.3, "tv_l2": 0.05},
}


def images_of(classes: int, each: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Some images, index by index, as a batch of a set has them."""
    images, _ = real_images(classes * each)
    return images, torch.arange(classes).repeat(each)


def test_groups_of_a_class() -> None:
    """The first groups are the larger ones; a class with fewer images than rounds has none that join later."""
    assert joining_rounds([0] * 10, 8) == [0, 0, 1, 1, 2, 3, 4, 5, 6, 7]
    assert joining_rounds([0] * 8, 3) == [0, 0, 0, 1, 1, 1, 2, 2]
    assert joining_rounds([0, 1, 0, 1, 0], 3) == [0, 0, 1, 1, 2]
    assert joining_rounds([0, 1, 0], 8) == [0, 0, 1]
    assert refined_counts([0, 1] * 10, 8) == [4, 8, 10, 12, 14, 16, 18, 20]
    assert refined_counts([0, 1, 2], 1) == [3]
    assert refined_counts([0, 1], 4) == [2, 2, 2, 2]


def test_share_of_the_iterations_that_images_get() -> None:
    """(M + 1) / 2M of T in the mean, where M groups are of equal size."""
    counts = refined_counts([0] * 64, 8)
    assert sum(counts) / (8 * 64) == 9 / 16


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_equals_reference_loop(settings: dict[str, Any], device: torch.device) -> None:
    images, labels = images_of(2, 5)
    images, labels = images.double().to(device), labels.to(device)
    config = small_recipe(precision="fp64", device=device.type, batch_size=10, **{"iterations": 12, "rounds": 3, **settings})
    got = synthesize(small_teacher(), images, labels, config, seed=3)
    wanted = recover(small_teacher(), images, labels, config, seed=3)
    assert distance(got.losses, wanted.losses) < 1e-6
    assert distance(got.images, wanted.images) < 1e-8
    assert distance(got.images, images) > 0.1


def test_fused_equals_reference_loop_in_single_precision(device: torch.device) -> None:
    images, labels = images_of(2, 5)
    images, labels = images.to(device), labels.to(device)
    fused = {"backend": "fused", "precision": "fp32", "device": device.type, "learning_rate": 0.01}
    config = small_recipe(iterations=12, rounds=3, batch_size=10, **fused)
    got = synthesize(small_teacher(), images, labels, config)
    assert_as_near(got, recover(small_teacher(), images, labels, config), recover(small_teacher(), images.double(), labels, config))


def test_several_teachers_take_turns_through_the_rounds() -> None:
    images, labels = images_of(2, 3)
    teachers = [small_teacher(), small_teacher(1)]
    config = small_recipe(iterations=7, rounds=3, batch_size=6, precision="fp64")
    got, wanted = (make(teachers, images.double(), labels, config) for make in (synthesize, recover))
    assert distance(got.images, wanted.images) < 1e-8


def test_images_wait_for_their_round() -> None:
    images, labels = images_of(2, 3)
    config = small_recipe(iterations=6, rounds=3, learning_rate=0.1)
    with Synthesizer(small_teacher(), images, config.synthesis, config.data) as engine:
        replica = engine.replicas[0]
        replica.begin(Batch(0, images, labels), seed=0)
        for joined in (2, 4, 6):
            replica.advance(2)
            now, _ = replica.finish()
            changed = (now != images).flatten(1).any(1)
            assert changed.tolist() == [place < joined for place in range(6)]
        shapes = sorted(shape[0] for shape in replica._refinement._refinements)
        finished, losses = replica.finish()
    assert shapes == [2, 4, 6]
    whole = synthesize(small_teacher(), images, labels, config)
    assert torch.equal(finished, whole.images)
    assert torch.equal(losses, whole.losses[0])


def test_one_image_of_each_class_is_refined_in_all_rounds() -> None:
    images, labels = images_of(6, 1)
    one, several = (synthesize(small_teacher(), images, labels, small_recipe(iterations=6, rounds=rounds)) for rounds in (1, 3))
    assert torch.equal(one.images, several.images)
    assert torch.equal(one.losses, several.losses)


def test_settings_that_do_not_fit() -> None:
    with pytest.raises(InputError, match="iterations must be at least the number of rounds, 8, got 7"):
        recipe("digits", iterations=7, rounds=8)
    with pytest.raises(InputError, match="a refinement has several rounds or stages of several sizes, not both"):
        recipe("digits", rounds=2, stage_sizes=(8, 16))


def test_set_of_whole_classes(tmp_path: Path) -> None:
    """Its batches follow from ipc, which therefore cannot change; interrupted, it resumes to the same bytes."""
    given = small_recipe(iterations=4, rounds=2, batch_ipc=None, batch_size=20, initial="median")
    assert distill(small_teacher(), small_set(), given, ipc=4, output=tmp_path / "whole") == 40
    manifest = read_manifest(tmp_path / "whole")
    assert (manifest["settings"]["batch_ipc"], manifest["settings"]["rounds"], len(manifest["losses"])) == (4, 2, 2)
    with pytest.raises(InputError, match=r"with 4 images of a class in a batch; .* cannot go on with it for ipc 2"):
        distill(small_teacher(), small_set(), given, ipc=2, output=tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        distill(small_teacher(), small_set(), given, ipc=4, output=tmp_path / "stopped", progress=stop_at(5))
    assert distill(small_teacher(), small_set(), given, ipc=4, output=tmp_path / "stopped") == 20
    names = sorted(path.relative_to(tmp_path / "whole") for path in (tmp_path / "whole").rglob("*.png"))
    assert len(names) == 40
    assert all((tmp_path / "whole" / name).read_bytes() == (tmp_path / "stopped" / name).read_bytes() for name in names)


def test_method() -> None:
    """DELT on CIFAR-10 as published: M = 8 rounds of 500 iterations."""
    config = recipe("cifar10", method="delt").synthesis
    assert (config.iterations, config.rounds, config.batch_ipc, config.initial) == (4000, 8, None, "median")
    assert (config.view, config.curriculum, config.jitter, config.ascent) == ("crop", "cosine", 0, "none")
    assert (config.learning_rate, config.lambda_mean, config.lambda_var) == (0.25, 0.01, 0.01)
