"""Tasks in one and in several processes: results, progress, errors."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dwa_fast import InputError
from dwa_fast.config import Progress
from dwa_fast.processes import Running, Task, processes

# Functions in functions travel to other processes by value, so these need not import this file.


def square(value: int) -> Task:
    def call(progress: Progress) -> tuple[int, int]:
        progress(1, 2)
        progress(2, 2)
        return value**2, os.getpid()

    return Task(str(value), call)


def wait_for(file: Path) -> Task:
    def call(progress: Progress) -> None:
        progress(3, 7)
        while not file.exists():
            time.sleep(0.01)

    return Task(file.name, call)


def fail(progress: Progress) -> None:
    raise InputError("no image")


def test_one_process() -> None:
    seen: list[Running] = []
    with processes(1) as run:
        assert list(run([square(1), square(2)], seen.append)) == [(0, (1, os.getpid())), (1, (4, os.getpid()))]
        assert seen == [{0: (1, 2)}, {0: (2, 2)}, {1: (1, 2)}, {1: (2, 2)}]
        with pytest.raises(InputError, match=r"^student 3: no image$"):
            list(run([Task("student 3", fail)], seen.append))


def test_several_processes(tmp_path: Path) -> None:
    files = [tmp_path / "first", tmp_path / "second"]

    def fails(progress: Progress) -> None:
        raise InputError("no image")

    def dies(progress: Progress) -> None:
        os._exit(3)

    def end(running: Running) -> None:
        """Lets the first task end when both are running, and then the second."""
        if running == {0: (3, 7), 1: (3, 7)}:
            files[0].touch()
        if running == {1: (3, 7)}:
            files[1].touch()

    with processes(2) as run:
        found = dict(run([square(value) for value in range(5)], lambda _: None))
        assert [found[place][0] for place in range(5)] == [0, 1, 4, 9, 16]
        assert os.getpid() not in {process for _, process in found.values()}
        assert [place for place, _ in run([wait_for(file) for file in files], end)] == [0, 1]
        with pytest.raises(InputError, match=r"^student 3: no image$"):
            list(run([Task("student 3", fails)], lambda _: None))
        with pytest.raises(InputError, match=r"a process died, perhaps because memory ran out \(a large cell\); the same command resumes"):
            list(run([Task("a large cell", dies)] * 2, lambda _: None))


def test_processes_ignore_interrupts_before_they_run_anything_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    def ignores(progress: Progress) -> bool:
        return signal.getsignal(signal.SIGINT) is signal.SIG_IGN

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr("dwa_fast.processes._start", abs)  # which does nothing
    with processes(2) as run:
        assert dict(run([Task("", ignores)] * 2, lambda _: None)) == {0: True, 1: True}
    assert signal.getsignal(signal.SIGINT) is before


_KILLED = """
import functools, os, sys, time
from dwa_fast.processes import Task, processes

def hold(path, progress):
    os.write(os.open(path, os.O_WRONLY), b"x")  # open as long as the process lives
    time.sleep(60)

with processes(2) as run:
    list(run([Task("", functools.partial(hold, sys.argv[1]))] * 2, lambda _: None))
"""


def test_processes_end_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    fifo, script = tmp_path / "held", tmp_path / "script.py"
    os.mkfifo(fifo)
    script.write_text(_KILLED)
    parent = subprocess.Popen([sys.executable, script, fifo], stderr=subprocess.DEVNULL)
    with fifo.open("rb", buffering=0) as held:
        try:
            started = b""
            while len(started) < 2:
                started += held.read(2)
        finally:
            parent.kill()
            parent.wait()
        assert select.select([held], [], [], 20)[0], "a process still runs"
        assert held.read(1) == b""  # its last writer is gone
