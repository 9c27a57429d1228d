"""The command that trains a teacher."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro
from torch import nn

from dwa_fast.commands.console import Console
from dwa_fast.commands.data import Architecture, Data, counted, naming_bad_images, on_its_threads, readable_images
from dwa_fast.config import NonNegativeInt, PositiveInt, SqueezeConfig
from dwa_fast.data.images import ImageSet
from dwa_fast.data.overlap import warn_of_shared_images
from dwa_fast.data.set_layout import refuse_images
from dwa_fast.engine import backend
from dwa_fast.errors import InputError
from dwa_fast.io.files import output_folder
from dwa_fast.models.checkpoint import TeacherInfo, save_teacher
from dwa_fast.training.fit import top1
from dwa_fast.training.squeeze import squeeze


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
        """Train, test where there are held-out images, and write the checkpoint."""
        if self.output.is_dir():
            raise InputError(f"{self.output} is a folder; --output names the file of the teacher, such as {self.output / 'teacher.pt'}")
        if self.output.exists() and not self.overwrite:
            raise InputError(f"{self.output} exists; choose another name, or pass --overwrite")
        refuse_images(self.output)
        device = backend.resolve_device(self.device)
        checkpoint_file = self.output.with_name(f".{self.output.name}.state")
        with naming_bad_images(), console.bars() as track:
            train = self.load("train")
            output_folder(self.output.parent)
            console.print(f"training images: {counted(train)}")
            if self.config.schedule == "short":
                console.print(f"epochs: {self.config.epochs}, for better students; --schedule cosine trains as published")
            train = readable_images(console, train, self.skip_bad_images)
            test = self._held_out(console)
            if test is not None:
                warn_of_shared_images(train, test)
            recipe = self.full_recipe(squeeze=self.config, architecture=self.architecture)
            bar = track("teacher")

            def tested(network: nn.Module, epochs: int) -> None:
                if test is not None:
                    bar.note(f"{top1(network, test, recipe.data, device):.2f} % after {epochs} epochs")

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
        accuracy = None if test is None else top1(module, test, recipe.data, device)
        info = TeacherInfo(
            architecture=self.architecture,
            classes=len(train.class_names),
            channels=recipe.data.channels,
            size=self.size,
            accuracy=accuracy,
            class_names=train.class_names,
            mean=recipe.data.mean,
            std=recipe.data.std,
        )
        save_teacher(self.output, module, info)
        checkpoint_file.unlink(missing_ok=True)
        console.print(f"{self.output}: {self.architecture}" + ("" if accuracy is None else f", {accuracy:.2f} % top-1 on held-out images"))

    def _held_out(self, console: Console) -> ImageSet | None:
        """The held-out images; None, with a message, where there are none."""
        try:
            test = self.load("test")
        except InputError as error:
            console.print(f"not tested: {error}")
            return None
        return readable_images(console, test, self.skip_bad_images, used_late=True)
