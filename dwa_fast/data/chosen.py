"""Initial images that a teacher chooses: the patches that it classifies best, or images of median difficulty."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dwa_fast.config import InitialConfig, Normalisation, Progress
from dwa_fast.data.images import ImageSet
from dwa_fast.data.patches import Patch, Predict, cut, draw_patches, scores, stitch
from dwa_fast.data.pixels import normalise
from dwa_fast.data.real import RealImages, class_members
from dwa_fast.errors import InputError
from dwa_fast.seeding import generator

PATCH_SETTINGS = ("patch_candidates", "patch_crops", "patch_factor")


class PatchImages:
    """Patches that a teacher classifies best, factor × factor to an image (RDED, arXiv 2312.03526, Alg. 1).

    Each of the first `patch_candidates` images of a class, in random order, gives the one of `patch_crops` random squares with the
    lowest cross-entropy. The best ipc · factor² of them become images: patch k of image i is the (k · ipc + i)-th best. Unlike the
    released program this cuts them from images as the set loads them, resized to its size, not from the files.
    """

    def __init__(
        self, data: ImageSet, normalisation: Normalisation, config: InitialConfig, *, ipc: int, seed: int, predict: Predict
    ) -> None:
        """Scores nothing yet.

        Raises:
            InputError: a class has fewer than ipc · factor² images, or these are more than the candidates; the factor does not divide the
                size; or an order of the images is asked for.
        """
        if config.initial_order != "sampled":
            raise InputError(f"patches are taken from images in random order; leave out initial_order {config.initial_order}")
        self._factor, self._ipc, self._candidates, self._crops = config.patch_factor, ipc, config.patch_candidates, config.patch_crops
        self._needed = ipc * self._factor**2
        if data.image_shape[1] % self._factor:
            raise InputError(f"patch_factor must divide the size of the images, {data.image_shape[1]}, got {self._factor}")
        if self._needed > self._candidates:
            raise InputError(f"ipc {ipc} takes patches of {self._needed} images of each class, but patch_candidates is {self._candidates}")
        class_members(data, self._needed, f"ipc {ipc} takes patches of {self._needed} of them")
        self.settings: dict[str, Any] = {name: getattr(config, name) for name in PATCH_SETTINGS}
        if self._factor > 1:  # then all images of a class depend on their number
            self.settings["patch_ipc"] = ipc
        self._real = RealImages(data, normalisation, config, ipc=1, seed=seed)
        self._data, self._normalisation, self._seed, self._predict = data, normalisation, seed, predict
        self._best: dict[int, list[Patch]] = {}  # of a class, best first

    @property
    def skipped(self) -> dict[str, str]:
        """Files that could not be decoded so far, with the cause."""
        return self._real.skipped

    def check(self, last: Mapping[int, int], progress: Progress | None = None) -> None:
        """Choose the patches of each class, whatever the index.

        Raises:
            InputError: as `RealImages.load`, or the teacher's logits are not finite.
        """
        for label in reporting(last, progress):
            if label not in self._best:
                self._best[label] = self._choose(label)

    def load(self, images: Sequence[tuple[int, int]]) -> Tensor:
        """Images, [n, C, S, S], normalised, by label and index of each; their classes have been checked."""
        return normalise(torch.stack([self._image(*image) for image in images]), self._normalisation)

    def _image(self, label: int, index: int) -> Tensor:
        chosen = self._best[label][index : self._needed : self._ipc]
        sources = [self._real.levels(label, patch.candidate) for patch in chosen]
        side = self._data.image_shape[1] // self._factor
        return stitch(torch.stack([cut(source, patch, side) for source, patch in zip(sources, chosen, strict=True)]))

    def _choose(self, label: int) -> list[Patch]:
        size, classes = self._data.image_shape[1], len(self._data.class_names)
        candidates = self._real.first(label, self._candidates)
        if len(candidates) < self._needed:
            name = self._data.class_names[label]
            raise InputError(f"class {name!r} has {len(candidates)} images that can be decoded, and {self._needed} patches are needed")
        drawn = draw_patches(self._candidates, self._crops, size, generator(self._seed, "patches", label))[: len(candidates)]
        patches = [cut(image[0], patch, size // self._factor) for image, own in zip(candidates, drawn, strict=True) for patch in own]
        losses = scores(torch.stack(patches), label, size, self._predict, self._normalisation, classes).view(len(drawn), self._crops)
        lowest, which = losses.min(1)
        return [drawn[candidate][int(which[candidate])] for candidate in lowest.sort(stable=True).indices[: self._needed].tolist()]


class MedianImages:
    """The real images of each class whose probability under the teacher is nearest to the class's median (DELT, arXiv 2411.19946).

    All images of a class are ranked by the probability of their class; image 0 is the median, and the others follow from both sides in
    turn, so that images of a smaller ipc are those of a larger one.
    """

    def __init__(
        self, data: ImageSet, normalisation: Normalisation, config: InitialConfig, *, ipc: int, seed: int, predict: Predict
    ) -> None:
        """Ranks nothing yet.

        Raises:
            InputError: a class has fewer than ipc images, or an order of the images is asked for.
        """
        if config.initial_order != "sampled":
            raise InputError(f"median images have an order of their own; leave out initial_order {config.initial_order}")
        self._members = class_members(data, ipc)
        self.settings: dict[str, Any] = {}
        self._real = RealImages(data, normalisation, config, ipc=1, seed=seed)
        self._data, self._normalisation, self._predict = data, normalisation, predict
        self._order: dict[int, list[int]] = {}  # of a class: places among its images that can be decoded

    @property
    def skipped(self) -> dict[str, str]:
        """Files that could not be decoded so far, with the cause."""
        return self._real.skipped

    def check(self, last: Mapping[int, int], progress: Progress | None = None) -> None:
        """Rank the images of each class.

        Raises:
            InputError: as `RealImages.load`, too few images of a class can be decoded, or the teacher's logits are not finite.
        """
        for label in reporting(last, progress):
            index = last[label]
            if label not in self._order:
                self._order[label] = self._rank(label)
            if index >= len(self._order[label]):
                self._real.levels(label, index)  # says how many there are

    def load(self, images: Sequence[tuple[int, int]]) -> Tensor:
        """Images, [n, C, S, S], normalised, by label and index of each; their classes have been checked."""
        return normalise(torch.stack([self._real.levels(label, self._order[label][index]) for label, index in images]), self._normalisation)

    def _rank(self, label: int) -> list[int]:
        candidates = torch.cat(self._real.first(label, len(self._members[label])))
        size, classes = self._data.image_shape[1], len(self._data.class_names)
        losses = scores(candidates, label, size, self._predict, self._normalisation, classes)  # −log of the probability
        ranked = losses.sort(stable=True).indices.tolist()
        middle = len(ranked) // 2
        places = sorted(range(len(ranked)), key=lambda place: (abs(place - middle), place))
        return [ranked[place] for place in places]


def reporting(labels: Collection[int], progress: Progress | None) -> Iterator[int]:
    """The labels, with a report before each and behind the last."""
    for done, label in enumerate(labels):
        if progress:
            progress(done, len(labels))
        yield label
    if progress:
        progress(len(labels), len(labels))
