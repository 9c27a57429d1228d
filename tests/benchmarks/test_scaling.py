"""benchmarks/scaling.py: the fits find what they should, every curve is measured and drawn, and points are taken in turns."""

from __future__ import annotations

import importlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from dwa_fast import InputError

SIZES = [1, 2, 4, 8]
BLUE, ORANGE = (31, 119, 180), (255, 127, 14)  # of the first and of the second peer


@pytest.fixture
def scaling() -> ModuleType:
    return importlib.import_module("scaling")


@pytest.fixture
def plan(scaling: ModuleType) -> Any:
    """The smallest points there can be, of a network of three layers; in one thread, which waits for no other."""
    torch.set_num_threads(1)
    workload = replace(scaling.harness.WORKLOADS["digits"], architecture="convnet128", size=8, classes=2)
    plan = scaling.make_plan(workload, torch.device("cpu"), "fp32", quick=True)
    fixed = {"rounds": 1, "whole": 1, "steps": 1, "classes": 2, "batch": 2}
    return replace(plan, **fixed, batches=(2, 3), sides=(8,), ipcs=(1,), iterations=(1, 2), flights=(1, 2))


def curve(scaling: ModuleType, name: str = "time", **medians: Sequence[float]) -> Any:
    """A curve with those medians and samples on both sides of them."""
    samples = {peer: {n: [0.9 * y, y, 1.2 * y] for n, y in zip(SIZES, values, strict=False)} for peer, values in medians.items()}
    return scaling.curves.Curve(name, "iterations", "seconds", "1", samples, {"batch": 2})


def test_fits_find_the_lines(scaling: ModuleType) -> None:
    power, _ = curve(scaling, ours=[3 * n**1.5 for n in SIZES]).fits("ours")
    assert (power.slope, power.offset) == (pytest.approx(1.5), pytest.approx(np.log(3)))
    assert (power.slope_error, power.offset_error) == (pytest.approx(0, abs=1e-12), pytest.approx(0, abs=1e-12))
    _, straight = curve(scaling, ours=[0.2 + 0.05 * n for n in SIZES]).fits("ours")
    assert (straight.offset, straight.slope) == (pytest.approx(0.2), pytest.approx(0.05))
    flat, _ = curve(scaling, ours=[40.0] * 4).fits("ours")
    assert flat.slope == pytest.approx(0)


def test_standard_errors_are_those_of_numpy(scaling: ModuleType) -> None:
    x, y = np.array(SIZES, dtype=float), np.array([1.1, 1.8, 4.5, 7.6])
    fits = curve(scaling, ours=y.tolist()).fits("ours")
    oracles = np.polyfit(np.log(x), np.log(y), 1, cov=True), np.polyfit(x, y, 1, w=1 / y, cov=True)
    for line, ((slope, offset), covariance) in zip(fits, oracles, strict=True):
        assert (line.slope, line.offset) == (pytest.approx(slope), pytest.approx(offset))
        assert (line.slope_error, line.offset_error) == tuple(pytest.approx(error) for error in np.sqrt(np.diag(covariance)))


def test_what_has_no_logarithm_has_no_exponent(scaling: ModuleType, tmp_path: Path) -> None:
    nothing = curve(scaling, ours=[0.0, 0.0, 1.0, 2.0])
    assert nothing.fits("ours") is None
    assert nothing.describe()["lines"][0]["power_law"] is None
    assert "–" in shown(scaling, [nothing])
    scaling.curves.plot([nothing], "nothing", tmp_path / "nothing.png")


def test_two_points_are_too_few(scaling: ModuleType) -> None:
    with pytest.raises(ValueError, match="needs at least 3 points, got 2"):
        curve(scaling, ours=[1.0, 2.0]).fits("ours")


def shown(scaling: ModuleType, curves: list[Any]) -> str:
    console = Console(width=200)
    with console.capture() as captured:
        console.print(scaling.curves.table(curves, "title"))
    return captured.get()


