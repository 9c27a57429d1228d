"""Independent random streams from one seed.

All random numbers come from `generator(seed, purpose, *indices)`. A stream depends on its purpose and never on how many numbers another
stream has used, so a batch gives the same images whether it runs first, last or alone.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from dwa_fast.errors import InputError


def generator(seed: int, purpose: str, *indices: int) -> np.random.Generator:
    """Random generator of one purpose ("views", "initial", …) and its indices (batch, class, …).

    Raises:
        InputError: seed is not an integer ≥ 0.
    """
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise InputError(f"seed must be an integer of at least 0, got {seed!r}")
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence((seed, zlib.crc32(purpose.encode()), *indices))))


def derive(seed: int, purpose: str, *indices: int) -> int:
    """The seed of a sub-task, below 2⁶³."""
    return int(generator(seed, purpose, *indices).integers(0, 2**63))


def normal(
    source: np.random.Generator,
    shape: tuple[int, ...],
) -> Tensor:  # shape, float32 on the CPU
    """Standard normal numbers, drawn on the host so that they are the same on every device."""
    return torch.from_numpy(source.standard_normal(shape, dtype=np.float32))


@contextmanager
def seeded_layers(seed: int, device: torch.device) -> Iterator[None]:
    """Inside, random layers and new weights follow the seed, on the CPU and the device; afterwards the generators are as before."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield
