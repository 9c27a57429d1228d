"""How fast the engine is on a GPU, in one command of at most seven minutes: every number is a row of speed.jsonl as soon as it is measured.

python benchmarks/gpu_speed.py --output gpu-results     `make gpu-speed` builds first, then runs this
python benchmarks/gpu_speed.py --only "training resnet18"     one step again
python benchmarks/gpu_speed.py --dry-run                the same steps on a CPU, tiny
"""

from __future__ import annotations

import argparse
import functools
import gc
import importlib.metadata
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import harness
import machine
import pipeline
import stages
import torch
import torchvision.models  # noqa: F401  # here once, not in every step: it takes seconds
from proof import Rows, Step, add_options, chosen, exit_status, run_steps

from dwa_fast.engine.backend import resolve
from dwa_fast.engine.synthesis import Batch, Synthesizer

BUDGET = 400.0  # seconds after the build, which leaves 80 of 480 for that
_CHECKED = 3  # iterations whose losses are compared
_LISTED = 60  # kernels by name at most
_PACKAGES = ("torch", "torchvision", "triton", "numpy", "nvidia-cudnn-cu13", "nvidia-cublas")
_STATE = "name,driver_version,clocks.sm,clocks.mem,power.draw,power.limit,temperature.gpu"


@dataclass(frozen=True)
class Plan:
    """What is measured, and in which sizes."""

    device: torch.device
    workloads: tuple[str, ...]
    batch: int | None  # images of a batch; None: as published
    precision: str
    iterations: int  # of one sample
    rounds: int  # samples of each peer, taken in turns
    rivals: tuple[str, ...]
    flights: tuple[int, ...]  # batches in flight
    ceilings: int  # copies and products tried for the most that they can do
    trained: tuple[str, ...]  # cases of pipeline.py
    patience: float = 1.0  # factor of the steps' limits
    fewer: Mapping[tuple[str, str], int] = field(default_factory=dict)  # iterations of one sample, of a slow rival on a workload


FULL = Plan(
    torch.device("cuda"),
    ("cifar100-resnet18", "imagenet-resnet18", "imagenet-resnet50"),
    batch=None,
    precision="bf16",
    iterations=50,
    rounds=5,
    rivals=("eager+graph", "published"),
    flights=(1, 2, 4, 8),
    ceilings=7,
    trained=("convnet128", "resnet18"),
    fewer={("imagenet-resnet50", "published"): 10},
)
TINY = Plan(
    torch.device("cpu"),
    ("digits",),
    batch=3,
    precision="fp32",
    iterations=2,
    rounds=1,
    rivals=("eager", "published"),
    flights=(1, 2),
    ceilings=1,
    trained=("tiny",),
    patience=20.0,
)


def steps(plan: Plan) -> list[Step]:
    """In the order of their worth: a plan that is cut short has lost the least. Compiling takes longest, the first time above all."""

    def step(name: str, work: Callable[..., None], limit: float, *arguments: Any) -> Step:
        return Step(name, functools.partial(work, plan, *arguments), plan.patience * limit)

    first, *later = (step(f"compiled {name}", compiled, 90 if number else 170, name) for number, name in enumerate(plan.workloads))
    trainings = [step(f"training {case}", training, 90, case) for case in plan.trained]
    return [
        step("facts", facts, 40),
        step("first look", first_look, 60),
        *(step(f"loop {name}", loop, 75, name) for name in plan.workloads),
        step("ascent", ascent, 30),
        step("batches in flight", batches_in_flight, 60),
        first,
        *trainings,
        step("state", state, 10),
        *later,
    ]


def facts_of(device: torch.device, rows: Rows) -> None:
    """Machine and versions."""
    versions = {name: _version(name) for name in _PACKAGES}
    rows.add("facts", **machine.facts(device, sys.argv), packages=versions, cudnn=torch.backends.cudnn.version())


def facts(plan: Plan, rows: Rows) -> None:
    """Machine, versions, and the ceilings of its arithmetic and its memory."""
    state(plan, rows)
    facts_of(plan.device, rows)
    arithmetic = machine.arithmetic_ceiling(plan.device, plan.precision, plan.ceilings)
    rows.add("ceilings", copy=machine.copy_ceiling(plan.device, plan.ceilings), arithmetic=arithmetic)


