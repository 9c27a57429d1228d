"""Real images as initial ones: of each class at random, or in the order of the set."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from dwa_fast.config import InitialConfig, InitialOrder, Normalisation, Progress
from dwa_fast.data.images import ImageSet
from dwa_fast.data.pixels import normalise
from dwa_fast.data.subsets import by_class
from dwa_fast.errors import InputError
from dwa_fast.io.decode import READERS, BadImageError
from dwa_fast.seeding import generator

log = logging.getLogger("dwa_fast")


class RealImages:
    """Real images: image i of a class is the i-th one in the order of the class that can be decoded."""

    def __init__(self, data: ImageSet, normalisation: Normalisation, config: InitialConfig, *, ipc: int, seed: int) -> None:
        self.settings: dict[str, Any] = {"initial_order": config.initial_order}
        self.skipped: dict[str, str] = {}
        self._data, self._normalisation, self._skip = data, normalisation, config.skip_bad_images
        self._members, self._order, self._seed = class_members(data, ipc), config.initial_order, seed
        self._classes: dict[int, _ClassOrder] = {}
        self._lock = Lock()

    def load(self, images: Sequence[tuple[int, int]]) -> Tensor:
        """Initial images, [n, C, S, S], normalised.

        Args:
            images: label and index in its class of each.
        Raises:
            InputError: a file is not an image and may not be skipped, or a class has too few images that can be decoded.
        """
        indices: dict[int, list[int]] = {}
        for label, index in images:
            indices.setdefault(label, []).append(index)
        with self._lock:  # each class is advanced by one thread at a time
            classes = READERS.map(lambda label: {(label, index): self._find(label, index) for index in indices[label]}, indices)
            pixels = {image: content for own in classes for image, content in own.items()}
        return normalise(torch.cat([pixels[image] for image in images]), self._normalisation)

    def check(self, last: Mapping[int, int], progress: Progress | None = None) -> None:
        """Decode the images of each class up to the given index.

        Raises:
            InputError: as `load`; the message has the number of affected classes.
        """
        with self._lock:
            faults = [fault for fault in READERS.map(self._fault, last, last.values()) if fault is not None]
        if faults:
            others = f" (and images of {len(faults) - 1} more classes)" if len(faults) > 1 else ""
            raise InputError(f"{faults[0]}{others}") from faults[0]

    def _fault(self, label: int, index: int) -> InputError | None:
        try:
            self._find(label, index)
        except InputError as error:
            return error
        return None

    def first(self, label: int, count: int) -> list[Tensor]:
        """The first images of a class, [1, C, S, S] uint8 each, as many of `count` as can be decoded.

        Raises:
            InputError: a file is not an image and may not be skipped.
        """
        with self._lock:
            pixels = (self._at(label, index) for index in range(count))
            return list(takewhile(lambda each: each is not None, pixels))  # type: ignore[arg-type]

    def levels(self, label: int, index: int) -> Tensor:
        """One image, [C, S, S] uint8."""
        with self._lock:
            return self._find(label, index)[0]

    def _find(self, label: int, index: int) -> Tensor:
        pixels = self._at(label, index)
        if pixels is None:
            own = self._classes[label]
            name, good, bad = self._data.class_names[label], len(own.good), own.tried - len(own.good)
            raise InputError(
                f"class {name!r} has {good} images that can be read and {bad} that cannot, and image {index + 1} is needed; lower --ipc"
            )
        return pixels

    def _at(self, label: int, index: int) -> Tensor | None:
        """Image `index` of a class, [1, C, S, S] uint8; None where fewer can be decoded."""
        if label not in self._classes:
            self._classes[label] = _ClassOrder(ordered(self._members[label], label, self._order, seed=self._seed))
        own = self._classes[label]
        if index < len(own.good):
            return self._data.load([own.good[index]])
        while own.tried < len(own.order):
            candidate = own.order[own.tried]
            pixels = self._try(candidate)
            own.tried += 1  # not if _try raised: the next call tries it again
            if pixels is not None:
                own.good.append(candidate)
                if index < len(own.good):
                    return pixels
        return None

    def _try(self, candidate: int) -> Tensor | None:
        """The pixels, or None if the image is skipped. An image that a set has skipped stays skipped, even if it has been repaired."""
        name = self._data.name(candidate)
        if name in self.skipped:
            return None
        try:
            return self._data.load([candidate])
        except BadImageError as error:
            if not self._skip:
                raise InputError(f"{error}; with --skip-bad-images the next image of its class takes its place") from error
            log.warning("skipped %s: %s", name, error.cause)
            self.skipped[name] = error.cause
            return None


@dataclass
class _ClassOrder:
    """The images of one class in the order in which they are used, and how many have been tried."""

    order: list[int]
    good: list[int] = field(default_factory=list)  # images that could be decoded
    tried: int = 0  # number of images of `order` that have been tried


def class_members(data: ImageSet, needed: int, wanted: str = "") -> Sequence[Tensor]:
    """Indices of the images of each class, in the order of the set.

    Args:
        needed: images of each class. wanted: who takes them, for the message; default: as many initial images per class.
    Raises:
        InputError: a class has fewer.
    """
    found = by_class(data)
    for label, own in enumerate(found):
        if len(own) < needed:
            wanted = wanted or f"ipc {needed} needs as many initial ones"
            raise InputError(f"class {data.class_names[label]!r} has {len(own)} images, but {wanted}")
    return found


def ordered(members: Tensor, label: int, order: InitialOrder, *, seed: int) -> list[int]:
    """The images of a class in the order in which they are used: shuffled by the seed, or as in the set (sorted by file name)."""
    if order == "sampled":
        members = members[generator(seed, "initial", label).permutation(len(members))]
    return [int(index) for index in members.tolist()]


def sample(
    data: ImageSet,
    label: int,
    ipc: int,
    *,
    seed: int,
) -> list[int]:
    """Indices of `ipc` random images of a class, without replacement; those of a smaller ipc are a prefix of those of a larger one.

    Raises:
        InputError: a class has fewer images.
    """
    return ordered(class_members(data, ipc)[label], label, "sampled", seed=seed)[:ipc]
