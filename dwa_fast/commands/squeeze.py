"""The command that trains a teacher."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from torch import nn

from dwa_fast.commands.console import Bar, Console
from dwa_fast.commands.data import Architecture, Data, counted, naming_bad_images, on_its_threads, readable_images
from dwa_fast.config import NonNegativeInt, PositiveInt, SqueezeConfig
from dwa_fast.data.images import ImageSet
from dwa_fast.data.overlap import warn_of_shared_images
from dwa_fast.data.set_layout import AmongImagesError, refuse_images
from dwa_fast.engine import backend
from dwa_fast.errors import InputError
from dwa_fast.io.files import output_folder, sole_writer
from dwa_fast.models.architectures import check_architecture
from dwa_fast.models.checkpoint import TeacherInfo, load_teacher, save_teacher
from dwa_fast.recipes import Recipe
from dwa_fast.training.fit import top1
from dwa_fast.training.squeeze import squeeze, training_settings
from dwa_fast.training.state import FinishedTeacher


@dataclass(frozen=True, kw_only=True)
class Squeeze(Data):
    """Train a teacher on the real images. The same command resumes an interrupted training."""

    output: Path  # Checkpoint to write, such as teacher.pt.
    architecture: Architecture
    overwrite: bool = False  # Replace a checkpoint that is already there.
    skip_bad_images: bool = False  # Skip files that are not complete images and report how many; otherwise stop at the first.
    test_every: NonNegativeInt = 0  # Also test the network after every so many epochs; 0: only at the end.
    seed: NonNegativeInt = 0  # Seed of all random numbers.
    device: str = "auto"  # auto, cpu, cuda, cuda:1, …
    threads: PositiveInt | None = None  # CPU threads; the last bits of the results depend on them. Default: all.
    config: tyro.conf.OmitArgPrefixes[SqueezeConfig]

    @on_its_threads
    def run(self, console: Console) -> None:
        """Train, test where there are held-out images, and write the checkpoint; or say that it is there."""
        if self.output.is_dir():
            raise InputError(f"{self.output} is a folder; --output names the file of the teacher, such as {self.output / 'teacher.pt'}")
        check_architecture("architecture", self.architecture)
        self._refuse_unknown()
        refuse_images(self.output)
        with naming_bad_images(), console.bars() as track:
            train, test = self.load("train"), self._held_out()
            console.print(f"training images: {counted(train)}")
            output_folder(self.output.parent)
            train = readable_images(console, train, self.skip_bad_images)
            with sole_writer(self.output, self.output.with_name(f".{self.output.name}.lock")):
                complete = self._is_complete(train)
                if not complete:
                    self._train(console, track, train, test)
        info = load_teacher(self.output)[1]
        reached = "not tested" if info.accuracy is None else f"{info.accuracy:.2f} % top-1 on held-out images"
        there, then = ("complete, ", " when it was trained") if complete else ("", "")
        console.print(f"{self.output}: {there}{info.architecture}, {reached}{then}")

    def _refuse_unknown(self) -> None:
        """Raise InputError where a file would be replaced whose settings are not known."""
        if self.output.exists() and not self.overwrite and not FinishedTeacher(self.output).known():
            raise InputError(f"{self.output} exists; choose another name, or pass --overwrite")

    def _is_complete(self, train: ImageSet) -> bool:
        """Whether the teacher is there.

        Raises:
            InputError: it was trained with other settings.
        """
        self._refuse_unknown()
        if self.overwrite or not self.output.exists():
            return False
        FinishedTeacher(self.output).compare(self._settings(train))
        return True

    def _settings(self, train: ImageSet) -> dict[str, Any]:
        return training_settings(train, self._recipe(), backend.resolve_device(self.device), self.seed)

    def _recipe(self) -> Recipe:
        return self.full_recipe(squeeze=self.config, architecture=self.architecture)

    def _train(self, console: Console, track: Callable[[str], Bar], train: ImageSet, held_out: ImageSet | InputError) -> None:
        if self.config.schedule == "short":
            console.print(f"schedule short, epochs: {self.config.epochs}; --schedule cosine trains as published")
        recipe, device = self._recipe(), backend.resolve_device(self.device)
        checkpoint_file = self.output.with_name(f".{self.output.name}.state")
        test = None
        if isinstance(held_out, InputError):
            console.print(f"not tested: {held_out}")
        else:
            test = readable_images(console, held_out, self.skip_bad_images, used_late=True)
            warn_of_shared_images(train, test)
        bar = track("teacher")

        def tested(network: nn.Module, epochs: int) -> None:
            if test is not None:
                bar.report(f"{top1(network, test, recipe.data, device):.2f} % after {epochs} epochs")

        module = squeeze(
            train,
            recipe,
            device=device,
            seed=self.seed,
            progress=bar,
            checkpoint_file=checkpoint_file,
            tested=tested,
            test_every=self.test_every,
        )
        info = TeacherInfo(
            architecture=self.architecture,
            classes=len(train.class_names),
            channels=recipe.data.channels,
            size=self.size,
            accuracy=None if test is None else top1(module, test, recipe.data, device),
            class_names=train.class_names,
            mean=recipe.data.mean,
            std=recipe.data.std,
        )
        save_teacher(self.output, module, info)
        FinishedTeacher(self.output).write(self._settings(train))
        checkpoint_file.unlink(missing_ok=True)

    def _held_out(self) -> ImageSet | InputError:
        """The held-out images, or why there are none."""
        try:
            return self.load("test")
        except AmongImagesError:
            raise
        except InputError as error:
            return error
