"""The commands for the tables of the paper. Finished work is skipped; all studies of an output folder share their sets."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import tyro

from dwa_fast.commands.console import Console
from dwa_fast.commands.data import Preset, TeacherData, readable_images, try_teacher
from dwa_fast.commands.finish import finish
from dwa_fast.commands.sets import named_sets
from dwa_fast.config import InitialConfig, NonNegative, Positive, PositiveInt, SynthesisConfig, ValidationConfig
from dwa_fast.data.digest import image_digest
from dwa_fast.data.overlap import warn_of_shared_images
from dwa_fast.data.set_layout import refuse_images
from dwa_fast.engine import backend
from dwa_fast.errors import InputError
from dwa_fast.experiments.cells import REAL, Setup, StudyTeacher
from dwa_fast.experiments.grid import GridRunner, contact_sheet, run_grid
from dwa_fast.experiments.jobs import default_jobs
from dwa_fast.experiments.studies import AblationName, ablate, by_method, compare, cross
from dwa_fast.io.files import output_folder
from dwa_fast.report.records import Record, command_line


@dataclass(frozen=True, kw_only=True)
class Study(TeacherData):
    """Flags of every study."""

    teacher: tuple[Path, ...]  # Checkpoint of the teacher, or of several: all give soft labels; methods of one teacher take the first.
    output: Path  # Folder for sets and cells, shared by all studies in it, and for one folder per study with its record.
    ipc: tuple[PositiveInt, ...] = (10,)  # Images per class; a smaller set is the start of a larger one.
    seeds: PositiveInt = 3  # Sets of each kind, synthesised from seeds 0, 1, …; standard deviations are over them.
    architecture: tuple[str, ...] = ()  # Network in each checkpoint, if the files do not name them; default: the recipe's.
    jobs: PositiveInt | None = None  # Processes that compute sets and cells at the same time; default: as many as fill the CPU, 1 on a GPU.
    threads: PositiveInt = 1  # CPU threads of each process; the last bits depend on it, but not on --jobs.
    initial: tyro.conf.OmitArgPrefixes[InitialConfig] = field(default_factory=InitialConfig)
    preset: Preset = "paper"
    fast: bool = False  # A quarter of DWA's iterations, for every method.
    synthesis: SynthesisConfig  # DWA's settings, from which those of each set are derived.
    validation: ValidationConfig  # Training of the students.

    def _run_study(self, console: Console, name: str, study: Callable[[GridRunner, Setup, Path], Record]) -> None:
        """Compute the missing cells, and write the record into a folder of that name."""
        refuse_images(self.output)
        setup, started = self._setup(console), time.perf_counter()
        folder = output_folder(self.output / name)
        with console.bars() as track:
            run = functools.partial(run_grid, setup, jobs=self.jobs or default_jobs(setup), progress_bar=track(name))
            record = study(run, setup, folder)
        finish(console, folder, replace(record, command=command_line(), seconds=time.perf_counter() - started))

    def _setup(self, console: Console) -> Setup:
        train, test = self.load("train"), readable_images(console, self.load("test"), False, used_late=True)
        warn_of_shared_images(train, test)
        if not self.teacher:
            raise InputError("--teacher must name at least one checkpoint, got none")
        teachers = self.open_all(self.teacher, self.architecture, test.class_names)
        for each in teachers:
            try_teacher(each, test, self.normalisation, backend.resolve_device(self.synthesis.device))
        return Setup(
            output=self.output,
            recipe=self.full_recipe(architecture=teachers[0].info.architecture, synthesis=self.synthesis, validation=self.validation),
            folder=self.data,
            train_checksum=image_digest(train),
            test_checksum=image_digest(test),
            teachers=tuple(
                StudyTeacher(
                    file=file,
                    checksum=each.checksum,
                    architecture=each.info.architecture,
                    accuracy=each.info.accuracy,
                    classes=each.info.classes,
                    outputs=tuple(each.outputs) if each.outputs else None,
                )
                for file, each in zip(self.teacher, teachers, strict=True)
            ),
            weights_key=self.weights_key,
            initial=self.initial,
            threads=self.threads,
        )


@dataclass(frozen=True, kw_only=True)
class Compare(Study):
    """Compare methods: top-1 of students on the sets of each, at every ipc. A table, bars and a contact sheet."""

    methods: tuple[str, ...] = (REAL, "sre2l", "real-start", "random-step", "dwa")  # real (plain real images), or methods of synthesize.
    student: str  # Architecture of the students, as for squeeze --architecture.

    def run(self, console: Console) -> None:
        """Run the study, and print its table."""

        def study(run: GridRunner, setup: Setup, folder: Path) -> Record:
            found = compare(run, setup, methods=self.methods, ipc=self.ipc, student=self.student, seeds=range(self.seeds))
            return replace(found, pictures=contact_sheet(folder, setup, by_method(setup, self.methods), max(self.ipc), 0))

        self._run_study(console, "compare", study)


@dataclass(frozen=True, kw_only=True)
class Ablate(Study):
    """Repeat an ablation or a sweep of the paper: tables, and bars, a curve or a heat map.

    adjustment: no step, a random one, the directed one. lambda-var: λ_var alone against λ_mean = λ_var. k-rho: steps × length of the
    adjustment. matching-weights: matching terms on the adjusted or on the original weights. initial: real images or noise.
    iterations: accuracy against T and against time.
    """

    study: tyro.conf.Positional[AblationName]  # Which one: adjustment, lambda-var, k-rho, matching-weights, initial or iterations.
    student: str  # Architecture of the students, as for squeeze --architecture.
    lambda_vars: tuple[NonNegative, ...] = (0.01, 0.03, 0.05, 0.07, 0.09, 0.11, 0.13, 0.15, 0.17, 0.19, 0.21, 0.23)  # Values of lambda-var.
    steps: tuple[PositiveInt, ...] = (4, 8, 12, 16, 20)  # K in k-rho.
    rhos: tuple[Positive, ...] = (0.005, 0.01, 0.015, 0.02, 0.025)  # ρ in k-rho.
    iterations: tuple[PositiveInt, ...] = (125, 250, 500, 1000, 2000)  # T in iterations.

    def run(self, console: Console) -> None:
        """Run the study, and print its table."""

        def study(run: GridRunner, setup: Setup, folder: Path) -> Record:
            return ablate(
                run,
                setup,
                study=self.study,
                ipc=self.ipc,
                student=self.student,
                seeds=range(self.seeds),
                lambda_vars=self.lambda_vars,
                steps=self.steps,
                rhos=self.rhos,
                iterations=self.iterations,
            )

        self._run_study(console, f"ablate-{self.study}", study)


@dataclass(frozen=True, kw_only=True)
class Cross(Study):
    """Train students of several architectures on the sets of several methods: a table and bars."""

    methods: tuple[str, ...] = ("sre2l", "dwa")  # real (plain real images), or methods of synthesize; none: only those of --sets.
    sets: tuple[str, ...] = ()  # Also these sets, made by whatever program: folders of class folders, or name=folder.
    student: tuple[str, ...]  # Architectures of the students, as for squeeze --architecture.

    def run(self, console: Console) -> None:
        """Run the study, and print its table."""
        sets = named_sets(self.sets)

        def study(run: GridRunner, setup: Setup, folder: Path) -> Record:
            seeds = range(self.seeds)
            return cross(run, setup, methods=self.methods, sets=sets, ipc=self.ipc, students=self.student, seeds=seeds)

        self._run_study(console, "cross", study)
