"""Whether the engine is right on a GPU, in one command of at most five minutes: every result is a row of check.jsonl at once.

python benchmarks/gpu_check.py --output gpu-results     `make gpu-check` builds first, then runs this
python benchmarks/gpu_check.py --only memcheck          one step again
python benchmarks/gpu_check.py --dry-run                the same steps on a CPU, tiny
"""

from __future__ import annotations

import argparse
import functools
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import bench_operators
import harness
import machine
import operator_calls
import operator_cases
import torch
from gpu_speed import facts_of
from proof import Rows, Step, add_options, chosen, exit_status, run_steps

from dwa_fast.engine.backend import resolve

ROOT = Path(__file__).resolve().parent.parent
BUDGET = 280.0  # seconds; nothing is built where `make gpu-speed` came before
_TOOLS = ("memcheck", "racecheck", "initcheck")
_TESTS = ("tests/kernels", "tests/ops", "tests/engine", "tests/compat", "tests/training/test_step.py")  # what has tests for a GPU
_REPORTED = 30  # lines of a tool's report that are kept
_SMALL = 2**16  # elements at most of a case that a tool watches


@dataclass(frozen=True)
class Plan:
    """What is checked, and in which sizes."""

    device: torch.device
    tests: tuple[str, ...]  # arguments of pytest
    workload: str
    batch: int | None
    iterations: int  # of both precisions
    precisions: tuple[str, str]
    network: tuple[int, str]  # whose largest inputs the operators get
    cases: int | None  # of the operators at most
    ceilings: int  # copies tried for the most that the memory can do
    patience: float = 1.0  # factor of the steps' limits


FULL = Plan(
    torch.device("cuda"),
    ("-m", "gpu", "-n", "12", "--dist", "worksteal", *_TESTS),
    "cifar100-resnet18",
    batch=None,
    iterations=300,
    precisions=("fp32", "bf16"),
    network=(18, "imagenet-resnet18"),
    cases=None,
    ceilings=15,
)
TINY = Plan(
    torch.device("cpu"),
    ("-k", "gpu or test_library", *_TESTS),  # those for a GPU are collected and skipped
    "digits",
    batch=3,
    iterations=3,
    precisions=("fp32", "fp32"),
    network=(18, "digits"),
    cases=2,
    ceilings=1,
    patience=20.0,
)


def steps(plan: Plan, rows: Rows) -> list[Step]:
    """The tests last: they take what time is left, and every hundred of them leave a row."""
    pytest = [sys.executable, "-m", "pytest", "-q", "-W", "default", "--timeout", "60", "-p", "no:cacheprovider"]
    tools = _TOOLS if plan.device.type == "cuda" else _TOOLS[:1]
    # Named, since pytest looks for its settings above all paths among its arguments, and the rows may lie anywhere.
    settings = ["-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT)]
    tests = [*pytest, *settings, "--rows", str(rows.path.resolve()), *(_absolute(argument) for argument in plan.tests)]
    found = [
        Step("facts", functools.partial(facts_of, plan.device), 15),
        Step("operators", functools.partial(operators, plan), 40),
        Step("losses of two precisions", functools.partial(two_precisions, plan), 30),
        *(Step(tool, functools.partial(watched, plan, tool), 40, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}) for tool in tools),
        Step("tests", tests, 200),
    ]
    return [replace(step, limit=plan.patience * step.limit) for step in found]


