"""CPU threads. PyTorch's number of threads decides the order of its sums, and so the last bits of results computed on a CPU."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

log = logging.getLogger("dwa_fast")

THREADS = "threads"  # key in recorded settings
_MOST = 1024  # larger recorded numbers are not valid


def threads_of(device: torch.device) -> int | None:
    """The number of threads to record with a result: PyTorch's present one on a CPU, None on a GPU."""
    return torch.get_num_threads() if device.type == "cpu" else None


def with_recorded_threads(settings: Mapping[str, Any], recorded: Mapping[str, Any], what: str) -> dict[str, Any]:
    """`settings` with the number of threads in `recorded`, so that resuming with another number is allowed; a difference is logged.

    Args:
        what: what is resumed, for the warning.
    """
    before, now = recorded.get(THREADS), settings.get(THREADS)
    if not before or not now:  # one of them is of a GPU
        return dict(settings)
    if before != now:
        log.warning("%s: begun on %s CPU threads, now on %s; the last bits of what is still computed may differ", what, before, now)
    return {**settings, THREADS: before}


def recorded_threads(settings: Mapping[str, Any]) -> int | None:
    """The number of threads in recorded settings; None if there is no valid one."""
    value = settings.get(THREADS)
    return value if type(value) is int and 0 < value <= _MOST else None


@contextmanager
def torch_threads(threads: int | None) -> Iterator[None]:
    """Use that number of PyTorch CPU threads inside the block; None leaves it unchanged."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
