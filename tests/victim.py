"""Runs command lines of dwa-fast in processes that can be killed, without the seconds that importing PyTorch takes: each is a fork.

A program of its own, driven by lines of JSON on its standard input; `Victims` in tests/processes.py talks to it.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import signal
import sys
import threading
import time
import traceback
from typing import Any

from dwa_fast.sets import workers

NEEDED = (
    "dwa_fast.commands.cli dwa_fast.commands torchvision.transforms.v2 sklearn.datasets sklearn.model_selection importlib.readers".split()
)
FILE_EVENTS = ("open", "os.rename", "os.remove", "os.mkdir")


def main() -> None:
    """Serve until standard input ends."""
    for name in NEEDED:
        importlib.import_module(name)
    for line in sys.stdin:
        order = json.loads(line)
        if "wait" in order:
            _, status = os.waitpid(order["wait"], 0)
            print(os.waitstatus_to_exitcode(status), flush=True)
            continue
        child = os.fork()
        if child == 0:
            serve(order)
        print(child, flush=True)


def serve(order: dict[str, Any]) -> None:
    """Run one command line and leave with its exit code; the log says how long it took and how many operations on files it did."""
    output = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (1, 2):
        os.dup2(output, stream)
    os.environ.update(order["environment"])
    workers.LEASE_SECONDS = 1.5
    operations = count_operations(order["folder"], order["signal"], order["at_operation"])
    if order["after_seconds"]:  # SIGALRM, which nothing handles, ends the process on the spot
        signal.setitimer(signal.ITIMER_REAL, order["after_seconds"])
    if order["largest_file"]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (order["largest_file"], order["largest_file"]))
    if order["user"] is not None:
        os.setuid(order["user"])
    started = time.monotonic()
    code = 70
    try:
        code = importlib.import_module("dwa_fast.commands.cli").run(order["arguments"])
        print(json.dumps({"seconds": time.monotonic() - started, "operations": operations[0]}))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def count_operations(folder: str, number: int, at: int | None) -> list[int]:
    """Count this process's operations on files of the folder, and send it a signal at one of them."""
    done, lock = [0], threading.Lock()

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in FILE_EVENTS and isinstance(arguments[0], (str, os.PathLike)) and str(arguments[0]).startswith(folder):
            with lock:
                done[0] += 1
                reached = done[0] == at
            if reached:
                os.kill(os.getpid(), number)

    sys.addaudithook(hook)
    return done


if __name__ == "__main__":
    main()
