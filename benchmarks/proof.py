"""What the `gpu_*.py` scripts share: rows that are on the disk as soon as they are measured, and steps with a limit each."""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import math
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

_GRACE = 3.0  # seconds between SIGTERM and SIGKILL
_POLL = 0.02  # seconds between two checks of a step


class Rows:
    """A file of JSON lines; another process may add rows to the same file."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._start = time.monotonic()

    def add(self, kind: str, **values: Any) -> None:
        """Write one row and wait until it is on the disk. JSON has no NaN and no infinity: they become null."""
        row = {"row": kind, "at": round(time.monotonic() - self._start, 1), **values}
        line = json.dumps(_finite(row), allow_nan=False) + "\n"
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        print(line if len(line) < 400 else f"{line[:396]} …\n", end="", flush=True)


@dataclass(frozen=True)
class Step:
    """A function or a command, run in a process of its own, so that a crash or a hang costs no other step."""

    name: str
    work: Callable[[Rows], None] | Sequence[str]
    limit: float  # seconds
    environment: Mapping[str, str] = field(default_factory=dict)


def add_options(parser: argparse.ArgumentParser, file: str, budget: float) -> None:
    """The flags of all of them."""
    parser.add_argument("--output", type=Path, default=Path("gpu-results"), help=f"folder for {file}")
    parser.add_argument("--budget", type=float, default=budget, help=f"seconds for all steps; default: {budget:.0f}")
    parser.add_argument("--only", nargs="+", metavar="STEP", help="these steps alone, in their usual order; their new rows count")
    parser.add_argument("--dry-run", action="store_true", help="the same steps on a CPU with tiny sizes")


def chosen(steps: Sequence[Step], names: Sequence[str] | None, parser: argparse.ArgumentParser) -> list[Step]:
    """The steps of those names, all without names; ends with one sentence that lists them where there is no such step."""
    known = [step.name for step in steps]
    for name in names or ():
        if name not in known:
            parser.error(f"no step {name!r}; the steps are: {', '.join(known)}")
    return [step for step in steps if not names or step.name in names]


def run_steps(steps: Sequence[Step], rows: Rows, budget: float) -> list[str]:
    """Run the steps in order, whatever becomes of those before; returns the names of those that did not end well.

    Every step leaves a row "step" with its outcome: "done", "failed" (its exit status is in the row), "stopped" at its limit, or
    "skipped" where the budget was spent. SIGTERM stops the step that runs, writes its row, and exits with 143.

    Args:
        budget: seconds for all of them.
    """
    before = signal.signal(signal.SIGTERM, _terminated)
    start, unfinished = time.monotonic(), []
    try:
        for step in steps:
            left = budget - (time.monotonic() - start)
            outcome, status, seconds = _run(step, rows, min(step.limit, left)) if left > 0 else ("skipped", None, 0.0)
            rows.add("step", name=step.name, outcome=outcome, exit=status, wall=round(seconds, 1), limit=step.limit)
            if outcome != "done":
                unfinished.append(step.name)
    finally:
        signal.signal(signal.SIGTERM, before)
    return unfinished


def exit_status(rows: Rows, unfinished: Sequence[str]) -> int:
    """Print where the rows are and which steps did not end well; 1 where there are such."""
    print(f"every row is in {rows.path}" + (f"; not finished: {', '.join(unfinished)}" if unfinished else ""))
    return 1 if unfinished else 0


def _run(step: Step, rows: Rows, limit: float) -> tuple[str, int | None, float]:
    start = time.monotonic()
    sys.stdout.flush()
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])  # until it can be stopped too
    process = os.fork()  # has everything imported already; it is legal because this process never touches a GPU
    if process == 0:
        _work(step, rows)
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
        status = _wait(process, limit)
    except BaseException as reason:
        _stop(process)
        rows.add("step", name=step.name, outcome="stopped", exit=None, wall=round(time.monotonic() - start, 1), cause=type(reason).__name__)
        raise
    seconds = time.monotonic() - start
    if status is None:
        _stop(process)
        return "stopped", None, seconds
    return "done" if status == 0 else "failed", status, seconds


def _wait(process: int, limit: float) -> int | None:
    """Exit status, the negative signal where one ended it; None where it still runs after that many seconds."""
    until = time.monotonic() + limit
    while True:
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() >= until:
            return None
        time.sleep(_POLL)


def _work(step: Step, rows: Rows) -> NoReturn:
    """The step, in a process group of its own; does not return."""
    status = 1
    try:
        os.setsid()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
        os.environ.update(step.environment)
        gc.freeze()  # what was imported is no garbage: searching it takes longer than a small step
        if not callable(step.work):
            os.execvp(step.work[0], list(step.work))
        step.work(rows)
        status = 0
    except BaseException as error:
        traceback.print_exc()
        rows.add("error", step=step.name, error=f"{type(error).__name__}: {error}"[:2000])
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _stop(process: int) -> None:
    """End the process and all that it started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        for end in (os.killpg, os.kill):  # it may not have become the leader of its group yet
            with contextlib.suppress(ProcessLookupError):
                end(process, number)
        with contextlib.suppress(ChildProcessError):  # it has ended
            _wait(process, _GRACE)


def _terminated(number: int, frame: object) -> None:
    sys.exit(128 + number)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(each) for key, each in value.items()}
    return [_finite(each) for each in value] if isinstance(value, (list, tuple)) else value


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Every whole row of a file; a last line that was cut off is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows
