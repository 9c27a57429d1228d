"""Several processes make one set: the bytes are those of one process alone, whoever dies, hangs or starts anew."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import HashStore, TCPStore  # type: ignore[attr-defined]

from dwa_fast import InputError
from dwa_fast.data.manifest import read_manifest
from dwa_fast.sets import workers
from dwa_fast.sets.verify import problems
from dwa_fast.sets.workers import Elastic, Shard, StoppedError, StoreLostError, own_device, rank, threads_alone
from tests.processes import Bench, agent_store, contents, launcher


@pytest.fixture
def store() -> TCPStore:
    return agent_store()


@pytest.mark.parametrize("world", [1, 2, 3])
def test_any_number_of_workers_makes_the_same_bytes(bench: Bench, tmp_path: Path, store: TCPStore, world: int) -> None:
    processes = [bench.start(tmp_path, environment=launcher(world, store, number)) for number in range(world)]
    assert [process.wait() for process in processes] == [0] * world, [process.output for process in processes]
    assert contents(tmp_path) == bench.whole
    made = [int(process.output.split("30 images, ")[1].split()[0]) for process in processes]
    assert sum(made) == 30


@pytest.mark.parametrize("seed", range(4))
def test_batches_of_a_dead_worker_are_made_by_others(bench: Bench, tmp_path: Path, store: TCPStore, seed: int) -> None:
    """One of three hangs at a random operation on its files, which may be its survey of the folder, and is killed while the others work."""
    at = random.Random(seed).randint(1, bench.operations)
    doomed = bench.start(tmp_path, environment=launcher(3, store), at_operation=at, sends=signal.SIGSTOP)
    doomed.wait_for_stop()
    others = [bench.start(tmp_path, environment=launcher(3, store, number)) for number in (1, 2)]
    doomed.send(signal.SIGKILL)
    assert [process.wait() for process in others] == [0, 0], [process.output for process in others]
    assert doomed.wait() == -signal.SIGKILL
    run_tidies(bench, tmp_path)
    assert contents(tmp_path) == bench.whole


def run_tidies(bench: Bench, folder: Path) -> None:
    """A dead worker may have left a file half written, which the next run of the command removes."""
    assert [problem for problem in problems(folder) if "left over" not in problem] == []
    assert bench.run(folder)[0] == 0


def test_batches_of_a_hanging_worker_are_made_by_others(bench: Bench, tmp_path: Path, store: TCPStore) -> None:
    """When it wakes up after the set is complete, it changes nothing."""
    hanging = bench.start(tmp_path, environment=launcher(2, store), at_operation=60, sends=signal.SIGSTOP)
    hanging.wait_for_stop()
    other = bench.start(tmp_path, environment=launcher(2, store, 1))
    assert other.wait() == 0, other.output
    complete = contents(tmp_path)
    hanging.send(signal.SIGCONT)
    assert hanging.wait() == 0, hanging.output
    assert contents(tmp_path) == bench.whole
    assert complete.keys() >= bench.whole.keys()


def test_store_that_goes_is_one_sentence(bench: Bench, tmp_path: Path) -> None:
    store = agent_store()
    process = bench.start(tmp_path, environment=launcher(2, store), at_operation=60, sends=signal.SIGSTOP)
    process.wait_for_stop()
    del store
    process.send(signal.SIGCONT)
    assert process.wait() == 1
    assert "dwa-fast: the store of the workers is gone; what is finished is kept" in process.output
    assert "Traceback" not in process.output
    assert bench.run(tmp_path)[0] == 0
    assert contents(tmp_path) == bench.whole


def test_shards_make_the_same_bytes(bench: Bench, tmp_path: Path) -> None:
    """In any order, at the same time or not, one of them killed and started again; the last one completes the set."""
    assert bench.run(tmp_path, "--shard", "1/3", at_operation=40)[0] == -signal.SIGKILL
    together = [bench.start(tmp_path, "--shard", shard) for shard in ("3/3", "2/3")]
    assert [process.wait() for process in together] == [0, 0]
    assert not read_manifest(tmp_path)["complete"]
    assert "10 images of shard 3/3 made now; complete with the other shards" in together[0].output
    code, last = bench.run(tmp_path, "--shard", "1/3")
    assert (code, "30 images" in last.output) == (0, True)
    assert contents(tmp_path) == bench.whole
    assert bench.run(tmp_path, "--shard", "2/3")[0] == 0
    assert contents(tmp_path) == bench.whole


BAD_SHARDS = {
    "0/3": "a shard must be i/n with 1 ≤ i ≤ n, got 0/3",
    "4/3": "a shard must be i/n with 1 ≤ i ≤ n, got 4/3",
    "3": "a shard must be i/n with 1 ≤ i ≤ n, got '3'",
    "-1/3": "a shard must be i/n with 1 ≤ i ≤ n, got '-1/3'",
}


@pytest.mark.parametrize(("text", "message"), BAD_SHARDS.items())
def test_bad_shard(text: str, message: str) -> None:
    with pytest.raises(InputError) as error:
        Shard.parse(text)
    assert str(error.value) == message


def test_shards_deal_every_batch_once() -> None:
    shards = [Shard(number, 3) for number in (1, 2, 3)]
    dealt = [shard.begin(lambda: list(range(10))) for shard in shards]
    assert sorted(number for numbers in dealt for number in numbers) == list(range(10))
    assert [shards[0].take(3), shards[0].take(3), shards[0].take(3)] == [[0, 3, 6], [9], []]


class Clock:
    """Time that passes when it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(workers.time, "monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def elastic(store: Any, survey: Callable[[], list[int]]) -> Elastic:
    """A worker that has begun; it gives signs of life only when a test makes it."""
    worker = Elastic(store, "run")
    worker.begin(survey)
    return worker


def never() -> list[int]:
    pytest.fail("the folder was surveyed twice")


def test_every_batch_is_taken_once(clock: Clock) -> None:
    store = HashStore()
    first = elastic(store, lambda: [4, 5, 7, 9])
    second = elastic(store, never)
    taken = [first.take(1), second.take(2), first.take(2)]
    assert taken == [[4], [5, 7], [9]]


def test_lease_ends_when_there_is_no_sign_of_life(clock: Clock) -> None:
    store = HashStore()
    first, second = elastic(store, lambda: [1, 2]), elastic(store, never)
    assert (first.take(1), second.take(1)) == ([1], [2])
    second.done(2)
    assert second._left_over(1) == []  # the first sign of life that it looks for is none: from now on time counts
    clock.now = workers.LEASE_SECONDS
    assert second._left_over(1) == []
    clock.now += 1
    assert second.take(1) == [1]
    first.done(1)  # it was only slow
    second.done(1)
    assert (first.take(1), second.take(1)) == ([], [])
    assert (first.elsewhere(), second.elsewhere()) == (0, 0)


def test_sign_of_life_keeps_a_batch(clock: Clock) -> None:
    store = HashStore()
    first, second = elastic(store, lambda: [1]), elastic(store, never)
    assert first.take(1) == [1]
    for _ in range(3):
        assert second._left_over(1) == []
        clock.now += workers.LEASE_SECONDS
        store.add(f"dwa_fast/run/pulse/{first._me.decode()}", 1)


def test_whoever_waits_stops_with_its_process() -> None:
    store = HashStore()
    first = elastic(store, lambda: [1])
    first.take(1)
    with elastic(store, never) as second:
        second._stop.set()
        with pytest.raises(StoppedError):
            second.take(1)


def test_one_worker_completes(clock: Clock) -> None:
    store, completed = HashStore(), []
    team = [elastic(store, list), elastic(store, never)]
    for number, worker in enumerate(team):
        assert worker.take(1) == []
        worker.finish(lambda number=number: completed.append(number))  # type: ignore[misc]
    assert completed == [0]


def test_lost_store() -> None:
    class Gone(HashStore):  # type: ignore[misc]
        def add(self, key: str, amount: int) -> int:
            raise RuntimeError("Broken pipe")

    worker = elastic(Gone(), lambda: [1])
    with pytest.raises(StoreLostError, match="the store of the workers is gone"):
        worker.take(1)


def test_threads_of_several_workers_are_those_of_one_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun gives each of several workers one OpenMP thread, which would change the bits."""
    assert threads_alone() == torch.get_num_threads() == 2
    for name, value in {"TORCHELASTIC_RUN_ID": "x", "LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(workers, "_cores", lambda: 7)
    assert threads_alone() == 7
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert threads_alone() == 2
    monkeypatch.undo()
    assert 1 <= workers._cores() <= (os.cpu_count() or 1)


def test_workers_of_a_machine_share_its_gpus_out(monkeypatch: pytest.MonkeyPatch) -> None:
    current: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    assert (own_device("auto"), rank()) == ("auto", 0)
    for name, value in {"TORCHELASTIC_RUN_ID": "x", "LOCAL_RANK": "3", "RANK": "7"}.items():
        monkeypatch.setenv(name, value)
    assert [own_device(device) for device in ("auto", "cuda", "cuda:0", "cpu")] == ["cuda:1", "cuda:1", "cuda:0", "cpu"]
    assert (current, rank()) == ([1, 1], 7)


def test_shard_under_the_launcher_is_refused(bench: Bench, tmp_path: Path, store: TCPStore) -> None:
    code, process = bench.run(tmp_path, "--shard", "1/2", environment=launcher(2, store))
    assert code == 1
    assert "--shard is for processes that know nothing of each other" in process.output


def children(process: int) -> list[int]:
    """The processes that one has started."""
    return [int(number) for number in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def test_torchrun_starts_workers_anew(bench: Bench, tmp_path: Path) -> None:
    """The launcher itself: one of its two workers is killed, it restarts both, and they go on with what is not in the journal."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1"]
    folder, log = tmp_path / "set", tmp_path / "log"
    with log.open("w") as output:
        launched = subprocess.Popen([*command, "-m", "dwa_fast", *bench.command(folder)], stdout=output, stderr=output, cwd=tmp_path)
        while launched.poll() is None and not list(folder.glob("images/new*/*.png")):
            time.sleep(0.02)
        os.kill(children(launched.pid)[0], signal.SIGKILL)
        assert launched.wait(timeout=300) == 0, log.read_text()
    assert contents(folder) == bench.whole
