"""What `synthesize` gives back and how it is saved; images that cannot be meant."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dwa_fast import InputError, SynthesisResult, digits, normalise, open_distilled, recipe, synthesize
from dwa_fast.data.manifest import read_manifest
from tests.nets import SIZE, real_images, small_recipe, small_teacher

IMAGES, LABELS = real_images(10)


def result(**settings: Any) -> SynthesisResult:
    return synthesize(small_teacher(), IMAGES, LABELS, small_recipe(**{"iterations": 2, **settings}), seed=0)


def test_a_result_keeps_its_own_labels(tmp_path: Path) -> None:
    labels = LABELS.clone()
    made = synthesize(small_teacher(), IMAGES, labels, small_recipe(iterations=1), seed=0)
    labels.fill_(0)
    assert torch.equal(made.labels, LABELS)


def test_the_manifest_says_what_ran(tmp_path: Path) -> None:
    made = result(backend="auto", precision="auto")
    made.save(tmp_path)
    settings = read_manifest(tmp_path)["settings"]
    assert settings["backend"] in ("fused", "reference")
    assert settings["precision"] in ("fp32", "bf16")
    assert (settings["device"], settings["threads"]) == ("cpu", torch.get_num_threads())
    assert {name: settings[name] for name in made.execution} == dict(made.execution)


def test_numbers_of_numpy_can_be_saved(tmp_path: Path) -> None:
    config = replace(small_recipe(), data=replace(small_recipe().data, mean=np.array([0.5]), std=[0.5]))
    synthesize(small_teacher(), IMAGES, LABELS, config, seed=np.int64(3)).save(tmp_path)  # type: ignore[arg-type]
    assert read_manifest(tmp_path)["settings"]["seed"] == 3


def test_a_saved_result_opens_with_the_names_that_it_was_given(tmp_path: Path) -> None:
    names = [f"digit {number}" for number in range(10)]
    made = result()
    made.save(tmp_path, class_names=names)
    data, _ = open_distilled(tmp_path, IMAGES.shape[2], 1, names)
    assert data.labels.bincount().tolist() == LABELS.bincount().tolist()


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a", "b"], "class_names must name every class, and label 9 is that of class 10; got 2 names"),
        (["a"] * 10, "class_names must be a list of different names"),
        ("abcdefghij", "class_names must be a list of different names, one for each class, got 'abcdefghij'"),
        ([None, *map(str, range(9))], "class_names must be a list of different names"),
        (torch.arange(10), "class_names must be a list of different names"),
        ({number: str(number) for number in range(10)}, "class_names must be a list of different names"),
    ],
    ids=["too few", "twice", "text", "None", "tensor", "dictionary"],
)
def test_other_class_names_are_refused_before_anything_is_written(names: Any, message: str, tmp_path: Path) -> None:
    made = result()
    with pytest.raises(InputError, match=message):
        made.save(tmp_path / "set", class_names=names)
    assert not (tmp_path / "set").exists()


def test_images_that_are_no_squares_can_be_saved_and_not_opened_as_a_set(tmp_path: Path) -> None:
    wide = synthesize(small_teacher(), torch.cat([IMAGES, IMAGES], 3), LABELS, small_recipe(iterations=1))
    wide.save(tmp_path)
    height, width = IMAGES.shape[2], 2 * IMAGES.shape[3]
    with pytest.raises(
        InputError, match=f"holds images of {height} × {width} pixels, not 8 × 8; a set is opened only if its images are squares"
    ):
        open_distilled(tmp_path, 8, 1, [str(number) for number in range(10)])


def test_a_result_is_shown_in_one_line() -> None:
    assert repr(result()) == f"SynthesisResult(10 images {list(IMAGES.shape[1:])}, 2 batches of 2 iterations)"


@pytest.mark.parametrize("method", ["rded", "fadrm", "delt"])
def test_methods_that_choose_among_all_images_are_for_whole_sets(method: str) -> None:
    config = recipe("digits", method=method, size=SIZE)
    with pytest.raises(InputError, match="is for distill, whose teacher chooses among all images of a class"):
        synthesize(small_teacher(), IMAGES, LABELS, config)
    own = recipe("digits", method=method, size=SIZE, initial="real", iterations=8)
    assert synthesize(small_teacher(), IMAGES, LABELS, own).images.shape == IMAGES.shape


def test_images_that_are_no_normalised_pixels_are_refused() -> None:
    levels = digits("train", SIZE).load(range(10)).float()
    with pytest.raises(InputError, match=r"images must be normalised with mean and std .* from 0\.305 to 81\.5"):
        synthesize(small_teacher(), levels, LABELS, small_recipe())


def test_pixels_that_were_not_normalised_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    pixels = digits("train", SIZE).load(range(40)).float() / 255
    labels = digits("train", SIZE).labels[:40]
    with caplog.at_level(logging.WARNING, "dwa_fast"):
        synthesize(small_teacher(), normalise(pixels, small_recipe().data), labels, small_recipe(iterations=1))
        assert "0 … 1" not in caplog.text
        caplog.clear()
        synthesize(small_teacher(), pixels, labels, small_recipe(iterations=1))
    (message,) = caplog.messages  # and nothing about mean and std
    assert message.startswith("all values of the images lie in 0 … 1, as pixels do that are not normalised")


def test_gaussian_noise_is_taken_as_initial_images() -> None:
    noise = torch.randn(IMAGES.shape, generator=torch.Generator().manual_seed(0))
    assert synthesize(small_teacher(), noise, LABELS, small_recipe(iterations=1)).images.isfinite().all()
