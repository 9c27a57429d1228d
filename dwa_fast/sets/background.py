"""Input and output beside the computation: the next initial images are read, and finished batches are written, in threads."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Generic, TypeVar

T = TypeVar("T")


class Prefetcher(Generic[T]):
    """Computes the next value in a thread, from `begin` until `take`."""

    def __init__(self, compute: Callable[[], T]) -> None:
        self._compute = compute
        self._executor = ThreadPoolExecutor(1)
        self._next: Future[T] | None = None

    def begin(self) -> Future[T]:
        """Start computing the next value, unless that has been started."""
        if self._next is None:
            self._next = self._executor.submit(self._compute)
        return self._next

    def take(self) -> T:
        """Wait for the next value; raises what computing it raised."""
        value = self.begin().result()
        self._next = None
        return value

    def __enter__(self) -> Prefetcher[T]:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._executor.shutdown(cancel_futures=True)


class BackgroundWriter:
    """Runs jobs in a thread, one after the other.

    Leaving the context waits for all of them, also on Ctrl-C or an error. A job that fails stops no other; its exception is raised at
    the next `check` or `submit`, or when the context is left.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity  # jobs that may wait; `submit` blocks when there are more
        self._executor = ThreadPoolExecutor(1)
        self._pending: deque[Future[None]] = deque()

    def check(self) -> None:
        """Raise what a job has raised."""
        while self._pending and self._pending[0].done():
            self._pending.popleft().result()

    def submit(self, job: Callable[[], None]) -> None:
        """Add a job, once there is room for it."""
        self.check()
        while len(self._pending) > self._capacity:
            self._pending.popleft().result()
        self._pending.append(self._executor.submit(job))

    def __enter__(self) -> BackgroundWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            failures = [failure for job in self._pending if (failure := job.exception())]
        finally:  # a second Ctrl-C ends the waiting after the job that is running
            self._executor.shutdown(cancel_futures=True)
        if failures and error is None:
            raise failures[0]
