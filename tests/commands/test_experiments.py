"""compare, ablate and cross as a person types them: what they leave, what a second run finds, and Ctrl-C in the middle."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from dwa_fast.commands.cli import run
from dwa_fast.report.records import Record, read_record
from tests.experiments.setups import small_setup
from tests.nets import SIZE

QUICK = [
    "--size",
    str(SIZE),
    "--validation.epochs",
    "2",
    "--validation.padding",
    "1",
    "--synthesis.iterations",
    "2",
    "--synthesis.jitter",
    "1",
    "--synthesis.backend",
    "reference",
]
SMALL = [*QUICK, "--validation.students", "1", "--seeds", "2", "--jobs", "1"]


@pytest.fixture
def common(tmp_path: Path) -> list[str]:
    """Flags that every study is given, and an output folder."""
    (teacher,) = small_setup(tmp_path).teachers
    return ["--recipe", "digits", "--teacher", str(teacher.file), "--output", str(tmp_path / "out")]


def stamps(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for name in ("sets", "cells") for path in (folder / name).rglob("*") if path.is_file()}


def lives(group: int) -> bool:
    """Whether a process of that group is left."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def cells_of(record: Record) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = record.data["cells"]
    return found


def test_compare_with_several_teachers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    teachers = [str(each.file) for each in small_setup(tmp_path, "small-resnet", "convnet128").teachers]
    arguments = [
        "compare",
        "--recipe",
        "digits",
        "--output",
        str(tmp_path / "out"),
        *SMALL,
        "--methods",
        "real",
        "dwa",
        "cv-dd",
        "--ipc",
        "1",
    ]
    assert run([*arguments, "--teacher", *teachers]) == 0
    record = read_record(tmp_path / "out" / "compare" / "record.json")
    assert [cell["method"] for cell in cells_of(record)] == ["real", "dwa", "cv-dd"]
    assert record.settings["teacher"]["architecture"] == "small-resnet, convnet128"
    assert record.tables[0].note.endswith("Soft labels of all sets: plain mean of 2 teachers' logits.")
    capsys.readouterr()
    assert run([*arguments, "--teacher", teachers[0]]) == 1
    assert "--teacher must name the checkpoints of several teachers for method cv-dd, got 1" in capsys.readouterr().err
    assert run([*arguments, "--teacher"]) == 1
    assert "--teacher must name at least one checkpoint, got none" in capsys.readouterr().err


