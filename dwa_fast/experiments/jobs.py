"""Runs the sets and cells of a study: finished ones are skipped, the others run one after another or in several processes."""

from __future__ import annotations

import functools
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

from dwa_fast.engine.backend import resolve_device
from dwa_fast.errors import InputError
from dwa_fast.experiments.cells import Cell, DistilledSource, Setup, accuracies, make_set, measure, set_is_complete

if TYPE_CHECKING:
    from joblib.externals.loky import ProcessPoolExecutor


class StudyProgress(Protocol):
    """Progress of a study, such as a progress bar."""

    def __call__(self, done: int, total: int) -> None:
        """Number of finished sets and cells, and the total."""

    def note(self, text: str) -> None:
        """Names of the sets and cells that are running."""


@dataclass(frozen=True)
class _Task:
    title: str
    call: Callable[..., None]  # takes `progress`

    def run(self, progress: Callable[[int, int], None] | None = None) -> None:
        try:
            self.call(progress=progress)
        except InputError as error:  # a subclass may not be picklable
            raise InputError(f"{self.title}: {error}") from None


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
        InputError: as `make_set` and `measure`, with the name of the cell; or a process died.
    """
    missing = {cell: name for cell, name in cells.items() if accuracies(setup, cell) is None}
    largest: dict[DistilledSource, tuple[int, str]] = {}
    for cell, name in cells.items():
        if isinstance(cell.source, DistilledSource):
            largest[cell.source] = max(largest.get(cell.source, (0, "")), (cell.ipc, name))
    used = {cell.source for cell in missing}
    to_make = {source: each for source, each in largest.items() if source in used or not set_is_complete(setup, source, each[0])}
    making = [_Task(f"making {name}", functools.partial(make_set, setup, source, ipc)) for source, (ipc, name) in to_make.items()]
    measuring = [_Task(f"students of {name}", functools.partial(measure, setup, cell)) for cell, name in missing.items()]
    total = len(largest) + len(cells)
    done = total - len(making) - len(measuring)
    if progress_bar:
        progress_bar(done, total)
    count = min(jobs, max(len(making), len(measuring)))
    with _processes(count) if count > 1 else nullcontext() as executor:
        for tasks in (making, measuring):
            run = _run_here(tasks, progress_bar) if executor is None else _run_in_processes(executor, tasks, count, progress_bar)
            for _ in run:
                done += 1
                if progress_bar:
                    progress_bar(done, total)
    return {cell: accuracies(setup, cell) or [] for cell in cells}


def _run_here(tasks: Sequence[_Task], progress_bar: StudyProgress | None) -> Iterator[None]:
    """Run the tasks one after another; yields after each."""
    for task in tasks:
        task.run(functools.partial(_note_percent, progress_bar, task.title) if progress_bar else None)
        yield


def _note_percent(progress_bar: StudyProgress, title: str, done: int, total: int) -> None:
    progress_bar.note(f"{title}, {100 * done // total} %")


@contextmanager
def _processes(count: int) -> Iterator[ProcessPoolExecutor]:
    """A pool of processes. After an error or Ctrl-C all of them are killed: every task can be resumed."""
    from joblib.externals.loky import ProcessPoolExecutor

    # Ctrl-C in a terminal reaches every process; only this one reacts.
    executor = ProcessPoolExecutor(count, initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN))
    finished = False
    try:
        yield executor
        finished = True
    finally:
        hook = threading.excepthook
        if not finished:  # loky's own thread may run into pipes of the processes that are killed, and would print that
            threading.excepthook = lambda _: None
        try:
            executor.shutdown(kill_workers=not finished)
        finally:
            threading.excepthook = hook


def _run_in_processes(
    executor: ProcessPoolExecutor, tasks: Sequence[_Task], count: int, progress_bar: StudyProgress | None
) -> Iterator[None]:
    """Run the tasks in a pool of `count` processes; yields after each."""
    from joblib.externals.loky import as_completed
    from joblib.externals.loky.process_executor import BrokenProcessPool

    running = {executor.submit(task.run): task.title for task in tasks}

    def note() -> None:
        if progress_bar:
            progress_bar.note("; ".join(list(running.values())[:count]))  # started in this order

    note()
    for future in as_completed(list(running)):
        title = running.pop(future)
        try:
            future.result()
        except BrokenProcessPool:
            reason = f"a process died, perhaps because memory ran out ({title})"
            raise InputError(f"{reason}; the same command resumes, and --jobs 1 needs the least memory") from None
        note()
        yield
