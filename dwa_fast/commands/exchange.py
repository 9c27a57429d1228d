"""The commands that export distilled sets for other programs, and import theirs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from torch import Tensor

from dwa_fast.commands.console import Console
from dwa_fast.config import Fraction, NonNegativeInt, Normalisation, Positive, PositiveInt
from dwa_fast.data.pairing import read_classes
from dwa_fast.data.pixels import to_levels
from dwa_fast.data.set_layout import refuse_images
from dwa_fast.data.tensors import IMAGES_FILE, LABELS_FILE, as_pixels, read_tensors, write_tensors
from dwa_fast.errors import InputError
from dwa_fast.io.files import checksum, output_folder
from dwa_fast.io.parquet import read_parquet, write_parquet
from dwa_fast.recipes import recipe
from dwa_fast.sets.exchange import as_tensors, open_files, write_folders, write_set

ExportFormat = Literal["parquet", "tensors", "folders"]

_SetContents = tuple[Callable[[int], bytes | Tensor], list[int], list[str], dict[str, Any]]  # images, labels, class names, settings


@dataclass(frozen=True, kw_only=True)
class _Normalised:
    """Mean and std that tensors are normalised with."""

    recipe: str | None = None  # Recipe whose mean and std are used, unless they are given.
    mean: tuple[Fraction, ...] = ()  # Mean of each channel, of pixels in [0, 1], that tensors are normalised with.
    std: tuple[Positive, ...] = ()  # Standard deviation of each channel, likewise.

    def normalisation(self, made: dict[str, Any]) -> Normalisation:
        """From the flags, else from the recipe, else from the settings of the set.

        Raises:
            InputError: mean or std is not known.
        """
        if self.mean or self.std:
            return Normalisation(mean=self.mean, std=self.std)
        if self.recipe:
            return recipe(self.recipe).data
        if isinstance(made.get("mean"), list) and isinstance(made.get("std"), list):
            return Normalisation(mean=tuple(made["mean"]), std=tuple(made["std"]))
        raise InputError("tensors are normalised, and nothing says how; pass --mean and --std, or --recipe, whose values are taken")


@dataclass(frozen=True, kw_only=True)
class Export(_Normalised):
    """Write a distilled set for other programs: one Parquet file for Hugging Face, tensors as MTT's, or class folders by number.

    parquet: columns image and label, with class names; the image files go in as they are. tensors: images_best.pt, [N, C, H, W]
    float32, normalised, and labels_best.pt, [N] int64, class after class. folders: 00000/00000.png and so on, copies of the files.
    """

    images: tyro.conf.Positional[Path]  # The distilled set, ours or another program's.
    to: ExportFormat  # parquet, tensors or folders.
    output: Path  # File to write (parquet), or folder.
    ipc: PositiveInt | None = None  # Take the first images of each class only; default: all.
    label_column: str = "label"  # Name of the column of labels in Parquet; some programs want class_id.
    overwrite: bool = False  # Replace files that are there already.

    def run(self, console: Console) -> None:
        """Write it."""
        if self.label_column in ("", "image"):
            raise InputError(f"the column of labels needs a name, and not that of the images; got {self.label_column!r}")
        self._refuse_loss()
        refuse_images(self.output)
        found = open_files(self.images, self.ipc)
        count, classes = len(found.files), len(found.class_names)
        with console.bars() as track:
            progress = track(self.to)
            if self.to == "parquet":
                output_folder(self.output.parent)
                rows = ((found.content(place), Path(name).name, found.labels[place]) for place, name in enumerate(found.files))
                write_parquet(self.output, _counted(rows, count, progress), found.class_names, label_column=self.label_column)
                console.print(f"{self.output}: {count} images of {classes} classes, columns image and {self.label_column}")
            elif self.to == "folders":
                write_folders(found, output_folder(self.output), progress)
                console.print(f"{self.output}: {count} images in {classes} class folders")
            else:
                normalisation = self.normalisation(found.settings)
                images, labels = as_tensors(found, normalisation, progress)
                write_tensors(output_folder(self.output), images, labels)
                by = f"normalised by mean {normalisation.mean} and std {normalisation.std}"
                console.print(f"{self.output} holds {IMAGES_FILE}, {list(images.shape)}, {by}, and {LABELS_FILE}")

    def _refuse_loss(self) -> None:
        if self.output.is_dir() and self.to == "parquet":
            raise InputError(f"{self.output} is a folder; --output names the Parquet file, such as {self.output / 'train.parquet'}")
        if self.output.is_file() and self.to != "parquet":
            raise InputError(f"{self.output} is a file; --output names a folder for {self.to}")
        if self.to == "folders" and self.output.is_dir() and any(self.output.iterdir()):
            raise InputError(
                f"{self.output} is not empty, and other images in it would be taken for some of this set; choose another --output"
            )
        files = {"parquet": [self.output], "tensors": [self.output / IMAGES_FILE, self.output / LABELS_FILE], "folders": []}[self.to]
        for path in files:
            if path.exists() and not self.overwrite:
                raise InputError(f"{path} exists; choose another --output, or pass --overwrite")


@dataclass(frozen=True, kw_only=True)
class Import(_Normalised):
    """Make a distilled set of Parquet files or of tensors of DC, DM, MTT, DATM or IDC, for all other commands. Run it again to resume.

    Parquet: a column of images (PNG or JPEG, which stay as they are) and one of labels. Tensors: a pair of files images_X.pt and
    labels_X.pt (the first one is enough), [images, labels] in one file, or a file with such pairs under 'data'.
    """

    files: tyro.conf.Positional[tuple[Path, ...]]  # Parquet files of one data set, or one or two PyTorch files.
    output: Path  # Folder for the set.
    classes: Path | None = None  # Text file with the names of the classes, one a line in the order of their numbers.
    experiment: NonNegativeInt | None = None  # Which one of several in a file of DC or DM, from 0.
    clip: bool = False  # Cut values of tensors that are no pixels: these methods do not clamp their images.
    image_column: str | None = None  # Column of the images in Parquet; default: image or img.
    label_column: str | None = None  # Column of the labels in Parquet; default: label, class_id or labels.

    def run(self, console: Console) -> None:
        """Make the set."""
        if not self.files:
            raise InputError("there is nothing to import; name Parquet files or PyTorch files")
        for path in self.files:
            if path.is_dir():
                raise InputError(f"{path} is a folder; name .parquet files or PyTorch files. Class folders of images are taken as they are")
        refuse_images(self.output)
        if all(path.suffix == ".parquet" for path in self.files):
            images, labels, names, settings = self._parquet()
        elif any(path.suffix == ".parquet" for path in self.files):
            raise InputError("Parquet files and PyTorch files cannot be one set; name one kind")
        else:
            images, labels, names, settings = self._tensors(console)
        names = self._class_names(names)
        settings = {"imported": [checksum(path) for path in self.files], **settings}
        with console.bars() as track:
            made = write_set(self.output, images, labels, names, settings, track("images"))
        now = "" if made == len(labels) else f", {made} written now"
        console.print(f"{self.output}: {len(labels)} images of {len(names)} classes{now}")

    def _parquet(self) -> _SetContents:
        found = read_parquet(self.files, image_column=self.image_column, label_column=self.label_column)
        return found.content, found.labels, found.class_names or _numbered(max(found.labels) + 1), {}

    def _tensors(self, console: Console) -> _SetContents:
        images, labels, soft = read_tensors(self.files, self.experiment)
        normalisation = self.normalisation({})
        pixels, cut = as_pixels(images, normalisation, clip=self.clip)
        if cut:
            console.print(cut)
        if soft:
            console.print("the labels are soft; each image goes to its likeliest class, and students get their labels from a teacher")
        levels = torch.cat([to_levels(part) for part in pixels.split(1000)])
        how = {"denormalised_by": {"mean": list(normalisation.mean), "std": list(normalisation.std)}, "experiment": self.experiment}
        return levels.__getitem__, labels.tolist(), _numbered(soft or int(labels.max()) + 1), how

    def _class_names(self, found: list[str]) -> list[str]:
        """Names from the flag, else from the files."""
        if self.classes is None:
            return found
        names = read_classes(self.classes)
        if len(names) != len(found):
            got = f"{len(names)} names; expected one for each of {len(found)} classes"
            raise InputError(f"{self.classes} holds {got}, in the order of their numbers")
        return names


def _numbered(classes: int) -> list[str]:
    """Class names if there are none: numbers, which stand for the real classes in sorted order."""
    return [str(number) for number in range(classes)]


def _counted(rows: Any, count: int, progress: Callable[[int, int], None]) -> Any:
    for number, row in enumerate(rows, 1):
        yield row
        progress(number, count)
