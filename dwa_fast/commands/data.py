"""What the commands share: which real images, and which teacher."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro

from dwa_fast.architectures import ARCHITECTURES
from dwa_fast.checkpoint import TeacherInfo, load_teacher
from dwa_fast.config import DataConfig
from dwa_fast.console import Console
from dwa_fast.datasets import FileSet, ImageSet, Split, load
from dwa_fast.decoding import BadImageError
from dwa_fast.errors import InputError
from dwa_fast.recipes import full_recipe

Architecture = Annotated[str, tyro.conf.arg(help=f"One of {', '.join(ARCHITECTURES)}. Or timm:NAME, a network of timm.")]


@dataclass(frozen=True, kw_only=True)
class Data:
    """Which real images a command reads."""

    recipe: str  # Settings of a data set: digits, cifar10, cifar100, tiny, imagenet, folder (your own), or one with -released.
    data: Path | None = None  # Folder of the real images; digits need none.
    download: bool = False  # Fetch CIFAR into that folder if it is not there.
    size: int  # Height and width of the images, pixels.
    held_out_share: float = 0.0  # Hold out this share of the training images in place of the test images, to choose settings without them.

    def load(self, split: Split, channels: int) -> ImageSet:
        """The images of a split, as the recipe says."""
        return load(self.data_config, self.data, split, channels=channels, download=self.download)

    @property
    def data_config(self) -> DataConfig:
        """The recipe's, at the size asked for."""
        config = full_recipe(self.recipe).data
        return DataConfig(layout=config.layout, size=self.size, classes=config.classes, held_out_share=self.held_out_share)


def read_teacher(
    data: Data, path: Path, architecture: str | None, classes: int, channels: int, weights_key: str | None = None
) -> tuple[torch.nn.Module, TeacherInfo]:
    """The teacher of a command; a checkpoint that does not say what it holds is taken for the recipe's architecture."""
    try:
        return load_teacher(path, architecture=architecture, classes=classes, channels=channels, size=data.size, weights_key=weights_key)
    except InputError as error:
        if architecture is not None or "does not say which network" not in str(error):
            raise
    usual = full_recipe(data.recipe).architecture
    return load_teacher(path, architecture=usual, classes=classes, channels=channels, size=data.size, weights_key=weights_key)


_SHOWN = 5  # skipped files that are named


def usable(console: Console, data: ImageSet, skip_bad_images: bool) -> ImageSet:
    """The images, on request without those that cannot be decoded, which are counted and named; every file is read once for it.

    Raises:
        InputError: nothing is left of a class.
    """
    if not skip_bad_images or not isinstance(data, FileSet):
        return data
    faults = data.faults()
    good = data.select([index for index in range(len(data.files)) if index not in faults])
    say_skipped(console, {data.name(index): cause for index, cause in faults.items()})
    missing = set(data.labels.tolist()) - set(good.labels.tolist())
    if missing:
        raise InputError(f"no image of class {data.class_names[min(missing)]!r} in {data.folder} can be read")
    return good


def say_skipped(console: Console, skipped: Mapping[str, str]) -> None:
    """Say how many images were left out, and which."""
    if skipped:
        console.say(f"skipped {len(skipped)} image{'s' if len(skipped) > 1 else ''} that cannot be read:")
        for name, cause in list(skipped.items())[:_SHOWN]:
            console.say(f"  {name}: {cause}")
        if len(skipped) > _SHOWN:
            console.say("  …")


@contextmanager
def naming_bad_images() -> Iterator[None]:
    """Inside, an image that cannot be decoded stops the command with its name and the way out."""
    try:
        yield
    except BadImageError as error:
        raise InputError(f"{error}; with --skip-bad-images it is left out") from error
