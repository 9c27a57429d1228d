"""Diversity from features that come a batch at a time."""

from __future__ import annotations

import itertools

import pytest
import torch

from dwa_fast.evaluation.diversity import Spread, pairwise_distance


def spread(features: torch.Tensor, labels: torch.Tensor, batch: int) -> Spread:
    whole = Spread(3)
    for start in range(0, len(labels), batch):
        whole.add(features[start : start + batch], labels[start : start + batch])
    return whole


@pytest.mark.parametrize("batch", [1, 4, 30])
def test_batches_give_the_distance_of_the_whole(batch: int) -> None:
    features, labels = torch.randn(30, 2, 3) + 1000, torch.arange(30) % 3
    found = spread(features, labels, batch)
    assert found.counts == [10, 10, 10]
    for label in range(3):
        assert found.distance(label) == pytest.approx(pairwise_distance(features[labels == label]), rel=1e-9)


def test_copies_have_no_diversity() -> None:
    image = torch.randn(1, 50) * 1e3
    assert spread(image.expand(7, 50), torch.zeros(7, dtype=torch.int64), 2).distance(0) == 0
    assert spread(image, torch.zeros(1, dtype=torch.int64), 1).distance(0) == 0


def test_expected_distance_is_the_mean_over_all_draws() -> None:
    features = torch.randn(6, 4)
    found = spread(features, torch.full((6,), 1), 6)
    for count in (2, 3, 6):
        draws = [pairwise_distance(features[list(chosen)]) for chosen in itertools.combinations(range(6), count)]
        assert found.expected_distance(1, count) == pytest.approx(sum(draws) / len(draws), rel=1e-6)
