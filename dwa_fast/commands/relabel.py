"""The command that keeps soft labels on disk."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

from dwa_fast.commands.console import Console
from dwa_fast.commands.data import DistilledData, compare_normalisation, naming_bad_images, try_teacher
from dwa_fast.config import NonNegativeInt, PositiveInt, ValidationConfig
from dwa_fast.engine import backend
from dwa_fast.training.relabel import label_bytes, relabel, stored_epochs


@dataclass(frozen=True, kw_only=True)
class Relabel(DistilledData):
    """Keep the teacher's soft labels for every view of a training on disk. Run the same command again to resume.

    Views, mixes and batches are those of validate with the same settings and seed; settings of the students are not used.
    """

    teacher: Path  # Checkpoint of the teacher.
    output: Path  # Folder for the labels, for validate --soft-labels.
    pool: PositiveInt = 1  # Keep the labels of one epoch in so many; students use them again and again. 1: of all.
    dry_run: bool = False  # Only say how much the labels would take on the disk.
    seed: NonNegativeInt = 0  # Seed of all random numbers.
    device: str = "auto"  # auto, cpu, cuda, cuda:1, …
    architecture: str | None = None  # What the checkpoint holds, where it does not say it itself; default: as the recipe says.
    config: tyro.conf.OmitArgPrefixes[ValidationConfig]

    def run(self, console: Console) -> None:
        """Say how much it will be, and write it."""
        device = backend.resolve_device(self.device)
        with naming_bad_images(), console.bars(shown=not self.dry_run) as track:
            distilled, test = self.open_both(console)
            images, classes, epochs = len(distilled.labels), len(test.class_names), stored_epochs(self.config, self.pool)
            size = label_bytes(self.config, images, classes, self.pool) / 2**20
            console.print(f"soft labels of {epochs} epochs × {images} images × {classes} classes: {size:.3g} MiB on the disk")
            if self.dry_run:
                return
            teacher = self.open_teacher(self.teacher, self.architecture, test.class_names)
            compare_normalisation(self.images, self.normalisation, teacher)
            try_teacher(teacher, test, self.normalisation, device)
            recipe, progress = self.full_recipe(validation=self.config), track("soft labels")
            relabel(distilled, teacher.module, recipe, output=self.output, device=device, seed=self.seed, pool=self.pool, progress=progress)
        console.print(f"{self.output}: complete; dwa-fast validate --soft-labels {self.output} takes them in the teacher's place")