def test_compare_writes_a_table_a_chart_and_a_sheet(tmp_path: Path, common: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["compare", *common, *SMALL, "--methods", "real", "dwa", "--ipc", "1", "2"]
    assert run(arguments) == 0
    folder = tmp_path / "out" / "compare"
    record = read_record(folder / "record.json")
    assert [(row["method"], row["ipc"], len(row["accuracies"])) for row in cells_of(record)] == [
        ("real", 1, 2), ("real", 2, 2), ("dwa", 1, 2), ("dwa", 2, 2)
    ]  # fmt: skip
    printed = capsys.readouterr().out
    assert all(cell in printed for row in record.tables[0].rows for cell in row)
    assert {"record.json", "chart-1.png", "contact-sheet.png"} <= {path.name for path in folder.iterdir()}
    assert len(list((tmp_path / "out" / "sets").iterdir())) == 4

    before = stamps(tmp_path / "out")
    assert run(arguments) == 0
    assert stamps(tmp_path / "out") == before
    assert cells_of(read_record(folder / "record.json")) == cells_of(record)


def test_studies_share_sets_and_changed_settings_lie_beside(tmp_path: Path, common: list[str]) -> None:
    assert run(["compare", *common, *SMALL, "--methods", "dwa", "real-start", "--ipc", "1"]) == 0
    before = stamps(tmp_path / "out")
    assert run(["ablate", "adjustment", *common, *SMALL, "--ipc", "1"]) == 0
    after = stamps(tmp_path / "out")
    assert {path: after[path] for path in before} == before
    names = {path.relative_to(tmp_path / "out").parts[1] for path in after.keys() - before.keys()}
    assert len(names) == 4
    assert all(name.startswith("random-step-") for name in names)  # its two sets and two cells
    assert run(["ablate", "adjustment", *common, *SMALL, "--ipc", "1", "--synthesis.rho", "0.5"]) == 0
    later = stamps(tmp_path / "out")
    assert {path: later[path] for path in after} == after
    assert any("rho0.5" in path.parts[-2] for path in later)


def test_sweeps(tmp_path: Path, common: list[str]) -> None:
    one = [*common, *QUICK, "--validation.students", "2", "--seeds", "1", "--jobs", "1", "--ipc", "1"]
    assert run(["ablate", "lambda-var", *one, "--lambda-vars", "0.01", "0.11"]) == 0
    assert run(["ablate", "k-rho", *one, "--steps", "1", "2", "--rhos", "0.01"]) == 0
    sweep, grid = (read_record(tmp_path / "out" / f"ablate-{name}" / "record.json") for name in ("lambda-var", "k-rho"))
    assert len(cells_of(sweep)) == 4
    assert {"chart-1.png"} <= {path.name for path in (tmp_path / "out" / "ablate-lambda-var").iterdir()}
    assert [len(row) for row in grid.heat_maps[0].values] == [2]
    assert {"heat-map-1.png"} <= {path.name for path in (tmp_path / "out" / "ablate-k-rho").iterdir()}


def test_cross_takes_sets_from_elsewhere(tmp_path: Path, common: list[str]) -> None:
    assert run(["compare", *common, *SMALL, "--methods", "real", "--ipc", "2"]) == 0
    theirs = next((tmp_path / "out" / "sets").iterdir()).rename(tmp_path / "theirs")
    arguments = ["cross", *common, *SMALL, "--methods", "dwa", "--sets", f"ours={theirs}", "--ipc", "1"]
    assert run([*arguments, "--student", "small-resnet", "convnet128"]) == 0
    record = read_record(tmp_path / "out" / "cross" / "record.json")
    assert record.tables[0].columns == ["student", "DWA", "ours"]
    assert [len(row["accuracies"]) for row in cells_of(record)] == [2, 2, 1, 1]
    assert (theirs / "manifest.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["compare", "--methods", "mtt"],
            "unknown method 'mtt'; known: real, dwa, sre2l, cda, rded, real-start, random-step, coupled, sre2l++, ",
        ),
        (["compare", "--ipc", "0"], "ipc must be an integer of at least 1, got 0"),
        (["compare", "--seeds", "0"], "seeds must be an integer of at least 1, got 0"),
        (["compare", "--jobs", "0"], "jobs must be an integer of at least 1, got 0"),
        (["compare", "--threads", "0"], "threads must be an integer of at least 1, got 0"),
        (["compare", "--student", "vit"], "unknown student 'vit'; known: "),
        (["compare", "--ipc", "9999", "--jobs", "1"], "ipc 9999 needs as many initial ones"),
        (["ablate", "lambda-var", "--lambda-vars", "-1"], "lambda_vars must be a finite number of at least 0, got -1.0"),
        (["ablate", "k-rho", "--steps", "0"], "steps must be an integer of at least 1, got 0"),
        (["cross", "--student", "small-resnet", "--methods"], "a study needs at least one method or set, got none"),
        (["cross", "--student", "small-resnet", "--sets", "nowhere"], "nowhere is not a folder"),
        (["cross", "--student", "small-resnet", "--sets", "mine="], "'mine=' names no folder; expected mine=DIR"),
    ],
)
def test_bad_input_is_one_sentence(common: list[str], capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    assert run([*arguments[:1], *arguments[1:], *common, *QUICK]) == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("dwa-fast: ")]
    assert len(errors) == 1
    assert message in errors[0]


def test_ctrl_c_keeps_what_is_finished(tmp_path: Path, common: list[str]) -> None:
    """A real interrupt of a study in two processes; they end with it, and the same command goes on to the end."""
    folder = tmp_path / "out"
    arguments = ["compare", *common, *QUICK, "--validation.students", "1", "--methods", "real", "--ipc", "1", "2", "--seeds", "3"]
    process = subprocess.Popen(
        [sys.executable, "-m", "dwa_fast", *arguments, "--jobs", "2"],
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        start_new_session=True,
    )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None and not list(folder.glob("cells/*/result.json")):
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "stopped; the same command resumes" in errors
    assert "Traceback" not in errors
    finished = {path: path.stat().st_mtime_ns for path in folder.glob("cells/*/result.json")}
    assert 0 < len(finished) < 6
    while time.monotonic() < deadline and lives(process.pid):  # the last of its group may take a moment
        time.sleep(0.02)
    assert not lives(process.pid)
    assert run([*arguments, "--jobs", "1"]) == 0
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    assert len(json.loads((folder / "compare" / "record.json").read_text())["data"]["cells"]) == 2
