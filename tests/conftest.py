"""Set-up that every test shares."""

from __future__ import annotations

import collections
import json
import os
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
    parser.addoption("--rows", metavar="FILE", help="append a JSON line for every test that does not pass, and how many passed, to FILE")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--rows") and not hasattr(config, "workerinput"):  # one of pytest-xdist's processes has it
        config.pluginmanager.register(RowsOfTests(Path(config.getoption("--rows"))))


class RowsOfTests:
    """What became of the tests, on the disk at once: a run may be cut off at any time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.counts = collections.Counter[str]()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.outcome == "failed":
            self.add(row="test", test=report.nodeid, phase=report.when, outcome="failed", error=str(report.longrepr).splitlines()[-8:])
        if report.when == "call" or report.outcome != "passed":
            self.counts[report.outcome] += 1
            if sum(self.counts.values()) % 100 == 0:
                self.add(row="tests", so_far=dict(self.counts))

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.add(row="test", test=report.nodeid, phase="collect", outcome="failed", error=str(report.longrepr).splitlines()[-8:])

    def pytest_sessionfinish(self, exitstatus: int) -> None:
        self.add(row="tests", exit=int(exitstatus), counts=dict(self.counts))

    def add(self, **values: object) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")
            file.flush()
            os.fsync(file.fileno())


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
