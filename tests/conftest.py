"""Set-up that every test shares."""

from __future__ import annotations

import json
import os
import platform
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from tests.hostile import contents

if TYPE_CHECKING:
    from tests.processes import Bench

# Triton reads this where a kernel is decorated, so it must be set before any test imports dwa_fast.kernels.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# A shell that starts the tests in the background lets them ignore Ctrl-C, and the commands that they start would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--json-summary", metavar="FILE", help="write what ran, where, and how it ended to FILE")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, exitstatus: int, config: pytest.Config) -> None:
    """The summary that `make gpu` leaves behind."""
    target = config.getoption("--json-summary")
    if target is None:
        return
    outcomes = ("passed", "failed", "error", "skipped", "xfailed", "xpassed")
    reports = {outcome: terminalreporter.stats.get(outcome, []) for outcome in outcomes}
    has_gpu = torch.cuda.is_available()
    summary = {
        "exit": int(exitstatus),
        "counts": {outcome: len(found) for outcome, found in reports.items()},
        "not_passed": {report.nodeid: str(report.longrepr).splitlines()[-1:] for report in (*reports["failed"], *reports["error"])},
        "device": torch.cuda.get_device_name() if has_gpu else None,
        "capability": torch.cuda.get_device_capability() if has_gpu else None,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
    }
    Path(target).write_text(json.dumps(summary, indent=1) + "\n")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked gpu run where there is one."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def settled() -> Iterator[None]:
    """Every test starts from the same seed, with one thread, since two tests run at once, and leaves the number of threads as it was."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def two_threads(settled: None) -> None:
    """For what divides its work between threads, or depends on their number."""
    torch.set_num_threads(2)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """The CPU, and the GPU where there is one."""
    return torch.device(request.param)


@pytest.fixture
def outside(tmp_path: Path) -> Iterator[Path]:
    """A folder that must be the same after the test, and that would hold the canary."""
    folder = tmp_path / "outside"
    (folder / "new000").mkdir(parents=True)
    (folder / "precious.txt").write_text("precious")
    before = contents(folder)
    yield folder
    assert contents(folder) == before


@pytest.fixture(scope="session")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """Command lines in processes that can be killed."""
    from tests.processes import make_bench

    with make_bench(tmp_path_factory.mktemp("bench")) as made:
        yield made
