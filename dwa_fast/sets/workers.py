"""Who makes which batch of a set: one process alone, a shard of a batch scheduler, or workers of PyTorch's elastic launcher."""

from __future__ import annotations

import json
import logging
import os
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import torch

from dwa_fast.errors import InputError

log = logging.getLogger("dwa_fast")

LEASE_SECONDS = 30.0  # seconds after which a worker that gives no sign of life has lost what it had taken
_DONE = b"done"


class StoreLostError(InputError):
    """The store that the workers share cannot be reached any more."""


class StoppedError(Exception):
    """The process is ending; whoever waits for work need not wait any longer."""


class SharedStore(Protocol):
    """What is needed of a `torch.distributed.Store`."""

    def get(self, key: str, /) -> bytes: ...

    def set(self, key: str, value: str, /) -> None: ...

    def add(self, key: str, amount: int, /) -> int: ...

    def compare_set(self, key: str, expected: str, desired: str, /) -> bytes: ...


class Workers(Protocol):
    """How the batches of a set get to the processes that make them. Batches go by their numbers."""

    exclusive: bool  # whether what this process will take is its own from the beginning
    partial: bool  # whether batches may be missing when there is nothing left to take

    def begin(self, survey: Callable[[], list[int]]) -> list[int]:
        """The batches that are to be made, by whichever process; `survey` finds them, and is called in one process only."""

    def take(self, count: int) -> list[int]:
        """The next batches for this process, at most `count`; none once there is nothing left to do, here or elsewhere."""

    def done(self, number: int) -> None:
        """A batch of this process is on the disk and in the journal."""

    def elsewhere(self) -> int:
        """How many batches other processes have made, as far as is known."""

    def finish(self, complete: Callable[[], None]) -> None:
        """Call `complete` once there is nothing left to take."""

    def __enter__(self) -> Workers: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None: ...


class Shard:
    """One of n processes that know nothing of each other: batches are dealt by number. The only one, by default."""

    exclusive = True

    def __init__(self, number: int = 1, count: int = 1) -> None:
        """Shard `number` of `count`, from 1 on.

        Raises:
            InputError: there is no such shard.
        """
        if not 1 <= number <= count:
            raise InputError(f"a shard must be i/n with 1 ≤ i ≤ n, got {number}/{count}")
        self.number, self.count = number, count
        self.partial = count > 1
        self._mine: deque[int] = deque()

    @classmethod
    def parse(cls, text: str) -> Shard:
        """From "i/n"."""
        number, _, count = text.partition("/")
        if not (number.isdecimal() and count.isdecimal()):
            raise InputError(f"a shard must be i/n with 1 ≤ i ≤ n, got {text!r}")
        return cls(int(number), int(count))

    def begin(self, survey: Callable[[], list[int]]) -> list[int]:
        """The batches of this shard that are to be made."""
        mine = [number for number in survey() if number % self.count == self.number - 1]
        self._mine = deque(mine)
        return mine

    def take(self, count: int) -> list[int]:
        """The next batches."""
        return [self._mine.popleft() for _ in range(min(count, len(self._mine)))]

    def done(self, number: int) -> None:
        """Nobody else needs to know."""

    def elsewhere(self) -> int:
        """Others are not known."""
        return 0

    def finish(self, complete: Callable[[], None]) -> None:
        """Complete the set, if the other shards have finished too."""
        complete()

    def __enter__(self) -> Shard:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        pass


