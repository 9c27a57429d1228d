"""Memory of a CPU that repeated steps keep: the C library gives large blocks back and faults every page in again."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from dwa_fast import ops


@contextmanager
def kept_memory(device: torch.device) -> Iterator[None]:
    """Inside, large tensors that this thread makes on a CPU take the memory of those that were let go; afterwards it goes back.

    Nothing happens on a GPU, where PyTorch does the same, and without the compiled operators.
    """
    if device.type != "cpu" or ops.cause() is not None:
        yield
        return
    extension = importlib.import_module("dwa_fast._C")
    extension.enter_pool()
    try:
        yield
    finally:
        extension.leave_pool()
        extension.release_pool()
