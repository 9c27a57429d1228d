"""The schedule of a batch: its formula, its ranges, its distribution and its independence."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from dwa_fast.recipes import recipe
from dwa_fast.schedule import DOWN, FLIP, HEIGHT, LEFT, RIGHT, TOP, WIDTH, make_schedule


def test_learning_rate_is_half_a_cosine() -> None:
    rates = make_schedule(recipe("cifar100", iterations=4).synthesis, 32, 32, seed=0, batch=0).learning_rates
    assert rates.tolist() == pytest.approx([0.25 * 0.5 * (1 + math.cos(math.pi * t / 4)) for t in range(4)], rel=1e-6)


def test_cifar_rolls_and_nothing_else() -> None:
    rows = make_schedule(recipe("cifar100").synthesis, 32, 32, seed=0, batch=0).rows
    assert rows[:, :DOWN].unique(dim=0).tolist() == [[0, 0, 32, 32, 0]]
    for column in (DOWN, RIGHT):
        assert rows[:, column].unique().tolist() == [0, 1, 2, 3, 4]
        assert rows[:, column].bincount().min() > 150  # 200 expected


def test_crops_lie_inside_and_have_the_published_distribution() -> None:
    height, width = 60, 80
    rows = make_schedule(recipe("imagenet").synthesis, height, width, seed=0, batch=0).rows
    assert (rows[:, TOP] >= 0).all()
    assert (rows[:, TOP] + rows[:, HEIGHT] <= height).all()
    assert (rows[:, LEFT] >= 0).all()
    assert (rows[:, LEFT] + rows[:, WIDTH] <= width).all()
    share = rows[:, HEIGHT] * rows[:, WIDTH] / (height * width)
    assert share.min() >= 0.07
    assert share.max() > 0.9
    ratio = rows[:, WIDTH] / rows[:, HEIGHT]
    assert ratio.min() > 0.7
    assert ratio.max() < 1.4
    assert 0.45 < rows[:, FLIP].double().mean() < 0.55
    assert rows[:, DOWN].max() == 32


def test_crops_of_a_seed_stay_as_they_are() -> None:
    """Sets are resumed with them."""
    rows = make_schedule(recipe("imagenet").synthesis, 60, 80, seed=0, batch=0).rows
    assert rows[:3].tolist() == [[1, 12, 59, 53, 0, 23, 21], [14, 26, 42, 40, 0, 10, 26], [3, 34, 55, 43, 1, 9, 22]]


def smallest_shares(**changes: Any) -> list[float]:
    """The smallest share of the area that was drawn in each of ten stretches of the iterations."""
    rows = make_schedule(recipe("imagenet", **changes).synthesis, 200, 200, seed=0, batch=0).rows.double()
    share = rows[:, HEIGHT] * rows[:, WIDTH] / 200**2
    return share.view(10, -1).min(1).values.tolist()


@pytest.mark.parametrize(
    ("changes", "bounds"),
    [
        # 0.08 + 0.92·(1 + cos(πs))/2 at the end of each tenth
        ({"curriculum": "cosine"}, [0.977, 0.912, 0.81, 0.682, 0.54, 0.398, 0.27, 0.168, 0.103, 0.08]),
        ({"curriculum": "linear"}, [1 - 0.092 * tenth for tenth in range(1, 11)]),
        ({"curriculum": "linear", "milestone": 0.5}, [1 - 0.184 * tenth for tenth in range(1, 6)] + [0.08] * 5),
        ({"curriculum": "step", "milestone": 0.3}, [1.0] * 3 + [0.08] * 7),
        ({"curriculum": "cosine", "milestone": 0.0}, [0.08] * 10),
    ],
)
def test_a_curriculum_lets_crops_shrink(changes: dict[str, Any], bounds: list[float]) -> None:
    """CDA: the smallest crop that may be drawn falls from the whole image to 0.08 of it."""
    for found, bound in zip(smallest_shares(iterations=20000, **changes), bounds, strict=True):
        assert bound - 0.01 <= found <= bound + 0.02


def test_without_a_curriculum_the_schedule_is_that_of_milestone_0() -> None:
    configs = recipe("imagenet").synthesis, recipe("imagenet", curriculum="linear", milestone=0.0).synthesis
    plain, over = (make_schedule(config, 64, 64, seed=0, batch=0).rows for config in configs)
    assert torch.equal(plain, over)


def test_impossible_crops_fall_back_to_the_centre() -> None:
    rows = make_schedule(recipe("imagenet", crop_scale=(1.0, 1.0), iterations=3).synthesis, 10, 40, seed=0, batch=0).rows
    assert rows[0, TOP:FLIP].tolist() == [0, 13, 10, 13]  # as wide as ratio 4/3 allows, centred
    assert rows[:, TOP:FLIP].unique(dim=0).shape[0] == 1


def test_streams_differ_by_seed_and_batch_and_repeat() -> None:
    config = recipe("imagenet", iterations=20).synthesis

    def rows(seed: int, batch: int) -> torch.Tensor:
        return make_schedule(config, 64, 64, seed=seed, batch=batch).rows

    assert torch.equal(rows(0, 0), rows(0, 0))
    assert not torch.equal(rows(0, 0), rows(0, 1))
    assert not torch.equal(rows(0, 0), rows(1, 0))
