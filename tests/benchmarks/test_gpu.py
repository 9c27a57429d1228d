"""`make gpu-speed`, `gpu-check` and `gpu-accuracy`: what is measured is on the disk at once, and no step costs another one anything."""

from __future__ import annotations

import importlib
import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

import dwa_fast

ROOT = Path(__file__).resolve().parents[2]
LACKING = ("tyro", "importlinter")  # what a machine with a GPU and no network may not have


@pytest.fixture
def proof() -> ModuleType:
    return importlib.import_module("proof")


def tool(folder: Path, name: str, script: str) -> None:
    """An executable shell script."""
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def run(proof: ModuleType, tmp_path: Path, budget: float, *steps: tuple[str, Any, float]) -> tuple[list[str], list[dict[str, Any]]]:
    rows = proof.Rows(tmp_path / "rows.jsonl")
    unfinished = proof.run_steps([proof.Step(*step) for step in steps], rows, budget)
    return unfinished, proof.read_rows(rows.path)


def outcomes(rows: list[dict[str, Any]]) -> dict[str, tuple[str, int | None]]:
    return {row["name"]: (row["outcome"], row["exit"]) for row in rows if row["row"] == "step"}


def test_a_step_that_fails_crashes_or_hangs_costs_no_other(proof: ModuleType, tmp_path: Path) -> None:
    def good(rows: Any) -> None:
        rows.add("number", value=[1.5, float("nan")])

    def wrong(rows: Any) -> None:
        rows.add("number", value=2)
        raise ValueError("no such kernel")

    def slow(rows: Any) -> None:
        rows.add("number", value=3)
        time.sleep(60)

    steps = [
        ("good", good, 20.0),
        ("wrong", wrong, 20.0),
        ("crash", lambda rows: os.kill(os.getpid(), signal.SIGKILL), 20.0),
        ("slow", slow, 1.0),
        ("command", [sys.executable, "-c", "raise SystemExit(3)"], 20.0),
    ]
    unfinished, rows = run(proof, tmp_path, 100.0, *steps)
    assert unfinished == ["wrong", "crash", "slow", "command"]
    assert [row["value"] for row in rows if row["row"] == "number"] == [[1.5, None], 2, 3]
    assert outcomes(rows) == {
        "good": ("done", 0), "wrong": ("failed", 1), "crash": ("failed", -9), "slow": ("stopped", None), "command": ("failed", 3),
    }  # fmt: skip
    (error,) = (row for row in rows if row["row"] == "error")
    assert (error["step"], error["error"]) == ("wrong", "ValueError: no such kernel")


def test_what_the_budget_does_not_hold_is_skipped(proof: ModuleType, tmp_path: Path) -> None:
    unfinished, rows = run(proof, tmp_path, 0.5, ("long", lambda rows: time.sleep(60), 30.0), ("late", lambda rows: None, 30.0))
    assert unfinished == ["long", "late"]
    assert outcomes(rows) == {"long": ("stopped", None), "late": ("skipped", None)}


def test_what_a_step_started_ends_with_it(proof: ModuleType, tmp_path: Path) -> None:
    """The child of a command whose time is up, which would hold the pipe open for a minute."""
    os.mkfifo(tmp_path / "pipe")
    pipe = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    run(proof, tmp_path, 20.0, ("child", ["sh", "-c", f"(echo there; sleep 60) > {tmp_path}/pipe & wait"], 1.0))
    for expected in (b"there\n", b""):
        assert select.select([pipe], [], [], 20)[0]
        assert os.read(pipe, 100) == expected
    os.close(pipe)


def test_sigterm_keeps_every_row(tmp_path: Path) -> None:
    code = f"""
import os, signal, sys, time
sys.path.insert(0, {str(ROOT / "benchmarks")!r})
import proof

def work(rows):
    rows.add("number", value=7)
    os.kill(os.getppid(), signal.SIGTERM)
    time.sleep(60)

rows = proof.Rows(proof.Path({str(tmp_path / "rows.jsonl")!r}))
proof.run_steps([proof.Step("one", work, 50.0), proof.Step("two", work, 50.0)], rows, 100.0)
"""
    ended = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=50)
    assert ended.returncode == 143, ended.stderr
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [row["row"] for row in rows] == ["number", "step"]
    assert outcomes(rows) == {"one": ("stopped", None)}