class Elastic:
    """One of several workers that share a store: each takes a batch when it has time for one.

    A batch that is taken belongs to its worker until it is done, or until the worker has given no sign of life for the time of a lease.
    Then another takes it; should both come to an end, they have written the same bytes. No worker is special: what only one may do, the
    survey of the folder and the completion of the set, is taken in the same way.
    """

    exclusive = False
    partial = False

    def __init__(self, store: SharedStore, name: str) -> None:
        """One of the workers of the run of that name, of which a store may see many."""
        self._store, self._name, self._lease = store, f"dwa_fast/{name}", LEASE_SECONDS
        self._me = uuid.uuid4().hex.encode()
        self._missing: list[int] = []
        self._mine: set[int] = set()  # taken by this worker and not done
        self._finished: set[int] = set()  # known to be done, here or elsewhere
        self._made = 0
        self._all_made = 0
        self._beats: dict[bytes, tuple[int, float]] = {}  # worker → its last sign of life, and when this process first saw it
        self._stop = threading.Event()
        self._pulse = threading.Thread(target=self._beat, daemon=True)

    def begin(self, survey: Callable[[], list[int]]) -> list[int]:
        """The batches that are to be made, by all workers together."""
        self._once("survey", lambda: self._ask(self._store.set, "missing", json.dumps(survey())))
        self._missing = json.loads(self._ask(self._store.get, "missing"))
        return self._missing

    def take(self, count: int) -> list[int]:
        """The next batches; waits while others work on the last ones, and takes them over if those workers die.

        Raises:
            StoreLostError: the store is gone.
            StoppedError: this process is ending.
        """
        taken: list[int] = []
        while len(taken) < count and (place := self._ask(self._store.add, "next", 1) - 1) < len(self._missing):
            if self._claim(f"batch/{self._missing[place]}"):
                taken.append(self._missing[place])
        while not taken and len(self._finished) < len(self._missing):
            taken = self._left_over(count)
            if not taken:
                self._wait()
        self._mine.update(taken)
        return taken

    def done(self, number: int) -> None:
        """Tell the others."""
        self._ask(self._store.set, f"batch/{number}", _DONE.decode())
        self._made += 1
        self._ask(self._store.add, "made", 1)
        self._finished.add(number)
        self._mine.discard(number)

    def elsewhere(self) -> int:
        """How many batches other workers had made at the last sign of life of this one."""
        return max(0, self._all_made - self._made)

    def finish(self, complete: Callable[[], None]) -> None:
        """Let one worker complete the set; returns once that is done."""
        self._once("complete", complete)

    def __enter__(self) -> Elastic:
        self._ask(self._store.add, self._pulse_of(self._me), 1)
        self._pulse.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop.set()
        self._pulse.join()

    def _left_over(self, count: int) -> list[int]:
        """Batches that nobody has taken, or whose worker is dead."""
        found: list[int] = []
        for number in self._missing:
            if len(found) < count and number not in self._finished and number not in self._mine:
                if self._claim(f"batch/{number}"):
                    found.append(number)
                elif self._ask(self._store.get, f"batch/{number}") == _DONE:
                    self._finished.add(number)
        return found

    def _once(self, task: str, action: Callable[[], Any]) -> None:
        """Let one worker do something; returns once it is done."""
        while not self._claim(task):
            if self._ask(self._store.get, task) == _DONE:
                return
            self._wait()
        action()
        self._ask(self._store.set, task, _DONE.decode())

    def _claim(self, task: str) -> bool:
        """Take a task that is nobody's, or a dead worker's; whether it is ours now."""
        owner = self._ask(self._store.compare_set, task, "", self._me.decode())
        if owner not in (self._me, _DONE) and self._is_dead(owner):
            owner = self._ask(self._store.compare_set, task, owner.decode(), self._me.decode())
        return bool(owner == self._me)

    def _is_dead(self, worker: bytes) -> bool:
        """Whether a worker has given no sign of life for the time of a lease, by the clock of this process."""
        beat = self._ask(self._store.add, self._pulse_of(worker), 0)
        last, since = self._beats.get(worker, (None, 0.0))
        if beat != last:
            self._beats[worker] = beat, time.monotonic()
            return False
        return time.monotonic() - since > self._lease

    def _beat(self) -> None:
        while not self._stop.wait(self._lease / 5):
            try:
                self._ask(self._store.add, self._pulse_of(self._me), 1)
                self._all_made = self._ask(self._store.add, "made", 0)
            except StoreLostError:  # whoever asks for work will see it too
                return

    def _wait(self) -> None:
        if self._stop.wait(min(1.0, self._lease / 10)):
            raise StoppedError

    def _pulse_of(self, worker: bytes) -> str:
        return f"pulse/{worker.decode()}"

    def _ask(self, operation: Callable[..., Any], key: str, *arguments: Any) -> Any:
        try:
            return operation(f"{self._name}/{key}", *arguments)
        except RuntimeError as error:
            raise StoreLostError(
                "the store of the workers is gone; what is finished is kept, and the same command goes on from there"
            ) from error


def launched() -> bool:
    """Whether PyTorch's elastic launcher (torchrun) has started this process."""
    return torch.distributed.is_available() and torch.distributed.is_torchelastic_launched()


def elastic(run: str = "set") -> Elastic:
    """This process as a worker of the elastic launcher.

    Args:
        run: tells one run of the same launch from another; the same in all workers.
    """
    from torch.distributed.rendezvous import rendezvous  # here: not every build of PyTorch has it

    store, _, _ = next(rendezvous("env://"))
    return Elastic(store, f"{run}/{os.environ['TORCHELASTIC_RESTART_COUNT']}")  # the store outlives workers and what they had taken


def rank() -> int:
    """Number of this worker among those of the elastic launcher; 0 without it."""
    return int(os.environ["RANK"]) if launched() else 0


def own_device(device: str) -> str:
    """The device of this worker, made the current one: the workers of a machine share its GPUs out, where the name leaves it open."""
    if not launched() or device not in ("auto", "cuda") or not torch.cuda.is_available():
        return device
    number = int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count()
    torch.cuda.set_device(number)
    return f"cuda:{number}"


def threads_alone() -> int:
    """CPU threads that PyTorch would take in a process alone. The launcher gives each of several workers one, and so other bits."""
    here = int(os.environ["LOCAL_WORLD_SIZE"]) if launched() else 1
    if here == 1 or os.environ.get("OMP_NUM_THREADS") != "1":
        return torch.get_num_threads()
    log.info("%d workers with %d threads each, for the bits of one process alone; a new set with --threads 1 is faster", here, _cores())
    return _cores()


def _cores() -> int:
    """Physical cores that this process may use."""
    usable = os.sched_getaffinity(0)
    files = [Path(f"/sys/devices/system/cpu/cpu{number}/topology/thread_siblings_list") for number in usable]
    return len({path.read_text() for path in files}) if all(path.is_file() for path in files) else len(usable)
