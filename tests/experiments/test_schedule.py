"""Carrying cells out: the same numbers by however many processes, nothing twice, and nothing lost."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dwa_fast import InputError
from dwa_fast.data.datasets import image_folder
from dwa_fast.experiments import schedule
from dwa_fast.experiments.cells import Cell, Made, Setup, measure
from dwa_fast.experiments.schedule import carry_out, default_jobs
from tests.experiments.setups import small_setup


class Notes:
    """A watcher that remembers."""

    def __init__(self) -> None:
        self.counts: list[tuple[int, int]] = []
        self.notes: list[str] = []

    def __call__(self, done: int, total: int) -> None:
        self.counts.append((done, total))

    def note(self, text: str) -> None:
        self.notes.append(text)


def cells(setup: Setup) -> dict[Cell, str]:
    """Real images and DWA at two ipc."""
    sources = {"real": Made(None, 0), "DWA": Made(setup.synthesis, 0)}
    return {Cell(source, ipc, "small-resnet"): f"{name}, ipc {ipc}" for name, source in sources.items() for ipc in (1, 2)}


def stamps(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_processes_give_what_one_gives(tmp_path: Path) -> None:
    alone, together = small_setup(tmp_path / "alone"), small_setup(tmp_path / "together")
    watcher = Notes()
    one = carry_out(alone, cells(alone), jobs=1)
    two = carry_out(together, cells(together), jobs=2, watcher=watcher)
    assert list(one.values()) == list(two.values())
    assert [len(each) for each in one.values()] == [2] * 4
    assert watcher.counts == [(done, 6) for done in range(7)]
    assert any("making real, ipc 2; making DWA, ipc 2" in text for text in watcher.notes)
    pictures = [sorted(path.read_bytes() for path in (tmp_path / name / "sets").rglob("*.png")) for name in ("alone", "together")]
    assert pictures[0] == pictures[1]


def test_what_is_finished_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    setup, calls = small_setup(tmp_path), 0

    def interrupted(*arguments: Any, **more: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        measure(*arguments, **more)

    monkeypatch.setattr(schedule, "measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        carry_out(setup, cells(setup), jobs=1)
    before = stamps(tmp_path)
    watcher = Notes()
    first = carry_out(setup, cells(setup), jobs=1, watcher=watcher)
    assert calls == 5
    after = stamps(tmp_path)
    assert {path: after[path] for path in before} == before
    assert watcher.counts[0] == (3, 6)  # both cells of the real images, and their set
    monkeypatch.setattr(schedule, "measure", None)
    monkeypatch.setattr(schedule, "make_set", None)
    assert carry_out(setup, cells(setup), jobs=1) == first
    assert stamps(tmp_path) == after


def test_errors_come_through(tmp_path: Path) -> None:
    setup = small_setup(tmp_path)
    with pytest.raises(InputError, match="ipc 10000 needs as many initial ones"):
        carry_out(setup, {Cell(Made(None, 0), 10_000, "small-resnet"): "greedy"}, jobs=1)


def test_errors_and_death_of_a_process(tmp_path: Path) -> None:
    def together(call: Callable[..., Any]) -> None:
        schedule._run([schedule._Task("a large cell", call)] * 2, pool, 2, lambda: None, None)

    with schedule._processes(2) as pool:
        with pytest.raises(InputError, match="nowhere is not a folder"):
            together(functools.partial(image_folder, tmp_path / "nowhere", 8))
        with pytest.raises(InputError, match=r"a process died, perhaps for want of memory \(a large cell\)"):
            together(functools.partial(os._exit, 3))


def test_jobs_fill_the_cpu(tmp_path: Path) -> None:
    assert default_jobs(small_setup(tmp_path)) == 2
    assert default_jobs(small_setup(tmp_path, threads=2)) == 1
    assert default_jobs(small_setup(tmp_path, threads=8)) == 1
