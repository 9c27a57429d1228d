"""Runs tasks one after another or in several processes, and reports the progress of those that are running."""

from __future__ import annotations

import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dwa_fast.config import Progress
from dwa_fast.errors import InputError

if TYPE_CHECKING:
    from joblib.externals.loky import ProcessPoolExecutor

Running = dict[int, tuple[int, int]]  # steps done and in all of each task that is running, by its place in the list of tasks

_EVERY = 0.5  # seconds between two reports of a process, and two looks for its parent


@dataclass(frozen=True)
class Task:
    """Work that may be done in another process."""

    title: str  # before error messages; empty: they stay as they are
    call: Callable[..., Any]  # takes `progress`; it and its result can be pickled

    def run(self, progress: Progress) -> Any:
        """The result of the call; an InputError names the task."""
        try:
            return self.call(progress=progress)
        except InputError as error:  # a subclass may not be picklable
            if not self.title:
                raise
            raise InputError(f"{self.title}: {error}") from None


Run = Callable[[Sequence[Task], Callable[[Running], object]], Iterator[tuple[int, Any]]]


@contextmanager
def processes(count: int) -> Iterator[Run]:
    """A function that runs tasks in that many processes; a single one is this process itself.

    It takes the tasks and a function that is called with the progress of the running ones, and yields the place and the result of each
    task when it is finished. After an error or Ctrl-C all processes are killed: tasks must be able to resume. They also end where this
    process is killed.
    """
    if count == 1:
        yield _run_here
        return
    from joblib.externals.loky import ProcessPoolExecutor

    executor = ProcessPoolExecutor(count, initializer=_start, initargs=(os.getpid(),))
    finished = False
    try:
        with tempfile.TemporaryDirectory(prefix="dwa-fast-") as folder:
            yield lambda tasks, report: _run_in_processes(executor, count, Path(folder), tasks, report)
        finished = True
    finally:
        hook = threading.excepthook
        if not finished:  # loky's own thread may run into pipes of the processes that are killed, and would print that
            threading.excepthook = lambda _: None
        try:
            executor.shutdown(kill_workers=not finished)
        finally:
            threading.excepthook = hook


def _start(parent: int) -> None:
    """Prepare a process: Ctrl-C, which reaches every process of a terminal, is left to the parent, and it ends where the parent does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_EVERY)
    os._exit(1)


@contextmanager
def _interrupts_ignored() -> Iterator[None]:
    """Inside, Ctrl-C does nothing, nor does it ever in processes that start there, which otherwise would print what it interrupts."""
    if threading.current_thread() is not threading.main_thread():  # others cannot set it
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _run_here(tasks: Sequence[Task], report: Callable[[Running], object]) -> Iterator[tuple[int, Any]]:
    for place, task in enumerate(tasks):

        def progress(done: int, total: int, place: int = place) -> None:
            report({place: (done, total)})

        yield place, task.run(progress)


def _run_in_processes(
    executor: ProcessPoolExecutor, count: int, folder: Path, tasks: Sequence[Task], report: Callable[[Running], object]
) -> Iterator[tuple[int, Any]]:
    from joblib.externals.loky.process_executor import BrokenProcessPool

    files = [_ProgressFile(folder / str(place)) for place in range(len(tasks))]
    with _interrupts_ignored():  # the first call starts the processes
        waiting = {executor.submit(task.run, file): place for place, (task, file) in enumerate(zip(tasks, files, strict=True))}
    while waiting:
        report({place: files[place].read() for place in list(waiting.values())[:count]})  # started in this order
        for future in wait(waiting, _EVERY, FIRST_COMPLETED).done:
            place = waiting.pop(future)
            try:
                result = future.result()
            except BrokenProcessPool:
                reason = f"a process died, perhaps because memory ran out ({tasks[place].title})"
                raise InputError(f"{reason}; the same command resumes, and --jobs 1 needs the least memory") from None
            files[place].path.unlink(missing_ok=True)
            yield place, result


class _ProgressFile:
    """Progress of a task in one process, written where another can read it."""

    def __init__(self, path: Path) -> None:
        self.path, self._next = path, 0.0

    def __call__(self, done: int, total: int) -> None:
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + _EVERY
            part = self.path.with_suffix(".part")
            part.write_text(f"{done} {total}")
            part.replace(self.path)

    def read(self) -> tuple[int, int]:
        """Steps done and in all; 0 of 1 before the first."""
        try:
            done, total = map(int, self.path.read_text().split())
        except FileNotFoundError:
            return 0, 1
        return done, total
