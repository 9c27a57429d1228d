"""benchmarks/throughput.py: what it counts, that wrong numbers get no ratio, and that a run writes what it measured."""

from __future__ import annotations

import dataclasses
import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

CPU = torch.device("cpu")


@pytest.fixture
def throughput() -> ModuleType:
    return importlib.import_module("throughput")


@pytest.fixture
def cheap(throughput: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ceilings that need no measuring."""
    monkeypatch.setattr(throughput.machine, "copy_ceiling", lambda device, rounds: 1e10)
    monkeypatch.setattr(throughput.machine, "arithmetic_ceiling", lambda device, precision, rounds: 1e11)


@pytest.fixture
def problem(throughput: ModuleType) -> Any:
    harness = throughput.harness
    return harness.make_problem(harness.WORKLOADS["digits"], CPU, 4, 10)


def run(throughput: ModuleType, tmp_path: Path, *more: str) -> tuple[int, dict[str, Any]]:
    small = ["--workload", "digits", "--batch-size", "4", "--iterations", "1", "--rounds", "2", "--device", "cpu"]
    target = tmp_path / "out.json"
    status = throughput.main([*small, "--peers", "published", "eager", "fused", "--json", str(target), *more])
    return status, json.loads(target.read_text())


@pytest.mark.slow
@pytest.mark.usefixtures("cheap")
def test_the_floor_takes_the_best_ceiling_of_all_rounds(throughput: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that is slow in one round is not taken to be slow in all."""
    rates = iter([1e11, 4e11, 2e11])
    monkeypatch.setattr(throughput.machine, "arithmetic_ceiling", lambda device, precision, rounds: next(rates))
    _, content = run(throughput, tmp_path, "--precision", "fp32", "--rounds", "3")
    assert content["ceilings"] == {"fp32": 4e11, "copy": 1e10}
    (result,) = content["workloads"]
    assert result["floors"]["fp32"]["seconds"] >= result["floors"]["fp32"]["operations"] / 4e11


@pytest.mark.parametrize("precisions", [["fp32"], pytest.param(["fp32", "bf16"], marks=pytest.mark.slow)])
@pytest.mark.usefixtures("cheap")
def test_a_run_writes_what_it_measured(
    throughput: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], precisions: list[str]
) -> None:
    status, content = run(throughput, tmp_path, "--precision", *precisions)
    (result,) = content["workloads"]
    assert status == 0
    assert {"commit", "command", "device", "versions", "precision flags", "ceilings"} <= content.keys()
    names = {(row["peer"], row["precision"]) for row in result["rows"]}
    assert names == {("published", "fp32"), *((peer, precision) for peer in ("eager", "fused") for precision in precisions)}
    for row in result["rows"]:
        assert len(row["samples"]) == 2
        assert row["matches"]
        assert row["ratio_to_published"] > 0
        assert (row["ratio_to_best_rival"] is None) == (row["peer"] == "published" and len(result["rows"]) == 1)
        assert row["kernels"] is None
    assert result["ascent"]
    assert [each["ipc"] for each in result["whole_sets"]] == [10, 50]
    assert result["whole_sets"][1]["batches"] == 150
    printed = capsys.readouterr().out
    assert "× published" in printed
    assert "batch 4 (published: 100)" in printed


