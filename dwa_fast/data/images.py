"""Labelled images of one size: in memory, or in files that are decoded on demand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from dwa_fast.config import DataConfig
from dwa_fast.errors import InputError
from dwa_fast.io.decode import READERS, BadImageError, check_image, decode

_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)

Indices = Sequence[int] | Tensor  # of images; a tensor may also be a mask, one boolean per image


class ImageSet(Protocol):
    """Labelled images of one size: what `distill`, `squeeze`, `validate` and `relabel` read. Any object with these five will do."""

    @property
    def labels(self) -> Tensor:
        """Class of each image, [N] int64."""

    @property
    def class_names(self) -> list[str]:
        """Class names, by label."""

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of every image."""

    def name(self, index: int) -> str:
        """Name of an image within the set, independent of the location of the set."""

    def load(self, indices: Sequence[int]) -> Tensor:
        """Images [n, C, S, S], uint8."""


def check_image_set(data: Any, name: str = "data") -> None:
    """Raise TypeError unless that is a set of images: a `FileSet`, a `MemorySet` or something like them; InputError for its labels."""
    if not all(hasattr(data, each) for each in ("labels", "class_names", "image_shape", "name", "load")):
        raise TypeError(
            f"{name} must be a set of images, such as image_folder(folder, size) or MemorySet(pixels, labels, class_names), "
            f"got {type(data).__name__}"
        )
    if not isinstance(data.labels, Tensor) or data.labels.dtype != torch.int64 or data.labels.dim() != 1:
        raise InputError(f"labels of {name} must be a tensor [N] of int64, got {_described(data.labels)}")


def check_shape(data: ImageSet, config: DataConfig) -> None:
    """Raise InputError unless the images have the size and channels that the settings are for: views, stages and networks follow these."""
    wanted = (config.channels, config.size, config.size)
    if tuple(data.image_shape) != wanted:
        raise InputError(
            f"images have {_size(data.image_shape)}, and the recipe is for {_size(wanted)}; "
            f"give it their size, recipe(…, size={data.image_shape[1]}), with one mean and std for each channel"
        )


