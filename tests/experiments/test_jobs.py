"""Running cells: the same numbers from any number of processes, nothing computed twice, nothing lost."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dwa_fast import InputError
from dwa_fast.config import InitialConfig
from dwa_fast.experiments import jobs
from dwa_fast.experiments.cells import Cell, DistilledSource, ExternalSet, Setup, measure
from dwa_fast.experiments.jobs import default_jobs, run_cells
from tests.experiments.setups import small_setup


class Notes:
    """A progress_bar that remembers."""

    def __init__(self) -> None:
        self.counts: list[tuple[int, int]] = []
        self.notes: list[str] = []

    def __call__(self, done: int, total: int) -> None:
        self.counts.append((done, total))

    def note(self, text: str) -> None:
        self.notes.append(text)


def cells(setup: Setup) -> dict[Cell, str]:
    """Real images and DWA at two ipc."""
    sources = {"real": DistilledSource(None, 0), "DWA": DistilledSource(setup.recipe.synthesis, 0)}
    return {Cell(source, ipc, "small-resnet"): f"{name}, ipc {ipc}" for name, source in sources.items() for ipc in (1, 2)}


def stamps(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_processes_give_what_one_gives(tmp_path: Path) -> None:
    alone, together = small_setup(tmp_path / "alone"), small_setup(tmp_path / "together")
    progress_bar = Notes()
    one = run_cells(alone, cells(alone), jobs=1)
    two = run_cells(together, cells(together), jobs=2, progress_bar=progress_bar)
    assert list(one.values()) == list(two.values())
    assert [len(each) for each in one.values()] == [2] * 4
    assert progress_bar.counts == [(done, 6) for done in range(7)]
    assert any("making real, ipc 2 (0 % done); making DWA, ipc 2 (0 % done)" in text for text in progress_bar.notes)
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

    monkeypatch.setattr(jobs, "measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_cells(setup, cells(setup), jobs=1)
    before = stamps(tmp_path)
    progress_bar = Notes()
    first = run_cells(setup, cells(setup), jobs=1, progress_bar=progress_bar)
    assert calls == 5
    after = stamps(tmp_path)
    assert {path: after[path] for path in before} == before
    assert progress_bar.counts[0] == (3, 6)  # both cells of the real images, and their set
    monkeypatch.setattr(jobs, "measure", None)
    monkeypatch.setattr(jobs, "make_set", None)
    assert run_cells(setup, cells(setup), jobs=1) == first
    assert stamps(tmp_path) == after


def too_many(seed: int) -> Cell:
    return Cell(DistilledSource(None, seed), 10_000, "small-resnet")


def test_errors_name_their_cell(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^making greedy: .*ipc 10000 needs as many initial ones"):
        run_cells(small_setup(tmp_path), {too_many(0): "greedy"}, jobs=1)


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        (Cell(DistilledSource(None, 0), 1, "vgg16-bn"), "vgg16-bn needs images of at least 32 pixels"),
        (Cell(ExternalSet(Path("nowhere"), 0), 1, "small-resnet"), "nowhere is not a folder"),
    ],
)
def test_what_would_stop_it_in_the_end_stops_it_first(tmp_path: Path, cell: Cell, message: str) -> None:
    setup = small_setup(tmp_path)
    before = stamps(tmp_path)
    with pytest.raises(InputError, match=f"^students of the last: {message}"):
        run_cells(setup, {**cells(setup), cell: "the last"}, jobs=1)
    assert stamps(tmp_path) == before


@pytest.mark.usefixtures("two_threads")
def test_jobs_fill_the_cpu(tmp_path: Path) -> None:
    assert default_jobs(small_setup(tmp_path)) == 2
    assert default_jobs(replace(small_setup(tmp_path), threads=2)) == 1
    assert default_jobs(replace(small_setup(tmp_path), threads=8)) == 1


def test_images_of_several_patches_are_for_one_ipc(tmp_path: Path) -> None:
    setup = small_setup(tmp_path)
    setup = replace(setup, initial=InitialConfig(patch_candidates=8, patch_crops=1, patch_factor=2))
    synthesis = replace(setup.recipe.synthesis, initial="patches", iterations=0)
    both = {Cell(DistilledSource(synthesis, 0), ipc, "small-resnet"): f"ipc {ipc}" for ipc in (1, 2)}
    with pytest.raises(InputError, match="images of 2 × 2 patches are chosen for one ipc, got 1, 2; each needs a study"):
        run_cells(setup, both, jobs=1)
    (cell, name), _ = both.items()
    assert len(run_cells(setup, {cell: name}, jobs=1)[cell]) == 2
