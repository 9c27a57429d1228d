"""benchmarks/gpu_proof.py: one JSON of everything that ran, whatever became of it; and `make gpu` says what is missing."""

from __future__ import annotations

import importlib
import json
import os
import re
import select
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def proof() -> ModuleType:
    return importlib.import_module("gpu_proof")


@pytest.fixture
def piece(proof: ModuleType, tmp_path: Path) -> Callable[..., Any]:
    """A step that writes some text as its result, then ends with a status, perhaps after some seconds."""

    def make(name: str, text: str | None, status: int = 0, seconds: float = 0, limit: float | None = None) -> Any:
        path = tmp_path / f"{name}.json"
        write = "" if text is None else f"open({str(path)!r}, 'w').write({text!r}); "
        code = f"import sys, time; {write}time.sleep({seconds}); sys.exit({status})"
        return proof.Step(name, [sys.executable, "-c", code], lambda: proof.content(path), limit=limit)

    return make


def tool(folder: Path, name: str, script: str) -> None:
    """An executable shell script."""
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def test_pieces_are_merged(proof: ModuleType, piece: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A piece that fails, crashes, writes half a file or takes too long costs nothing of the others."""
    pieces = [
        piece("good", '{"a": [1, 2]}'),
        piece("wrong", '{"b": 3}', status=1),
        piece("crashed", None, status=3),
        piece("half", '{"c": '),
        piece("slow", '{"d": 4}', seconds=60, limit=1.0),
        piece("odd", '{"e": NaN}'),
    ]
    assert proof.prove(pieces, tmp_path / "gpu.json") == ["wrong", "crashed", "slow"]
    found = json.loads((tmp_path / "gpu.json").read_text())
    steps = found.pop("steps")
    assert found == {"good": {"a": [1, 2]}, "wrong": {"b": 3}, "crashed": None, "half": None, "slow": {"d": 4}, "odd": {"e": None}}
    assert {name: outcome["exit"] for name, outcome in steps.items()} == {
        "good": 0, "wrong": 1, "crashed": 3, "half": 0, "slow": None, "odd": 0,
    }  # fmt: skip
    assert "slow was stopped after 1 s" in capsys.readouterr().out


def test_every_step_leaves_its_result_at_once(proof: ModuleType, piece: Callable[..., Any], tmp_path: Path) -> None:
    """Where a later step cannot even be started, what was measured before it is kept."""
    with pytest.raises(FileNotFoundError):
        proof.prove([piece("good", "5"), proof.Step("none", [str(tmp_path / "none")], lambda: None)], tmp_path / "gpu.json")
    assert json.loads((tmp_path / "gpu.json").read_text())["good"] == 5


def test_what_a_step_started_ends_with_it(proof: ModuleType, tmp_path: Path) -> None:
    """The child of a command whose time is up, which would hold the pipe open for a minute."""
    os.mkfifo(tmp_path / "pipe")
    pipe = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    assert proof.run(proof.Step("child", ["sh", "-c", f"(echo there; sleep 60) > {tmp_path}/pipe & wait"], lambda: None, limit=1.0)) is None
    for expected in (b"there\n", b""):
        assert select.select([pipe], [], [], 20)[0]
        assert os.read(pipe, 100) == expected
    os.close(pipe)


@pytest.mark.parametrize(
    ("report", "status", "errors"),
    [("========= ERROR SUMMARY: 0 errors", 0, 0), ("========= ERROR SUMMARY: 2 errors", 9, 2), ("========= COMPUTE-SANITIZER", 1, None)],
)
def test_memcheck_where_there_is_its_tool(
    report: str, status: int, errors: int | None, proof: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in for the tool takes the arguments, writes its report, and leaves the tests' summary."""
    script = f"""
    while [ $# -gt 0 ]; do
        case $1 in
            --log-file) echo "{report}" > "$2" ;;
            --json-summary) echo '{{"without": "'$PYTORCH_NO_CUDA_MEMORY_CACHING'"}}' > "$2" ;;
        esac
        shift
    done
    exit {status}
    """
    tool(tmp_path, "compute-sanitizer", script)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    (step,) = [each for each in proof.steps(tmp_path) if each.name == "memcheck"]
    assert proof.prove([step], tmp_path / "gpu.json") == (["memcheck"] if status else [])
    found = json.loads((tmp_path / "gpu.json").read_text())["memcheck"]
    assert found == {"errors": errors, "report": [report], "tests": {"without": "1"}}


def test_without_its_tool(proof: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert [step.name for step in proof.steps(tmp_path)] == ["tests", "throughput", "anatomy", "operators"]
    assert "compute-sanitizer is not on the PATH" in capsys.readouterr().out


def test_commands_are_understood(proof: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The benchmarks take the flags that they are given, and write where they are told to."""
    _, throughput, anatomy, operators = proof.steps(tmp_path)[:4]
    assert importlib.import_module("throughput")._parse(throughput.command[2:]).json == tmp_path / "throughput.json"
    bench, passed_on = importlib.import_module("bench_operators"), list[str]()
    monkeypatch.setattr(bench.pytest, "main", lambda arguments: passed_on.extend(arguments) or 0)
    bench.main(operators.command[2:])
    assert passed_on[1:3] == ["--benchmark-json", str(tmp_path / "operators.json")]
    assert [(ROOT / step.command[1]).exists() for step in (throughput, anatomy, operators)] == [True, True, True]


def test_memcheck_sees_every_kernel(proof: ModuleType) -> None:
    chosen = proof.CHECKED.split(" or ")
    others = ("test_compile.py", "test_dispatch.py")  # no values of their own, or those of the interpreter
    for path in (path for path in (ROOT / "tests" / "kernels").glob("test_*.py") if path.name not in others):
        names = re.findall(r"^def (test_\w+)", path.read_text(encoding="utf-8"), re.MULTILINE)
        assert any(each in name for each in chosen for name in names), path


def test_make_gpu_says_that_there_is_none() -> None:
    """One sentence, before anything is built."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}  # these tests may run in a make
    command = ["make", "gpu", f"PYTHON={sys.executable}"]
    run = subprocess.run(command, cwd=ROOT, env={**environment, "CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True, check=False)
    assert run.returncode == 2
    said, makes_own = run.stderr.splitlines()
    assert said == f"make gpu needs a PyTorch that sees a GPU, and the one of '{sys.executable}' does not."
    assert makes_own.startswith("make: ***")
    assert run.stdout == ""


@pytest.mark.parametrize(("script", "version"), [("echo 580.95.05; echo 580.95.05", "580.95.05"), ("exit 9", None), (None, None)])
def test_driver(script: str | None, version: str | None, proof: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if script:
        tool(tmp_path, "nvidia-smi", script)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert importlib.import_module("machine").driver() == version
