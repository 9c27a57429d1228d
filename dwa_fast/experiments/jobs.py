"""Runs the sets and cells of a study: finished ones are skipped, the others run one after another or in several processes."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import Protocol

import torch

from dwa_fast.data.distilled import open_distilled
from dwa_fast.engine.backend import resolve_device
from dwa_fast.errors import InputError
from dwa_fast.experiments.cells import Cell, DistilledSource, ExternalSet, Setup, accuracies, inputs, make_set, measure, set_is_complete
from dwa_fast.models.architectures import build_on_meta
from dwa_fast.processes import Running, Task, processes


class StudyProgress(Protocol):
    """Progress of a study, such as a progress bar."""

    def __call__(self, done: int, total: int) -> None:
        """Number of finished sets and cells, and the total."""

    def note(self, text: str) -> None:
        """Names and progress of the sets and cells that are running."""


def default_jobs(setup: Setup) -> int:
    """As many processes as fill PyTorch's CPU threads; one on a GPU."""
    if resolve_device(setup.recipe.synthesis.device).type != "cpu":
        return 1
    return max(1, torch.get_num_threads() // setup.threads)


def run_cells(
    setup: Setup,
    cells: dict[Cell, str],
    *,
    jobs: int,
    progress_bar: StudyProgress | None = None,
) -> dict[Cell, list[float]]:
    """Top-1 of the students of every cell, percent. Missing sets are made first, each at its largest ipc.

    Args:
        cells: with their names for progress and error messages.
        jobs: processes that run at the same time; the results do not depend on it.
    Raises:
        InputError: as `make_set` and `measure`, with the name of the cell; a process died; or images of several patches have several ipc.
            Before anything is computed: a student cannot have images of that size, or a set from elsewhere cannot be read.
    """
    _check_patches(setup, cells)
    _check_first(setup, cells)
    missing = {cell: name for cell, name in cells.items() if accuracies(setup, cell) is None}
    largest: dict[DistilledSource, tuple[int, str]] = {}
    for cell, name in cells.items():
        if isinstance(cell.source, DistilledSource):
            largest[cell.source] = max(largest.get(cell.source, (0, "")), (cell.ipc, name))
    used = {cell.source for cell in missing}
    to_make = {source: each for source, each in largest.items() if source in used or not set_is_complete(setup, source, each[0])}
    making = [Task(f"making {name}", functools.partial(make_set, setup, source, ipc)) for source, (ipc, name) in to_make.items()]
    measuring = [Task(f"students of {name}", functools.partial(measure, setup, cell)) for cell, name in missing.items()]
    total = len(largest) + len(cells)
    done = total - len(making) - len(measuring)
    if progress_bar:
        progress_bar(done, total)
    with processes(max(1, min(jobs, max(len(making), len(measuring))))) as run:
        for tasks in (making, measuring):
            for _ in run(tasks, functools.partial(_note, progress_bar, tasks)):
                done += 1
                if progress_bar:
                    progress_bar(done, total)
    return {cell: accuracies(setup, cell) or [] for cell in cells}


def _check_patches(setup: Setup, cells: Iterable[Cell]) -> None:
    """Images of several patches depend on the ipc: the first ones of a larger set are not a smaller set."""
    configs = {(cell.source.synthesis, cell.ipc) for cell in cells if isinstance(cell.source, DistilledSource)}
    ipc, factor = sorted({ipc for config, ipc in configs if config and config.initial == "patches"}), setup.initial.patch_factor
    if factor > 1 and len(ipc) > 1:
        given = ", ".join(map(str, ipc))
        raise InputError(
            f"images of {factor} × {factor} patches are chosen for one ipc, got {given}; each needs a study with its own --output"
        )


def _check_first(setup: Setup, cells: Mapping[Cell, str]) -> None:
    """Find out now what would otherwise stop the study after hours of other cells."""
    data, opened = setup.recipe.data, set()
    for cell, name in cells.items():
        try:
            build_on_meta(cell.student, classes=2, channels=data.channels, size=data.size)
            if isinstance(cell.source, ExternalSet) and (cell.source, cell.ipc) not in opened:
                names = inputs(setup).test.class_names
                open_distilled(cell.source.folder, data.size, data.channels, names, per_class=cell.ipc)
                opened.add((cell.source, cell.ipc))
        except InputError as error:
            raise InputError(f"students of {name}: {error}") from error


def _note(progress_bar: StudyProgress | None, tasks: list[Task], running: Running) -> None:
    if progress_bar:
        progress_bar.note("; ".join(f"{tasks[place].title} ({100 * done // total} % done)" for place, (done, total) in running.items()))
