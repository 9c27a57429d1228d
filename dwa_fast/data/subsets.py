"""Subsets of a set of images: some images, or some classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dwa_fast.data.images import ImageSet
from dwa_fast.errors import InputError
from dwa_fast.seeding import generator


@dataclass(frozen=True)
class Subset:
    """A view of some images of a set."""

    source: ImageSet
    indices: Tensor  # [n] int64, into the source
    labels: Tensor  # [n] int64
    class_names: list[str]

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of every image."""
        return self.source.image_shape

    def name(self, index: int) -> str:
        """Name of the image in the source."""
        return self.source.name(int(self.indices[index]))

    def load(self, indices: Sequence[int]) -> Tensor:
        """Images [n, C, S, S], uint8."""
        return self.source.load(self.indices[torch.as_tensor(indices, dtype=torch.int64)].tolist())


def by_class(data: ImageSet) -> list[Tensor]:
    """Indices of the images of each class, in the order of the set."""
    counts = torch.bincount(data.labels, minlength=len(data.class_names)).tolist()
    return list(torch.argsort(data.labels, stable=True).split(counts))


def images_per_class(data: ImageSet) -> int | str:
    """Number of images per class: a number, or "2–5" if it varies."""
    counts = [len(own) for own in by_class(data)]
    return counts[0] if min(counts) == max(counts) else f"{min(counts)}–{max(counts)}"


def part(data: ImageSet, indices: Tensor) -> Subset:
    """Some images of a set, with the same classes."""
    return Subset(data, indices, data.labels[indices], data.class_names)


def some_classes(data: ImageSet, classes: Sequence[int]) -> Subset:
    """The images of these classes, relabelled from 0 in the given order."""
    numbers = torch.full((len(data.class_names),), -1)
    numbers[list(classes)] = torch.arange(len(classes))
    indices = (numbers[data.labels] >= 0).nonzero().flatten()
    return Subset(data, indices, numbers[data.labels[indices]], [data.class_names[label] for label in classes])


def draw(data: ImageSet, per_class: int, purpose: str, *, seed: int) -> Subset:
    """`per_class` random images of every class, class by class, without replacement.

    Raises:
        InputError: a class has fewer images.
    """
    chosen = []
    for label, own in enumerate(by_class(data)):
        if len(own) < per_class:
            raise InputError(f"class {data.class_names[label]!r} has {len(own)} real images, expected at least {per_class} to compare with")
        chosen.append(own[generator(seed, purpose, label).permutation(len(own))[:per_class]])
    return part(data, torch.cat(chosen))
