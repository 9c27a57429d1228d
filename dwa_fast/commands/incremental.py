"""The command for class-incremental learning from distilled sets."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import tyro

from dwa_fast.commands.console import Console
from dwa_fast.commands.data import Preset, compare_normalisation, naming_bad_images, on_its_threads, try_teacher
from dwa_fast.commands.finish import finish
from dwa_fast.commands.sets import DistilledSets, study_folder, teacher_settings
from dwa_fast.config import NonNegativeInt, PositiveInt, SynthesisConfig, ValidationConfig
from dwa_fast.data.digest import image_digest
from dwa_fast.data.images import FileSet
from dwa_fast.data.manifest import read_manifest, set_teachers
from dwa_fast.data.set_layout import is_set
from dwa_fast.data.subsets import images_per_class
from dwa_fast.engine import backend
from dwa_fast.evaluation.incremental import IncrementalConfig, class_order, learn
from dwa_fast.io.files import LOCK, sole_writer
from dwa_fast.recipes import preset_text
from dwa_fast.report.records import Chart, Record, Series, Table, command_line, environment, format_mean_std, preset_data, tested_note
from dwa_fast.training.validate import ValidationResult

_STEPS = "steps"  # folder of the finished steps

Accuracies = Mapping[str, list[list[list[float]]]]  # by set: [seeds][tasks][students], percent


@dataclass(frozen=True, kw_only=True)
class Incremental(DistilledSets):
    """Class-incremental learning (GDumb): at every step a new student learns from the distilled images of all classes seen so far.

    Soft labels are the teacher's logits of these classes alone. Run the same command again to resume.
    """

    teacher: Path  # Checkpoint of the teacher, which gives the soft labels.
    output: Path  # Folder for record.json, the chart and the finished steps.
    student: str  # Architecture of the students, as for squeeze --architecture.
    seed: NonNegativeInt = 0  # Seed of all random numbers.
    device: str = "auto"  # auto, cpu, cuda, cuda:1, …
    threads: PositiveInt | None = None  # CPU threads; the last bits of the results depend on them. Default: all.
    architecture: str | None = None  # Network in the checkpoint, if the file does not name it; default: the recipe's.
    jobs: PositiveInt = 1  # Tasks learned at the same time, each in a process with its share of the CPU's threads.
    protocol: tyro.conf.OmitArgPrefixes[IncrementalConfig] = field(default_factory=IncrementalConfig)
    preset: Preset = "paper"
    config: tyro.conf.OmitArgPrefixes[ValidationConfig]

    @on_its_threads
    def run(self, console: Console) -> None:
        """Train and test a student for every set, order of the classes and step, and write the record."""
        started = time.perf_counter()
        recipe, device = self.full_recipe(validation=self.config), backend.resolve_device(self.device)
        test = self.real(console, "test")
        sets = self.open_sets(console, test.class_names)
        teacher = self.open_teacher(self.teacher, self.architecture, test.class_names)
        for images in sets.values():
            compare_normalisation(images.folder, self.normalisation, teacher)
        try_teacher(teacher, test, self.normalisation, device)
        tested = {"held_out_share": recipe.data.held_out_share, "test_crop": recipe.data.test_crop}
        settings = {
            "recipe": self.recipe,
            "size": self.size,
            "held_out": image_digest(test),
            **tested,
            "student": self.student,
            "seed": self.seed,
            "tasks": self.protocol.tasks,
            "teacher": teacher_settings(teacher),
            "validation": recipe.settings("validation"),
        }
        resume_dir = study_folder(self.output, settings) / _STEPS
        with sole_writer(self.output, self.output / LOCK):
            with naming_bad_images(), console.bars() as track:
                accuracies = learn(
                    sets,
                    test,
                    teacher.module,
                    self.student,
                    recipe,
                    self.protocol,
                    device=device,
                    resume_dir=resume_dir,
                    seed=self.seed,
                    jobs=self.jobs,
                    progress=track(f"tasks {self.protocol.tasks}, orders {self.protocol.seeds}, sets {len(sets)}"),
                )
            names = test.class_names
            orders = [class_order(len(names), self.protocol.tasks, seed=self.seed, index=index) for index in range(self.protocol.seeds)]
            seen = list(itertools.accumulate(map(len, orders[0])))
            facts: dict[str, Any] = {"settings": settings, "environment": environment(device), "command": command_line()}
            cells = [
                {"recipe": self.recipe, "student": self.student, **_provenance(sets[name], name), "classes seen": count, **result}
                for name, own in accuracies.items()
                for count, result in zip(seen, _steps(own), strict=True)
            ]
            data = {
                "cells": cells,
                "class orders": [[[names[label] for label in part] for part in order] for order in orders],
                "top-1 % by set, order, task and student": accuracies,
                "preset": preset_data(recipe),
            }
            labels, text = f"{self.config.labels} labels", preset_text(recipe)
            labels += f" and {text}" if text else ""
            facts |= {"data": data, "seconds": time.perf_counter() - started}
            finish(console, self.output, as_record(accuracies, seen, labels, tested_note(recipe.data), **facts))


def as_record(accuracies: Accuracies, seen: list[int], labels: str, tested: str, **facts: Any) -> Record:
    """Table and curve of accuracies over the classes seen."""
    results = {name: _steps(own) for name, own in accuracies.items()}
    orders = len(next(iter(accuracies.values())))
    rows = [
        [name, *(_with_spread(step) for step in steps), f"{statistics.fmean(step['mean'] for step in steps):.1f}"]
        for name, steps in results.items()
    ]
    last = "; ".join(f"{name} {_with_spread(steps[-1])}" for name, steps in results.items())
    return Record(
        kind="incremental",
        title=f"Class-incremental learning in {len(seen)} tasks",
        summary=f"Top-1 % once all {seen[-1]} classes are seen: {last}.",
        tables=[
            Table(
                title="Top-1 % on the classes seen so far",
                columns=["set", *(f"{count} class{'es' if count > 1 else ''}" for count in seen), "mean of steps"],
                rows=rows,
                note=f"Mean ± standard deviation over {orders} orders of the classes. Each step trains a new student on the distilled "
                f"images of all classes so far, with {labels}; soft ones are the teacher's logits of these classes alone."
                f" {tested}".rstrip(),
            )
        ],
        charts=[
            Chart(
                title="Top-1 % on the classes seen so far",
                x_label="classes seen",
                y_label="top-1 %",
                x=seen,
                series=[
                    Series(name=name, values=[step["mean"] for step in steps], spreads=[step["std"] for step in steps])
                    for name, steps in results.items()
                ],
            )
        ],
        **facts,
    )


def _with_spread(step: dict[str, Any]) -> str:
    return format_mean_std(step["mean"], step["std"], len(step["accuracies"]))


def _steps(own: list[list[list[float]]]) -> list[dict[str, Any]]:
    """Each step over the orders of the classes, the students of an order averaged."""
    found = []
    for task in range(len(own[0])):
        means = [statistics.fmean(order[task]) for order in own]
        result = ValidationResult(means, [])
        found.append({"mean": result.mean, "std": result.std, "accuracies": means})
    return found


def _provenance(images: FileSet, name: str) -> dict[str, Any]:
    """The settings that a set was made with, if recorded; else its name stands for the method."""
    manifest = read_manifest(images.folder) if is_set(images.folder) else {"settings": {}}
    settings = manifest["settings"]
    names = ["mean", "std", "teacher", *(each.name for each in fields(SynthesisConfig))]
    synthesis = {field: settings[field] for field in names if field in settings}
    extra = {**({"synthesis": synthesis} if synthesis else {}), **set_teachers(manifest)}
    return {"set": name, "method": settings.get("method", name), "ipc": images_per_class(images), **extra}
