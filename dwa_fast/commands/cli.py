"""The command line `dwa-fast`: reads the flags, runs the command, turns errors into one sentence and an exit code."""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Any

from dwa_fast.errors import InputError

OK, FAILED, INTERRUPTED, TERMINATED = 0, 1, 130, 143  # and 2 for wrong usage

_DESCRIPTIONS = {
    "demo": "The whole method on real digits, on a CPU, in minutes.",
    "squeeze": "Train a teacher on the real images.",
    "synthesize": "Distil a data set into a few images per class.",
    "relabel": "Keep the teacher's soft labels of a distilled set on disk.",
    "validate": "Train students on a distilled set and test them.",
    "compare": "Compare methods: students of their sets at every ipc.",
    "ablate": "Repeat an ablation or a sweep of the paper.",
    "cross": "Students of several architectures on the sets of several methods.",
    "diversity": "Measure how diverse distilled sets are, and how close to real images.",
    "incremental": "Class-incremental learning from distilled sets.",
    "export": "Write a distilled set for other programs: Parquet, tensors, or folders.",
    "import": "Make a distilled set of Parquet files or tensors.",
    "report": "Make one page of every run and every distilled set below some folders.",
    "verify": "Check a distilled set against its manifest, file by file.",
    "info": "What was built, what this machine has, which back-end would run.",
}


class _Terminated(KeyboardInterrupt):
    """SIGTERM, as schedulers send it; whatever stops cleanly on Ctrl-C stops cleanly on this."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point; exits with 0 (done), 1 (input that cannot be used, one sentence on standard error), 2 (wrong flags), 130 (Ctrl-C)
    or 143 (SIGTERM).
    """
    sys.exit(run(sys.argv[1:] if arguments is None else arguments))


def run(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit code; wrong flags leave through SystemExit, as in every argparse program."""
    from dwa_fast.commands.console import Console

    console = Console()
    try:
        with _terminable():
            _parse(arguments).run(console)
    except InputError as error:
        console.error(str(error))
    except BrokenPipeError:  # the reader of our output has gone; nobody is left to tell
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        console.error(f"{error.strerror or error}" + (f": {error.filename}" if error.filename else ""))
    except KeyboardInterrupt as stop:
        console.error("stopped; everything finished so far is kept, and the same command goes on from there")
        return TERMINATED if isinstance(stop, _Terminated) else INTERRUPTED
    else:
        return OK
    return FAILED


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Inside, SIGTERM raises _Terminated; in a thread of a larger program, whose signals are its own, it does not."""

    def stop(number: int, frame: object) -> None:
        raise _Terminated

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _parse(arguments: Sequence[str]) -> Any:
    import tyro

    from dwa_fast.commands import commands

    names = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    names.add_argument("--recipe")
    names.add_argument("--method", default="dwa")
    known, _ = names.parse_known_args(list(arguments))
    defaults = commands(known.recipe, known.method)
    parse = functools.partial(
        tyro.cli,
        tyro.extras.subcommand_type_from_defaults(dict(defaults), _DESCRIPTIONS),
        args=arguments,
        prog="dwa-fast",
        description="Distil a data set into a few images per class, fast: directed weight adjustment over SRe2L.",
    )
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            return parse()
    except SystemExit as stop:  # --help, wrong flags, or a value that a configuration refused
        refused = _input_error(stop)
        if refused:
            raise refused from None
    return parse()


def _input_error(error: BaseException | None) -> InputError | None:
    """The InputError that led to this exception, if one did."""
    while error is not None and not isinstance(error, InputError):
        error = error.__cause__ or error.__context__
    return error
