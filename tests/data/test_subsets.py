"""Parts of sets: which images, which numbers, which pixels."""

from __future__ import annotations

import pytest
import torch

from dwa_fast import InputError
from dwa_fast.data.datasets import digits
from dwa_fast.data.images import MemorySet
from dwa_fast.data.subsets import by_class, draw, images_per_class, part, some_classes
from tests.nets import SIZE


def small() -> MemorySet:
    """Six images of three classes, each filled with its own number."""
    pixels = torch.arange(6, dtype=torch.uint8).view(6, 1, 1, 1).expand(6, 1, 2, 2)
    return MemorySet(pixels, torch.tensor([2, 0, 1, 0, 2, 0]), ["ant", "bee", "cat"])


def numbers(images: torch.Tensor) -> list[int]:
    return images[:, 0, 0, 0].tolist()


def test_images_by_class_keep_their_order() -> None:
    assert [own.tolist() for own in by_class(small())] == [[1, 3, 5], [2], [0, 4]]
    assert [len(own) for own in by_class(MemorySet(small().pixels[:1], torch.tensor([1]), ["a", "b", "c"]))] == [0, 1, 0]


def test_images_per_class() -> None:
    assert images_per_class(small()) == "1–3"
    assert images_per_class(part(small(), torch.tensor([0, 1, 2]))) == 1
    assert images_per_class(part(small(), torch.tensor([0, 1]))) == "0–1"  # the last classes count too


def test_some_classes_are_numbered_anew_in_the_order_given() -> None:
    chosen = some_classes(small(), [2, 0])
    assert chosen.class_names == ["cat", "ant"]
    assert chosen.labels.tolist() == [0, 1, 1, 0, 1]
    assert numbers(chosen.load(range(5))) == [0, 1, 3, 4, 5]
    assert numbers(chosen.load([4, 0])) == [5, 0]
    assert [chosen.name(index) for index in range(5)] == ["0", "1", "3", "4", "5"]
    assert chosen.image_shape == (1, 2, 2)


def test_classes_of_classes() -> None:
    again = some_classes(some_classes(small(), [2, 0]), [1])
    assert again.class_names == ["ant"]
    assert numbers(again.load(range(len(again.labels)))) == [1, 3, 5]


def test_part_keeps_the_classes() -> None:
    some = part(small(), torch.tensor([4, 1]))
    assert some.labels.tolist() == [2, 0]
    assert some.class_names == ["ant", "bee", "cat"]
    assert numbers(some.load([1])) == [1]


def test_draw_is_seeded_and_without_replacement() -> None:
    data = digits("train", SIZE)
    first, again, other = (draw(data, 20, "test", seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.indices, again.indices)
    assert not torch.equal(first.indices, other.indices)
    assert len(first.indices.unique()) == 200
    assert torch.equal(first.labels, torch.arange(10).repeat_interleave(20))
    assert torch.equal(first.labels, data.labels[first.indices])
    with pytest.raises(InputError, match="class 'bee' has 1 real images, expected at least 2 to compare with"):
        draw(small(), 2, "test", seed=0)
