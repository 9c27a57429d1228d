"""CPU threads: how many PyTorch computes with, which decides the order of its sums and so the last bits of what a CPU computes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

THREADS = "threads"  # in recorded settings
_MOST = 1024  # a file that asks for more is not ours


def threads_of(device: torch.device) -> int | None:
    """Threads that the results of a device depend on: PyTorch's present ones on a CPU, None on a GPU."""
    return torch.get_num_threads() if device.type == "cpu" else None


def recorded_threads(settings: Mapping[str, Any]) -> int | None:
    """The number of threads in recorded settings; None where there is no sensible one."""
    value = settings.get(THREADS)
    return value if type(value) is int and 0 < value <= _MOST else None


def as_begun(settings: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with the number of threads that something was begun with, so that it goes on to the same bits."""
    threads = recorded_threads(before)
    return {**settings, THREADS: threads} if threads and recorded_threads(settings) else dict(settings)


@contextmanager
def computing(threads: int | None) -> Iterator[None]:
    """Inside, PyTorch computes with that many CPU threads; None changes nothing."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
