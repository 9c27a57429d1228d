"""Command lines in processes of their own, which tests kill at chosen or random moments."""

from __future__ import annotations

import datetime
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from dwa_fast.models.architectures import build
from dwa_fast.models.checkpoint import TeacherInfo, save_teacher

SIZE = 8
QUICK = ["--size", str(SIZE), "--iterations", "3", "--batch-size", "5", "--steps", "2", "--ipc", "3", "--backend", "reference"]


@dataclass(frozen=True)
class Process:
    """One command line that runs."""

    number: int  # the operating system's
    log: Path  # standard output and error
    victims: Victims

    def send(self, number: signal.Signals) -> None:
        """Send it a signal."""
        os.kill(self.number, number)

    def wait_for_stop(self) -> None:
        """Return once it has stopped itself."""
        while (state := Path(f"/proc/{self.number}/stat").read_text().rsplit(")", 1)[1].split()[0]) != "T":
            assert state != "Z", f"it came to its end: {self.output}"
            time.sleep(0.02)

    def wait(self) -> int:
        """Its exit code, or minus the signal that ended it."""
        return self.victims.ask({"wait": self.number})

    @property
    def output(self) -> str:
        """What it has printed so far."""
        return self.log.read_text(encoding="utf-8") if self.log.exists() else ""

    @property
    def report(self) -> dict[str, Any]:
        """Of a finished run: its seconds and its operations on files."""
        content: dict[str, Any] = json.loads(self.output.splitlines()[-1])
        return content


class Victims:
    """Starts command lines of dwa-fast; one thread each, which is fastest for networks as small as those of tests."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._count = folder, 0
        command = [sys.executable, "-W", "ignore", str(Path(__file__).with_name("victim.py"))]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self._server = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=folder, env=environment, bufsize=1
        )

    def ask(self, order: Mapping[str, Any]) -> int:
        """Send an order and return its answer."""
        assert self._server.stdin
        assert self._server.stdout
        self._server.stdin.write(json.dumps(order) + "\n")
        return int(self._server.stdout.readline())

    def start(
        self,
        arguments: Sequence[str | Path],
        folder: Path,
        *,
        at_operation: int | None = None,
        sends: signal.Signals = signal.SIGKILL,
        after_seconds: float | None = None,
        largest_file: int | None = None,
        user: int | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> Process:
        """Start a command line.

        Args:
            folder: whose files count as operations.
            at_operation: at which of them the process sends itself a signal.
            after_seconds: when it dies on the spot.
            largest_file: bytes after which its files are full.
            user: whose rights it has; needs those of root.
        """
        self._count += 1
        log = self._folder / f"{self._count}.log"
        order = {
            "arguments": [str(argument) for argument in arguments],
            "folder": str(folder),
            "at_operation": at_operation,
            "signal": int(sends),
            "after_seconds": after_seconds,
            "largest_file": largest_file,
            "user": user,
            "environment": dict(environment or {}),
            "log": str(log),
        }
        return Process(self.ask(order), log, self)

    def close(self) -> None:
        """End the server; whoever still runs is waited for by nobody."""
        self._server.communicate()


@dataclass(frozen=True)
class Bench:
    """Runs the command line of these tests."""

    teacher: Path
    whole: dict[str, bytes]  # the files of a run that nothing happened to
    operations: int  # of that run, on files
    seconds: float  # of that run
    victims: Victims

    def command(self, folder: Path) -> list[str]:
        """The command line that makes the set in a folder."""
        return ["synthesize", "--recipe", "digits", "--teacher", str(self.teacher), "--output", str(folder), *QUICK, "--threads", "1"]

    def start(self, folder: Path, *more: str, **options: Any) -> Process:
        """Start a run in a process of its own; options as those of Victims.start."""
        return self.victims.start([*self.command(folder), *more], folder, **options)

    def run(self, folder: Path, *more: str, **options: Any) -> tuple[int, Process]:
        """Start a run, and wait for its end."""
        process = self.start(folder, *more, **options)
        return process.wait(), process


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def launcher(world: int, store: TCPStore, rank: int = 0) -> dict[str, str]:
    """The environment that PyTorch's elastic launcher gives a worker; the store is that of its agent."""
    return {
        "TORCHELASTIC_RUN_ID": "test",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
    }


def agent_store() -> TCPStore:
    """The store of an elastic launcher, which lives as long as it is held."""
    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=datetime.timedelta(seconds=60))


@contextmanager
def make_bench(folder: Path) -> Iterator[Bench]:
    """What the tests of faults and of workers share; its teacher and the undisturbed set lie in the folder."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = build("small-resnet", classes=10, channels=1, size=SIZE)
    save_teacher(folder / "teacher.pt", module, TeacherInfo(architecture="small-resnet", classes=10, channels=1, size=SIZE))
    victims = Victims(folder)
    code, process = Bench(folder / "teacher.pt", {}, 0, 0.0, victims).run(folder / "whole")
    assert code == 0, process.output
    yield Bench(folder / "teacher.pt", contents(folder / "whole"), process.report["operations"], process.report["seconds"], victims)
    victims.close()
