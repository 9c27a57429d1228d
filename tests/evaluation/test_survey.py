"""Sets beside real images: sets whose answers are known."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from dwa_fast import InputError
from dwa_fast.data.datasets import ImageSet, MemorySet, digits
from dwa_fast.data.subsets import draw
from dwa_fast.evaluation.survey import REAL, Survey, SurveyConfig, survey
from dwa_fast.recipes import recipe
from tests.nets import SIZE, small_set, small_teacher

CPU = torch.device("cpu")
FEW = SurveyConfig(tsne_images=5)


def look(config: SurveyConfig = FEW, seed: int = 0, **sets: ImageSet) -> Survey:
    return survey(small_teacher(), sets, digits("train", SIZE), config, recipe("digits"), device=CPU, seed=seed)


def copies() -> MemorySet:
    """The same image of every class three times."""
    first = small_set(1)
    return MemorySet(first.pixels.repeat_interleave(3, 0), first.labels.repeat_interleave(3), first.class_names)


@pytest.mark.parametrize("space", ["features", "pixels"])
def test_known_sets(space: Any) -> None:
    found = look(SurveyConfig(space=space, tsne_images=5), copies=copies(), real=small_set(6))
    assert list(found.sets) == [REAL, "copies", "real"]
    assert found.shown == list(range(10))
    same = found.sets["copies"]
    assert same.distances == [0] * 10
    assert same.ratios == same.feature_ratios == [0] * 10
    for name in ("copies", "real"):
        own = found.sets[name]
        assert own.nearest_distances.max() < 1e-4  # the batch may change the last bits of features
        assert torch.equal(found.real.labels[own.nearest], own.images.labels)
        assert torch.equal(found.real.load(own.nearest.tolist()), own.images.load(range(len(own.nearest))))
    assert all(0.2 < ratio < 2.5 for ratio in found.sets["real"].ratios if ratio is not None)
    drawn = found.sets[REAL]
    assert len(drawn.nearest) == 30
    assert drawn.nearest_distances.min() > 1e-3
    assert [len(own.points) for own in found.sets.values()] == [50, 30, 50]


def test_random_real_images_are_as_diverse_as_real_ones() -> None:
    """All of them together: the ratio is 1 but for the finite sample."""
    everything = digits("train", SIZE)
    found = look(everything=everything).sets["everything"]
    assert found.ratios == pytest.approx([1.0] * 10)
    assert found.feature_ratios == pytest.approx([1.0] * 10)


def test_same_seed_same_survey() -> None:
    first, again, other = (look(SurveyConfig(shown_classes=4, real_images=30, tsne_images=5), seed, few=small_set()) for seed in (1, 1, 2))
    assert first.shown == again.shown != other.shown
    assert len(first.shown) == 4
    assert len(first.real.labels) == 300
    for name in first.sets:
        assert torch.equal(first.sets[name].points, again.sets[name].points)
        assert torch.equal(first.sets[name].nearest_distances, again.sets[name].nearest_distances)
        assert first.sets[name].ratios == again.sets[name].ratios


def test_progress_counts_every_image() -> None:
    seen: list[tuple[int, int]] = []
    data = draw(digits("train", SIZE), 10, "test", seed=0)
    survey(small_teacher(), {"few": small_set(4)}, data, FEW, recipe("digits"), device=CPU, progress=lambda *step: seen.append(step))
    assert seen[-1] == (40 + 40 + 100, 180)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


@pytest.mark.parametrize(
    ("config", "per_class", "message"),
    [
        ({}, 1, "set 'few' has a class with 1 image; diversity needs at least 2 of each class"),
        ({"real_images": 200}, 2, "class '0' has 133 real images, wanted at least 200 to compare with"),
        ({"real_images": 4}, 6, "class '0' has 4 real images, wanted at least 6 to compare with"),
        ({"real_images": 1}, 6, "real_images must be an integer of at least 2, got 1"),
        ({"shown_classes": 0}, 6, "shown_classes must be an integer of at least 1, got 0"),
        ({"tsne_images": 0}, 6, "tsne_images must be an integer of at least 1, got 0"),
        ({"space": "logits"}, 6, "unknown space 'logits'; known: features, pixels"),
    ],
)
def test_wrong_input(config: dict[str, Any], per_class: int, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        look(SurveyConfig(**config), few=small_set(per_class))
