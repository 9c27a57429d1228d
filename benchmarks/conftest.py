"""Options of `pytest benchmarks/bench_operators.py`, and what its JSON says about the machine."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))
import machine

from dwa_fast.engine.backend import resolve_device


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("operators of dwa_fast")
    group.addoption("--device", default="auto", help="auto, cpu, cuda, …")
    group.addoption("--all-shapes", action="store_true", help="on a CPU too every shape of every network")
    group.addoption("--compiled", action="store_true", help="also plain PyTorch in torch.compile, which takes seconds per case")


def pytest_configure(config: pytest.Config) -> None:
    """Here times are wanted: the --benchmark-disable of pyproject.toml is for the tests."""
    if "--benchmark-disable" not in config.invocation_params.args:
        config.option.benchmark_disable = False


def pytest_benchmark_generate_machine_info(config: pytest.Config) -> dict[str, Any]:
    return machine.facts(resolve_device(config.getoption("--device")), sys.argv)
