"""What the fused back-end costs against iterations, batch, image size, images per class and batches in flight: curves and their exponents.

python benchmarks/scaling.py --json benchmark-output/scaling.json --plot benchmark-output/scaling.png
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import curves
import harness
import machine
import torch
from rich.console import Console

from dwa_fast import distill
from dwa_fast.config import Precision
from dwa_fast.data.images import MemorySet
from dwa_fast.data.pixels import denormalise
from dwa_fast.engine.backend import resolve_device
from dwa_fast.engine.synthesis import Batch, Synthesizer
from dwa_fast.errors import InputError
from dwa_fast.recipes import recipe

_PEERS = ("published", "fused")
_PEAK_RUNS = 2  # calls of one measurement of a peak
_CPU_CLASSES = 10  # at most, of the sets whose images per class vary

T = TypeVar("T")
Jobs = Mapping[tuple[str, int], Callable[[], float]]  # peer and size → a sample
Samples = dict[str, dict[int, list[float]]]  # peer → size → samples


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is held fixed, and the points of each curve."""

    workload: harness.Workload
    device: torch.device
    precision: Precision  # of the fused back-end
    rounds: int  # samples of each time
    peaks: int  # samples of each peak of memory
    warm_up: float  # seconds, before samples of time are taken
    batch: int  # images, where the batch is not what varies
    sample: int  # iterations of one sample, where they are not what varies
    steps: int  # of the ascent of such a batch
    whole: int  # iterations of a batch that runs from its begin to its end
    classes: int  # of the sets whose images per class vary; a batch has one image of each
    iterations: tuple[int, ...]
    batches: tuple[int, ...]
    sides: tuple[int, ...]  # of square images, pixels
    ipcs: tuple[int, ...]
    flights: tuple[int, ...]  # batches at once

    @property
    def settings(self) -> dict[str, object]:
        """For the JSON."""
        return {"batch": self.batch, "side": self.workload.size, "classes": self.workload.classes}


