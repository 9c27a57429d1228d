"""Initial images of the refinement: real images, images or patches that a teacher chooses, tensors from files, or none."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

from dwa_fast.config import InitialConfig, Progress
from dwa_fast.data.chosen import MedianImages, PatchImages
from dwa_fast.data.images import ImageSet
from dwa_fast.data.patches import Predict
from dwa_fast.data.real import RealImages
from dwa_fast.data.tensor_files import TensorImages
from dwa_fast.errors import InputError
from dwa_fast.recipes import Recipe
from dwa_fast.seeding import generator, normal

log = logging.getLogger("dwa_fast")

SMALL = 64  # pixels; up to this size published patches fill an image


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
    if config.initial_tensors and recipe.synthesis.initial in ("patches", "median"):
        raise InputError(f"initial {recipe.synthesis.initial!r} chooses among the real images; leave out initial_tensors")
    if config.initial_tensors:
        return TensorImages(config.initial_tensors, (len(data.class_names), *data.image_shape), ipc)
    if recipe.synthesis.initial == "median":
        assert predict is not None
        return MedianImages(data, recipe.data, config, ipc=ipc, seed=seed, predict=predict)
    if recipe.synthesis.initial == "patches":
        assert predict is not None
        if recipe.synthesis.iterations == 0 and recipe.data.size > SMALL and config.patch_factor == 1:
            log.warning("each image is one patch; RDED is published with 2 × 2 for images of more than %d pixels (patch_factor 2)", SMALL)
        return PatchImages(data, recipe.data, config, ipc=ipc, seed=seed, predict=predict)
    return RealImages(data, recipe.data, config, ipc=ipc, seed=seed)


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