@dataclass(frozen=True, repr=False)
class MemorySet:
    """Images held in memory: pixels [N, C, S, S] uint8, labels [N] in 0 … classes − 1, and the class names by label.

    Labels of any integer type are kept as int64.

    `len(data)` is N, and `data[i]` an image [C, S, S] uint8 and its label, so that a torch DataLoader takes it.

    Raises:
        InputError: pixels or labels are of another type or shape, or a label is not the number of a class.
    """

    pixels: Tensor
    labels: Tensor
    class_names: list[str]

    def __post_init__(self) -> None:
        if not isinstance(self.pixels, Tensor) or self.pixels.dtype != torch.uint8 or self.pixels.dim() != 4:
            raise InputError(f"pixels must be a tensor [N, C, S, S] of uint8, got {_described(self.pixels)}")
        integers = isinstance(self.labels, Tensor) and self.labels.dtype in _INTEGERS
        if not integers or self.labels.shape != self.pixels.shape[:1]:
            raise InputError(f"labels must be a tensor [{len(self.pixels)}] of integers, got {_described(self.labels)}")
        object.__setattr__(self, "labels", self.labels.to(torch.int64))  # a tensor of bytes is no index: PyTorch takes it for a mask
        if isinstance(self.class_names, str) or not all(isinstance(name, str) for name in self.class_names):
            raise InputError(f"class_names must be a list of names, got {self.class_names!r}")
        if len(self.labels) and not 0 <= int(self.labels.min()) <= int(self.labels.max()) < len(self.class_names):
            raise InputError(
                f"labels must lie in 0 … {len(self.class_names) - 1}, one number for each of the class_names, "
                f"got {int(self.labels.min())} … {int(self.labels.max())}"
            )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.pixels[index], int(self.labels[index])

    def __repr__(self) -> str:
        return _summary(self)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of every image."""
        channels, height, width = self.pixels.shape[1:]
        return channels, height, width

    def select(self, indices: Indices) -> MemorySet:
        """A subset, in the given order, or of a mask [N] of booleans.

        Raises:
            InputError: an index is not that of an image.
        """
        chosen = places(indices, len(self))
        return replace(self, pixels=self.pixels[chosen], labels=self.labels[chosen])

    def name(self, index: int) -> str:
        """The index as text."""
        return str(index)

    def load(self, indices: Indices) -> Tensor:
        """Images [n, C, S, S], uint8.

        Raises:
            InputError: an index is not that of an image.
        """
        return self.pixels[places(indices, len(self))]


@dataclass(frozen=True, repr=False)
class FileSet:
    """Image files, decoded on demand: shorter side resized, then a centre crop.

    `len(data)` is the number of images, and `data[i]` an image [C, S, S] uint8 and its label, so that a torch DataLoader takes it.
    """

    folder: Path
    files: list[str]  # paths relative to the folder, sorted class by class
    labels: Tensor  # [N] int64
    class_names: list[str]
    size: int
    channels: int
    resize: int | None = None  # length of the shorter side before the centre crop; None: `size`

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self._read(range(len(self.files))[index]), int(self.labels[index])

    def __repr__(self) -> str:
        return _summary(self)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of every image."""
        return self.channels, self.size, self.size

    def name(self, index: int) -> str:
        """Path of the file, relative to the folder."""
        return self.files[index]

    def load(self, indices: Indices) -> Tensor:
        """Images [n, C, S, S], uint8.

        Raises:
            BadImageError: a file is not an image.
            InputError: a file cannot be read, or an index is not that of an image.
        """
        chosen = places(indices, len(self)).tolist()
        if len(chosen) == 1:  # decoded in this thread, which may itself run a task of READERS
            return self._read(chosen[0])[None]
        decoded = list(READERS.map(self._read, chosen))
        return torch.stack(decoded) if decoded else torch.empty(0, *self.image_shape, dtype=torch.uint8)

    def select(self, indices: Indices) -> FileSet:
        """A subset, in the given order, or of a mask [N] of booleans.

        Raises:
            InputError: an index is not that of an image.
        """
        chosen = places(indices, len(self))
        return replace(self, files=[self.files[index] for index in chosen.tolist()], labels=self.labels[chosen])

    def faults(self) -> dict[int, str]:
        """Read every file; gives the indices of those that cannot be decoded, with the cause.

        Raises:
            InputError: a file cannot be opened or read.
        """
        causes = READERS.map(self._fault, range(len(self.files)))
        return {index: cause for index, cause in enumerate(causes) if cause is not None}

    def _read(self, index: int) -> Tensor:
        return decode(self.folder / self.files[index], self.size, self.channels, resize=self.resize)

    def _fault(self, index: int) -> str | None:
        try:
            check_image(self.folder / self.files[index], self.channels)
        except BadImageError as error:
            return error.cause
        return None


def places(
    indices: Indices,
    count: int,
) -> Tensor:  # [n] int64
    """The indices of some of `count` images, checked; a mask gives those where it is true.

    Raises:
        InputError: an index is not that of an image.
    """
    given = torch.as_tensor(indices if isinstance(indices, (Tensor, np.ndarray)) else list(indices))
    if given.dtype == torch.bool and given.shape == (count,):
        return given.nonzero().flatten()
    if given.numel() == 0:
        return torch.empty(0, dtype=torch.int64)
    if given.dim() != 1 or given.dtype == torch.bool or given.is_floating_point():
        raise InputError(f"expected indices of images, or a mask of {count} booleans, got {_described(given)}")
    low, high = int(given.min()), int(given.max())
    if low < 0 or high >= count:
        raise InputError(f"indices must lie in 0 … {count - 1}, got {low if low < 0 else high}")
    return given.to(torch.int64)


def _size(shape: Sequence[int]) -> str:
    return f"{shape[0]} channel{'s' if shape[0] != 1 else ''} of {shape[1]} × {shape[2]} pixels"


def _described(value: Any) -> str:
    return f"{value.dtype} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def _summary(data: ImageSet) -> str:
    """In place of a dataclass's repr, which would print every file or pixel."""
    where = f" from {data.folder}" if isinstance(data, FileSet) else ""
    return f"{type(data).__name__}({len(data.labels)} images of {len(data.class_names)} classes, {list(data.image_shape)}{where})"
