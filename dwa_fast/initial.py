"""Where the refinement starts: a seeded sample of real images of each class, or Gaussian noise."""

from __future__ import annotations

from torch import Tensor

from dwa_fast.datasets import ImageSet
from dwa_fast.errors import InputError
from dwa_fast.seeding import generator, normal


def sample(
    data: ImageSet,
    label: int,
    ipc: int,
    *,
    seed: int,
) -> list[int]:
    """Indices of `ipc` images of a class, drawn without replacement; a smaller ipc draws the first of a larger one's.

    Raises:
        InputError: the class has fewer images.
    """
    members = (data.labels == label).nonzero().flatten().tolist()
    if len(members) < ipc:
        raise InputError(f"class {data.class_names[label]!r} has {len(members)} images, but ipc {ipc} needs as many initial ones")
    order = generator(seed, "initial", label).permutation(len(members))
    return [members[i] for i in order[:ipc]]


def noise(
    images: Tensor,  # [B, C, H, W]: gives shape, type and device
    *,
    seed: int,
    batch: int,
) -> Tensor:  # [B, C, H, W]
    """Standard normal noise, SRe2L's start."""
    return normal(generator(seed, "noise", batch), tuple(images.shape)).to(images)
