"""The command that trains students on a distilled set and tests them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import tyro

from dwa_fast.commands.console import Console
from dwa_fast.commands.data import Architecture, DistilledData, Preset, naming_bad_images, on_its_threads
from dwa_fast.commands.finish import finish
from dwa_fast.config import NonNegativeInt, PositiveInt, ValidationConfig
from dwa_fast.data.manifest import read_manifest, set_teachers
from dwa_fast.data.set_layout import refuse_images, set_folder
from dwa_fast.data.subsets import images_per_class
from dwa_fast.engine import backend
from dwa_fast.errors import InputError
from dwa_fast.io.files import LOCK, output_folder, sole_writer
from dwa_fast.models.architectures import check_architecture
from dwa_fast.models.checkpoint import TeacherInfo
from dwa_fast.recipes import preset_text
from dwa_fast.report.records import Record, Table, command_line, environment, format_mean_std, preset_data, preset_note, tested_note
from dwa_fast.training.validate import ValidationResult, validate


@dataclass(frozen=True, kw_only=True)
class Validate(DistilledData):
    """Train students on a distilled set and test them on the held-out real images. Run the same command again to resume."""

    teacher: tuple[Path, ...] = ()  # Checkpoint of the teacher, or of several; not needed with --soft-labels or hard labels.
    soft_labels: Path | None = None  # Folder of soft labels that dwa-fast relabel wrote, or of FKD files of any program; default: computed.
    student: Architecture
    seed: NonNegativeInt = 0  # Seed of all random numbers.
    device: str = "auto"  # auto, cpu, cuda, cuda:1, …
    threads: PositiveInt | None = None  # CPU threads; the last bits of the results depend on them. Default: all.
    architecture: tuple[str, ...] = ()  # Network in each checkpoint, if the files do not name them; default: the recipe's.
    test_every: NonNegativeInt = 0  # Also test each student after every so many epochs; 0: only at the end.
    jobs: PositiveInt = 1  # Students trained at the same time, each in a process with its share of the CPU's threads.
    output: Path | None = None  # Folder for record.json and for the state from which an interrupted run resumes.
    preset: Preset = "paper"
    config: tyro.conf.OmitArgPrefixes[ValidationConfig]

    @on_its_threads
    def run(self, console: Console) -> None:
        """Train and test the students."""
        started = time.perf_counter()
        check_architecture("student", self.student)
        if self.output:
            refuse_images(self.output)
        recipe, device = self.full_recipe(validation=self.config), backend.resolve_device(self.device)
        with ExitStack() as writing:
            with naming_bad_images(), console.bars() as track:
                distilled, test = self.open_both(console)
                if self.output:
                    writing.enter_context(sole_writer(output_folder(self.output), self.output / LOCK))
                if self.teacher and self.config.labels == "hard":
                    console.print("the labels are hard, and --teacher is not used")
                teachers = self.open_teachers(self.teacher, self.architecture, test, device)
                bar = track(f"{self.config.students} student{'s' * (self.config.students > 1)}")

                def tested(student: int, epochs: int, accuracy: float) -> None:
                    bar.report(f"student {student + 1}: {accuracy:.2f} % after {epochs} epochs")

                result = validate(
                    distilled,
                    test,
                    [each.module for each in teachers] or None,
                    self.student,
                    recipe,
                    device=device,
                    seed=self.seed,
                    progress=bar,
                    resume_dir=self.output,
                    soft_labels=self.soft_labels,
                    test_every=self.test_every,
                    tested=tested,
                    jobs=self.jobs,
                )
            preset = preset_text(recipe)
            training = f", {preset}" if preset else ""
            count = len(result.accuracies)
            reached = (
                f"{result.mean:.2f} ± {result.std:.2f} % top-1, {count} students"
                if count > 1
                else f"{result.mean:.2f} % top-1, one student"
            )
            console.print(f"{self.student}: {reached}{training}")
            if not self.output and (note := tested_note(recipe.data)):  # else below the table
                console.print(note)
            if self.output:
                record = self._record(result, images_per_class(distilled), [each.info for each in teachers])
                finish(console, self.output, replace(record, environment=environment(device), seconds=time.perf_counter() - started))

    def _record(self, result: ValidationResult, ipc: int | str, teachers: Sequence[TeacherInfo]) -> Record:
        made, recipe = self._set_settings(), self.full_recipe(validation=self.config)
        name = set_folder(self.images).name
        title = f"{self.student} on {name}, ipc {ipc}"
        rows = [[str(number), f"{accuracy:.2f}"] for number, accuracy in enumerate(result.accuracies, 1)]
        cell = {
            "recipe": self.recipe,
            "method": str(made.get("method", name)),  # another program's set goes by the name of its folder
            "student": self.student,
            "ipc": ipc,
            "mean": result.mean,
            "std": result.std,
            "accuracies": result.accuracies,
            "seeds": result.seeds,
            **({"tests": result.tests} if self.test_every else {}),
            **self._set_teachers(),
        }
        return Record(
            kind="validate",
            title=title,
            command=command_line(),
            settings={
                **{
                    name: str(value) if isinstance(value, Path) else value
                    for name, value in asdict(self).items()
                    if name not in ("config", "normalisation")
                },
                "teacher": _described(self.teacher, teachers),
                "validation": recipe.settings("validation"),
                "synthesis": made,
            },
            tables=[
                Table(
                    title=title,
                    columns=["student", "top-1 %"],
                    rows=[*rows, ["mean", format_mean_std(result.mean, result.std, len(result.accuracies))]],
                    note=" ".join(filter(None, (preset_note(recipe), tested_note(recipe.data)))),
                )
            ],
            data={"cells": [cell], "preset": preset_data(recipe)},
        )

    def _set_settings(self) -> dict[str, Any]:
        """The settings that one of our sets was made with; empty for other programs'."""
        with suppress(InputError):
            return dict(read_manifest(self.images)["settings"])
        return {}

    def _set_teachers(self) -> dict[str, list[str]]:
        """Architectures of the teachers that made the set, where its manifest has them."""
        with suppress(InputError):
            return set_teachers(read_manifest(self.images))
        return {}


def _described(paths: Sequence[Path], teachers: Sequence[TeacherInfo]) -> dict[str, str]:
    """The teachers' files and architectures for a record; one teacher is compared with published results."""
    return {"file": ", ".join(map(str, paths)), "architecture": ", ".join(each.architecture for each in teachers)} if teachers else {}
