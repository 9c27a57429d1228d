"""Prefetching and background writing: order, capacity, errors, and what happens when the context is left."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from dwa_fast.sets.background import BackgroundWriter, Prefetcher


def nothing() -> None:
    pass


def test_values_are_computed_in_another_thread_once_that_is_requested() -> None:
    threads: list[threading.Thread] = []

    def compute() -> int:
        threads.append(threading.current_thread())
        return len(threads)

    with Prefetcher(compute) as prefetcher:
        assert threads == []
        prefetcher.begin()
        prefetcher.begin()
        assert [prefetcher.take(), prefetcher.take()] == [1, 2]
    assert threading.main_thread() not in threads


def test_prefetcher_raises_what_computing_raised() -> None:
    def fail() -> int:
        raise ZeroDivisionError

    with Prefetcher(fail) as prefetcher, pytest.raises(ZeroDivisionError):
        prefetcher.take()


def test_jobs_are_done_in_order_before_the_context_is_left() -> None:
    done: list[int] = []
    jobs: list[Callable[[], None]] = [lambda number=number: done.append(number) for number in range(20)]  # type: ignore[misc]
    with BackgroundWriter(capacity=2) as writer:
        for job in jobs:
            writer.submit(job)
    assert done == list(range(20))


def test_submitting_waits_for_room() -> None:
    release, third = threading.Event(), threading.Event()
    with BackgroundWriter(capacity=1) as writer:
        writer.submit(lambda: release.wait(60) and None)  # type: ignore[func-returns-value]
        writer.submit(nothing)

        def submit() -> None:
            writer.submit(nothing)
            third.set()

        other = threading.Thread(target=submit)
        other.start()
        assert not third.wait(0.05)
        release.set()
        assert third.wait(60)
        other.join()


def fail() -> None:
    raise ZeroDivisionError


def test_a_failed_job_stops_no_other_and_is_raised() -> None:
    done: list[int] = []
    begin = threading.Event()

    def fail_later() -> None:
        begin.wait(60)
        raise ZeroDivisionError

    def leave() -> None:
        with BackgroundWriter(capacity=5) as writer:
            writer.submit(fail_later)
            writer.submit(lambda: done.append(1))
            begin.set()

    with pytest.raises(ZeroDivisionError):
        leave()
    assert done == [1]


def test_a_failed_job_is_raised_by_check() -> None:
    failed = threading.Event()

    def check_until_it_raises() -> None:
        with BackgroundWriter(capacity=5) as writer:
            writer.submit(fail)
            writer.submit(failed.set)
            failed.wait(60)
            writer.check()

    with pytest.raises(ZeroDivisionError):
        check_until_it_raises()


def test_an_interrupt_lets_what_is_finished_be_written() -> None:
    done: list[int] = []
    release = threading.Event()

    def interrupted() -> None:
        with BackgroundWriter(capacity=5) as writer:
            writer.submit(lambda: release.wait(60) and None)  # type: ignore[func-returns-value]
            writer.submit(lambda: done.append(1))
            release.set()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert done == [1]
