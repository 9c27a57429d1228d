"""Labelled images of one size: in memory, or in files that are decoded on demand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from dwa_fast.io.decode import READERS, BadImageError, check_image, decode


class ImageSet(Protocol):
    """Labelled images of one size."""

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


@dataclass(frozen=True)
class MemorySet:
    """Images held in memory."""

    pixels: Tensor  # [N, C, S, S] uint8
    labels: Tensor  # [N] int64
    class_names: list[str]

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of every image."""
        channels, height, width = self.pixels.shape[1:]
        return channels, height, width

    def select(self, indices: Sequence[int]) -> MemorySet:
        """A subset, in the given order."""
        return replace(self, pixels=self.pixels[list(indices)], labels=self.labels[list(indices)])

    def name(self, index: int) -> str:
        """The index as text."""
        return str(index)

    def load(self, indices: Sequence[int]) -> Tensor:
        """Images [n, C, S, S], uint8."""
        return self.pixels[torch.as_tensor(indices, dtype=torch.int64)]


@dataclass(frozen=True)
class FileSet:
    """Image files, decoded on demand: shorter side resized, then a centre crop."""

    folder: Path
    files: list[str]  # paths relative to the folder, sorted class by class
    labels: Tensor  # [N] int64
    class_names: list[str]
    size: int
    channels: int
    resize: int | None = None  # length of the shorter side before the centre crop; None: `size`

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of every image."""
        return self.channels, self.size, self.size

    def name(self, index: int) -> str:
        """Path of the file, relative to the folder."""
        return self.files[index]

    def load(self, indices: Sequence[int]) -> Tensor:
        """Images [n, C, S, S], uint8.

        Raises:
            BadImageError: a file is not an image.
            InputError: a file cannot be read.
        """
        if len(indices) == 1:  # decoded in this thread, which may itself run a task of READERS
            return self._read(indices[0])[None]
        return torch.stack(list(READERS.map(self._read, indices)))

    def select(self, indices: Sequence[int]) -> FileSet:
        """A subset, in the given order."""
        return replace(self, files=[self.files[index] for index in indices], labels=self.labels[list(indices)])

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
