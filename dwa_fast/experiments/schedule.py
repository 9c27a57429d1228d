"""Carries cells out: what is finished is skipped, the rest is computed here, or by several processes at the same time."""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from dwa_fast.engine.backend import resolve_device
from dwa_fast.errors import InputError
from dwa_fast.experiments.cells import Cell, Made, Setup, accuracies, make_set, measure, set_is_there


class Watcher(Protocol):
    """What is told how far a study is, such as a progress bar."""

    def __call__(self, done: int, total: int) -> None:
        """How many sets and cells are finished, and how many there are."""

    def note(self, text: str) -> None:
        """What is being computed."""


@dataclass(frozen=True)
class _Task:
    title: str
    call: Callable[..., None]  # takes `progress`


def default_jobs(setup: Setup) -> int:
    """As many processes as keep the CPU busy; one where a GPU computes."""
    if resolve_device(setup.synthesis.device).type != "cpu":
        return 1
    return max(1, torch.get_num_threads() // setup.threads)


def carry_out(
    setup: Setup,
    cells: dict[Cell, str],
    *,
    jobs: int,
    watcher: Watcher | None = None,
) -> dict[Cell, list[float]]:
    """Top-1 of the students of every cell, percent. Sets that are wanting are made first, each at the largest ipc that is asked of it.

    Args:
        cells: each with its name for people.
        jobs: processes that compute at the same time; the results are the same whatever it is.
    Raises:
        InputError: as `make_set` and `measure`; or a process has died.
    """
    wanting = {cell: name for cell, name in cells.items() if accuracies(setup, cell) is None}
    largest: dict[Made, tuple[int, str]] = {}
    for cell, name in cells.items():
        if isinstance(cell.source, Made):
            largest[cell.source] = max(largest.get(cell.source, (0, "")), (cell.ipc, name))
    used = {cell.source for cell in wanting}
    to_make = {made: ask for made, ask in largest.items() if made in used or not set_is_there(setup, made, ask[0])}
    making = [_Task(f"making {name}", functools.partial(make_set, setup, made, ipc)) for made, (ipc, name) in to_make.items()]
    measuring = [_Task(f"students of {name}", functools.partial(measure, setup, cell)) for cell, name in wanting.items()]
    total = len(largest) + len(cells)
    done = total - len(making) - len(measuring)

    def finished(count: int = 1) -> None:
        nonlocal done
        done += count
        if watcher:
            watcher(done, total)

    finished(0)
    with _processes(min(jobs, max(len(making), len(measuring)))) as pool:
        for tasks in (making, measuring):
            _run(tasks, pool, jobs, finished, watcher)
    return {cell: accuracies(setup, cell) or [] for cell in cells}


def _run(
    tasks: Sequence[_Task], pool: ProcessPoolExecutor | None, jobs: int, finished: Callable[[], None], watcher: Watcher | None
) -> None:
    if pool is None:
        for task in tasks:
            task.call(progress=functools.partial(_note, watcher, task.title))
            finished()
        return
    waiting, running = deque(tasks), dict[Future[None], str]()
    while waiting or running:
        while waiting and len(running) < jobs:
            task = waiting.popleft()
            running[pool.submit(_travelling, task.call)] = task.title
        if watcher:
            watcher.note("; ".join(running.values()))
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            title = running.pop(future)
            try:
                future.result()
            except BrokenProcessPool:
                why = f"a process died, perhaps for want of memory ({title})"
                raise InputError(f"{why}; the same command goes on, and --jobs 1 takes least memory") from None
            finished()


def _note(watcher: Watcher | None, title: str, done: int, total: int) -> None:
    if watcher:
        watcher.note(f"{title}, {100 * done // total} %")


def _travelling(call: Callable[..., None]) -> None:
    """Do it; what is raised is of a kind that finds its way to another process."""
    try:
        call()
    except InputError as error:
        raise InputError(str(error)) from None


@contextmanager
def _processes(count: int) -> Iterator[ProcessPoolExecutor | None]:
    """That many processes, none for one; on an error or Ctrl-C they end at once, since everything that they do can be gone on with."""
    if count < 2:
        yield None
        return
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(count, mp_context=multiprocessing.get_context("spawn"), initializer=_begin)
    try:
        yield pool
    except BaseException:
        for process in set(multiprocessing.active_children()) - others:
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _begin() -> None:
    """In a new process: Ctrl-C is for the one that started it, and when that one dies it ends as well."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_follow, args=(multiprocessing.parent_process(),), daemon=True).start()


def _follow(parent: Any) -> None:
    parent.join()
    os._exit(1)
