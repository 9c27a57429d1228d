"""Everything that needs a GPU, into one JSON: the tests, the loop against its peers, every operator, and the kernels under memcheck.

python benchmarks/gpu_proof.py --output gpu-results     `make gpu` builds first, then runs this
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dwa_fast.io.files import output_folder, write_json

ROOT = Path(__file__).resolve().parent.parent
# Every kernel at odd small sizes; not its CUDA graph, in which PyTorch cannot allocate without its own allocator.
CHECKED = "matches_float64 or by_hand"
_MEMCHECK_SECONDS = 900.0
_LINES = 40  # of memcheck's report that are kept


@dataclass(frozen=True)
class Step:
    """One command, and how to read what it leaves behind."""

    name: str
    command: list[str]
    result: Callable[[], Any]
    environment: dict[str, str] = field(default_factory=dict)
    limit: float | None = None  # seconds


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all steps; 1 where one of them failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("gpu-results"), help="folder for gpu.json")
    target = output_folder(parser.parse_args(arguments).output) / "gpu.json"
    with tempfile.TemporaryDirectory() as folder:
        failed = prove(steps(Path(folder)), target)
    print(f"everything is in {target}" + (f"; failed: {', '.join(failed)}" if failed else ""))
    return 1 if failed else 0


def steps(folder: Path) -> list[Step]:
    """What to run; results go through files in `folder`."""
    files = {name: folder / f"{name}.json" for name in ("tests", "throughput", "anatomy", "operators", "memcheck")}
    log, python, checker = folder / "memcheck.log", sys.executable, shutil.which("compute-sanitizer")
    test = [python, "-m", "pytest", "-m", "gpu", "--json-summary"]
    found = [
        Step("tests", [*test, str(files["tests"])], lambda: content(files["tests"])),
        Step(
            "throughput",
            [python, "benchmarks/throughput.py", "--iterations", "50", "--json", str(files["throughput"])],
            lambda: content(files["throughput"]),
        ),
        Step(
            "anatomy",
            [python, "benchmarks/anatomy.py", "--json", str(files["anatomy"])],
            lambda: content(files["anatomy"]),
        ),
        Step(
            "operators",
            [python, "benchmarks/bench_operators.py", "--json", str(files["operators"])],
            lambda: content(files["operators"]),
        ),
    ]
    if checker is None:
        print("compute-sanitizer is not on the PATH: the kernels' memory accesses will not be checked")
        return found
    # Not the compilers that Triton starts, nor PyTorch's questions for driver functions that an older driver lacks.
    check = [checker, "--tool", "memcheck", "--target-processes", "application-only", "--report-api-errors", "no"]
    check += ["--error-exitcode", "9", "--log-file", str(log)]
    command = [*check, *test, str(files["memcheck"]), "-k", CHECKED, "tests/kernels"]
    # Inside of a larger block of PyTorch's allocator an access out of bounds would go unseen.
    alone = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return [*found, Step("memcheck", command, lambda: checked(log, files["memcheck"]), alone, _MEMCHECK_SECONDS)]


def prove(steps: Sequence[Step], target: Path) -> list[str]:
    """Run each step whatever became of those before it, write everything after each, and name those that failed."""
    everything: dict[str, Any] = {"steps": {}}
    for step in steps:
        began = time.perf_counter()
        status = run(step)
        seconds = time.perf_counter() - began
        everything["steps"][step.name] = {"exit": status, "seconds": seconds, "limit": step.limit}
        everything[step.name] = step.result()
        write_json(target, everything)
        if status is None:
            print(f"{step.name} was stopped after {step.limit:.0f} s")
    return [name for name, outcome in everything["steps"].items() if outcome["exit"] != 0]


def run(step: Step) -> int | None:
    """Exit status of its command; None where its time was up. Nothing that it started outlives it."""
    process = subprocess.Popen(step.command, cwd=ROOT, env={**os.environ, **step.environment}, start_new_session=True)
    try:
        return process.wait(step.limit)
    except BaseException as reason:  # its time is up, or Ctrl-C
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if isinstance(reason, subprocess.TimeoutExpired):
            return None
        raise


def content(path: Path) -> Any:
    """What a step wrote; None where it wrote nothing, or nothing whole. JSON has no NaN: one becomes null."""
    try:
        return json.loads(path.read_bytes(), parse_constant=lambda _: None)
    except (OSError, ValueError):
        return None


def checked(log: Path, tests: Path) -> dict[str, Any] | None:
    """What memcheck found: its errors (None where it was stopped), the end of its report, and how the tests under it ended."""
    if not log.exists():
        return None
    text = log.read_text(errors="replace")
    summary = re.search(r"ERROR SUMMARY: (\d+) error", text)
    return {"errors": int(summary[1]) if summary else None, "report": text.splitlines()[-_LINES:], "tests": content(tests)}


if __name__ == "__main__":
    sys.exit(main())
