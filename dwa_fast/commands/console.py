"""What commands print: text, tables, trees and progress bars, through rich."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import rich.console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from dwa_fast.errors import escape_control_chars

_PLAIN_WIDTH = 120  # columns where the output is no terminal
_LINE_EVERY = 60.0  # seconds between two lines of progress, at least, where there is no bar


class Console:
    """Results go to standard output; progress, log and errors to standard error."""

    def __init__(self) -> None:
        self._out = _console(stderr=False)
        self._err = _console(stderr=True)
        logger = logging.getLogger("dwa_fast")
        logger.handlers[:] = [_Lines(self._err)]
        logger.setLevel(logging.INFO)

    def say(self, text: str) -> None:
        """One line."""
        self._out.print(_safe(text), soft_wrap=True, highlight=False)

    def error(self, text: str) -> None:
        """One line on standard error."""
        self._err.print(f"dwa-fast: {_safe(text)}", soft_wrap=True, highlight=False)

    def table(self, title: str, rows: Sequence[Sequence[str]]) -> None:
        """A table; the first row is the header."""
        table = Table(title=_safe(title))
        for number, name in enumerate(rows[0]):
            table.add_column(_safe(name), justify="left" if number == 0 else "right")
        for row in rows[1:]:
            table.add_row(*map(_safe, row))
        self._out.print(table)

    def tree(self, title: str, content: Mapping[str, Any]) -> None:
        """Nested values."""
        tree = Tree(_safe(title))
        _grow(tree, content)
        self._out.print(tree, soft_wrap=True, highlight=False)

    @contextmanager
    def bars(self, *, shown: bool = True) -> Iterator[Callable[[str], Bar]]:
        """Progress bars: gives a function that starts a bar of a title.

        Where standard error is no terminal, as under nohup, Slurm or CI, each bar prints a line at its start and at most one a minute.
        """
        columns = (
            *(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Rate()),
            *(TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("{task.fields[note]}")),
        )
        lines = shown and not self._err.is_terminal
        with Progress(*columns, console=self._err, disable=lines or not shown) as progress:
            yield lambda title: Bar(progress, progress.add_task(_safe(title), total=None, note=""), lines=lines)


class Bar:
    """One progress bar: called with what is done and the whole, it moves. Where there is no terminal, it prints plain lines instead."""

    def __init__(self, progress: Progress, task: TaskID, *, lines: bool = False) -> None:
        self._progress, self._task, self._lines = progress, task, lines
        self._start: tuple[float, int] | None = None  # time and what was done, at the first call
        self._printed = -math.inf  # when the last line was printed

    def __call__(self, done: int, total: int) -> None:
        """Move the bar. What is done at the first call was done before, and says nothing about the rate."""
        if self._start is None:
            self._start = self._progress.get_time(), done
            self._progress.reset(self._task, completed=done, total=total)
        self._progress.update(self._task, completed=done, total=total)
        if self._lines and self._progress.get_time() >= self._printed + _LINE_EVERY:
            self._print(*self._start)

    def note(self, text: str) -> None:
        """Show a few words behind the bar."""
        self._progress.update(self._task, note=_safe(text))

    def _print(self, start: float, before: int) -> None:
        """One line: done and total, rate, time left, note."""
        task = next(each for each in self._progress.tasks if each.id == self._task)
        now, done, total = self._progress.get_time(), int(task.completed), int(task.total or 0)
        parts = [f"{task.description}: {done}/{total}"]
        if done > before and now > start:
            rate = (done - before) / (now - start)
            parts += [_per_second(rate), f"{timedelta(seconds=round((total - done) / rate))} left"]
        parts += [task.fields["note"]] if task.fields["note"] else []
        self._progress.console.print(", ".join(parts), soft_wrap=True, highlight=False)
        self._printed = now


def _per_second(rate: float) -> str:
    """A rate; seconds for each where it is less than one per second."""
    return f"{rate:.1f}/s" if rate >= 1 else f"{1 / rate:.1f} s each"


class _Rate(ProgressColumn):
    """How many per second; seconds for each where it is less than one."""

    def render(self, task: Task) -> Text:
        """The rate of a bar; nothing before there is one."""
        speed = task.finished_speed or task.speed
        if not speed:
            return Text("")
        return Text(_per_second(speed))


class _Lines(logging.Handler):
    """Log records as plain lines, above the progress bars."""

    def __init__(self, console: rich.console.Console) -> None:
        super().__init__()
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        """Print one record."""
        self._console.print(_safe(self.format(record)), soft_wrap=True, highlight=False)


def _safe(text: str) -> str:
    """Text of any origin for rich, which reads markup in square brackets."""
    return escape(escape_control_chars(text))


def _console(stderr: bool) -> rich.console.Console:
    console = rich.console.Console(stderr=stderr, emoji=False)  # a name such as :x: stays as it is
    return console if console.is_terminal else rich.console.Console(stderr=stderr, emoji=False, width=_PLAIN_WIDTH)


def _grow(tree: Tree, content: Mapping[str, Any]) -> None:
    for name, value in content.items():
        if isinstance(value, Mapping):
            _grow(tree.add(_safe(name)), value)
        elif isinstance(value, list):
            branch = tree.add(_safe(name))
            for item in value:
                branch.add(_safe(str(item)))
        else:
            tree.add(_safe(f"{name}: {value}"))