def two_precisions(plan: Plan, rows: Rows) -> None:
    """Some hundred iterations in both: whether the losses of the lower precision follow those of the higher one."""
    problem = harness.make_problem(harness.WORKLOADS[plan.workload], plan.device, plan.batch, plan.iterations)
    losses = []
    for precision in plan.precisions:
        peer = harness.make_peer("fused", problem, precision)
        peer.advance(plan.iterations)
        losses.append(peer.losses_so_far().double())
    last = [own[-max(1, plan.iterations // 10) :].mean(0).tolist() for own in losses]
    rows.add(
        "losses",
        workload=plan.workload,
        iterations=plan.iterations,
        precisions=plan.precisions,
        first=[own[0].tolist() for own in losses],
        last=last,
        curve=[own[:: max(1, plan.iterations // 20)].tolist() for own in losses],
        relative=[abs(low - high) / abs(high) for high, low in zip(*last, strict=True)],
    )


def chosen_cases(plan: Plan) -> list[operator_cases.Case]:
    """The largest input of every operator of ours in the lower precision of the plan, as far as `cases` goes."""
    firsts: dict[str, operator_cases.Case] = {}
    for case in operator_cases.cases(plan.device, all_shapes=False, networks=[plan.network]):
        if case.operator.is_fused(plan.device) and (case.precision == plan.precisions[1] or len(case.operator.precisions) == 1):
            firsts.setdefault(case.operator.name, case)
    return list(firsts.values())[: plan.cases]


def operators(plan: Plan, rows: Rows) -> None:
    """Errors, milliseconds and share of the copy ceiling of the chosen cases."""
    ceiling = machine.copy_ceiling(plan.device, plan.ceilings)
    for case in chosen_cases(plan):
        inputs, exact, allowed = bench_operators.oracle(case, plan.device)
        fused = resolve("fused", case.precision, str(plan.device)).operators  # type: ignore[arg-type]
        errors = bench_operators.compare(case.operator.call(fused, operator_calls.copied(inputs))(), exact)
        turns = bench_operators.Turns([case.operator.call(fused, operator_calls.copied(inputs))], plan.device)
        samples, now = [], machine.clock(plan.device)
        for _ in range(turns.rounds()):
            turns.prepare()
            start = now()
            turns.run()
            samples.append(now() - start)
        seconds, traffic = statistics.median(samples), case.operator.traffic(inputs)
        rows.add(
            "operator",
            case=str(case),
            errors=errors,
            allowed=allowed,
            right=all(own <= bound for own, bound in zip(errors, allowed, strict=True)),
            milliseconds=1e3 * seconds,
            bytes=traffic,
            percent_of_copy=100 * traffic / seconds / ceiling if case.operator.moves_memory else None,
        )


def watched(plan: Plan, tool: str, rows: Rows) -> None:
    """Every operator once on small inputs under one of compute-sanitizer's tools."""
    work = [sys.executable, __file__, "--small", str(plan.device)]
    checker = shutil.which("compute-sanitizer")
    if checker is None and plan.device.type == "cuda":
        raise FileNotFoundError("compute-sanitizer is not on the PATH: the kernels' memory accesses are not checked")
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "log")
        # Not the compilers that Triton starts, nor PyTorch's questions for driver functions that an older driver lacks.
        options = ["--target-processes", "application-only", "--log-file", str(log), "--error-exitcode", "9"]
        options += ["--report-api-errors", "no"] if tool == "memcheck" else []
        command = [checker, "--tool", tool, *options, *work] if checker else work
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        report = log.read_text(errors="replace").splitlines() if log.exists() else []
    summary = re.search(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)", "\n".join(report))
    rows.add(
        "watched",
        tool=tool,
        exit=run.returncode,
        errors=int(summary[1]) if summary else None,
        report=report[-_REPORTED:],
        output=(run.stdout + run.stderr).splitlines()[-5:],
    )
    if run.returncode:
        raise RuntimeError(f"{tool} ended with {run.returncode}")


def small_cases(device: torch.device) -> list[operator_cases.Case]:
    """The chosen cases of the whole plan on small inputs, of even and of odd sizes."""
    return [small for case in chosen_cases(replace(FULL, device=device)) for small in operator_cases.shrunk(case, _SMALL)]


def once_small(device: torch.device) -> None:
    """Every operator on inputs so small that a tool which follows each access is done in seconds; numbers are compared."""
    for small in small_cases(device):
        torch.manual_seed(harness.SEED)
        fused = resolve("fused", small.precision, str(device)).operators  # type: ignore[arg-type]
        inputs, exact, allowed = bench_operators.oracle(small, device)
        errors = bench_operators.compare(small.operator.call(fused, operator_calls.copied(inputs))(), exact)
        print(f"{small}: errors {', '.join(f'{error:.1e}' for error in errors)}", flush=True)
        if any(own > bound for own, bound in zip(errors, allowed, strict=True)):
            raise RuntimeError(f"{small}: relative errors {errors}, where {allowed} are allowed")


def _absolute(argument: str) -> str:
    return str(ROOT / argument) if argument.startswith("tests/") else argument


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all steps; 1 where one of them did not end well, 143 after SIGTERM."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, "check.jsonl", BUDGET)
    parser.add_argument("--small", type=torch.device, metavar="DEVICE", help="only every operator once on a small input")
    options = parser.parse_args(arguments)
    if options.small:
        once_small(options.small)
        return 0
    rows = Rows(options.output / "check.jsonl")
    planned = chosen(steps(TINY if options.dry_run else FULL, rows), options.only, parser)
    return exit_status(rows, run_steps(planned, rows, options.budget))


if __name__ == "__main__":
    sys.exit(main())
