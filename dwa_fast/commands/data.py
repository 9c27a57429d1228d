"""Flags that several commands share: the real images and the teacher."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from torch import Tensor

from dwa_fast.commands.console import Console
from dwa_fast.config import Fraction, Normalisation, PositiveFraction, PositiveInt
from dwa_fast.data.datasets import Split, load
from dwa_fast.data.distilled import open_distilled, set_manifest
from dwa_fast.data.images import FileSet, ImageSet
from dwa_fast.data.overlap import warn_if_made_from, warn_if_seen
from dwa_fast.data.pairing import PairedTeacher, as_flags, described, open_teacher
from dwa_fast.data.set_layout import refuse_class_folders
from dwa_fast.data.teacher_check import warn_if_inaccurate
from dwa_fast.errors import InputError
from dwa_fast.io.decode import BadImageError
from dwa_fast.models.architectures import ARCHITECTURES
from dwa_fast.recipes import METHODS, PRESETS, SEVERAL_TEACHERS, Recipe, recipe
from dwa_fast.threads import torch_threads
from dwa_fast.training.state import FinishedTeacher

log = logging.getLogger("dwa_fast")

Architecture = Annotated[str, tyro.conf.arg(help=f"One of {', '.join(ARCHITECTURES)}. Or timm:NAME, a network of timm.")]

Method = Annotated[
    str, tyro.conf.arg(help=f"One of {', '.join(METHODS)}. Of these {', '.join(SEVERAL_TEACHERS)} are for several teachers.")
]

Preset = Annotated[str, tyro.conf.arg(help=f"Training of the students, of which other flags change settings: {', '.join(PRESETS)}.")]


@dataclass(frozen=True, kw_only=True)
class Data:
    """Which real images a command reads."""

    recipe: str  # Settings of a data set: digits, cifar10, cifar100, tiny, imagenet, folder (your own), or one with -released.
    data: Path | None = None  # Folder of the real images; digits need none.
    download: bool = False  # Fetch CIFAR into that folder if it is not there.
    size: PositiveInt  # Height and width of the images, pixels.
    normalisation: tyro.conf.OmitArgPrefixes[Normalisation]
    held_out_share: Fraction = 0.0  # Test on this fraction of the training images of each class instead of the test images.
    test_crop: PositiveFraction = 1.0  # Fraction of the shorter side that the centre crop of test images covers; 0.875: 224 of 256 pixels.

    def full_recipe(self, **stages: Any) -> Recipe:
        """The recipe with the data as the flags have them, and with these stages."""
        data = {name: getattr(self, name) for name in ("size", "held_out_share", "test_crop")}
        return replace(recipe(self.recipe, **asdict(self.normalisation), **data), **stages)

    def warn_if_seen(self, settings: Mapping[str, Any], key: str, what: str) -> None:
        """Where a share of the training images is held out, warn of what was made from those as well."""
        if self.held_out_share and key in settings:
            warn_if_seen(settings, key, what, self.load("train"), self.held_out_share)

    def load(self, split: Split) -> ImageSet:
        """The images of a split.

        Raises:
            InputError: as `datasets.load`; or all are of one class, or the command would write among them.
        """
        images = load(self.full_recipe().data, self.data, split, download=self.download)
        if len(images.class_names) < 2:
            raise InputError(
                f"{self.data} has images of one class alone, {images.class_names[0]!r}; expected a sub-folder for each of several"
            )
        output: Path | None = getattr(self, "output", None)
        if output and isinstance(images, FileSet):
            refuse_class_folders(output, images.folder)
        return images


@dataclass(frozen=True, kw_only=True)
class TeacherData(Data):
    """Real images, and what a teacher's checkpoint may lack."""

    weights_key: str | None = None  # Key of the weights, if the checkpoint holds several, such as state_dict_ema.
    classes: Path | None = None  # The teacher's classes, one name per line in the order of its outputs, if they are not those of the data.

    def open_teacher(self, path: Path, architecture: str | None, class_names: Sequence[str]) -> PairedTeacher:
        """The teacher of a command, with the classes of its data as outputs.

        A checkpoint that does not name its network is taken for the recipe's. Raises InputError as `pairing.open_teacher`.
        """
        self.warn_if_seen(FinishedTeacher(path).settings() or {}, "real_images", f"teacher {path}")
        return open_teacher(
            path,
            class_names,
            self.normalisation,
            size=self.size,
            architecture=architecture,
            default_architecture=recipe(self.recipe).architecture,
            classes=self.classes,
            weights_key=self.weights_key,
        )

    def open_all(self, paths: Sequence[Path], architectures: Sequence[str], class_names: Sequence[str]) -> list[PairedTeacher]:
        """Several teachers in order, as `open_teacher`; the architectures are those of each, or empty."""
        if paths and architectures and len(architectures) != len(paths):
            raise InputError(f"--architecture must name a network for each of the {len(paths)} teachers, got {len(architectures)}")
        names: Sequence[str | None] = architectures or [None] * len(paths)
        return [self.open_teacher(path, own, class_names) for path, own in zip(paths, names, strict=False)]