def state(plan: Plan, rows: Rows) -> None:
    """Clocks, power and temperature as they are."""
    try:
        query = ["nvidia-smi", f"--query-gpu={_STATE}", "--format=csv,noheader"]
        shown = subprocess.run(query, capture_output=True, text=True, check=False, timeout=5).stdout.strip()
    except (OSError, subprocess.TimeoutExpired) as error:
        shown = str(error)
    rows.add("state", columns=_STATE, values=shown)


def first_look(plan: Plan, rows: Rows) -> None:
    """Whether the fused step is right at all: traced, near the exact gradient, the same captured and called, the same twice."""
    problem = _problem(plan, plan.workloads[0])
    exact = harness.numbers(harness.Published(problem, torch.float64, frozen=True), _CHECKED)
    execution = resolve("fused", plan.precision, str(plan.device))  # type: ignore[arg-type]
    fused, called = harness.Ours(problem, execution), harness.Ours(problem, replace(execution, captures=False))
    errors = harness.errors(fused, exact, _CHECKED)
    plain = harness.errors(harness.make_peer("eager", problem, plan.precision), exact, _CHECKED)
    results = []
    for peer in (fused, called, fused):
        peer.reset()
        peer.advance(_CHECKED)
        results.append((peer.refinement.images.clone(), peer.losses_so_far()))
    captured, direct, again = results
    rows.add(
        "first look",
        workload=problem.workload.name,
        traced=fused.network.traced,
        errors=errors,
        errors_of_pytorch=plain,
        right=fused.network.traced and all(own <= 2 * other for own, other in zip(errors, plain, strict=True)),
        recorded_equals_called=all(torch.equal(a, b) for a, b in zip(captured, direct, strict=True)),
        same_twice=all(torch.equal(a, b) for a, b in zip(captured, again, strict=True)),
        milliseconds=1e3 * harness.seconds(fused, plan.iterations, plan.device),
    )


def loop(plan: Plan, name: str, rows: Rows) -> None:
    """The fused loop beside each rival, in pairs: only the two that are compared take memory. Then its kernels by name."""
    problem = _problem(plan, name)
    exact = _exact(problem)
    for rival in plan.rivals:
        _pair(plan, problem, exact, rival, rows)
    fused = harness.make_peer("fused", problem, plan.precision)
    fused.advance(plan.iterations)
    spent = machine.kernel_times(lambda: fused.advance(plan.iterations), plan.device)
    listed = sorted(spent.items(), key=lambda item: -sum(item[1]))
    rows.add(
        "kernels",
        workload=name,
        per_iteration=sum(map(len, spent.values())) / plan.iterations,
        microseconds=1e6 * sum(map(sum, spent.values())) / plan.iterations,
        largest=[[kernel[:120], len(times) / plan.iterations, 1e6 * sum(times) / plan.iterations] for kernel, times in listed[:_LISTED]],
    )
    tried = harness.Ours(problem, harness.Tuned.of(resolve("fused", plan.precision, str(plan.device))))  # type: ignore[arg-type]
    samples, _ = harness.interleaved({"fused": fused, "tried": tried}, {}, plan.iterations, plan.rounds, plan.device)
    rows.add("cudnn.benchmark", workload=name, **{f"milliseconds_{key}": _milliseconds(own) for key, own in samples.items()})


def compiled(plan: Plan, name: str, rows: Rows) -> None:
    """The fused loop beside the plain step that TorchInductor has tuned and compiled."""
    problem = _problem(plan, name)
    _pair(plan, problem, _exact(problem), "compiled", rows)


def ascent(plan: Plan, rows: Rows) -> None:
    """All K steps of the ascent, ours and the published loop's."""
    for name in plan.workloads[:2]:
        problem = _problem(plan, name)
        peers = {f"{each}/{plan.precision}": harness.make_peer(each, problem, plan.precision) for each in ("fused", "published")}
        for key, samples in stages.ascents(problem, peers, plan.rounds).items():
            rows.add("ascent", workload=name, peer=key, steps=problem.config.steps, milliseconds=_milliseconds(samples))


