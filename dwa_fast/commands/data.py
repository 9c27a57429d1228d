"""What the commands share: which real images, and which teacher."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from dwa_fast.checkpoint import TeacherInfo, load_teacher
from dwa_fast.config import DataConfig
from dwa_fast.datasets import ImageSet, Split, load
from dwa_fast.errors import InputError
from dwa_fast.recipes import full_recipe


@dataclass(frozen=True, kw_only=True)
class Data:
    """Which real images a command reads."""

    recipe: str  # Settings of a data set: digits, cifar10, cifar100, tiny, imagenet, folder (your own), or one with -released.
    data: Path | None = None  # Folder of the real images; digits need none.
    download: bool = False  # Fetch CIFAR into that folder if it is not there.
    size: int  # Height and width of the images, pixels.

    def load(self, split: Split, channels: int) -> ImageSet:
        """The images of a split, as the recipe says."""
        return load(self.data_config, self.data, split, channels=channels, download=self.download)

    @property
    def data_config(self) -> DataConfig:
        """The recipe's, at the size asked for."""
        config = full_recipe(self.recipe).data
        return DataConfig(layout=config.layout, size=self.size, classes=config.classes)


def read_teacher(data: Data, path: Path, architecture: str | None, classes: int, channels: int) -> tuple[torch.nn.Module, TeacherInfo]:
    """The teacher of a command; a checkpoint that does not say what it holds is taken for the recipe's architecture."""
    try:
        return load_teacher(path, architecture=architecture, classes=classes, channels=channels, size=data.size)
    except InputError as error:
        if architecture is not None or "--architecture" not in str(error):
            raise
    return load_teacher(path, architecture=full_recipe(data.recipe).architecture, classes=classes, channels=channels, size=data.size)
