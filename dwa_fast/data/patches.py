"""Patches of real images, chosen by a teacher and stitched to images (RDED, arXiv 2312.03526)."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dwa_fast.config import Normalisation
from dwa_fast.data.pixels import normalise
from dwa_fast.models.finite import check_logits

Predict = Callable[[Tensor], Tensor]  # normalised images [n, C, S, S] → logits [n, classes]

_SMALLEST = 0.08  # smallest crop, fraction of the image area
_BATCH = 100  # crops that are scored at once


class Patch(NamedTuple):
    """A square of an image."""

    candidate: int  # which of the images
    top: int
    left: int
    side: int


def draw_patches(candidates: int, crops: int, size: int, source: np.random.Generator) -> list[list[Patch]]:
    """Random squares of each of `candidates` images of `size` × `size` pixels; their area is uniform in 0.08 … 1 of the image's."""
    sides = np.maximum(1, np.rint(np.sqrt(source.uniform(_SMALLEST, 1, (candidates, crops))) * size)).astype(int)
    tops, lefts = (source.random((2, candidates, crops)) * (size - sides + 1)).astype(int)
    places = np.stack([tops, lefts, sides], axis=2).tolist()
    return [[Patch(image, *place) for place in own] for image, own in enumerate(places)]


def cut(
    image: Tensor,  # [C, S, S] uint8
    patch: Patch,
    size: int,
) -> Tensor:  # [C, size, size] uint8
    """The patch, resized bilinearly with antialiasing."""
    square = image[None, :, patch.top : patch.top + patch.side, patch.left : patch.left + patch.side].float()
    resized = F.interpolate(square, (size, size), mode="bilinear", align_corners=False, antialias=True)
    return resized[0].round().clamp(0, 255).to(torch.uint8)


def scores(
    patches: Tensor,  # [n, C, s, s] uint8
    label: int,
    size: int,
    predict: Predict,
    normalisation: Normalisation,
    classes: int,
) -> Tensor:  # [n] float32
    """Cross-entropy of each patch in the middle of an image of `size` × `size` pixels that is 0 elsewhere, normalised.

    Raises:
        InputError: the logits are not finite.
    """
    before = (size - patches.shape[-1]) // 2
    after = size - patches.shape[-1] - before
    framed = F.pad(normalise(patches, normalisation), (before, after, before, after))
    logits = torch.cat([check_logits(predict(part), "teacher", classes).cpu() for part in framed.split(_BATCH)])
    return F.cross_entropy(logits, torch.full((len(logits),), label), reduction="none")


def stitch(
    patches: Tensor,  # [f², C, s, s]
) -> Tensor:  # [C, f·s, f·s]
    """One image of f × f patches, row by row."""
    count, channels, side, _ = patches.shape
    factor = round(count**0.5)
    grid = patches.view(factor, factor, channels, side, side)
    return grid.permute(2, 0, 3, 1, 4).reshape(channels, factor * side, factor * side)
