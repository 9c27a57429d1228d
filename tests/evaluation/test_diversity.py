"""Diversity, nearest neighbours and the analysis of whole sets, against definitions and sets with known answers."""

from __future__ import annotations

import itertools
import re
from typing import Any

import pytest
import torch
from torch import nn

from dwa_fast import InputError
from dwa_fast.commands.diversity import _median
from dwa_fast.data.datasets import digits
from dwa_fast.data.images import ImageSet, MemorySet
from dwa_fast.data.subsets import draw
from dwa_fast.evaluation.diversity import (
    REAL,
    Analysis,
    ClassScatter,
    DiversityConfig,
    NearestNeighbours,
    analyse_sets,
    class_diversity,
)
from tests.nets import DIGITS, SIZE, small_set, small_teacher

CPU = torch.device("cpu")
FEW = DiversityConfig(tsne_images=5)


def pairwise_distance(features: torch.Tensor) -> float:
    """D as the paper defines it: over all ordered pairs."""
    return sum(float((a - b).square().sum()) for a in features.double() for b in features.double())


def scatter(features: torch.Tensor, labels: torch.Tensor, batch: int) -> ClassScatter:
    whole = ClassScatter(3)
    for start in range(0, len(labels), batch):
        whole.update(features[start : start + batch], labels[start : start + batch])
    return whole


@pytest.mark.parametrize("batch", [1, 4, 30])
def test_batches_give_the_distance_over_all_pairs(batch: int) -> None:
    features, labels = torch.randn(30, 2, 3) + 1000, torch.arange(30) % 3
    found = scatter(features, labels, batch)
    assert found.counts == [10, 10, 10]
    for label in range(3):
        assert found.distance(label) == pytest.approx(pairwise_distance(features[labels == label]), rel=1e-9)


def test_copies_have_no_diversity() -> None:
    image = torch.randn(1, 50) * 1e3
    assert scatter(image.expand(7, 50), torch.zeros(7, dtype=torch.int64), 2).distance(0) == 0
    assert scatter(image, torch.zeros(1, dtype=torch.int64), 1).distance(0) == 0


def test_expected_distance_is_the_mean_over_all_draws() -> None:
    features = torch.randn(6, 4)
    found = scatter(features, torch.full((6,), 1), 6)
    for count in (2, 3, 6):
        draws = [pairwise_distance(features[list(chosen)]) for chosen in itertools.combinations(range(6), count)]
        assert found.expected_distance(1, count) == pytest.approx(sum(draws) / len(draws), rel=1e-6)


def test_diversity_reads_the_last_convolution() -> None:
    network = nn.Sequential(nn.Conv2d(1, 1, 1, bias=False), nn.ReLU(), nn.Conv2d(1, 1, 1, bias=False), nn.Flatten())
    for layer in (network[0], network[2]):
        nn.init.constant_(layer.weight, 2.0)
    images = torch.tensor([1.0, 3.0, 5.0, 5.0]).view(4, 1, 1, 1)
    assert class_diversity(network, images, torch.tensor([0, 0, 1, 1])) == {0: pytest.approx(2 * (4 * 2) ** 2), 1: 0.0}
    with pytest.raises(InputError, match="teacher must have a Conv2d to measure diversity on; Identity has none"):
        class_diversity(nn.Identity(), images, torch.zeros(4))


@pytest.mark.parametrize("batch", [1, 7, 64])
def test_neighbours_are_those_of_the_full_table(batch: int) -> None:
    images, queries = torch.randn(50, 5) + 100, torch.randn(9, 5) + 100
    found = NearestNeighbours(queries)
    for start in range(0, 50, batch):
        found.update(start, images[start : start + batch])
    table = (queries.double()[:, None] - images.double()).norm(dim=2)
    assert torch.equal(found.indices, table.argmin(1))
    assert torch.allclose(found.distances, table.amin(1), rtol=1e-12)