def test_table_and_plot(scaling: ModuleType, tmp_path: Path) -> None:
    both = curve(scaling, "both", theirs=[2.0 * n for n in SIZES], ours=[1.0 * n for n in SIZES])
    text = shown(scaling, [both])
    assert "both: seconds against n = iterations" in text
    assert text.count("1.000 ± 0.000") == 2
    assert "8 [7.2 … 9.6]" in text  # the largest of ours, with the spread of its samples
    sizes = []
    for count in (1, 5):
        path = tmp_path / "folder" / f"{count}.png"
        scaling.curves.plot([both] * count, "title", path)
        with Image.open(path) as image:
            colours = {colour for _, colour in image.convert("RGB").getcolors(2**24)}
            sizes.append(image.size)
        assert {BLUE, ORANGE} <= colours
    assert sizes[1][0] > sizes[0][0]
    assert sizes[1][1] > sizes[0][1]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("quick", [False, True])
def test_plans_have_points_for_a_line(scaling: ModuleType, device: str, quick: bool) -> None:
    for workload in scaling.harness.WORKLOADS.values():
        found = scaling.make_plan(workload, torch.device(device), None, quick=quick)
        for points in (found.iterations, found.batches, found.sides, found.ipcs, found.flights):
            assert len(points) >= 3
            assert list(points) == sorted(set(points))
        assert found.batch >= 1


def test_points_are_taken_in_turns(scaling: ModuleType) -> None:
    calls: list[str] = []
    jobs = {name: lambda name=name: float(calls.append(name) or len(calls)) for name in "ab"}
    scaling.harness.warm_up(jobs)
    assert scaling.harness.in_turns(jobs, 2) == {"a": [3, 5], "b": [4, 6]}
    assert "".join(calls) == "ababab"


@pytest.mark.parametrize(
    ("name", "sizes", "peers"),
    [
        ("time-iterations", [1, 2], 2),
        ("time-batch", [2, 3], 2),
        ("time-size", [64], 2),
        ("time-ipc", [1], 1),
        ("time-flights", [1, 2], 1),
        ("memory-batch", [2, 3], 2),
        ("memory-ipc", [1], 1),
    ],
)
def test_every_curve_is_measured(scaling: ModuleType, plan: Any, name: str, sizes: list[int], peers: int) -> None:
    found = scaling.CURVES[name](plan)
    assert found.name == name
    assert list(found.samples) == ["published/fp32", "fused/fp32"][-peers:]
    rounds = plan.peaks if name.startswith("memory") else plan.rounds
    for taken in found.samples.values():
        assert [(size, len(samples)) for size, samples in taken.items()] == [(size, rounds) for size in sizes]
        assert name.startswith("memory") or all(sample > 0 for samples in taken.values() for sample in samples)


def test_command(scaling: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """What was measured is printed, written with the facts of the machine, and drawn."""
    monkeypatch.setitem(scaling.CURVES, "time-size", lambda plan: curve(scaling, "time-size", ours=[1.0 * n for n in SIZES]))
    json_file, picture = tmp_path / "out" / "scaling.json", tmp_path / "out" / "scaling.png"
    chosen = ["--curves", "time-size", "--workload", "digits", "--device", "cpu"]
    assert scaling.main([*chosen, "--json", str(json_file), "--plot", str(picture)]) == 0
    assert "1.000 ± 0.000" in capsys.readouterr().out
    content = json.loads(json_file.read_text())
    assert {"commit", "command", "device", "versions"} <= set(content)
    assert content["workload"] == "digits"
    (measured,) = content["curves"]
    (line,) = measured["lines"]
    assert (measured["name"], measured["settings"], line["peer"]) == ("time-size", {"batch": 2}, "ours")
    assert line["power_law"]["slope"] == pytest.approx(1)
    assert line["points"][1] == {"size": 2, "median": 2.0, "low_10": 1.8, "high_90": 2.4, "samples": [1.8, 2.0, 2.4]}
    with Image.open(picture) as image:
        assert image.format == "PNG"


def test_whole_sets_have_their_images(scaling: ModuleType, plan: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What time-ipc and memory-ipc run makes ipc images of each class."""
    made = []
    distill = scaling.distill
    monkeypatch.setattr(scaling, "distill", lambda *arguments, **named: made.append(distill(*arguments, **named)))
    make_set, settings = scaling._sets(replace(plan, ipcs=(1, 2)))
    make_set(2)
    assert made == [4]
    assert (settings["classes"], settings["steps"], settings["iterations"]) == (2, 1, 1)


def test_unknown_peaks_are_said(scaling: ModuleType, plan: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling.machine, "peak_memory_of", lambda build, run, device: (None, None))
    with pytest.raises(InputError, match="choose --curves without those of memory"):
        scaling.memory_batch(plan)
