"""Reading ahead and writing behind: order, room, errors, and what happens when the context is left."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from dwa_fast.sets.background import Ahead, Background


def nothing() -> None:
    pass


def test_ahead_computes_in_another_thread_once_it_is_asked_to() -> None:
    threads: list[threading.Thread] = []

    def compute() -> int:
        threads.append(threading.current_thread())
        return len(threads)

    with Ahead(compute) as ahead:
        assert threads == []
        ahead.begin()
        ahead.begin()
        assert [ahead.take(nothing), ahead.take(nothing)] == [1, 2]
    assert threading.main_thread() not in threads


def test_ahead_raises_what_computing_raised() -> None:
    def fail() -> int:
        raise ZeroDivisionError

    with Ahead(fail) as ahead, pytest.raises(ZeroDivisionError):
        ahead.take(nothing)


def test_waiting_for_the_next_value_ends_with_what_happens_meanwhile() -> None:
    release = threading.Event()

    def raises() -> None:
        raise ZeroDivisionError

    with Ahead(release.wait) as ahead, pytest.raises(ZeroDivisionError):
        ahead.take(raises)
    release.set()


def test_jobs_are_done_in_order_before_the_context_is_left() -> None:
    done: list[int] = []
    jobs: list[Callable[[], None]] = [lambda number=number: done.append(number) for number in range(20)]  # type: ignore[misc]
    with Background(room=2) as background:
        for job in jobs:
            background.submit(job)
    assert done == list(range(20))


def test_submitting_waits_for_room() -> None:
    release, third = threading.Event(), threading.Event()
    with Background(room=1) as background:
        background.submit(lambda: release.wait(60) and None)  # type: ignore[func-returns-value]
        background.submit(nothing)

        def submit() -> None:
            background.submit(nothing)
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
        with Background(room=5) as background:
            background.submit(fail_later)
            background.submit(lambda: done.append(1))
            begin.set()

    with pytest.raises(ZeroDivisionError):
        leave()
    assert done == [1]


def test_a_failed_job_is_raised_while_the_others_go_on() -> None:
    failed = threading.Event()

    def check_until_it_raises() -> None:
        with Background(room=5) as background:
            background.submit(fail)
            background.submit(failed.set)
            failed.wait(60)
            background.check()

    with pytest.raises(ZeroDivisionError):
        check_until_it_raises()


def test_an_interrupt_lets_what_is_finished_be_written() -> None:
    done: list[int] = []
    release = threading.Event()

    def interrupted() -> None:
        with Background(room=5) as background:
            background.submit(lambda: release.wait(60) and None)  # type: ignore[func-returns-value]
            background.submit(lambda: done.append(1))
            release.set()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert done == [1]
