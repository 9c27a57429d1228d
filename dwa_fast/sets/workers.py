"""Which batches of a set this process makes: all of them, a shard, or what the store of torchrun hands out."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from dwa_fast.errors import InputError
from dwa_fast.sets.store import BatchSpec

log = logging.getLogger("dwa_fast")


class Workers(Protocol):
    """How the batches of a set are divided among processes. Each process finds the missing batches itself."""

    def share(self, batches: Sequence[BatchSpec]) -> list[BatchSpec]:
        """Those batches that this process may have to make."""

    def take(self, missing: Sequence[BatchSpec]) -> Iterator[BatchSpec]:
        """One after the other, the batches that this process makes, of those missing in its share."""

    def others_done(self) -> bool | None:
        """Whether all other processes have finished, called once this one has; None: unknown."""


class Shard:
    """Shard `number` of `count`, from 1 on, for processes that do not communicate; by default the only one."""

    def __init__(self, number: int = 1, count: int = 1) -> None:
        if not 1 <= number <= count:
            raise InputError(f"a shard must be i/n with 1 ≤ i ≤ n, got {number}/{count}")
        self.number, self.count = number, count

    @classmethod
    def parse(cls, text: str) -> Shard:
        """From "i/n"; raises InputError where there is no such shard."""
        number, _, count = text.partition("/")
        if not (number.isdecimal() and count.isdecimal()):
            raise InputError(f"a shard must be i/n with 1 ≤ i ≤ n, got {text!r}")
        return cls(int(number), int(count))

    def share(self, batches: Sequence[BatchSpec]) -> list[BatchSpec]:
        """Every n-th batch."""
        return [batch for batch in batches if batch.number % self.count == self.number - 1]

    def take(self, missing: Sequence[BatchSpec]) -> Iterator[BatchSpec]:
        """All of them."""
        return iter(missing)

    def others_done(self) -> bool | None:
        """Unknown, unless there are no others."""
        return True if self.count == 1 else None


class TorchrunWorker:
    """One worker of PyTorch's elastic launcher: a counter in the shared store hands out the numbers of all batches.

    When a worker dies, torchrun restarts all of them with a new counter, and they find the missing batches again.
    """

    def __init__(
        self,
        store: Any,  # torch.distributed.Store
        workers: int,
        restart: int = 0,
    ) -> None:
        self._store, self._workers, self._restart = store, workers, restart

    def share(self, batches: Sequence[BatchSpec]) -> list[BatchSpec]:
        """All of them."""
        return list(batches)

    def take(self, missing: Sequence[BatchSpec]) -> Iterator[BatchSpec]:
        """The next number of the counter, until there is none; raises InputError where the store cannot be reached."""
        batches = {batch.number: batch for batch in missing}
        while (number := self._count("handed-out") - 1) <= max(batches, default=-1):
            if number in batches:  # others start at another time and may miss more or fewer batches
                yield batches[number]

    def others_done(self) -> bool | None:
        """Whether this worker is the last."""
        return self._count("finished") >= self._workers

    def _count(self, name: str) -> int:
        try:
            return int(self._store.add(f"dwa_fast/{self._restart}/{name}", 1))
        except RuntimeError as error:
            raise InputError("the shared store of torchrun is gone; finished batches are kept, run the command again to resume") from error


def launched() -> bool:
    """Whether PyTorch's elastic launcher (torchrun) has started this process."""
    return torch.distributed.is_available() and torch.distributed.is_torchelastic_launched()


def torchrun_worker() -> TorchrunWorker:
    """This process as a worker of torchrun."""
    from torch.distributed.rendezvous import rendezvous  # imported late: not every build of PyTorch has it

    store, _, workers = next(rendezvous("env://"))
    return TorchrunWorker(store, workers, int(os.environ["TORCHELASTIC_RESTART_COUNT"]))


def rank() -> int:
    """Number of this worker among those of torchrun; 0 without it."""
    return int(os.environ["RANK"]) if launched() else 0


def own_device(device: str) -> str:
    """The device of this worker, made the current one: where the name leaves it open, the workers of a machine divide its GPUs."""
    if not launched() or device not in ("auto", "cuda") or not torch.cuda.is_available():
        return device
    number = int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count()
    torch.cuda.set_device(number)
    return f"cuda:{number}"


def default_threads() -> int:
    """CPU threads that PyTorch takes in a single process. torchrun gives each of several workers one, which would change the last bits."""
    here = int(os.environ["LOCAL_WORLD_SIZE"]) if launched() else 1
    if here == 1 or os.environ.get("OMP_NUM_THREADS") != "1":
        return torch.get_num_threads()
    log.info("%d workers use %d threads each, for the bits of a single process; a new set with --threads 1 is faster", here, _cores())
    return _cores()


def _cores() -> int:
    """Physical cores that this process may use."""
    usable = os.sched_getaffinity(0)
    files = [Path(f"/sys/devices/system/cpu/cpu{number}/topology/thread_siblings_list") for number in usable]
    return len({path.read_text() for path in files}) if all(path.is_file() for path in files) else len(usable)