def make_plan(workload: harness.Workload, device: torch.device, precision: Precision | None, *, quick: bool) -> Plan:
    """Points that take minutes, or seconds where `quick`; on a CPU with smaller batches and fewer iterations."""
    cuda = device.type == "cuda"
    largest = max(8, (workload.batch if cuda else workload.cpu_batch) * (1 if quick else 2))
    batch = max(2, largest // (8 if quick else 4))
    return Plan(
        workload=workload,
        device=device,
        precision=precision or harness.offered("fused", device)[0],  # type: ignore[arg-type]
        rounds=3 if quick else 5,
        peaks=1 if quick else 3,
        warm_up=(1.0 if quick else 5.0) if cuda else 0.0,
        batch=batch,
        sample=(10 if quick else 50) if cuda else (1 if quick else 2),
        steps=2 if quick else recipe(workload.recipe).synthesis.steps,
        whole=(20 if quick else 100) if cuda else (2 if quick else 10),
        classes=min(workload.classes, batch if cuda else _CPU_CLASSES),
        iterations=tuple(count * (10 if cuda else 1) for count in ((1, 2, 4) if quick else (1, 2, 4, 8, 16))),
        batches=tuple(max(1, largest // part) for part in ((8, 4, 2) if quick else (8, 4, 2, 1))),
        sides=tuple(workload.size * quarters // 4 for quarters in ((2, 3, 4) if quick else (2, 3, 4, 5, 6))),
        ipcs=(1, 2, 4) if quick else (1, 2, 4, 8),
        flights=(1, 2, 3) if quick else (1, 2, 4, 8) if cuda else (1, 2, 3, 4),
    )


def time_iterations(plan: Plan) -> curves.Curve:
    """A batch is loaded and refined by so many iterations."""
    problem = harness.make_problem(plan.workload, plan.device, plan.batch, max(plan.iterations))

    def refine(peer: harness.Peer, count: int) -> None:
        peer.reset()
        peer.advance(count)

    jobs = {
        (name, count): functools.partial(machine.timed, functools.partial(refine, peer, count), plan.device)
        for name, peer in _peers(plan, problem).items()
        for count in plan.iterations
    }
    samples = _times(jobs, plan)
    return curves.Curve("time-iterations", "iterations of a batch", "seconds", "1", samples, plan.settings)


def time_batch(plan: Plan) -> curves.Curve:
    """Seconds per iteration of batches of several sizes."""
    problems = {count: harness.make_problem(plan.workload, plan.device, count, _horizon(plan)) for count in plan.batches}
    settings = {**plan.settings, "batch": "varies"}
    return curves.Curve("time-batch", "images of a batch", "seconds per iteration", "1", _per_iteration(plan, problems), settings)


def time_size(plan: Plan) -> curves.Curve:
    """Seconds per iteration against the pixels of an image."""
    problems = {
        side**2: harness.make_problem(replace(plan.workload, size=side), plan.device, plan.batch, _horizon(plan)) for side in plan.sides
    }
    settings = {**plan.settings, "side": "varies"}
    return curves.Curve("time-size", "pixels of an image", "seconds per iteration", "1", _per_iteration(plan, problems), settings)


def time_ipc(plan: Plan) -> curves.Curve:
    """Whole sets into a folder: preparing the teacher, and loading, ascent, refinement and writing of every batch."""
    make_set, settings = _sets(plan)
    jobs = {
        (_label("fused", plan), ipc): functools.partial(machine.timed, functools.partial(make_set, ipc), plan.device) for ipc in plan.ipcs
    }
    return curves.Curve("time-ipc", "images per class", "seconds of the whole set", "1", _times(jobs, plan), settings)


def time_flights(plan: Plan) -> curves.Curve:
    """Seconds in which every batch in flight gets on by an iteration, loading included."""
    problem = harness.make_problem(plan.workload, plan.device, plan.batch, plan.whole)
    config = replace(problem.config, ascent="none", backend="fused", precision=plan.precision)

    def fly(run: Synthesizer, batches: list[Batch]) -> float:
        return machine.timed(lambda: run.run(batches, seed=harness.SEED), plan.device) / plan.whole

    jobs = {}
    for flights in plan.flights:
        run = Synthesizer(problem.teacher, problem.images, replace(config, concurrent_batches=flights), problem.recipe.data)
        batches = [Batch(number, problem.images, problem.labels) for number in range(flights)]
        jobs[_label("fused", plan), flights] = functools.partial(fly, run, batches)
    settings = {**plan.settings, "iterations": plan.whole}
    return curves.Curve("time-flights", "batches in flight", "seconds per iteration of all", "≤ 1", _times(jobs, plan), settings)


def memory_batch(plan: Plan) -> curves.Curve:
    """Peak of a peer and its iterations for batches of several sizes."""
    jobs = {}
    for count in plan.batches:
        problem = harness.make_problem(plan.workload, plan.device, count, _PEAK_RUNS)
        for name in _PEERS:
            build = functools.partial(harness.make_peer, name, problem, plan.precision)
            jobs[_label(name, plan), count] = functools.partial(_peak, build, lambda peer: peer.advance(1), plan.device)
    settings = {**plan.settings, "batch": "varies"}
    return curves.Curve("memory-batch", "images of a batch", "MiB at the peak", "≤ 1", _peaks(jobs, plan), settings)


def memory_ipc(plan: Plan) -> curves.Curve:
    """Peak while whole sets are made."""
    make_set, settings = _sets(plan)
    jobs = {(_label("fused", plan), ipc): functools.partial(_peak, lambda ipc=ipc: ipc, make_set, plan.device) for ipc in plan.ipcs}  # type: ignore[misc]
    return curves.Curve("memory-ipc", "images per class", "MiB at the peak", "0", _peaks(jobs, plan), settings)


CURVES: dict[str, Callable[[Plan], curves.Curve]] = {
    "time-iterations": time_iterations,
    "time-batch": time_batch,
    "time-size": time_size,
    "time-ipc": time_ipc,
    "time-flights": time_flights,
    "memory-batch": memory_batch,
    "memory-ipc": memory_ipc,
}


def _label(name: str, plan: Plan) -> str:
    return f"{name}/{'fp32' if name == 'published' else plan.precision}"


def _peers(plan: Plan, problem: harness.Problem) -> dict[str, harness.Peer]:
    return {_label(name, plan): harness.make_peer(name, problem, plan.precision) for name in _PEERS}


def _horizon(plan: Plan) -> int:
    """Iterations of a schedule that holds all samples of a peer, unless the warm-up takes many."""
    return plan.sample * (plan.rounds + 1)


def _per_iteration(plan: Plan, problems: Mapping[int, harness.Problem]) -> Samples:
    jobs = {
        (name, size): functools.partial(harness.seconds, peer, plan.sample, plan.device)
        for size, problem in problems.items()
        for name, peer in _peers(plan, problem).items()
    }
    return _times(jobs, plan)


def _times(jobs: Jobs, plan: Plan) -> Samples:
    harness.warm_up(jobs, plan.warm_up)
    return _by_peer(harness.in_turns(jobs, plan.rounds))


def _peaks(jobs: Jobs, plan: Plan) -> Samples:
    return _by_peer(harness.in_turns(jobs, plan.peaks))


def _by_peer(taken: Mapping[tuple[str, int], list[float]]) -> Samples:
    peers = dict.fromkeys(peer for peer, _ in taken)
    return {peer: {size: samples for (name, size), samples in taken.items() if name == peer} for peer in peers}


def _peak(build: Callable[[], T], run: Callable[[T], None], device: torch.device) -> float:
    peak = machine.peak_memory_of(build, run, device)[1]
    if peak is None:
        raise InputError("this system does not say how much memory a process held at most; choose --curves without those of memory")
    return peak


def _sets(plan: Plan) -> tuple[Callable[[int], None], dict[str, object]]:
    """What distils a set of so many images per class into a folder that is removed afterwards, and its settings."""
    workload = replace(plan.workload, classes=plan.classes)
    problem = harness.make_problem(workload, plan.device, plan.classes * max(plan.ipcs), plan.whole)
    pixels = (denormalise(problem.images, problem.recipe.data).clamp(0, 1) * 255).round().to(torch.uint8).cpu()
    data = MemorySet(pixels, problem.labels.cpu(), [str(label) for label in range(plan.classes)])
    config = replace(problem.config, batch_size=plan.classes, steps=plan.steps, backend="fused", precision=plan.precision)
    chosen = replace(problem.recipe, synthesis=config)

    def make_set(ipc: int) -> None:
        with tempfile.TemporaryDirectory() as folder:
            distill(problem.teacher, data, chosen, ipc=ipc, output=Path(folder))

    fixed = {"batch": plan.classes, "classes": plan.classes, "iterations": plan.whole, "steps": plan.steps}
    return make_set, {**plan.settings, **fixed}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and write what was asked for."""
    options = _parse(sys.argv[1:] if arguments is None else arguments)
    device = resolve_device(options.device)
    torch.set_float32_matmul_precision("highest")
    plan = make_plan(harness.WORKLOADS[options.workload], device, options.precision, quick=options.quick)
    facts = machine.facts(device, sys.argv)
    measured: list[curves.Curve] = []
    for name in options.curves:
        print(f"{name} …", file=sys.stderr)
        measured.append(CURVES[name](plan))
        if options.json:  # after each curve, so that a later one cannot lose it
            content = {**facts, "workload": plan.workload.name, "curves": [curve.describe() for curve in measured]}
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
    title = f"{plan.workload.name} on {facts['device']}"
    Console(width=None if sys.stdout.isatty() else 190).print(curves.table(measured, title))
    if options.plot:
        curves.plot(measured, title, options.plot)
    return 0


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", default="cifar100-convnet128", choices=list(harness.WORKLOADS), help="what is distilled")
    parser.add_argument("--curves", nargs="+", default=list(CURVES), choices=list(CURVES), help="only these")
    parser.add_argument("--precision", choices=["fp32", "tf32", "bf16"], help="of the fused back-end; default: its fastest here")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, …")
    parser.add_argument("--quick", action="store_true", help="fewer and smaller points, fewer samples")
    parser.add_argument("--json", type=Path, help="also write everything there, raw samples included")
    parser.add_argument("--plot", type=Path, help="also draw the curves into that PNG")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except InputError as error:
        sys.exit(f"scaling.py: {error}")
