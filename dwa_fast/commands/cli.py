"""The command line `dwa-fast`: parses flags, runs the command, turns errors into one line and an exit code."""

from __future__ import annotations

import contextlib
import difflib
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Any

from dwa_fast._version import __version__
from dwa_fast.errors import InputError

OK, FAILED, USAGE, INTERRUPTED, TERMINATED = 0, 1, 2, 130, 143

_DESCRIPTIONS = {
    "info": "Show what was built, what this machine has and which back-end would run.",
    "demo": "Run the whole pipeline on real digits, on a CPU, in minutes.",
    "squeeze": "Train a teacher on the real images.",
    "synthesize": "Distil a data set into a few images per class.",
    "verify": "Check every file of a distilled set against its manifest.",
    "relabel": "Write the teacher's soft labels for a distilled set to disk.",
    "validate": "Train students on a distilled set and test them.",
    "compare": "Compare methods: train students on the sets of each, at every ipc.",
    "ablate": "Repeat an ablation or a sweep of the paper.",
    "cross": "Train students of several architectures on the sets of several methods.",
    "diversity": "Measure the diversity of distilled sets and their distance to real images.",
    "incremental": "Class-incremental learning from distilled sets.",
    "report": "Write one page about all runs and distilled sets below some folders.",
    "export": "Write a distilled set as Parquet, tensors or numbered folders.",
    "import": "Make a distilled set from Parquet files or tensors.",
}

_RESUMING = ("demo", "squeeze", "synthesize", "relabel", "validate", "compare", "ablate", "cross", "incremental", "import")


class _UsageError(InputError):
    """A command line that makes no sense, whatever the files are."""


class _Terminated(KeyboardInterrupt):
    """SIGTERM, as schedulers send it; handled like Ctrl-C."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point; exits with 0 (done), 1 (unusable input, one line on standard error), 2 (wrong flags), 130 (Ctrl-C)
    or 143 (SIGTERM).
    """
    try:
        code = run(sys.argv[1:] if arguments is None else arguments)
    except KeyboardInterrupt:  # before there is a console
        code = INTERRUPTED
    sys.exit(code)


def run(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit code; wrong flags leave through SystemExit, as in every argparse program."""
    from dwa_fast.commands.console import Console

    console = Console()
    if list(arguments) == ["--version"]:
        console.print(f"dwa-fast {__version__}")
        return OK
    command = None
    try:
        with _terminable():
            command = _parse(arguments)
            command.run(console)
    except _UsageError as error:
        console.error(str(error))
        raise SystemExit(USAGE) from None
    except InputError as error:
        console.error(str(error))
    except BrokenPipeError:  # the reader of our output has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        console.error(f"{error.strerror or error}" + (f": {error.filename}" if error.filename else ""))
    except KeyboardInterrupt as stop:
        console.error(_stopped(arguments[0], command) if command else "stopped")
        return TERMINATED if isinstance(stop, _Terminated) else INTERRUPTED
    else:
        return OK
    return FAILED


def _stopped(name: str, command: Any) -> str:
    """What becomes of the work of a command that is stopped."""
    if name not in _RESUMING:
        return "stopped"
    if command.output is None:
        return "stopped; without --output nothing is kept from which it could resume"
    return "stopped; the same command resumes from the batches, epochs and students that are on the disk"


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Inside, SIGTERM raises _Terminated; outside the main thread, nothing is changed."""

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


def _check_words(arguments: Sequence[str]) -> None:
    """Refuse a misspelled command."""
    name = arguments[0] if arguments else "-"
    if not name.startswith("-") and name not in _DESCRIPTIONS:
        near = difflib.get_close_matches(name, _DESCRIPTIONS, 1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(_DESCRIPTIONS)}"
        raise _UsageError(f"there is no command {name!r}; {hint}")


def _check_flags(name: str, command: Any, arguments: Sequence[str]) -> None:
    """Refuse a flag that the command does not have, and say which one may be meant; and a flag of several values that stands twice."""
    from dwa_fast.commands.flags import flags_meant, flags_of

    takes_several = dict(flags_of(command))
    flags, all_typed = list(takes_several), [argument.partition("=")[0].replace("_", "-") for argument in arguments]
    for typed in all_typed:
        if takes_several.get(typed) and all_typed.count(typed) > 1:
            raise _UsageError(f"{typed} stands {all_typed.count(typed)} times; it takes all of its values at once: {typed} A B")
        known = typed in ("--", "--help") or typed in flags or typed.replace("no-", "", 1) in flags
        if typed.startswith("--") and not known:
            near = flags_meant(typed, flags)
            hint = f"did you mean {' or '.join(near)}?" if near else f"dwa-fast {name} --help lists its flags"
            raise _UsageError(f"{name} has no flag {typed}; {hint}")


def _parse(arguments: Sequence[str]) -> Any:
    """The command with its settings. Recipe, method, size and the like are read first, since the defaults of other flags depend on them."""
    import tyro

    from dwa_fast.commands.flags import RefusedError, settings_registry
    from dwa_fast.commands.table import commands

    _check_words(arguments)
    defaults, _ = tyro.cli(commands, args=arguments, return_unknown_args=True, add_help=False)
    if arguments and arguments[0] in defaults and not {"-h", "--help"} & {*arguments}:
        _check_flags(arguments[0], defaults[arguments[0]], arguments)
    try:
        with settings_registry():  # the argument `registry` needs tyro 1.0.12
            return tyro.cli(
                tyro.extras.subcommand_type_from_defaults(dict(defaults), _DESCRIPTIONS),
                args=arguments,
                prog="dwa-fast",
                description="Distil a data set into a few images per class, fast: directed weight adjustment over SRe2L.",
            )
    except RefusedError as refused:
        raise refused.args[0] from None
