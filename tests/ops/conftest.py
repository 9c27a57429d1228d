"""Instruction sets of the C++ operators, one at a time."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator

import pytest

from dwa_fast import ops

LEVELS = ["baseline", "avx2", "avx512", "avx512_bf16"]


@pytest.fixture(autouse=True)
def threaded(two_threads: None) -> None:
    """Every operator divides its work."""


@pytest.fixture
def use_level() -> Iterator[Callable[[str], None]]:
    """Sets the instruction set for one test; one that the machine lacks skips it."""
    best = ops.cpu_level()
    extension = importlib.import_module("dwa_fast._C")

    def use(level: str) -> None:
        if LEVELS.index(level) > LEVELS.index(best):
            pytest.skip(f"this machine's instructions end at {best}")
        extension.set_cpu_level(level)

    yield use
    extension.set_cpu_level(best)
