"""Nearest images, against a full table of distances."""

from __future__ import annotations

import pytest
import torch

from dwa_fast.evaluation.neighbours import Neighbours


@pytest.mark.parametrize("batch", [1, 7, 64])
def test_neighbours_are_those_of_the_full_table(batch: int) -> None:
    images, queries = torch.randn(50, 5) + 100, torch.randn(9, 5) + 100
    found = Neighbours(queries)
    for start in range(0, 50, batch):
        found.look(start, images[start : start + batch])
    table = (queries.double()[:, None] - images.double()).norm(dim=2)
    assert torch.equal(found.indices, table.argmin(1))
    assert torch.allclose(found.distances, table.amin(1), rtol=1e-12)


def test_a_copy_is_at_distance_0() -> None:
    images = torch.randn(40, 6) * 1e-3 + 1e3
    found = Neighbours(images[[3, 30]])
    found.look(0, images[:20])
    found.look(20, images[20:])
    assert found.indices.tolist() == [3, 30]
    assert found.distances.tolist() == [0, 0]


def test_an_image_is_no_neighbour_of_itself() -> None:
    images = torch.tensor([[0.0], [1.0], [10.0], [12.0]])
    found = Neighbours(images[[0, 2, 3]], torch.tensor([0, 2, 3]))
    for start in range(4):
        found.look(start, images[start : start + 1])
    assert found.indices.tolist() == [1, 3, 2]
    assert found.distances.tolist() == [1, 2, 2]


def test_before_any_image_there_is_no_neighbour() -> None:
    found = Neighbours(torch.zeros(1, 2), torch.tensor([0]))
    assert found.distances.tolist() == [torch.inf]
    found.look(0, torch.zeros(1, 2))  # itself
    assert found.indices.tolist() == [-1]
