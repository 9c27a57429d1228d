"""Terminal output through rich: text, tables, trees, the log and progress bars."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import rich.console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from dwa_fast.errors import escape_control_chars

_PLAIN_WIDTH = 120  # columns where the output is not a terminal
_LINE_EVERY = 60.0  # least seconds between two lines of progress where there is no terminal


class Console:
    """Results go to standard output; progress, log and errors to standard error."""

    def __init__(self) -> None:
        self._out, self._err = _console(stderr=False), _console(stderr=True)
        logger = logging.getLogger("dwa_fast")
        logger.handlers[:] = [_LogHandler(self._err)]
        logger.setLevel(logging.INFO)

    def print(self, text: str) -> None:
        """Print one line."""
        self._out.print(escape_control_chars(text), soft_wrap=True)

    def error(self, text: str) -> None:
        """Print one line on standard error."""
        self._err.print(f"dwa-fast: {escape_control_chars(text)}", soft_wrap=True)

    def table(self, title: str, rows: Sequence[Sequence[str]]) -> None:
        """Print a table; the first row is the header."""
        table = Table(title=escape_control_chars(title))
        for number, name in enumerate(rows[0]):
            table.add_column(escape_control_chars(name), justify="left" if number == 0 else "right")
        for row in rows[1:]:
            table.add_row(*map(escape_control_chars, row))
        self._out.print(table)

    def tree(self, title: str, content: Mapping[str, Any]) -> None:
        """Print nested values."""
        tree = Tree(escape_control_chars(title))
        _grow(tree, content)
        self._out.print(tree, soft_wrap=True)

    @contextmanager
    def bars(self, *, shown: bool = True) -> Iterator[Callable[[str], Bar]]:
        """Progress bars: yields a function that starts a bar with a title.

        Where standard error is not a terminal, as under nohup, Slurm or CI, each bar prints a line at its start and at most one a minute.
        """
        columns = (
            *(TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), _Rate()),
            *(TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("{task.fields[note]}", markup=False)),
        )
        lines = shown and not self._err.is_terminal
        with Progress(*columns, console=self._err, disable=lines or not shown, speed_estimate_period=3600) as progress:
            yield lambda title: Bar(progress, title, lines=lines)


class Bar:
    """A progress bar, called with the number of finished steps and the total; where there is no terminal, plain lines."""

    def __init__(self, progress: Progress, title: str, *, lines: bool = False) -> None:
        self._progress, self._lines = progress, lines
        self._id = progress.add_task(escape_control_chars(title), total=None, note="")
        self._next_line: float | None = None

    def __call__(self, done: int, total: int) -> None:
        """Move the bar. Steps finished before the first call do not count for the rate."""
        if self._next_line is None:
            self._next_line = -math.inf
            self._progress.reset(self._id, completed=done, total=total)
        self._progress.update(self._id, completed=done, total=total)
        if self._lines and self._progress.get_time() >= self._next_line:
            self._next_line = self._progress.get_time() + _LINE_EVERY
            self._print_line()

    def note(self, text: str) -> None:
        """Show a few words behind the bar."""
        self._progress.update(self._id, note=escape_control_chars(text))

    def report(self, text: str) -> None:
        """Print a line that stays, above the bars where they are shown."""
        task = self._task()
        self._progress.console.print(f"{task.description}: {escape_control_chars(text)}", soft_wrap=True)

    def _print_line(self) -> None:
        """Title, done and total, rate, time left, note."""
        task = self._task()
        left = "" if task.time_remaining is None or task.finished else f"{timedelta(seconds=task.time_remaining)} left"
        parts = [f"{task.description}: {task.completed:.0f}/{task.total:.0f}", _rate(task), left, task.fields["note"]]
        self._progress.console.print(", ".join(filter(None, parts)), soft_wrap=True)

    def _task(self) -> Task:
        return next(each for each in self._progress.tasks if each.id == self._id)


class _Rate(ProgressColumn):
    """Steps per second, or seconds per step."""

    def render(self, task: Task) -> Text:
        """The rate; empty before two steps are finished."""
        return Text(_rate(task))


def _rate(task: Task) -> str:
    speed = task.finished_speed or task.speed
    if not speed:
        return ""
    return f"{speed:.1f}/s" if speed >= 1 else f"{1 / speed:.1f} s each"


class _LogHandler(logging.Handler):
    """Log records as plain lines above the progress bars. rich's own handler would break and pad long lines."""

    def __init__(self, console: rich.console.Console) -> None:
        super().__init__()
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        """Print one record."""
        self._console.print(escape_control_chars(self.format(record)), soft_wrap=True)


def _console(stderr: bool) -> rich.console.Console:
    """A console that prints text as it is: no markup, no emoji codes, no highlighting."""
    console = rich.console.Console(stderr=stderr, markup=False, emoji=False, highlight=False)
    if not console.is_terminal:
        console.width = _PLAIN_WIDTH
    return console


def _grow(tree: Tree, content: Mapping[str, Any]) -> None:
    for name, value in content.items():
        if isinstance(value, Mapping):
            _grow(tree.add(escape_control_chars(name)), value)
        elif isinstance(value, list):
            branch = tree.add(escape_control_chars(name))
            for item in value:
                branch.add(escape_control_chars(str(item)))
        else:
            tree.add(escape_control_chars(f"{name}: {value}"))
