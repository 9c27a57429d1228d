"""--preset on the command line: which training each command then runs, and that its results say so."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from dwa_fast.commands.cli import _parse, run
from dwa_fast.config import StorageConfig
from dwa_fast.models.architectures import build
from dwa_fast.models.checkpoint import TeacherInfo, save_teacher
from dwa_fast.recipes import PRESETS, recipe
from dwa_fast.report.records import read_record
from dwa_fast.sets.store import BatchSpec, ImageStore
from tests.nets import SIZE, small_set

IPC = 2


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a set and two teachers."""
    folder, data = tmp_path_factory.mktemp("presets"), small_set(IPC)
    store = ImageStore(folder / "set", {"method": "real"}, data.class_names, StorageConfig(losses_every=0))
    items = [BatchSpec(index, index, list(range(10))) for index in range(IPC)]
    for item in items:
        store.write(item, data.pixels.view(10, IPC, 1, SIZE, SIZE)[:, item.index])
    store.finish(items)
    for name in ("one", "two"):
        info = TeacherInfo(architecture="small-resnet", classes=10, channels=1, size=SIZE)
        save_teacher(folder / f"{name}.pt", build("small-resnet", classes=10, channels=1), info)
    return folder


def command(name: str, bench: Path, output: Path, *more: str) -> list[str]:
    """A command of few epochs on digits, with its output."""
    prefix = "--validation." if name in ("compare", "cross") else "--"
    quick = [f"{prefix}epochs", "2", f"{prefix}padding", "1"]
    sets = {
        "validate": ["--images", str(bench / "set")],
        "relabel": ["--images", str(bench / "set")],
        "incremental": ["--sets", str(bench / "set")],
    }
    return [name, "--recipe", "digits", "--size", str(SIZE), "--output", str(output), *quick, *sets.get(name, []), *more]


@pytest.mark.parametrize("name", ["relabel", "validate", "compare", "ablate", "cross", "incremental"])
@pytest.mark.parametrize("preset", ["edc", "ddranking"])
def test_a_preset_gives_the_defaults_of_the_flags(name: str, preset: str) -> None:
    needed = {
        "relabel": ["--teacher", "t", "--images", "i", "--output", "o"],
        "validate": ["--images", "i"],
        "ablate": ["adjustment", "--teacher", "t", "--output", "o"],
        "cross": ["--student", "resnet18", "--teacher", "t", "--output", "o"],
        "incremental": ["--sets", "s", "--teacher", "t", "--output", "o"],
    }
    flags = [name, "--recipe", "cifar100", "--preset", preset, *needed.get(name, ["--teacher", "t", "--output", "o"])]
    prefix = "--validation." if name in ("compare", "ablate", "cross") else "--"
    wanted = recipe("cifar100", preset=preset).validation.__dict__ | ({"students": 1} if name == "incremental" else {})
    for more, changes in (
        ([], {}),
        ([f"{prefix}cosine-stretch", "1.5", f"{prefix}batch-size", "None"], {"cosine_stretch": 1.5, "batch_size": None}),
    ):
        parsed = _parse([*flags, *more])
        found = parsed.validation if name in ("compare", "ablate", "cross") else parsed.config
        assert found.__dict__ == wanted | changes


@pytest.mark.parametrize("preset", PRESETS)
def test_students_of_every_preset(preset: str, bench: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    teacher = ["--teacher", str(bench / "one.pt"), "--students", "1"]
    assert run(command("validate", bench, tmp_path, *teacher, "--preset", preset)) == 0
    record = read_record(tmp_path / "record.json")
    assert record.data["preset"] == {"name": preset, "changed": {"epochs": 2, "padding": 1}}
    named = "" if preset == "paper" else f"Students trained with preset {preset} (epochs 2, padding 1)."
    assert record.tables[0].note == named
    assert (f", preset {preset} (epochs 2, padding 1)\n" in capsys.readouterr().out) == bool(named)


def test_soft_labels_of_two_teachers(bench: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Stored, and then compared with the teachers that validate is given."""
    teachers = ["--teacher", str(bench / "one.pt"), str(bench / "two.pt"), "--preset", "fadrm", "--teacher-mean", "balanced"]
    assert run(command("relabel", bench, tmp_path / "labels", *teachers)) == 0
    students = ["--soft-labels", str(tmp_path / "labels"), "--students", "1"]
    assert run(command("validate", bench, tmp_path / "both", *teachers, *students)) == 0
    record = read_record(tmp_path / "both" / "record.json")
    assert record.settings["teacher"]["architecture"] == "small-resnet, small-resnet"
    assert record.data["preset"] == {"name": "fadrm", "changed": {"epochs": 2, "padding": 1, "teacher_mean": "balanced"}}
    one = ["--teacher", str(bench / "one.pt"), "--preset", "fadrm"]
    assert run(command("validate", bench, tmp_path / "one", *one, *students)) == 1
    assert re.search(r"holds soft labels of other settings \(teacher was \['", capsys.readouterr().err)


def test_tables_of_studies_name_the_preset(bench: Path, tmp_path: Path) -> None:
    study: list[Any] = ["--teacher", str(bench / "one.pt"), "--methods", "real", "--ipc", "1", "--seeds", "1", "--validation.students", "1"]
    notes = []
    for preset in ("paper", "rded"):
        assert run(command("compare", bench, tmp_path, *study, "--student", "small-resnet", "--jobs", "1", "--preset", preset)) == 0
        record = read_record(tmp_path / "compare" / "record.json")
        notes.append(record.tables[0].note)
        assert record.data["preset"]["name"] == preset
    assert notes == [
        "One student of one set each.",
        "One student of one set each. Students trained with preset rded (epochs 2, padding 1).",
    ]
    assert len(list((tmp_path / "cells").iterdir())) == 2  # of one set
    assert len(list((tmp_path / "sets").iterdir())) == 1


def test_incremental_learning_names_the_preset(bench: Path, tmp_path: Path) -> None:
    more = ["--teacher", str(bench / "one.pt"), "--tasks", "2", "--seeds", "1", "--preset", "rethinkdc"]
    assert run(command("incremental", bench, tmp_path, *more)) == 0
    record = read_record(tmp_path / "record.json")
    assert record.data["preset"]["name"] == "rethinkdc"
    assert "with soft labels and preset rethinkdc (epochs 2, padding 1); soft ones" in record.tables[0].note


def test_an_unknown_preset_is_one_sentence(bench: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(command("validate", bench, tmp_path, "--preset", "best")) == 1
    assert "unknown preset 'best'; known: paper, rded, edc, fadrm, cv-dd, rd3, rethinkdc, ddranking" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["relabel", "validate"])
def test_several_teachers_whose_files_name_no_network(name: str, bench: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kinds = ["small-resnet", "convnet128"]
    files = [str(tmp_path / f"{kind}.pth") for kind in kinds]
    for kind, file in zip(kinds, files, strict=True):
        torch.save(build(kind, classes=10, channels=1, size=SIZE).state_dict(), file)
    arguments = command(name, bench, tmp_path / "out", "--students", "1", "--teacher", *files, "--architecture")
    assert run([*arguments, *kinds]) == 0
    assert run([*arguments, kinds[0]]) == 1
    assert "--architecture must name a network for each of the 2 teachers, got 1" in capsys.readouterr().err