def test_sigterm_at_the_start_of_a_step_ends_the_step(tmp_path: Path) -> None:
    """The step would hold the output open for a minute."""
    code = f"""
import os, signal, sys, time
sys.path.insert(0, {str(ROOT / "benchmarks")!r})
import proof
fork = os.fork

def fork_and_end():
    process = fork()
    if process:
        os.kill(os.getpid(), signal.SIGTERM)
    return process

proof.os.fork = fork_and_end
rows = proof.Rows(proof.Path({str(tmp_path / "rows.jsonl")!r}))
proof.run_steps([proof.Step("one", lambda rows: time.sleep(60), 50.0)], rows, 100.0)
"""
    ended = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=50)
    assert ended.returncode == 143, ended.stderr
    assert outcomes([json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]) == {"one": ("stopped", None)}


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All three commands on a CPU, with tiny sizes, where packages are missing that the GPU's machine may lack."""
    if Path(dwa_fast.__file__).parents[1] != ROOT:
        pytest.skip("the commands need an editable install of this folder, as `make gpu-speed` makes it")
    folder = tmp_path_factory.mktemp("gpu")
    for name in LACKING:
        (folder / "lacking" / name).mkdir(parents=True)
        (folder / "lacking" / name / "__init__.py").write_text(
            "raise ModuleNotFoundError(f'No module named {__name__!r}', name=__name__)\n"
        )
    path = os.pathsep.join(filter(None, [str(folder / "lacking"), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_WAIT_POLICY": "PASSIVE"}
    for script in ("gpu_speed.py", "gpu_check.py", "gpu_accuracy.py"):
        command = [sys.executable, str(ROOT / "benchmarks" / script), "--dry-run", "--output", str(folder), "--budget", "1000"]
        ended = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
        assert ended.returncode == 0, ended.stdout + ended.stderr
    return folder


def test_rehearsal_measures_everything(rehearsal: Path, proof: ModuleType) -> None:
    speed, check = (proof.read_rows(rehearsal / name) for name in ("speed.jsonl", "check.jsonl"))
    assert set(dict(outcomes(speed) | outcomes(check)).values()) == {("done", 0)}
    (look,) = (row for row in speed if row["row"] == "first look")
    assert (look["right"], look["recorded_equals_called"], look["same_twice"]) == (True, True, True)
    assert {row["rival"] for row in speed if row["row"] == "ratio"} == {"eager", "published", "compiled"}
    assert [row["count"] for row in speed if row["row"] == "batches in flight"] == [1, 2]
    assert {row["peer"] for row in speed if row["row"] == "ascent"} == {"fused/fp32", "published/fp32"}
    assert {row["row"] for row in speed} >= {"facts", "ceilings", "kernels", "cudnn.benchmark"}
    assert [row["right"] for row in check if row["row"] == "operator"] == [True, True]
    (losses,) = (row for row in check if row["row"] == "losses")
    assert losses["relative"] == [0, 0, 0]
    (tests,) = (row for row in check if "counts" in row)
    assert tests["exit"] == 0
    assert tests["counts"].keys() == {"passed", "skipped"}  # collected where the command line's packages are missing
    assert tests["counts"]["skipped"] > 1000
    (watched,) = (row for row in check if row["row"] == "watched")
    assert watched["exit"] == 0


def test_tables_of_the_rehearsal(rehearsal: Path) -> None:
    tables = importlib.import_module("gpu_tables")
    text = tables.section(rehearsal)
    assert text.startswith("### ")
    assert text.count("| digits, ") == 3
    assert "the same bits, two runs the same bits." in text
    assert re.search(r"Tests on this GPU: \d+ passed, \d+ skipped\.", text)
    assert "Operators: 2 measured" in text
    assert text.count("| student small-resnet, ") == text.count("| teacher small-resnet, ") >= 2
    assert "errors too large: none" in text
    assert "Steps that did not end well" not in text
    assert tables.section(rehearsal, brief=True).count("| digits, ") == 3


def test_accuracy_of_the_rehearsal(rehearsal: Path, proof: ModuleType) -> None:
    """A row for each cell, with the students of every seed; a second run makes nothing again."""
    rows = proof.read_rows(rehearsal / "accuracy.jsonl")
    assert set(outcomes(rows).values()) == {("done", 0)}
    cells = [row for row in rows if row["row"] == "cell"]
    assert [(row["method"], row["ipc"], row["sets"], len(row["accuracies"])) for row in cells] == [("real", 1, 2, 2), ("dwa", 1, 2, 2)]
    assert (cells[0]["seconds_per_image"] is None, cells[1]["seconds_per_image"] > 0) == (True, True)
    script = importlib.import_module("gpu_accuracy")
    files = sorted((rehearsal / "accuracy").rglob("*"))
    times = [path.stat().st_mtime_ns for path in files if path.is_file() and "cells" in path.parts]
    assert times
    again = proof.Rows(rehearsal / "again.jsonl")
    plan = script.Plan("cpu", script.TINY)
    script.train_teacher(plan, script.TINY[0], "short", rehearsal / "accuracy", again)
    script.cells(plan, script.TINY[0], "short", rehearsal / "accuracy", 1, again)
    assert [row["accuracies"] for row in proof.read_rows(again.path)] == [row["accuracies"] for row in cells]
    assert sorted((rehearsal / "accuracy").rglob("*")) == files
    assert [path.stat().st_mtime_ns for path in files if path.is_file() and "cells" in path.parts] == times
    assert script.table_of([*rows, *cells]).row_count == 2


def test_a_teacher_of_other_settings_is_trained_again(proof: ModuleType, tmp_path: Path) -> None:
    script, rows = importlib.import_module("gpu_accuracy"), proof.Rows(tmp_path / "rows.jsonl")
    for epochs in (1, 2, 2):
        images = replace(script.TINY[0], teachers={"short": {"epochs": epochs}})
        script.train_teacher(script.Plan("cpu", (images,)), images, "short", tmp_path, rows)
    assert [row["epochs"] for row in proof.read_rows(rows.path)] == [1, 2]


def test_accuracy_needs_real_images(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    script = importlib.import_module("gpu_accuracy")
    for flags, message in (
        ([], "no real images: pass --cifar10 DIR or --tiny DIR"),
        (["--tiny", str(tmp_path / "none")], f"{tmp_path}/none is not a folder"),
    ):
        with pytest.raises(SystemExit):
            script.main(["--output", str(tmp_path), *flags])
        assert message in capsys.readouterr().err


def test_accuracy_in_the_order_of_its_worth(tmp_path: Path) -> None:
    script = importlib.import_module("gpu_accuracy")
    names = [step.name for step in script.steps(script.Plan("cuda", script.FULL), tmp_path)]
    assert names == [
        "facts", "cifar10 teacher short", "cifar10 short ipc 10", "cifar10 short ipc 1", "cifar10 short ipc 50", "cifar10 teacher long",
        "cifar10 long ipc 10", "tiny teacher short", "tiny short ipc 10",
    ]  # fmt: skip
    for images in script.FULL:
        for teacher in images.teachers:
            assert script.settings(script.Plan("cpu", script.FULL), images, teacher).squeeze.schedule == "fast"


def test_gpu_check_runs_every_test_for_a_gpu() -> None:
    """They are marked, or take the fixture `device`."""
    for_gpu = re.compile(r"mark\.gpu|\bdevice: torch\.device")
    found = {path for path in (ROOT / "tests").rglob("test_*.py") if for_gpu.search(path.read_text(encoding="utf-8"))}
    run = [ROOT / each for each in importlib.import_module("gpu_check").FULL.tests if "/" in each]
    own = {path for path in found if path.parent.name != "benchmarks"}
    assert {path for path in own if not any(path.is_relative_to(each) for each in run)} == set()
    assert all(any(path.is_relative_to(each) for path in own) for each in run)


def test_gpu_check_measures_every_operator_of_ours() -> None:
    """And none that is plain PyTorch on that device."""
    check, cases = importlib.import_module("gpu_check"), importlib.import_module("operator_calls")
    chosen = [case.operator.name for case in check.chosen_cases(check.FULL)]
    plain = ("mean_pool", "conv3x3", "conv_product")
    assert chosen == [each.name for each in cases.OPERATORS if not each.name.startswith(plain)]
    assert chosen[-1] == "ascend_"
    on_cpu = check.chosen_cases(replace(check.FULL, device=torch.device("cpu")))
    assert {case.operator.function for case in on_cpu} == {case.operator.function for case in check.chosen_cases(check.FULL)} | {*plain}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_small_cases_have_ragged_rows_too(device: str) -> None:
    """Of each operator on features: one whose last row of tiles is not full, with channels that are no multiple of 16 bytes."""
    check, layout = importlib.import_module("gpu_check"), importlib.import_module("dwa_fast.kernels.layout")
    subjects = importlib.import_module("operator_subjects")
    ragged, even, features = set(), set(), set()
    for case in check.small_cases(torch.device(device)):
        if isinstance(case.subject, subjects.Layer) and not case.operator.name.startswith("conv"):
            made = torch.empty(case.subject.shape, device="meta", memory_format=torch.channels_last)
            odd = made.numel() % layout.tiles(made).columns != 0 and made.shape[1] % 2 == made.shape[2] % 2 == 1
            (ragged if odd else even).add(case.operator.name)
            features.add(case.operator.name)
    assert len(features) >= 11
    assert ragged == even == features


def test_what_moves_little_memory_has_no_share_of_the_copy_ceiling() -> None:
    operators = importlib.import_module("operator_calls").OPERATORS
    assert [each.name for each in operators if not each.moves_memory] == ["matching_loss, both ways"]
    rows = [{"row": "operator", "case": str(share), "right": True, "percent_of_copy": share} for share in (40.4, None, 91.2)]
    tables = importlib.import_module("gpu_tables")
    assert tables._operators(rows) == [
        "Operators: 3 measured, the 2 that move much memory at 40 to 91 % of the copy ceiling; errors too large: none."
    ]
    assert tables._operators(rows[1:2]) == ["Operators: 1 measured; errors too large: none."]


SPEED_STEPS = """facts|first look|loop cifar100-resnet18|loop imagenet-resnet18|loop imagenet-resnet50|ascent|batches in flight|\
compiled cifar100-resnet18|training convnet128|training resnet18|state|compiled imagenet-resnet18|compiled imagenet-resnet50"""


def test_steps_in_the_order_of_their_worth(proof: ModuleType, tmp_path: Path) -> None:
    """Both commands together, with a start of two minutes and a build of 80 seconds, take less than a quarter of an hour."""
    speed, check = (importlib.import_module(name) for name in ("gpu_speed", "gpu_check"))
    steps = speed.steps(speed.FULL)
    assert [step.name for step in steps] == SPEED_STEPS.split("|")
    assert {step.name: step.limit for step in steps}["compiled cifar100-resnet18"] >= 150
    *before, tests = check.steps(check.FULL, proof.Rows(tmp_path / "rows.jsonl"))
    assert [step.name for step in before[-3:]] + [tests.name] == ["memcheck", "racecheck", "initcheck", "tests"]
    assert sum(step.limit for step in before) + 60 <= check.BUDGET
    assert 120 + 80 + speed.BUDGET + check.BUDGET <= 900


@pytest.mark.parametrize("name", ["gpu_speed", "gpu_check"])
def test_only_some_steps(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    script, ran = importlib.import_module(name), []
    monkeypatch.setattr(script, "run_steps", lambda steps, rows, budget: ran.append(([step.name for step in steps], budget)) or [])
    output = ["--output", str(tmp_path)]
    last = "tests" if name == "gpu_check" else "batches in flight"
    assert script.main([*output, "--only", last, "facts", "--budget", "70"]) == 0
    assert script.main([*output, "--only", "facts"]) == 0
    assert ran == [(["facts", last], 70.0), (["facts"], script.BUDGET)]
    with pytest.raises(SystemExit):
        script.main([*output, "--only", "facts", "asent"])
    assert re.search(rf"error: no step 'asent'; the steps are: facts, .*{last}", capsys.readouterr().err)


@pytest.mark.parametrize(("workload", "rival", "iterations"), [
    ("imagenet-resnet50", "published", 10), ("imagenet-resnet50", "eager+graph", 50), ("imagenet-resnet18", "published", 50),
])  # fmt: skip
def test_slow_rivals_are_timed_in_fewer_iterations(
    workload: str, rival: str, iterations: int, proof: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    speed, taken = importlib.import_module("gpu_speed"), []

    def interleaved(peers: dict[str, Any], others: dict[str, Any], count: int, rounds: int, device: torch.device) -> Any:
        taken.append(count)
        return {name: [1.0] for name in peers}, {}

    monkeypatch.setattr(speed.harness, "make_peer", lambda *_: SimpleNamespace(precision="bf16", advance=lambda count: None))
    monkeypatch.setattr(speed.harness, "errors", lambda *_: (0.0, 0.0))
    monkeypatch.setattr(speed.harness, "interleaved", interleaved)
    problem = SimpleNamespace(workload=SimpleNamespace(name=workload))
    plan = replace(speed.FULL, device=torch.device("cpu"))
    speed._pair(plan, problem, None, rival, proof.Rows(tmp_path / "rows.jsonl"))
    assert taken == [iterations]


def test_the_last_run_of_a_step_counts() -> None:
    """Unless it did not end well and an earlier one did."""

    def run(value: int, name: str, outcome: str) -> list[dict[str, Any]]:
        return [{"row": "number", "value": value}, {"row": "step", "name": name, "outcome": outcome}]

    runs = [
        run(1, "a", "done"),
        run(2, "b", "stopped"),
        run(3, "a", "stopped"),
        run(4, "b", "failed"),
        run(5, "c", "done"),
        run(6, "c", "done"),
    ]
    latest = importlib.import_module("gpu_tables")._latest([row for each in runs for row in each] + [{"row": "number", "value": 7}])
    assert [row["value"] for row in latest if row["row"] == "number"] == [1, 4, 6, 7]


@pytest.mark.parametrize("built", [True, False])
@pytest.mark.parametrize("target", ["gpu-speed", "gpu-check", "gpu-accuracy", "gpu"])
def test_make_gpu_builds_once_and_hands_the_budget_on(target: str, built: bool, tmp_path: Path) -> None:
    log = tmp_path / "log"
    tool(tmp_path, "python", f'echo "$@" >> {log}; case "$*" in benchmarks/built.py) exit {int(not built)};; esac')
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    command = ["make", target, f"PYTHON={tmp_path}/python", "BUDGET=77", f"OUT={tmp_path}"]
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
    lines = log.read_text().splitlines()
    names = ["speed", "check"] if target == "gpu" else [target.removeprefix("gpu-")]
    ran = [f"benchmarks/gpu_{name}.py --output {tmp_path} --budget 77" for name in names]
    assert [line for line in lines if line.startswith("benchmarks/gpu_")] == ran
    wanted = 0 if built else len(names)
    assert len([line for line in lines if line.startswith("-m pip install")]) == wanted
    assert lines.count("benchmarks/built.py --remember") == wanted


def test_what_is_built_is_known_by_its_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built = importlib.import_module("built")
    monkeypatch.setattr(built, "RECORD", tmp_path / "build" / "built-from")
    assert not built.is_built()
    built.remember()
    assert built.is_built() == (Path(dwa_fast.__file__).parents[1] == ROOT)
    for name in ("setup.py", "pyproject.toml"):
        (tmp_path / name).write_text("")
    (tmp_path / "csrc").mkdir()
    monkeypatch.setattr(built, "ROOT", tmp_path)
    before = built.digest()
    assert built.digest() == before
    (tmp_path / "csrc" / "more.cpp").write_text("int x;\n")
    assert built.digest() != before
    assert not built.is_built()


@pytest.mark.parametrize(("target", "has_torch"), [("gpu-speed", True), ("gpu-check", False)])
def test_make_gpu_says_that_there_is_none(target: str, has_torch: bool, tmp_path: Path) -> None:
    """One sentence, before anything is built, whether PyTorch sees no GPU or is not there."""
    tool(tmp_path, "python", "exit 1")
    python = sys.executable if has_torch else f"{tmp_path}/python"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}  # these tests may run in a make
    command = ["make", target, f"PYTHON={python}"]
    run = subprocess.run(command, cwd=ROOT, env={**environment, "CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True, check=False)
    assert run.returncode == 2
    said, makes_own = run.stderr.splitlines()
    assert said == f"make gpu needs a PyTorch that sees a GPU, and the one of '{python}' does not."
    assert makes_own.startswith("make: ***")
    assert run.stdout == ""


@pytest.mark.parametrize(("script", "version"), [("echo 580.95.05; echo 580.95.05", "580.95.05"), ("exit 9", None), (None, None)])
def test_driver(script: str | None, version: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if script:
        tool(tmp_path, "nvidia-smi", script)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert importlib.import_module("machine").driver() == version


def test_commit_where_there_is_no_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = importlib.import_module("machine")
    assert machine.commit() is not None
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("DWA_FAST_COMMIT", raising=False)
    assert machine.commit() is None
    monkeypatch.setenv("DWA_FAST_COMMIT", "0123abc")
    assert machine.commit() == "0123abc"
