"""The command that stores soft labels."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import tyro

from dwa_fast.commands.console import Console
from dwa_fast.commands.data import DistilledData, Preset, naming_bad_images, on_its_threads
from dwa_fast.config import FkdConfig, NonNegativeInt, PositiveInt, ValidationConfig
from dwa_fast.engine import backend
from dwa_fast.errors import InputError
from dwa_fast.training.fkd_store import FKD_FILES
from dwa_fast.training.relabel import label_bytes, relabel, stored_epochs

LabelLayout = Literal["own", "fkd"]


@dataclass(frozen=True, kw_only=True)
class Relabel(DistilledData):
    """Store the teacher's soft labels for every view of a training. Run the same command again to resume.

    Views, mixes and batches are those of validate with the same settings and seed; settings of the students are not used.
    --layout fkd writes what SRe2L's train_FKD reads, below OUTPUT/fkd, with views of its own.
    """

    teacher: tuple[Path, ...]  # Checkpoint of the teacher; of several, the mean of the logits counts.
    output: Path  # Folder for the labels, for validate --soft-labels.
    pool: PositiveInt = 1  # Store one epoch of labels in this many; students reuse them. 1: every epoch.
    layout: LabelLayout = "own"  # own: one file per epoch. fkd: a folder per epoch and a file per batch, as SRe2L and its descendants read.
    dry_run: bool = False  # Only print how much disk space the labels would take.
    seed: NonNegativeInt = 0  # Seed of all random numbers.
    device: str = "auto"  # auto, cpu, cuda, cuda:1, …
    threads: PositiveInt | None = None  # CPU threads; the last bits of the results depend on them. Default: all.
    architecture: tuple[str, ...] = ()  # Network in each checkpoint, if the files do not name them; default: the recipe's.
    preset: Preset = "paper"
    config: tyro.conf.OmitArgPrefixes[ValidationConfig]
    fkd: tyro.conf.OmitArgPrefixes[FkdConfig] = field(default_factory=FkdConfig)

    @on_its_threads
    def run(self, console: Console) -> None:
        """Print the size of the labels, and write them."""
        device = backend.resolve_device(self.device)
        with naming_bad_images(), console.bars(shown=not self.dry_run) as track:
            distilled, test = self.open_both(console)
            images, classes, fkd = len(distilled.labels), len(test.class_names), self._fkd()
            epochs = f"{self.config.epochs * self.fkd.pool_share:g}" if fkd else f"{stored_epochs(self.config, self.pool)}"
            size = label_bytes(self.config, images, classes, self.pool, fkd) / 2**20
            console.print(f"soft labels of {epochs} epochs × {images} images × {classes} classes: {size:.3g} MiB on the disk")
            if self.dry_run:
                return
            teachers = [each.module for each in self.open_teachers(self.teacher, self.architecture, test, device)]
            recipe, progress = self.full_recipe(validation=self.config), track("soft labels")
            relabel(
                distilled,
                teachers,
                recipe,
                output=self.output,
                device=device,
                seed=self.seed,
                pool=self.pool,
                fkd=fkd,
                progress=progress,
            )
        console.print(f"{self.output}: complete; dwa-fast validate --soft-labels {self.output} takes them in the teacher's place")
        if fkd:
            program = "SRe2L's train_FKD.py" if fkd.pool_share == 1 else "LPLD's train_FKD_label_pruning_batch.py"
            console.print(
                f"for {program}: fkd-path {self.output / FKD_FILES}/, with the slash at its end, and train-dir {distilled.folder}"
            )

    def _fkd(self) -> FkdConfig | None:
        """The settings of FKD files, if these are wanted.

        Raises:
            InputError: they are given for our own layout.
        """
        if self.layout == "own" and self.fkd != FkdConfig():
            raise InputError("--logits, --sample-indices and --pool-share are for FKD files; pass --layout fkd, or leave them out")
        return self.fkd if self.layout == "fkd" else None
