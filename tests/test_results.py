"""The re-run of the results: which numbers count as moved, and that its commands are ones that the program takes."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from dwa_fast.commands.cli import _parse
from dwa_fast.report.records import Record, write_record

PATH = Path(__file__).resolve().parents[1] / "docs" / "results" / "rerun.py"


def row(mean: float, std: float = 1.0, **changes: Any) -> dict[str, Any]:
    return {"method": "dwa", "ipc": 10, "student": "convnet128", "mean": mean, "std": std, **changes}


@pytest.fixture
def rerun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The program, with other expected numbers, and with commands that leave a record of 45 % without running."""
    spec = importlib.util.spec_from_file_location("rerun", PATH)
    assert spec
    assert spec.loader
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def leave_record(arguments: list[str]) -> int:
        _parse(arguments)
        output = Path(arguments[arguments.index("--output") + 1])
        if arguments[0] != "squeeze":
            folder = output / "compare" if arguments[0] == "compare" else output
            folder.mkdir(parents=True, exist_ok=True)
            write_record(folder, Record(kind=arguments[0], title="", data={"cells": [row(45.0, accuracies=[45.0])]}))
        return 0

    monkeypatch.setattr(module, "run", leave_record)
    monkeypatch.setattr(module, "EXPECTED", tmp_path / "expected.json")
    return module


def test_numbers_that_moved(rerun: Any) -> None:
    """By more than three standard deviations of the difference, and more than three points; or that are missing."""
    expected = [row(45.0), row(20.0, std=0.1, ipc=1)]
    assert rerun.moved(expected, [row(40.8), row(22.9, std=0.1, ipc=1)]) == []
    assert rerun.moved(expected, [row(40.7), row(23.1, std=0.1, ipc=1)]) == [
        "dwa, ipc 10, convnet128: 40.7, expected 45.0 within 4.2 points",
        "dwa, ipc 1, convnet128: 23.1, expected 20.0 within 3.0 points",
    ]
    assert rerun.moved(expected, [row(float("nan")), expected[1]]) == ["dwa, ipc 10, convnet128: nan, expected 45.0 within 4.2 points"]
    assert rerun.moved(expected, [row(45.0)]) == ["dwa, ipc 1, convnet128: not measured, expected 20.0"]


def test_write_then_compare(rerun: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--data", str(tmp_path), "--output", str(tmp_path / "output")]
    assert rerun.main([*options, "--write"]) == 0
    assert rerun.main(options) == 0
    content = json.loads(rerun.EXPECTED.read_text())
    assert sorted(content) == ["cifar10", "digits"]
    content["cifar10"]["rows"][0]["mean"] = 60.0
    rerun.EXPECTED.write_text(json.dumps(content))
    assert rerun.main(options[2:]) == 0  # that part is not run
    capsys.readouterr()
    assert rerun.main(options) == 1
    assert "cifar10: dwa, ipc 10, convnet128: 45.0, expected 60.0 within 4.2 points" in capsys.readouterr().err


def test_the_committed_numbers_are_whole() -> None:
    content = json.loads(PATH.with_name("expected.json").read_text())
    for part in content.values():
        assert len({(each["method"], each["ipc"], each["student"]) for each in part["rows"]}) == len(part["rows"]) >= 3
        assert all(0 < each["mean"] < 100 and each["std"] >= 0 for each in part["rows"])
