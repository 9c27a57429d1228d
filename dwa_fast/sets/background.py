"""What goes on beside the device: the next initial images are read, and what is finished is written, while it computes."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from types import TracebackType
from typing import Generic, TypeVar

T = TypeVar("T")


class Ahead(Generic[T]):
    """Computes the next value in a thread, from when it is asked to begin until somebody takes it."""

    def __init__(self, compute: Callable[[], T]) -> None:
        self._compute = compute
        self._pool = ThreadPoolExecutor(1)
        self._next: Future[T] | None = None

    def begin(self) -> None:
        """Begin with the next value, unless that has been done."""
        if self._next is None:
            self._next = self._pool.submit(self._compute)

    def take(self, meanwhile: Callable[[], None]) -> T:
        """The next value, waited for if need be; raises what computing it raised.

        Args:
            meanwhile: called about once a second while waiting; what it raises ends the waiting.
        """
        self.begin()
        assert self._next is not None
        while not wait([self._next], timeout=1).done:
            meanwhile()
        value, self._next = self._next.result(), None
        return value

    def __enter__(self) -> Ahead[T]:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)  # what it waits for itself may end only later


class Background:
    """Does jobs in a thread, one after the other, while its caller goes on.

    Leaving the context waits for all of them, also on Ctrl-C or an error. A job that fails stops no other; its exception is raised at
    the next `check` or `submit`, or when the context is left.
    """

    def __init__(self, room: int) -> None:
        self._room = room  # jobs that may wait; more make `submit` wait
        self._pool = ThreadPoolExecutor(1)
        self._pending: deque[Future[None]] = deque()

    def check(self) -> None:
        """Raise what a job has raised."""
        while self._pending and self._pending[0].done():
            self._pending.popleft().result()

    def submit(self, job: Callable[[], None]) -> None:
        """Add a job, once there is room for it."""
        self.check()
        while len(self._pending) > self._room:
            self._pending.popleft().result()
        self._pending.append(self._pool.submit(job))

    def __enter__(self) -> Background:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            failures = [failure for job in self._pending if (failure := job.exception())]
        finally:  # a second Ctrl-C ends the waiting after the job that is being done
            self._pool.shutdown(cancel_futures=True)
        if failures and error is None:
            raise failures[0]
