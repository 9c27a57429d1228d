"""The progress bar: what was done before says nothing about the rate."""

from __future__ import annotations

import io
import logging

import pytest
import rich.console
from rich.progress import Progress

from dwa_fast.commands.console import Bar, Console, _Rate


@pytest.mark.parametrize(("seconds", "shown"), [(1.0, "10.0/s"), (40.0, "4.0 s each")])
def test_rate_counts_what_was_done_since_the_first_call(seconds: float, shown: str) -> None:
    clock = [0.0]
    console = rich.console.Console(file=io.StringIO(), width=100)
    progress = Progress(console=console, get_time=lambda: clock[0])
    bar = Bar(progress, "set")
    bar(1000, 2000)
    (task,) = progress.tasks
    assert _Rate().render(task).plain == ""
    for done in range(1, 11):
        clock[0] += seconds / 10
        bar(1000 + done, 2000)
    assert (task.completed, task.total) == (1010, 2000)
    assert _Rate().render(task).plain == shown


def test_text_is_shown_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    """No markup, no emoji codes, and control characters are escaped."""
    console = Console()
    console.print("[red]a :x: \x1b[31m")
    console.table("[b]t", [["[i]a"], ["[red]b"]])
    console.tree("[b]t", {"[i]a": "[red]c", "d": ["[x]"]})
    logging.getLogger("dwa_fast").info("[red]%s", "log :x: " * 40)
    with console.bars() as track:
        bar = track("[b]set")
        bar.note("[red]ce 0.5")
        bar(1, 2)
    printed = capsys.readouterr()
    assert printed.out.startswith("[red]a :x: \\x1b[31m\n")
    for text in ("[b]t", "[i]a", "[red]b", "[red]c", "[x]"):
        assert text in printed.out
    assert printed.err == "[red]" + "log :x: " * 40 + "\n[b]set: 1/2, [red]ce 0.5\n"


def test_without_a_terminal_a_line_at_the_start_and_at_most_one_a_minute() -> None:
    clock, written = [0.0], io.StringIO()
    console = rich.console.Console(file=written, width=30)
    progress = Progress(console=console, get_time=lambda: clock[0], disable=True)
    bar = Bar(progress, "dwa, ipc 10", lines=True)
    bar(40, 140)
    for second in range(1, 151):
        clock[0] = second
        bar.note("ce 0.5")
        bar(40 + second // 2, 140)
    assert written.getvalue().splitlines() == [
        "dwa, ipc 10: 40/140",
        "dwa, ipc 10: 70/140, 2.0 s each, 0:02:20 left, ce 0.5",
        "dwa, ipc 10: 100/140, 2.0 s each, 0:01:20 left, ce 0.5",
    ]


def test_a_report_stays_whatever_the_time(capsys: pytest.CaptureFixture[str]) -> None:
    with Console().bars() as track:
        bar = track("teacher")
        bar(0, 9)
        for epochs in (1, 2):
            bar.report(f"{50 * epochs} % after {epochs} epochs")
    assert capsys.readouterr().err == "teacher: 0/9\nteacher: 50 % after 1 epochs\nteacher: 100 % after 2 epochs\n"


def test_without_a_terminal_nothing_that_only_a_terminal_understands(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console()
    with console.bars() as track:
        track("teacher [1]")(0, 3)
    with console.bars(shown=False) as track:
        track("another worker")(0, 3)
    assert capsys.readouterr().err == "teacher [1]: 0/3\n"
