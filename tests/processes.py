"""Command lines in processes that tests kill at chosen file operations; each is a fork of a process that has imported PyTorch."""

from __future__ import annotations

import datetime
import importlib
import json
import multiprocessing
import os
import resource
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from dwa_fast.models.architectures import build
from dwa_fast.models.checkpoint import TeacherInfo, save_teacher
from tests.files import contents

SIZE = 8
QUICK = ["--size", str(SIZE), "--iterations", "3", "--batch-size", "5", "--steps", "2", "--ipc", "3", "--backend", "reference"]
COMMANDS = "dwa_fast.commands.cli"
PRELOADED = f"__main__ pytest {COMMANDS} dwa_fast.commands.table torchvision.transforms.v2 sklearn.datasets sklearn.model_selection".split()
PRELOADED.append("importlib.readers")  # which a user without rights cannot read
FILE_EVENTS = ("open", "os.rename", "os.remove", "os.mkdir")

_context = multiprocessing.get_context("forkserver")


@dataclass(frozen=True)
class Order:
    """What happens to a command line: nothing, by default."""

    at_operation: int | None = None  # at which of its operations on files of the folder it sends itself a signal
    sends: signal.Signals = signal.SIGKILL
    after_seconds: float | None = None  # when it dies
    largest_file: int | None = None  # bytes after which its files are full
    user: int | None = None  # whose rights it has; needs those of root
    environment: Mapping[str, str] | None = None


@dataclass(frozen=True)
class Process:
    """A command line that runs."""

    process: BaseProcess
    log: Path  # standard output and error

    def wait(self) -> int:
        """Its exit code, or minus the signal that ended it."""
        self.process.join()
        assert self.process.exitcode is not None
        return self.process.exitcode

    @property
    def output(self) -> str:
        """What it has printed so far."""
        return self.log.read_text(encoding="utf-8") if self.log.exists() else ""

    @property
    def report(self) -> dict[str, Any]:
        """Of a finished run: its seconds and its operations on files."""
        content: dict[str, Any] = json.loads(self.output.splitlines()[-1])
        return content


@dataclass(frozen=True)
class Bench:
    """Runs the command line of these tests."""

    teacher: Path
    whole: dict[str, bytes]  # the files of a run that nothing happened to
    operations: int  # of that run, on files
    seconds: float  # of that run

    def command(self, folder: Path) -> list[str]:
        """The command line that makes the set in a folder."""
        return ["synthesize", "--recipe", "digits", "--teacher", str(self.teacher), "--output", str(folder), *QUICK, "--threads", "1"]

    def start(self, folder: Path, *more: str, **order: Any) -> Process:
        """Start a run in a process of its own; for the order, see Order."""
        log, command = self.teacher.with_name(f"{time.monotonic_ns()}.log"), self.command(folder)
        if "--teacher" in more:
            place = command.index("--teacher")
            del command[place : place + 2]
        process = _context.Process(target=serve, args=([*command, *more], str(folder), log, Order(**order)))
        process.start()
        return Process(process, log)

    def run(self, folder: Path, *more: str, **order: Any) -> tuple[int, Process]:
        """Start a run, and wait for its end."""
        process = self.start(folder, *more, **order)
        return process.wait(), process


def serve(arguments: Sequence[str], folder: str, log: Path, order: Order) -> None:
    """In the new process: run one command line and exit with its code; the last line of the log is its report."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (1, 2):
        os.dup2(output, stream)
    os.environ.update(order.environment or {})
    operations = count_operations(folder, order)
    if order.after_seconds:  # SIGALRM, which nothing handles, ends the process on the spot
        signal.setitimer(signal.ITIMER_REAL, order.after_seconds)
    if order.largest_file:
        resource.setrlimit(resource.RLIMIT_FSIZE, (order.largest_file, order.largest_file))
    if order.user is not None:
        os.setuid(order.user)
    started, code = time.monotonic(), 70
    try:
        code = importlib.import_module(COMMANDS).run(arguments)
        print(json.dumps({"seconds": time.monotonic() - started, "operations": operations[0]}))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def count_operations(folder: str, order: Order) -> list[int]:
    """Count this process's operations on files of the folder, and send it the signal at one of them."""
    done, lock = [0], threading.Lock()

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in FILE_EVENTS and isinstance(arguments[0], (str, os.PathLike)) and str(arguments[0]).startswith(folder):
            with lock:
                done[0] += 1
                reached = done[0] == order.at_operation
            if reached:
                os.kill(os.getpid(), order.sends)

    sys.addaudithook(hook)
    return done


def launcher(store: TCPStore, workers: int, rank: int, restart: int = 0) -> dict[str, str]:
    """The environment that torchrun gives a worker; the store is that of its agent."""
    return {
        "TORCHELASTIC_RUN_ID": "test",
        "TORCHELASTIC_RESTART_COUNT": str(restart),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(workers),
        "LOCAL_WORLD_SIZE": str(workers),
    }


def agent_store() -> TCPStore:
    """The store of torchrun's agent, which lives as long as it is held."""
    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=datetime.timedelta(seconds=60))


@contextmanager
def make_bench(folder: Path) -> Iterator[Bench]:
    """What the tests of faults and of workers share; its teacher and the undisturbed set lie in the folder."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = build("small-resnet", classes=10, channels=1, size=SIZE)
    save_teacher(folder / "teacher.pt", module, TeacherInfo(architecture="small-resnet", classes=10, channels=1, size=SIZE))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")  # fastest for networks as small as those of tests
        patch.syspath_prepend(Path(__file__).parents[1])  # where the new processes find this module
        _context.set_forkserver_preload(PRELOADED)
        code, process = Bench(folder / "teacher.pt", {}, 0, 0.0).run(folder / "whole")
        assert code == 0, process.output
        yield Bench(folder / "teacher.pt", contents(folder / "whole"), process.report["operations"], process.report["seconds"])