def test_a_copy_is_at_distance_0() -> None:
    images = torch.randn(40, 6) * 1e-3 + 1e3
    found = NearestNeighbours(images[[3, 30]])
    found.update(0, images[:20])
    found.update(20, images[20:])
    assert found.indices.tolist() == [3, 30]
    assert found.distances.tolist() == [0, 0]


def test_an_image_is_not_its_own_neighbour() -> None:
    images = torch.tensor([[0.0], [1.0], [10.0], [12.0]])
    found = NearestNeighbours(images[[0, 2, 3]], torch.tensor([0, 2, 3]))
    for start in range(4):
        found.update(start, images[start : start + 1])
    assert found.indices.tolist() == [1, 3, 2]
    assert found.distances.tolist() == [1, 2, 2]


def test_before_any_image_there_is_no_neighbour() -> None:
    found = NearestNeighbours(torch.zeros(1, 2), torch.tensor([0]))
    assert found.distances.tolist() == [torch.inf]
    found.update(0, torch.zeros(1, 2))  # itself
    assert found.indices.tolist() == [-1]


def analyse(config: DiversityConfig = FEW, seed: int = 0, **sets: ImageSet) -> Analysis:
    return analyse_sets(small_teacher(), sets, digits("train", SIZE), config, DIGITS.data, device=CPU, seed=seed)


def copies() -> MemorySet:
    """The same image of every class three times."""
    first = small_set(1)
    return MemorySet(first.pixels.repeat_interleave(3, 0), first.labels.repeat_interleave(3), first.class_names)


@pytest.mark.parametrize("space", ["features", "pixels"])
def test_known_sets(space: Any) -> None:
    found = analyse(DiversityConfig(space=space, tsne_images=5), copies=copies(), real=small_set(6))
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
    found = analyse(everything=everything).sets["everything"]
    assert found.ratios == pytest.approx([1.0] * 10)
    assert found.feature_ratios == pytest.approx([1.0] * 10)


def test_same_seed_same_analysis() -> None:
    config = DiversityConfig(shown_classes=4, real_images=30, tsne_images=5)
    first, again, other = (analyse(config, seed, few=small_set()) for seed in (1, 1, 2))
    assert first.shown == again.shown != other.shown
    assert len(first.shown) == 4
    assert len(first.real.labels) == 300
    for name in first.sets:
        assert torch.equal(first.sets[name].points, again.sets[name].points)
        assert torch.equal(first.sets[name].nearest_distances, again.sets[name].nearest_distances)
        assert first.sets[name].ratios == again.sets[name].ratios


def test_progress_counts_every_image() -> None:
    calls: list[tuple[int, int]] = []
    data = draw(digits("train", SIZE), 10, "test", seed=0)
    analyse_sets(small_teacher(), {"few": small_set(4)}, data, FEW, DIGITS.data, device=CPU, progress=lambda *step: calls.append(step))
    assert calls[-1] == (40 + 40 + 100, 180)
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)


def test_the_median_of_an_even_number_is_between_both_middle_ones() -> None:
    assert _median(torch.tensor([0.0, 10.0, 3.0, 1.0])) == 2.0
    assert _median(torch.tensor([4.0, 1.0, 2.0])) == 2.0


@pytest.mark.parametrize(
    ("config", "per_class", "message"),
    [
        ({}, 1, "set 'few' has a class with 1 image; diversity needs at least 2 of each class"),
        ({"real_images": 200}, 2, "class '0' has 133 real images, expected at least 200 to compare with"),
        ({"real_images": 4}, 6, "class '0' has 4 real images, expected at least 6 to compare with"),
        ({"real_images": 1}, 6, "real_images must be an integer of at least 2, got 1"),
        ({"shown_classes": 0}, 6, "shown_classes must be an integer of at least 1, got 0"),
        ({"tsne_images": 0}, 6, "tsne_images must be an integer of at least 1, got 0"),
        ({"space": "logits"}, 6, "unknown space 'logits'; known: features, pixels"),
    ],
)
def test_wrong_input(config: dict[str, Any], per_class: int, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        analyse(DiversityConfig(**config), few=small_set(per_class))