def batches_in_flight(plan: Plan, rows: Rows) -> None:
    """Milliseconds per iteration and batch with several batches at once, through the public engine."""
    problem = _problem(plan, plan.workloads[0])
    for count in plan.flights:
        config = replace(problem.config, iterations=plan.iterations, concurrent_batches=count, backend="fused", precision=plan.precision)  # type: ignore[arg-type]
        engine = Synthesizer(problem.teacher, problem.images, config, problem.recipe.data, batch_sizes=[len(problem.images)])
        batches = [Batch(number, problem.images, problem.labels) for number in range(count)]
        run = functools.partial(engine.run, batches, seed=harness.SEED)
        run()  # captures the steps
        samples = [machine.timed(run, plan.device) / plan.iterations / count for _ in range(plan.rounds)]
        rows.add("batches in flight", workload=problem.workload.name, count=count, milliseconds=_milliseconds(samples), with_ascent=True)
        del engine, run
        gc.collect()


def training(plan: Plan, case: str, rows: Rows) -> None:
    """Training steps of students and teachers: the package's own, plain PyTorch, and the released loops."""
    for trains in ("student", "teacher"):
        result = pipeline.measure(pipeline.CASES[case], trains, plan.iterations, plan.rounds, plan.device)
        for row in result.pop("rows"):
            rows.add("training", **{**result, **row})


def _pair(plan: Plan, problem: harness.Problem, exact: tuple[torch.Tensor, torch.Tensor], rival: str, rows: Rows) -> None:
    """Both checked, then timed in turns; both are gone when this returns."""
    peers: dict[str, harness.Peer] = {}
    known: dict[str, dict[str, Any]] = {}
    for name in ("fused", rival):
        start = time.perf_counter()
        peers[name], peak = machine.peak_memory_of(
            lambda name=name: harness.make_peer(name, problem, plan.precision),  # type: ignore[misc]
            lambda peer: peer.advance(1),
            plan.device,
        )
        known[name] = {"peak_mib": peak, "setup_seconds": time.perf_counter() - start}
        known[name]["errors"] = harness.errors(peers[name], exact, _CHECKED)
    iterations = plan.fewer.get((problem.workload.name, rival), plan.iterations)
    samples, _ = harness.interleaved(peers, {}, iterations, plan.rounds, plan.device)
    medians = {name: statistics.median(taken) for name, taken in samples.items()}
    for name, facts in known.items():
        precision = peers[name].precision
        rows.add("loop", workload=problem.workload.name, peer=name, precision=precision, milliseconds=_milliseconds(samples[name]), **facts)
    rows.add("ratio", workload=problem.workload.name, rival=rival, times=medians[rival] / medians["fused"])


def _problem(plan: Plan, name: str) -> harness.Problem:
    return harness.make_problem(harness.WORKLOADS[name], plan.device, plan.batch, plan.iterations * (plan.rounds + 2))


def _exact(problem: harness.Problem) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradient and losses in float32 without TensorFloat-32: exact beside bf16, and fast enough for large images."""
    with resolve("reference", "fp32", str(problem.device)).arithmetic():
        numbers = harness.numbers(harness.Published(problem, frozen=True), _CHECKED)
    gc.collect()
    return numbers


def _milliseconds(samples: Sequence[float]) -> list[float]:
    return [round(1e3 * sample, 4) for sample in samples]


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all steps; 1 where one of them did not end well, 143 after SIGTERM."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, "speed.jsonl", BUDGET)
    options = parser.parse_args(arguments)
    if options.dry_run:
        os.environ["TORCHDYNAMO_DISABLE"] = "1"  # the compiled step is called as it is
    planned = chosen(steps(TINY if options.dry_run else FULL), options.only, parser)
    rows = Rows(options.output / "speed.jsonl")
    return exit_status(rows, run_steps(planned, rows, options.budget))


if __name__ == "__main__":
    sys.exit(main())
