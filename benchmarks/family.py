"""What stages of several sizes and several teachers cost per iteration, beside a single size and each teacher alone.

python benchmarks/family.py --json benchmark-output/family.json

Expected: stages cost per pixel what the full size costs, and teachers in turn the mean of what each costs, within 5 %.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import harness
import machine
import torch
from torch import nn

from dwa_fast.engine.backend import resolve_device
from dwa_fast.engine.synthesis import Batch, Replica, Synthesizer

ALONE, SMALLER, STAGES, SECOND, BOTH = "full size", "smaller size", "stages of both sizes", "second teacher", "both teachers in turn"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", choices=list(harness.WORKLOADS), default="imagenet-resnet18")
    parser.add_argument("--second", default="resnet34", help="architecture of the second teacher")
    parser.add_argument("--smaller", type=int, help="size of every other stage, pixels; default: 25/28 of the full one, 200 of 224")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, …")
    parser.add_argument("--precision", default="auto", help="fp32, bf16, …; auto: what the device is best at")
    parser.add_argument("--batch-size", type=int, help="images of a batch; default: as published on a GPU, fewer on a CPU")
    parser.add_argument("--iterations", type=int, default=8, help="of a sample, a multiple of 4")
    parser.add_argument("--rounds", type=int, default=7, help="samples of each way, taken in turns")
    parser.add_argument("--json", type=Path, help="also write everything there")
    options = parser.parse_args(arguments)
    device, workload = resolve_device(options.device), harness.WORKLOADS[options.workload]
    sizes = options.smaller or workload.size * 25 // 28, workload.size

    def of(**changes: Any) -> harness.Problem:
        return harness.make_problem(replace(workload, **changes), device, options.batch_size, options.iterations)

    def way(problem: harness.Problem, *others: nn.Module, stage_sizes: Sequence[int] = ()) -> Callable[[], float]:
        synthesis = replace(problem.config, precision=options.precision, ascent="none", rho=0.0, stage_sizes=tuple(stage_sizes))
        teachers = [problem.teacher, *others]
        synthesizer = Synthesizer(teachers, problem.images, synthesis, problem.recipe.data, batch_sizes=[len(problem.images)])
        return _sample(synthesizer.replicas[0], Batch(0, problem.images, problem.labels), options.iterations, device)

    problem, second = of(), of(architecture=options.second)
    jobs = {
        ALONE: way(problem),
        SMALLER: way(of(size=sizes[0])),
        STAGES: way(problem, stage_sizes=sizes * 2),
        SECOND: way(second),
        BOTH: way(problem, second.teacher),
    }
    samples = harness.in_turns(jobs, options.rounds)
    small, full = (size**2 for size in sizes)
    ratios = {
        "stages per pixel, against the full size": _ratios(samples, STAGES, lambda each: each[ALONE] * (small + full) / (2 * full)),
        "stages, against the mean of both sizes": _ratios(samples, STAGES, lambda each: (each[ALONE] + each[SMALLER]) / 2),
        "two teachers in turn, against the mean of both": _ratios(samples, BOTH, lambda each: (each[ALONE] + each[SECOND]) / 2),
    }
    for name, taken in samples.items():
        print(f"{name}: {1e3 * harness.quantiles(taken)[0] / options.iterations:.1f} ms per iteration")
    for name, each in ratios.items():
        print(f"{name}: {each[0]:.3f} × ({each[1]:.3f} … {each[2]:.3f})")
    if options.json:
        facts: dict[str, Any] = {"workload": workload.name, "second": options.second, "sizes": sizes, "batch": len(problem.images)}
        facts |= {"iterations": options.iterations, "precision": options.precision}
        content = {**machine.facts(device, sys.argv), **facts, "ways": samples, "family": ratios}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
    return 0


def _sample(replica: Replica, batch: Batch, iterations: int, device: torch.device) -> Callable[[], float]:
    """Seconds of all iterations of a batch that has begun."""

    def sample() -> float:
        replica.begin(batch, harness.SEED)
        return machine.timed(lambda: replica.advance(iterations), device)

    return sample


def _ratios(
    samples: dict[str, list[float]], way: str, expected: Callable[[dict[str, float]], float]
) -> tuple[float, float, float]:  # median, 10 %, 90 %
    rounds = [dict(zip(samples, values, strict=True)) for values in zip(*samples.values(), strict=True)]
    return harness.quantiles([each[way] / expected(each) for each in rounds])


if __name__ == "__main__":
    sys.exit(main())