@pytest.mark.usefixtures("cheap")
def test_wrong_numbers_get_no_ratio_and_fail(
    throughput: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A matching loss that is one per cent off."""
    harness = throughput.harness
    advance = harness.Ours.advance

    def wrong(peer: Any, iterations: int) -> None:
        advance(peer, iterations)
        if peer.execution.backend == "fused":
            peer.refinement.losses.mul_(1.01)

    monkeypatch.setattr(harness.Ours, "advance", wrong)
    status, content = run(throughput, tmp_path, "--precision", "fp32", "--rounds", "1")
    rows = {row["peer"]: row for row in content["workloads"][0]["rows"]}
    assert status == 1
    assert not rows["fused"]["matches"]
    assert rows["fused"]["ratio_to_published"] is None
    assert rows["fused"]["ratio_to_best_rival"] is None
    assert rows["eager"]["matches"]
    assert content["workloads"][0]["whole_sets"] == []
    assert "fused (fp32) on digits" in capsys.readouterr().err


def test_floor_counts_operations_and_bytes(throughput: ModuleType, problem: Any) -> None:
    """The classifier's product by hand, every convolution once each way, Winograd's with its own products."""
    floor, harness = throughput.floor, throughput.harness
    calls = floor.count(harness.make_peer("fused", problem, "fp32"))
    (product,) = [call for call in calls if call.operator.startswith("aten.addmm")]
    assert product.operations == 2 * 4 * 64 * 10
    assert product.traffic == 4 * (4 * 64 + 64 * 10 + 10 + 4 * 10)
    (update,) = [call for call in calls if "adam_clip_" in call.operator]
    assert update.traffic >= 4 * 6 * problem.images.numel()  # images and both moments, read and written
    convolutions = [call for call in calls if "conv" in call.operator]
    layers = sum(isinstance(layer, torch.nn.Conv2d) for layer in problem.teacher.modules())
    assert len(convolutions) == 2 * layers
    assert all(call.operations > 0 for call in convolutions)
    first = next(call for call in convolutions if "conv3x3" in call.operator)
    assert first.operations == 2 * 16 * 4 * (problem.images.shape[-1] // 2) ** 2 * 16 * 16
    slow, fast = floor.seconds(calls, 1e11, 1e10), floor.seconds(calls, 2e11, 2e10)
    assert slow == pytest.approx(2 * fast)
    assert floor.seconds(calls, 1e30, 1e10) == pytest.approx(sum(call.traffic for call in calls) / 1e10)
    assert floor.seconds(calls, 1e11, 1e30) == pytest.approx(sum(call.operations for call in calls) / 1e11)


def test_the_oracle_without_gradients_of_weights_gives_the_same_numbers(throughput: ModuleType, problem: Any) -> None:
    released, frozen = (
        throughput.harness.numbers(throughput.harness.Published(problem, torch.float64, frozen=each), 2) for each in (False, True)
    )
    assert all(torch.equal(own, wanted) for own, wanted in zip(frozen, released, strict=True))


def test_a_disturbed_problem_has_weights_within_the_amount(throughput: ModuleType, problem: Any) -> None:
    first, again, second = (throughput.harness.disturbed(problem, 2.0**-9, draw).teacher for draw in (0, 0, 1))
    for p, one, same, other in zip(*(each.parameters() for each in (problem.teacher, first, again, second)), strict=True):
        assert torch.equal(one, same)
        assert ((one - p).abs() <= 1.01 * 2.0**-9 * p.abs()).all()
        assert not p.any() or not (torch.equal(one, p) or torch.equal(one, other))


def test_published_ascent_leaves_the_weights_as_they_were(throughput: ModuleType, problem: Any) -> None:
    peer = throughput.harness.Published(problem)
    before = [p.detach().clone() for p in peer.model.parameters()]
    throughput.stages.published_ascent(peer)
    assert all(torch.equal(p, value) for p, value in zip(peer.model.parameters(), before, strict=True))


def test_extrapolation_by_hand(throughput: ModuleType, problem: Any) -> None:
    """Ten iterations of 0.1 s within a batch of 3 s leave 2 s around them; the set is set up once."""
    batch = {"iterations": 10, "seconds": 3.0, "published_seconds": 4.0, "setup_seconds": 5.0}
    row = {"milliseconds": 100.0, "precision": "fp32"}
    ten, fifty = throughput.stages.whole_sets(problem, 500, batch, row, row)
    assert ten["batches"] == 10 * 3  # ten classes in batches of four
    assert ten["hours"] == pytest.approx((5 + 30 * (2 + 50)) / 3600)
    assert fifty["published_hours"] == pytest.approx(150 * (3 + 50) / 3600)


def test_peak_memory_is_that_of_the_run(throughput: ModuleType) -> None:
    """64 MiB that stay and 128 MiB that come and go."""
    machine = throughput.machine
    kept, peak = machine.peak_memory_of(lambda: torch.ones(2**24), lambda made: torch.ones(2**25).sum() + made[0], CPU)
    assert len(kept) == 2**24
    assert peak is None or 180 < peak < 260


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rounds", "0"], "--rounds must be at least 1, got 0"),
        (["--batch-size", "-3"], "--batch-size must be at least 1, got -3"),
        (["--teacher", "t.pt"], "--teacher belongs to one workload; name it with --workload"),
        (["--workload", "mnist"], "invalid choice: 'mnist'"),
    ],
)
def test_wrong_flags(throughput: ModuleType, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        throughput.main(arguments)
    assert message in capsys.readouterr().err


def test_comparing_leaves_the_peer_at_its_start_with_its_learning_rate(throughput: ModuleType, problem: Any) -> None:
    peer = throughput.harness.make_peer("fused", problem, "fp32")
    throughput.harness.numbers(peer, 2)
    assert peer.step == 0
    assert peer.problem is problem
    assert torch.equal(peer.refinement.images.contiguous(), problem.images)
    assert torch.equal(peer.refinement.learning_rates, problem.schedule.learning_rates)


@pytest.mark.parametrize("wrong", ["learning rate", "view"])
def test_a_wrong_step_is_told_from_rounding(throughput: ModuleType, problem: Any, wrong: str) -> None:
    """A learning rate of twice its value, and the views of the iterations after, although the steps are small."""
    harness, schedule = throughput.harness, problem.schedule
    exact = harness.numbers(harness.Published(problem, torch.float64, frozen=True), 3)
    allowed = throughput._allowed(problem, "fp32", {}, exact)
    changes = {"learning_rates": 2 * schedule.learning_rates} if wrong == "learning rate" else {"rows": schedule.rows.roll(1, 0)}
    other = dataclasses.replace(problem, schedule=dataclasses.replace(schedule, **changes))
    right, mistaken = (harness.errors(harness.make_peer("fused", each, "fp32"), exact, 3) for each in (problem, other))
    assert right[1] < allowed[1] < 1e-6
    assert mistaken[1] > 10 * allowed[1]
