"""Runs a small part of the results again and compares it with the committed numbers.

python docs/results/rerun.py                  the digits of the demo
python docs/results/rerun.py --data cifar10   also a part of CIFAR-10 (class folders below train/ and test/): a small ResNet of two epochs

On a processor with the instructions that `expected.json` names, and with its PyTorch, the numbers are the same to the digit; elsewhere
other roundings make other sets, and a number may move by three standard deviations of the difference.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from dwa_fast.commands.cli import run
from dwa_fast.engine.backend import bf16_instructions
from dwa_fast.errors import InputError
from dwa_fast.io.files import write_json
from dwa_fast.report.records import RECORD, read_record

EXPECTED = Path(__file__).with_name("expected.json")
_DEVIATIONS = 3.0
_LEAST = 3.0  # points that any number may move
_STUDENTS = ["--ipc", "10", "--seeds", "3", "--validation.students", "1", "--validation.epochs", "100", "--validation.batch-size", "25"]

Row = dict[str, Any]  # method, ipc, student, mean and std in percent


def digits(output: Path, data: Path | None) -> Path:
    """The demo; returns its folder."""
    _run("demo", "--output", output)
    return output


def cifar10(output: Path, data: Path | None) -> Path:
    """Real images, SRe2L and DWA with 125 iterations on CIFAR-10; returns the folder of the study."""
    source, teacher = ["--recipe", "cifar10", "--data", data], output / "teacher.pt"
    if not teacher.exists():
        _run("squeeze", *source, "--architecture", "small-resnet", "--schedule", "fast", "--epochs", "2", "--output", teacher)
    sets = ["--methods", "real", "sre2l", "dwa", "--synthesis.iterations", "125", "--output", output]
    _run("compare", *source, "--teacher", teacher, "--student", "small-resnet", *sets, *_STUDENTS)
    return output / "compare"


PARTS = {"digits": digits, "cifar10": cifar10}


def _run(*arguments: object) -> None:
    status = run([str(each) for each in arguments])
    if status:
        sys.exit(status)


def environment(folder: Path) -> dict[str, Any]:
    """What the numbers of a record may depend on."""
    known = {name: value for name, value in read_record(folder / RECORD).environment.items() if "memory" not in name}
    return {**known, "vector instructions": torch.backends.cpu.get_cpu_capability(), "bf16 instructions": bf16_instructions() or "none"}


def rows(folder: Path) -> list[Row]:
    """What a record has measured."""
    return [
        {name: cell[name] for name in ("method", "ipc", "student", "mean", "std")} for cell in read_record(folder / RECORD).data["cells"]
    ]


def allowed(expected: Row, found: Row) -> float:
    """Points that a number may move: three standard deviations of the difference, at least three points."""
    return max(_LEAST, _DEVIATIONS * math.hypot(expected["std"], found["std"]))


def moved(expected: Sequence[Row], found: Sequence[Row]) -> list[str]:
    """A sentence for each expected number that is missing or has moved too far."""
    by_place = {(row["method"], row["ipc"], row["student"]): row for row in found}
    sentences = []
    for row in expected:
        place = row["method"], row["ipc"], row["student"]
        name = f"{place[0]}, ipc {place[1]}, {place[2]}"
        if place not in by_place:
            sentences.append(f"{name}: not measured, expected {row['mean']:.1f}")
        elif not abs(by_place[place]["mean"] - row["mean"]) <= allowed(row, by_place[place]):
            now, most = by_place[place]["mean"], allowed(row, by_place[place])
            sentences.append(f"{name}: {now:.1f}, expected {row['mean']:.1f} within {most:.1f} points")
    return sentences


def table_of(title: str, expected: Sequence[Row], found: Sequence[Row]) -> Table:
    """Both numbers of every place."""
    before = {(row["method"], row["ipc"], row["student"]): row for row in expected}
    table = Table("set", "ipc", "student", "expected", "now", title=title)
    for row in found:
        known = before.get((row["method"], row["ipc"], row["student"]))
        numbers = [f"{each['mean']:.1f} ± {each['std']:.1f}" if each else "–" for each in (known, row)]
        table.add_row(row["method"], str(row["ipc"]), row["student"], *numbers)
    return table


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, print both numbers, and return 1 where one has moved too far."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of CIFAR-10; without it that part is left out")
    parser.add_argument("--output", type=Path, default=Path("results-output"), help="folder for all that is made; finished work is reused")
    parser.add_argument("--write", action="store_true", help="write the numbers as the expected ones")
    options = parser.parse_args(arguments)
    content: Mapping[str, Any] = json.loads(EXPECTED.read_text()) if EXPECTED.exists() else {}
    wrong = []
    for name, part in PARTS.items():
        if name != "digits" and options.data is None:
            continue
        folder = part(options.output / name, options.data)
        found, expected = rows(folder), content.get(name, {}).get("rows", [])
        Console().print(table_of(name, expected, found))
        wrong += [f"{name}: {each}" for each in moved(expected, found)]
        if options.write:
            content = {**content, name: {"environment": environment(folder), "rows": found}}
            write_json(EXPECTED, content)
    if wrong and not options.write:
        print("moved by more than three standard deviations:", *wrong, sep="\n  ", file=sys.stderr)
    return 1 if wrong and not options.write else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except InputError as error:
        sys.exit(f"rerun.py: {error}")
