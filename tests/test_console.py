"""The progress bar: what was done before says nothing about the rate."""

from __future__ import annotations

import io

import pytest
import rich.console
from rich.progress import Progress

from dwa_fast.console import Bar, _Rate


@pytest.mark.parametrize(("seconds", "shown"), [(1.0, "10.0/s"), (40.0, "4.0 s each")])
def test_rate_counts_what_was_done_since_the_first_call(seconds: float, shown: str) -> None:
    clock = [0.0]
    console = rich.console.Console(file=io.StringIO(), width=100)
    progress = Progress(console=console, get_time=lambda: clock[0])
    bar = Bar(progress, progress.add_task("set", total=None, note=""))
    bar(1000, 2000)
    (task,) = progress.tasks
    assert _Rate().render(task).plain == ""
    for done in range(1, 11):
        clock[0] += seconds / 10
        bar(1000 + done, 2000)
    assert (task.completed, task.total) == (1010, 2000)
    assert _Rate().render(task).plain == shown


def test_note_is_shown_as_it_is() -> None:
    progress = Progress(console=rich.console.Console(file=io.StringIO()))
    bar = Bar(progress, progress.add_task("set", total=None, note=""))
    bar.note("[red]ce 0.5")
    assert progress.tasks[0].fields["note"] == r"\[red]ce 0.5"
