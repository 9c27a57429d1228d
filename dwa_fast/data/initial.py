"""Initial images of the refinement: real images of each class, random or in order; patches of them; tensors from files; or noise."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile
from pathlib import Path
from threading import Lock
from typing import Any, Protocol

import torch
from torch import Tensor

from dwa_fast.config import InitialConfig, InitialOrder, Normalisation, Progress
from dwa_fast.data.images import ImageSet
from dwa_fast.data.patches import Patch, Predict, cut, draw_patches, scores, stitch
from dwa_fast.data.pixels import normalise
from dwa_fast.data.subsets import by_class
from dwa_fast.errors import InputError
from dwa_fast.io.decode import READERS, BadImageError
from dwa_fast.io.files import checksum
from dwa_fast.io.torch_files import read_archive
from dwa_fast.recipes import Recipe
from dwa_fast.seeding import generator, normal

PATCH_SETTINGS = ("patch_candidates", "patch_crops", "patch_factor")

log = logging.getLogger("dwa_fast")


def reporting(labels: Collection[int], progress: Progress | None) -> Iterator[int]:
    """The labels, with a report before each and behind the last."""
    for done, label in enumerate(labels):
        if progress:
            progress(done, len(labels))
        yield label
    if progress:
        progress(len(labels), len(labels))


class InitialImages(Protocol):
    """Image i of every class. It does not depend on the number or order of requests, nor on the number of processes."""

    @property
    def settings(self) -> dict[str, Any]:
        """Settings that the images depend on besides the data and the seed; JSON values."""

    @property
    def skipped(self) -> dict[str, str]:
        """Files that could not be decoded so far, with the cause; a set that resumes adds those that it has skipped before."""

    def check(self, last: Mapping[int, int], progress: Progress | None = None) -> None:
        """Check that the images of each class, up to the given index by class, can be read.

        Args:
            progress: called with the classes whose images a teacher has chosen, and those whose images it will choose.
        Raises:
            InputError: as `load`, for the first one that cannot.
        """

    def load(self, images: Sequence[tuple[int, int]]) -> Tensor:
        """Initial images, [n, C, S, S], normalised, by label and index in its class of each."""


def initial_images(
    data: ImageSet,
    recipe: Recipe,
    config: InitialConfig,
    *,
    ipc: int,
    seed: int,
    predict: Predict | None = None,
) -> InitialImages:
    """The initial images of a set, as configured. Decodes nothing yet.

    Args:
        predict: the teacher, which chooses patches and median images.
    Raises:
        InputError: a class has too few images, a tensor file is missing, the configuration does not use initial images, or images of
            this size cannot be made of the patches.
    """
    if not recipe.synthesis.sees_images:
        if config.initial_tensors:
            raise InputError("initial_tensors would not be used: a noise start without directed adjustment sees no images")
        return NoImages(data)
    if config.initial_tensors:
        return TensorImages(config.initial_tensors, (len(data.class_names), *data.image_shape), ipc)
    if recipe.synthesis.initial == "median":
        assert predict is not None
        return MedianImages(data, recipe.data, config, ipc=ipc, seed=seed, predict=predict)
    if recipe.synthesis.initial == "patches":
        assert predict is not None
        return PatchImages(data, recipe.data, config, ipc=ipc, seed=seed, predict=predict)
    return RealImages(data, recipe.data, config, ipc=ipc, seed=seed)


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
            raise InputError(f"class {name!r} has {good} good images and {bad} bad ones, and image {index + 1} is needed")
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
            InputError: a class has fewer than ipc · factor² images, or these are more than the candidates; or the factor does not divide
                the size.
        """
        self._factor, self._ipc, self._candidates, self._crops = config.patch_factor, ipc, config.patch_candidates, config.patch_crops
        self._needed = ipc * self._factor**2
        if data.image_shape[1] % self._factor:
            raise InputError(f"patch_factor must divide the size of the images, {data.image_shape[1]}, got {self._factor}")
        if self._needed > self._candidates:
            raise InputError(f"ipc {ipc} takes patches of {self._needed} images of each class, but patch_candidates is {self._candidates}")
        class_members(data, self._needed)
        self.settings: dict[str, Any] = {name: getattr(config, name) for name in PATCH_SETTINGS}
        if self._factor > 1:  # then all images of a class depend on their number
            self.settings["patch_ipc"] = ipc
        self._real = RealImages(data, normalisation, replace(config, initial_order="sampled"), ipc=1, seed=seed)
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


