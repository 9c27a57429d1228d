"""The whole method on scikit-learn's digits: teacher, distilled sets, students, a table and a picture."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from dwa_fast.config import Config, NonNegativeInt, PositiveInt, check_choice
from dwa_fast.data.datasets import load
from dwa_fast.data.digest import image_digest
from dwa_fast.data.folders import image_folder
from dwa_fast.data.pixels import normalise
from dwa_fast.engine.backend import resolve_device
from dwa_fast.errors import InputError
from dwa_fast.evaluation.diversity import class_diversity
from dwa_fast.experiments.cells import REAL, Setup, StudyTeacher, inputs, set_folder
from dwa_fast.experiments.grid import Grid, Outcomes, Variant, best, cell_rows, contact_sheet, environment, note, run_grid, study_settings
from dwa_fast.experiments.jobs import StudyProgress, default_jobs
from dwa_fast.experiments.studies import TITLES, by_method
from dwa_fast.io.files import checksum, output_folder
from dwa_fast.models.checkpoint import TeacherInfo, load_teacher, save_teacher
from dwa_fast.recipes import SEVERAL_TEACHERS, recipe
from dwa_fast.report.records import Record, Table
from dwa_fast.training.fit import top1
from dwa_fast.training.squeeze import squeeze

_ON_SHEET = (REAL, "sre2l", "dwa")  # methods in the contact sheet, where they were made

Track = Callable[[str], StudyProgress]  # starts a progress bar with that title


@dataclass(frozen=True, kw_only=True)
class DemoConfig(Config):
    """Settings of the demo."""

    ipc: tuple[PositiveInt, ...] = (1, 5)  # Images per class.
    methods: tuple[str, ...] = (REAL, "sre2l", "real-start", "random-step", "dwa")  # real (plain real images), or methods of synthesize.
    students: PositiveInt = 5  # Students trained on each set, each with its own seed.
    iterations: PositiveInt | None = None  # Adam steps per batch; default: as in the digits recipe.
    epochs: PositiveInt | None = None  # Epochs of each student; default: as in the digits recipe.
    seed: NonNegativeInt = 0  # Seed of all random numbers.
    device: str = "auto"  # auto, cpu, cuda, cuda:1, …
    jobs: PositiveInt | None = None  # Processes that run at the same time, each with one CPU thread; default: one per thread of PyTorch.

    def __post_init__(self) -> None:
        super().__post_init__()
        for method in self.methods:
            check_choice("method", method, [each for each in TITLES if each not in SEVERAL_TEACHERS])
        if not self.ipc or not self.methods:
            raise InputError("the demo needs at least one ipc and one method")


def run_demo(output: Path, config: DemoConfig, track: Track) -> Record:
    """Run the whole pipeline in a folder: teacher.pt (of seed 1 teacher-seed1.pt), the sets, the students' results, contact-sheet.png.

    Finished work of an earlier run with the same settings is reused.
    """
    started = time.perf_counter()
    output_folder(output)
    accuracy = _teacher(_teacher_file(output, config), config, track)
    setup = _setup(output, config, accuracy)
    grid = Grid(variants=by_method(setup, config.methods), ipc=config.ipc, students=(setup.recipe.architecture,), seeds=(config.seed,))
    outcomes = run_grid(setup, grid, jobs=config.jobs or default_jobs(setup), progress_bar=track("sets and students"))
    shown = [TITLES[method] for method in _ON_SHEET]
    variants = [variant for variant in grid.variants if variant.name in shown] or grid.variants
    diversity = {(variant.name, ipc): _diversity(setup, variant, ipc, config.seed) for variant in grid.variants for ipc in grid.ipc}
    tested = len(inputs(setup).test.labels)
    return Record(
        kind="demo",
        title="The whole method on digits",
        summary=f"Teacher: {accuracy:.1f} % top-1 on {tested} held-out digits. {best(grid, outcomes)}",
        settings={**study_settings(setup, grid), "demo": asdict(config)},
        environment=environment(setup),
        seconds=time.perf_counter() - started,
        tables=[_table(setup, grid, outcomes, diversity)],
        pictures=contact_sheet(output, setup, variants, max(config.ipc), config.seed),
        data={
            "cells": cell_rows(setup, grid, outcomes),
            "teacher": {"accuracy": accuracy, "test_images": tested},
            "diversity": [{"set": name, "ipc": ipc, "per class": values} for (name, ipc), values in diversity.items()],
        },
    )


def _teacher(path: Path, config: DemoConfig, track: Track) -> float:
    """Train the teacher unless its file exists; returns its top-1 on the held-out digits, percent."""
    digits, device = recipe("digits"), resolve_device(config.device)
    train, test = (load(digits.data, None, split) for split in ("train", "test"))
    if not path.exists():
        module = squeeze(train, digits, device=device, seed=config.seed, progress=track("teacher"))
        info = TeacherInfo(
            architecture=digits.architecture,
            classes=10,
            channels=1,
            size=digits.data.size,
            accuracy=top1(module, test, digits.data, device),
            class_names=train.class_names,
            mean=digits.data.mean,
            std=digits.data.std,
        )
        save_teacher(path, module, info)
    module, info = load_teacher(path)
    return info.accuracy if info.accuracy is not None else top1(module.to(device), test, digits.data, device)


def _teacher_file(output: Path, config: DemoConfig) -> Path:
    """A file for each seed, the only setting that the teacher depends on."""
    return output / (f"teacher-seed{config.seed}.pt" if config.seed else "teacher.pt")


def _setup(output: Path, config: DemoConfig, accuracy: float) -> Setup:
    digits, teacher = recipe("digits", device=config.device), _teacher_file(output, config)
    synthesis, validation = digits.synthesis, replace(digits.validation, students=config.students)
    if config.iterations is not None:
        synthesis = replace(synthesis, iterations=config.iterations)
    if config.epochs is not None:
        validation = replace(validation, epochs=config.epochs)
    return Setup(
        output=output,
        recipe=replace(digits, synthesis=synthesis, validation=validation),
        folder=None,
        train_checksum=image_digest(load(digits.data, None, "train")),
        test_checksum=image_digest(load(digits.data, None, "test")),
        teachers=(StudyTeacher(file=teacher, checksum=checksum(teacher), architecture=digits.architecture, accuracy=accuracy),),
    )


def _diversity(setup: Setup, variant: Variant, ipc: int, seed: int) -> list[float]:
    """D^c of every class; empty for ipc 1."""
    if ipc == 1:
        return []
    data, device = setup.recipe.data, resolve_device(setup.recipe.synthesis.device)
    made = image_folder(set_folder(setup, variant.source(seed, ipc)), data.size, data.channels, per_class=ipc, by_number=True)
    images = normalise(made.load(range(len(made.labels))).to(device), data)
    return list(class_diversity(inputs(setup).teachers[0].to(device), images, made.labels.to(device)).values())


def _table(setup: Setup, grid: Grid, outcomes: Outcomes, diversity: dict[tuple[str, int], list[float]]) -> Table:
    rows = []
    for ipc in grid.ipc:
        for variant in grid.variants:
            outcome, found = outcomes[variant.name, ipc, setup.recipe.architecture], diversity[variant.name, ipc]
            reached = str(outcome)
            rows.append([variant.name, str(ipc), reached, f"{statistics.fmean(found):.0f}" if found else "–"])
    title, columns = (
        f"students of the distilled digits, {setup.recipe.validation.students} of each",
        ["set", "ipc", "top-1 %", "diversity D^c"],
    )
    return Table(title=title, columns=columns, rows=rows, note=note(setup, grid))