@dataclass(frozen=True, kw_only=True)
class DistilledData(TeacherData):
    """A distilled set, and the real data that it was made from."""

    images: Path  # The distilled set, ours or another program's: class folders named as the real classes, or numbered from 0.
    ipc: PositiveInt | None = None  # Take the first images of each class only; default: all.
    skip_bad_images: bool = False  # Skip files that are not complete images and report how many; otherwise stop at the first.

    def open_both(self, console: Console) -> tuple[FileSet, ImageSet]:
        """The distilled images, and the held-out real ones."""
        test = readable_images(console, self.load("test"), self.skip_bad_images, used_late=True)
        distilled, skipped = open_distilled(
            self.images, self.size, self.normalisation.channels, test.class_names, per_class=self.ipc, skip_bad_images=self.skip_bad_images
        )
        report_skipped(console, skipped)
        settings = (set_manifest(self.images) or {}).get("settings", {})
        warn_if_made_from(settings, test)
        self.warn_if_seen(settings, "real_images_digest", f"the distilled set {self.images}")
        return distilled, test

    def open_teachers(
        self, paths: Sequence[Path], architectures: Sequence[str], test: ImageSet, device: torch.device
    ) -> list[PairedTeacher]:
        """The teachers of soft labels, each compared with the set and tried on held-out images; without any, the set alone is checked."""
        if not paths:
            compare_normalisation(self.images, self.normalisation, None)
        teachers = self.open_all(paths, architectures, test.class_names)
        for each in teachers:
            compare_normalisation(self.images, self.normalisation, each)
            try_teacher(each, test, self.normalisation, device)
        return teachers


def try_teacher(teacher: PairedTeacher, data: ImageSet, normalisation: Normalisation, device: torch.device) -> None:
    """Log the teacher's accuracy on some real images, and warn if it is near chance."""
    module = teacher.module.to(device)

    def predict(images: Tensor) -> Tensor:
        logits: Tensor = module(images.to(device))
        return logits

    warn_if_inaccurate(predict, data, normalisation)
    module.cpu()


def compare_normalisation(folder: Path, normalisation: Normalisation, teacher: PairedTeacher | None) -> None:
    """Compare the normalisation with that of the teacher that a set of ours was made with, as far as that is known.

    Raises:
        InputError: they differ, and it is this teacher.
    """
    settings = (set_manifest(folder) or {}).get("settings", {})
    made = settings.get("mean"), settings.get("std")
    known = teacher is not None and teacher.info.mean is not None  # then that has been compared, and is what counts
    if known or not all(isinstance(value, list) for value in made) or made == (list(normalisation.mean), list(normalisation.std)):
        return
    difference = f"{folder} was made with {described(*made)}, not {described(normalisation.mean, normalisation.std)}"
    made_with = settings.get("teacher")  # a list, if there were several
    if teacher is not None and teacher.checksum in (made_with if isinstance(made_with, list) else [made_with]):
        raise InputError(f"{difference}, and with this teacher; pass {as_flags(*made)}")
    log.warning("%s; a teacher is given images of the normalisation that it was trained with", difference)


_SHOWN = 5  # skipped files that are named


def readable_images(console: Console, data: ImageSet, skip_bad_images: bool, *, used_late: bool = False) -> ImageSet:
    """The images, on request without those that cannot be decoded, which are counted and named; every file is read once for it.

    Args:
        used_late: whether the images are decoded after hours of work alone, so that bad ones must be found now.
    Raises:
        InputError: nothing is left of a class.
        BadImageError: an image that is used late cannot be decoded, and none may be skipped.
    """
    if not (skip_bad_images or used_late) or not isinstance(data, FileSet):
        return data
    faults = data.faults()
    if faults and not skip_bad_images:
        index, cause = next(iter(faults.items()))
        raise BadImageError(data.folder / data.files[index], cause + (f" ({len(faults)} such files in all)" if len(faults) > 1 else ""))
    good = data.select([index for index in range(len(data.files)) if index not in faults])
    report_skipped(console, {data.name(index): cause for index, cause in faults.items()})
    missing = set(data.labels.tolist()) - set(good.labels.tolist())
    if missing:
        raise InputError(f"no image of class {data.class_names[min(missing)]!r} in {data.folder} can be read")
    return good


def report_skipped(console: Console, skipped: Mapping[str, str]) -> None:
    """Log how many images were skipped, and which."""
    if skipped:
        console.print(f"skipped {len(skipped)} image{'s' if len(skipped) > 1 else ''} that cannot be read:")
        for name, cause in list(skipped.items())[:_SHOWN]:
            console.print(f"  {name}: {cause}")
        if len(skipped) > _SHOWN:
            console.print("  …")


def counted(images: ImageSet) -> str:
    """How many there are, of how many classes."""
    classes = len(images.class_names)
    return f"{len(images.labels)} of {classes} class{'es' if classes > 1 else ''}"


def on_its_threads(run: Callable[[Any, Console], None]) -> Callable[[Any, Console], None]:
    """A command's `run`, on as many CPU threads as its flag `threads` says."""

    @functools.wraps(run)
    def limited(command: Any, console: Console) -> None:
        with torch_threads(command.threads):
            run(command, console)

    return limited


@contextmanager
def naming_bad_images() -> Iterator[None]:
    """Inside, an image that cannot be decoded stops the command with its name and the way out."""
    try:
        yield
    except BadImageError as error:
        raise InputError(f"{error}; with --skip-bad-images it is left out") from error
