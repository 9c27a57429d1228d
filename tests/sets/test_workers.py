"""Several processes make one set: the bytes are those of a single process, also where one is killed."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.distributed import HashStore  # type: ignore[attr-defined]

from dwa_fast import InputError
from dwa_fast.data.manifest import read_manifest
from dwa_fast.sets import workers
from dwa_fast.sets.distill import batch_specs
from dwa_fast.sets.workers import Shard, TorchrunWorker, default_threads, own_device, rank
from tests.files import contents
from tests.processes import Bench, Process, agent_store, launcher

pytestmark = pytest.mark.usefixtures("two_threads")

BATCHES = batch_specs(4, 5, 2)


def made(process: Process) -> int:
    match = re.search(r"(\d+) (?:of them|images of worker)", process.output)
    assert match, process.output
    return int(match[1])


def test_two_workers_make_the_same_bytes_also_after_one_is_killed(bench: Bench, tmp_path: Path) -> None:
    """One is killed during its second batch, the other makes the rest; then both are restarted, as torchrun does."""
    store = agent_store()
    assert bench.run(tmp_path, environment=launcher(store, 2, 0), at_operation=90)[0] == -signal.SIGKILL
    code, other = bench.run(tmp_path, environment=launcher(store, 2, 1))
    assert (code, read_manifest(tmp_path)["complete"]) == (0, False), other.output
    again = [bench.start(tmp_path, environment=launcher(store, 2, number, restart=1)) for number in range(2)]
    assert [process.wait() for process in again] == [0, 0], [process.output for process in again]
    assert contents(tmp_path) == bench.whole
    assert 5 <= sum(map(made, again)) == 25 - made(other)


def test_shards_make_the_same_bytes(bench: Bench, tmp_path: Path) -> None:
    """In any order, at the same time or not, one of them killed and started again; the last one completes the set."""
    first, second = (bench.start(tmp_path, "--shard", shard, at_operation=at) for shard, at in (("1/2", 40), ("2/2", None)))
    assert (first.wait(), second.wait()) == (-signal.SIGKILL, 0)
    assert not read_manifest(tmp_path)["complete"]
    assert "15 images of shard 2/2 made now; complete with the other shards" in second.output
    code, last = bench.run(tmp_path, "--shard", "1/2")
    assert (code, "30 images" in last.output) == (0, True)
    assert contents(tmp_path) == bench.whole


@pytest.mark.slow
def test_torchrun_restarts_workers(bench: Bench, tmp_path: Path) -> None:
    """The launcher itself: one of its two workers is killed, it restarts both, and they make the batches that have no entry."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1"]
    folder, log = tmp_path / "set", tmp_path / "log"
    with log.open("w") as output:
        launched = subprocess.Popen([*command, "-m", "dwa_fast", *bench.command(folder)], stdout=output, stderr=output, cwd=tmp_path)
        while launched.poll() is None and not list(folder.glob("images/new*/*.png")):
            time.sleep(0.02)
        os.kill(int(Path(f"/proc/{launched.pid}/task/{launched.pid}/children").read_text().split()[0]), signal.SIGKILL)
        assert launched.wait(timeout=300) == 0, log.read_text()
    assert contents(folder) == bench.whole


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


def test_every_batch_is_in_one_shard() -> None:
    shards = [Shard(number, 3) for number in (1, 2, 3)]
    shares = [shard.share(BATCHES) for shard in shards]
    assert sorted(batch.number for share in shares for batch in share) == list(range(10))
    assert list(shards[0].take(shares[0][1:])) == [BATCHES[number] for number in (3, 6, 9)]
    assert [Shard().others_done(), shards[0].others_done()] == [True, None]


def test_every_missing_batch_is_handed_out_once() -> None:
    """Also where one worker looked later and found fewer batches missing."""
    store = HashStore()
    workers = [TorchrunWorker(store, 2) for _ in range(2)]
    early, late = workers[0].take(workers[0].share(BATCHES)), workers[1].take(BATCHES[3:8])
    assert [batch.number for batch in (next(early), next(late), next(early), next(late))] == [0, 3, 4, 5]
    assert [batch.number for batch in early] == [6, 7, 8, 9]
    assert list(late) == []
    assert [worker.others_done() for worker in workers] == [False, True]


def test_a_restart_hands_out_all_batches_again() -> None:
    store = HashStore()
    assert list(TorchrunWorker(store, 1).take(BATCHES)) == BATCHES
    assert list(TorchrunWorker(store, 1, restart=1).take(BATCHES)) == BATCHES


def test_store_that_is_gone() -> None:
    class Gone(HashStore):  # type: ignore[misc]
        def add(self, key: str, amount: int) -> int:
            raise RuntimeError("Broken pipe")

    with pytest.raises(InputError, match="the shared store of torchrun is gone; finished batches are kept"):
        next(TorchrunWorker(Gone(), 2).take(BATCHES))


def test_threads_of_several_workers_are_those_of_a_single_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun gives each of several workers one OpenMP thread, which would change the bits."""
    assert default_threads() == torch.get_num_threads() == 2
    for name, value in {"TORCHELASTIC_RUN_ID": "x", "LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(workers, "_cores", lambda: 7)
    assert default_threads() == 7
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert default_threads() == 2
    monkeypatch.undo()
    assert 1 <= workers._cores() <= (os.cpu_count() or 1)


def test_workers_of_a_machine_divide_its_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    current: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    assert (own_device("auto"), rank()) == ("auto", 0)
    for name, value in {"TORCHELASTIC_RUN_ID": "x", "LOCAL_RANK": "3", "RANK": "7"}.items():
        monkeypatch.setenv(name, value)
    assert [own_device(device) for device in ("auto", "cuda", "cuda:0", "cpu")] == ["cuda:1", "cuda:1", "cuda:0", "cpu"]
    assert (current, rank()) == ([1, 1], 7)


def test_shard_under_torchrun_is_refused(bench: Bench, tmp_path: Path) -> None:
    code, process = bench.run(tmp_path, "--shard", "1/2", environment=launcher(agent_store(), 2, 0))
    assert code == 1
    assert "--shard is for processes that do not communicate" in process.output
