"""A grid of cells (variants × ipc × students × seeds), and tables of its results."""

from __future__ import annotations

import itertools
import logging
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from dwa_fast.config import SynthesisConfig, check_integer
from dwa_fast.data.folders import image_folder
from dwa_fast.data.manifest import read_manifest
from dwa_fast.engine.backend import resolve_device
from dwa_fast.errors import InputError
from dwa_fast.experiments.cells import (
    REAL,
    Cell,
    DistilledSource,
    ExternalSet,
    Setup,
    nearest_method,
    other_versions,
    seconds_per_image,
    set_folder,
)
from dwa_fast.experiments.jobs import StudyProgress, run_cells
from dwa_fast.models.architectures import check_architecture
from dwa_fast.report import records
from dwa_fast.report.contact_sheet import write_contact_sheet
from dwa_fast.report.records import Chart, Picture, Series, Table, format_mean_std

_SHEET_CLASSES, _SHEET_IPC = 10, 10  # shown in a contact sheet, at most
log = logging.getLogger("dwa_fast")

TOP1 = "top-1 %"
SECONDS = "seconds per image"
_TIME_NOTE = (
    "Wall time of the processes that made the sets, on the machine and beside whatever else ran there; the first set that a process makes "
    "includes about a second of its start."
)


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One kind of set."""

    name: str  # in tables
    synthesis: SynthesisConfig | None = None  # None: plain real images, unless `external`
    external: Path | None = None  # folder of a set that was made elsewhere
    all_teachers: bool = False  # refined with all teachers of the study, else with the first

    def source(self, seed: int, ipc: int) -> DistilledSource | ExternalSet:
        """The set of a seed. Batches of whole classes depend on the ipc, so that each ipc has a set of its own."""
        if self.external:
            return ExternalSet(self.external, seed)
        synthesis = self.synthesis
        if synthesis and synthesis.batch_ipc is None:
            synthesis = replace(synthesis, batch_ipc=ipc)
        return DistilledSource(synthesis, seed, self.all_teachers)


@dataclass(frozen=True, kw_only=True)
class Grid:
    """The cells of a study."""

    variants: Sequence[Variant]
    ipc: Sequence[int]
    students: Sequence[str]  # architectures
    seeds: Sequence[int]  # of the synthesis: a set of each variant from each

    def __post_init__(self) -> None:
        for name, values in (("method or set", self.variants), ("ipc", self.ipc), ("student", self.students), ("seed", self.seeds)):
            if not values:
                raise InputError(f"a study needs at least one {name}, got none")
            if len(set(values)) < len(values):
                raise InputError(f"each {name} must be named once, got {', '.join(str(getattr(value, 'name', value)) for value in values)}")
        for ipc in self.ipc:
            check_integer("ipc", ipc, 1)
        for student in self.students:
            check_architecture("student", student)
        for seed in self.seeds:
            check_integer("seed", seed, 0)

    @property
    def places(self) -> list[tuple[Variant, int, str]]:
        """Every variant, ipc and student."""
        return list(itertools.product(self.variants, self.ipc, self.students))

    def cells(self, variant: Variant, ipc: int, student: str) -> list[Cell]:
        """The cells of a place, one per seed; one in all for a set that was made elsewhere."""
        seeds = self.seeds[:1] if variant.external else self.seeds
        return [Cell(variant.source(seed, ipc), ipc, student) for seed in seeds]


@dataclass(frozen=True)
class Outcome:
    """Accuracies of the students of one variant, ipc and architecture."""

    accuracies: list[list[float]]  # [seed][student], percent

    @property
    def mean(self) -> float:
        """Over all students of all seeds."""
        return statistics.fmean(map(statistics.fmean, self.accuracies))

    @property
    def std(self) -> float:
        """Of the sample: over seeds, of the means of their students; over the students where there is one seed; 0 for a single one."""
        return statistics.stdev(self.values) if len(self.values) > 1 else 0.0

    @property
    def spread(self) -> float | None:
        """The standard deviation for a chart; None for a single value."""
        return self.std if len(self.values) > 1 else None

    @property
    def values(self) -> list[float]:
        """What the standard deviation is over."""
        return [statistics.fmean(each) for each in self.accuracies] if len(self.accuracies) > 1 else self.accuracies[0]

    def __str__(self) -> str:
        return format_mean_std(self.mean, self.std, len(self.values))


Outcomes = dict[tuple[str, int, str], Outcome]  # by name of the variant, ipc and student
GridRunner = Callable[[Grid], Outcomes]


def run_grid(setup: Setup, grid: Grid, *, jobs: int, progress_bar: StudyProgress | None = None) -> Outcomes:
    """Compute the missing cells of a grid, and return the outcomes of all.

    Raises:
        InputError: as `run_cells`.
    """
    names: dict[Cell, str] = {}
    for variant, ipc, student in grid.places:
        for cell in grid.cells(variant, ipc, student):
            name = f"{variant.name}, ipc {ipc}, seed {cell.source.seed}"
            names.setdefault(cell, f"{name}, {student}" if len(grid.students) > 1 else name)
    found = run_cells(setup, names, jobs=jobs, progress_bar=progress_bar)
    older = [each for each in (other_versions(setup, cell) for cell in names) if each]
    if older:
        log.warning("%d of %d results in %s were computed earlier, with %s", len(older), len(names), setup.output, older[0])
    return {
        (variant.name, ipc, student): Outcome([found[cell] for cell in grid.cells(variant, ipc, student)])
        for variant, ipc, student in grid.places
    }


def note(setup: Setup, grid: Grid) -> str:
    """How the numbers of a table are computed, for its note."""
    count = setup.recipe.validation.students
    students = "one student" if count == 1 else f"{count} students"
    preset = records.preset_note(setup.recipe)
    if len(grid.seeds) > 1:
        parts = [f"Mean ± standard deviation over {len(grid.seeds)} synthesis seeds, of the mean of {students} each."]
        if any(variant.external for variant in grid.variants):
            parts.append(f"Sets that were made elsewhere: over {students} of the one set.")
    else:
        parts = [f"Mean ± standard deviation over {students} of one set." if count > 1 else "One student of one set each."]
    if len(setup.teachers) > 1 and setup.recipe.validation.labels == "soft":
        parts.append(f"Soft labels of all sets: {setup.recipe.validation.teacher_mean} mean of {len(setup.teachers)} teachers' logits.")
    return " ".join(part for part in (*parts, preset, records.tested_note(setup.recipe.data)) if part)


def cell_rows(setup: Setup, grid: Grid, outcomes: Outcomes) -> list[dict[str, Any]]:
    """The numbers behind the tables, for the data of a record, with every setting that differs from the recipe."""
    rows, measured = [], {ipc: times(setup, grid, ipc) for ipc in grid.ipc}
    for variant, ipc, student in grid.places:
        outcome, known = outcomes[variant.name, ipc, student], measured[ipc]
        method, changes = variant.name if variant.external else REAL, dict[str, Any]()
        if variant.synthesis is not None:
            method, changes = nearest_method(setup, variant.synthesis, variant.all_teachers)
        flat = [accuracy for each in outcome.accuracies for accuracy in each]
        row = {"recipe": setup.recipe.name, "method": method, "student": student, "ipc": ipc, "mean": outcome.mean, "std": outcome.std}
        synthesis = replace(setup.recipe, synthesis=variant.synthesis).settings("synthesis") if variant.synthesis else {}
        seconds = {"seconds_per_image": known[variant.name]} if variant.name in known else {}
        rows.append({**changes, **row, "accuracies": flat, "sets": len(outcome.accuracies), **seconds, "synthesis": synthesis})
    return rows


def study_settings(setup: Setup, grid: Grid) -> dict[str, Any]:
    """The settings of a study, for its record."""
    recipe, tensors = setup.recipe, setup.initial.initial_tensors
    return {
        "recipe": recipe.name,
        "teacher": {name: ", ".join(getattr(each, name) for each in setup.teachers) for name in ("architecture", "checksum")},
        "data": {name: value for name, value in asdict(recipe.data).items() if name not in ("mean", "std")},
        "ipc": list(grid.ipc),
        "synthesis seeds": list(grid.seeds),
        "students": list(grid.students),
        "synthesis": recipe.settings("synthesis"),
        "initial": {**asdict(setup.initial), "initial_tensors": None if tensors is None else str(tensors)},
        "validation": recipe.settings("validation"),
    }


def environment(setup: Setup) -> dict[str, Any]:
    """Versions, device and threads, on which the numbers may depend."""
    return {**records.environment(resolve_device(setup.recipe.synthesis.device)), "threads": setup.threads}


def by_ipc(title: str, setup: Setup, grid: Grid, outcomes: Outcomes, student: str) -> tuple[Table, Chart]:
    """Variants × ipc, as a table and as bars."""
    rows = [[variant.name, *(str(outcomes[variant.name, ipc, student]) for ipc in grid.ipc)] for variant in grid.variants]
    columns = ["set", *(f"ipc {ipc}" for ipc in grid.ipc)]
    bars = [series(variant.name, [outcomes[variant.name, ipc, student] for ipc in grid.ipc]) for variant in grid.variants]
    chart = Chart(title=title, x_label="images per class", y_label=TOP1, x=columns[1:], series=bars)
    return Table(title=f"{title}, {TOP1}", columns=columns, rows=rows, note=note(setup, grid)), chart


def by_student(title: str, setup: Setup, grid: Grid, outcomes: Outcomes, ipc: int) -> tuple[Table, Chart]:
    """Students × variants, as a table and as bars."""
    names = [variant.name for variant in grid.variants]
    rows = [[student, *(str(outcomes[name, ipc, student]) for name in names)] for student in grid.students]
    bars = [series(name, [outcomes[name, ipc, student] for student in grid.students]) for name in names]
    chart = Chart(title=title, x_label="student", y_label=TOP1, x=list(grid.students), series=bars)
    return Table(title=f"{title}, {TOP1}", columns=["student", *names], rows=rows, note=note(setup, grid)), chart


def series(name: str, outcomes: Sequence[Outcome]) -> Series:
    """A row of outcomes as a curve or as bars of one colour."""
    return Series(name=name, values=[each.mean for each in outcomes], spreads=[each.spread for each in outcomes])


def times(setup: Setup, grid: Grid, ipc: int) -> dict[str, float]:
    """Seconds per image of the sets of each variant, mean over seeds; without those that have not been measured."""
    found = {}
    for variant in grid.variants:
        each = [seconds_per_image(setup, variant.source(seed, ipc)) for seed in grid.seeds]
        known = [seconds for seconds in each if seconds is not None]
        if known:
            found[variant.name] = statistics.fmean(known)
    return found


def by_time(title: str, setup: Setup, grid: Grid, outcomes: Outcomes, student: str) -> tuple[list[Table], list[Chart]]:
    """Accuracy at the largest ipc against the time of the synthesis, as a table and as points; nothing where no time is known.

    Sets without a time, such as plain real images, are lines across.
    """
    ipc = max(grid.ipc)
    seconds = times(setup, grid, ipc)
    if not seconds:
        return [], []
    found = {variant.name: outcomes[variant.name, ipc, student] for variant in grid.variants}
    rows = [[name, _seconds(seconds.get(name)), str(outcome)] for name, outcome in found.items()]
    points = [
        Series(
            name=name,
            values=[outcome.mean if each == name or name not in seconds else None for each in seconds],
            spreads=[outcome.spread if each == name or name not in seconds else None for each in seconds],
            level=name not in seconds,
        )
        for name, outcome in found.items()
    ]
    title = f"{title}, ipc {ipc}, against the time of the synthesis"
    chart = Chart(title=title, x_label=SECONDS, y_label=TOP1, x=list(seconds.values()), series=points, log_x=True)
    return [Table(title=title, columns=["set", SECONDS, TOP1], rows=rows, note=_TIME_NOTE)], [chart]


def _seconds(value: float | None) -> str:
    return "–" if value is None else f"{value:.2g}"


def best(grid: Grid, outcomes: Outcomes) -> str:
    """A sentence for each ipc and student: the best variant, and how many others are within one standard deviation, if known."""
    sentences = []
    for ipc, student in itertools.product(grid.ipc, grid.students):
        ranked = sorted(((outcomes[variant.name, ipc, student], variant.name) for variant in grid.variants), key=lambda pair: -pair[0].mean)
        first, name = ranked[0]
        near = sum(first.mean - other.mean <= max(first.std, other.std) for other, _ in ranked[1:])
        place = f"ipc {ipc}" + (f", {student}" if len(grid.students) > 1 else "")
        if len(ranked) == 1:
            others = "nothing to compare it with"
        elif any(len(outcome.values) > 1 for outcome, _ in ranked):
            count = {0: "none", len(ranked) - 1: "all"}.get(near, str(near))
            others = f"{count} of the others within one standard deviation"
        else:
            others = f"{ranked[1][1]} next with {ranked[1][0]}; the spread of single students is not known"
        sentences.append(f"{place}: {name} first with {first}, {others}.")
    return " ".join(sentences)


def contact_sheet(folder: Path, setup: Setup, variants: Sequence[Variant], ipc: int, seed: int) -> list[Picture]:
    """Write contact-sheet.png: the first images of the first classes of the sets of one seed, side by side."""
    shown, panels = min(ipc, _SHEET_IPC), {}
    folders = {variant: set_folder(setup, variant.source(seed, ipc)) for variant in variants}
    names = read_manifest(folders[variants[0]])["class_names"][:_SHEET_CLASSES]
    for variant, made in folders.items():
        images = image_folder(made, setup.recipe.data.size, setup.recipe.data.channels, per_class=shown, by_number=True)
        panels[f"{variant.name}, ipc {shown}"] = images.load(range(len(names) * shown))
    write_contact_sheet(folder / "contact-sheet.png", panels, names)
    return [Picture(title="the first images of each class", file="contact-sheet.png")]