class TensorImages:
    """Files tensor_0.pt, tensor_1.pt, … in the format of the published CIFAR code: image i of every class in one tensor, normalised."""

    def __init__(self, folder: Path, shape: tuple[int, ...], ipc: int) -> None:
        missing = [index for index in range(ipc) if not tensor_file(folder, index).is_file()]
        if missing:
            raise InputError(f"{tensor_file(folder, missing[0])} does not exist; ipc {ipc} needs tensor_0.pt to tensor_{ipc - 1}.pt")
        self.settings: dict[str, Any] = {"initial_tensors": checksum(tensor_file(folder, 0))}
        self.skipped: dict[str, str] = {}
        self._folder, self._shape = folder, shape
        self._last: dict[int, Tensor] = {}  # files of the last batch: others with the same indices follow
        self._lock = Lock()

    def check(self, last: Mapping[int, int], progress: Progress | None = None) -> None:
        """Read the files up to the largest index.

        Raises:
            InputError: as `read_tensor`.
        """
        for index in range(max(last.values()) + 1):
            read_tensor(tensor_file(self._folder, index), self._shape)

    def load(self, images: Sequence[tuple[int, int]]) -> Tensor:
        """Initial images, [n, C, S, S], normalised, by label and index of each.

        Raises:
            InputError: as `read_tensor`.
        """
        with self._lock:
            files = {index: self._last.get(index) for _, index in images}
            self._last = {
                index: read_tensor(tensor_file(self._folder, index), self._shape) if content is None else content
                for index, content in files.items()
            }
            return torch.stack([self._last[index][label] for label, index in images])


def tensor_file(folder: Path, index: int) -> Path:
    """Path of the tensor with image `index` of every class, named as in the published code."""
    return folder / f"tensor_{index}.pt"


def read_tensor(path: Path, shape: tuple[int, ...]) -> Tensor:
    """Read a tensor file with weights_only, as float32 on the CPU.

    Args:
        shape: the expected shape, [classes, C, H, W].
    Raises:
        InputError: it cannot be read safely, is not a tensor, or has another shape, an integer type or values that are not finite.
    """
    content = read_archive(path, "tensor file")
    wanted = f"expected one of shape {shape}: an image per class, normalised"
    if not isinstance(content, Tensor):
        raise InputError(f"tensor file {path} holds no tensor but {type(content).__name__}; {wanted}")
    if content.is_nested or content.layout != torch.strided or content.device.type != "cpu":
        raise InputError(f"tensor file {path} holds no plain tensor with values; {wanted}")
    if tuple(content.shape) != shape:
        raise InputError(f"tensor file {path} holds a tensor of shape {tuple(content.shape)}; {wanted}")
    if not content.is_floating_point():
        raise InputError(f"tensor file {path} holds a tensor of {content.dtype}; {wanted}, in floating point")
    if not torch.isfinite(content).all():
        raise InputError(f"tensor file {path} holds values that are NaN or infinite")
    return content.detach().float().contiguous()


class NoImages:
    """Placeholder for configurations that do not use initial images."""

    def __init__(self, data: ImageSet) -> None:
        self.settings: dict[str, Any] = {}
        self.skipped: dict[str, str] = {}
        self._image = probe_image(data)

    def check(self, last: Mapping[int, int], progress: Progress | None = None) -> None:
        """Nothing to check."""

    def load(self, images: Sequence[tuple[int, int]]) -> Tensor:
        """The same noise for every image, [n, C, S, S]."""
        return self._image.expand(len(images), -1, -1, -1)


def probe_image(data: ImageSet) -> Tensor:
    """Noise of the shape of an image, [1, C, S, S], to probe a teacher before anything is decoded."""
    return normal(generator(0, "unseen"), (1, *data.image_shape))


def class_members(data: ImageSet, ipc: int) -> Sequence[Tensor]:
    """Indices of the images of each class, in the order of the set.

    Raises:
        InputError: a class has fewer than ipc images.
    """
    found = by_class(data)
    for label, own in enumerate(found):
        if len(own) < ipc:
            raise InputError(f"class {data.class_names[label]!r} has {len(own)} images, but ipc {ipc} needs as many initial ones")
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
