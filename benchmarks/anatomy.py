"""Where the time of an iteration goes: convolutions, BatchNorm, losses, view and Adam, the rest, each beside the least that it could take.

python benchmarks/anatomy.py --workload cifar100-resnet18 --json benchmark-output/anatomy.json
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import floor
import harness
import machine
import torch
from rich.console import Console
from rich.table import Table
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from dwa_fast.engine.backend import resolve_device

# The first that an operator's name, or on a GPU a kernel's, matches.
PARTS = {
    "bn_act": r"bn_act",
    "matching loss": r"matching_",
    "view, Adam, clamp": r"dwa_fast::view|view_adam_clip|_view_kernel|adam_clip",
    "convolutions": r"^(?!.*pool).*(conv|mkldnn|cudnn|xmma|cutlass|implicit|sm\d+_|nchw|nhwc)",
    "linear, pooling, cross-entropy": r"addmm|::mm|linear|gemm|nvjet|pool|mean|MeanOps|softmax|nll_loss|cross_entropy|expand|div",
    "the rest": r"",
}
_COLUMNS = ("part", "calls", "ms per iteration", "% of the iteration", "floor, ms", "% of floor")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print a table per workload."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", nargs="+", choices=list(harness.WORKLOADS), default=["cifar100-resnet18", "cifar100-convnet128"])
    parser.add_argument("--batch-size", type=int, help="images of a batch; default: as published, smaller on a CPU")
    parser.add_argument("--iterations", type=int, default=10, help="that the profiler watches")
    parser.add_argument("--precision", default="bf16", help="fp32, tf32 or bf16")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, …")
    parser.add_argument("--json", type=Path, help="also write everything there")
    options = parser.parse_args(arguments)
    device = resolve_device(options.device)
    ceilings = {"copy": machine.copy_ceiling(device), "arithmetic": machine.arithmetic_ceiling(device, options.precision)}
    results, console = [], Console(width=None if sys.stdout.isatty() else 120)
    for name in options.workload:
        problem = harness.make_problem(harness.WORKLOADS[name], device, options.batch_size, 2 * options.iterations)
        peer = harness.make_peer("fused", problem, options.precision)
        assert isinstance(peer, harness.Ours)
        result = {
            "workload": name,
            "batch": len(problem.images),
            "precision": options.precision,
            **anatomy(peer, options.iterations, ceilings),
        }
        results.append(result)
        console.print(table(result))
    if options.json:
        content = {**machine.facts(device, sys.argv), "ceilings": ceilings, "results": results}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
    return 0


def anatomy(peer: harness.Ours, iterations: int, ceilings: dict[str, float]) -> dict[str, Any]:
    """Milliseconds of an iteration by part, under the profiler and, all together, without it."""
    device = peer.problem.device
    peer.advance(iterations)
    milliseconds = 1e3 * machine.timed(lambda: peer.advance(iterations), device) / iterations
    spent = profiled(lambda: peer.advance(iterations), device)
    least: dict[str, float] = defaultdict(float)
    for call in floor.count(peer):
        least[part(call.operator.replace(".", "::", 1))] += 1e3 * floor.seconds([call], ceilings["arithmetic"], ceilings["copy"])
    parts = [
        {
            "part": name,
            "calls": len(times := spent.get(name, [])) / iterations,
            "milliseconds": 1e3 * sum(times) / iterations,
            "floor": least.get(name, 0.0),
        }
        for name in PARTS
    ]
    return {"milliseconds": milliseconds, "parts": parts}


def profiled(run: Callable[[], None], device: torch.device) -> dict[str, list[float]]:
    """Seconds of every operator on a CPU, of every kernel on a GPU, by part."""
    cuda = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU], acc_events=True) as seen:
        run()
        machine.wait(device)
    spent = defaultdict(list)
    for event in seen.events():
        if cuda and event.device_type == DeviceType.CUDA:
            spent[part(event.name)].append(event.device_time_total / 1e6)
        elif not cuda and event.cpu_parent is None:  # an operator that the step calls, with those that it calls itself
            spent[part(event.name)].append(event.cpu_time_total / 1e6)
    return dict(spent)


def part(name: str) -> str:
    """What an operator or a kernel belongs to."""
    return next(part for part, pattern in PARTS.items() if re.search(pattern, name))


def table(result: dict[str, Any]) -> Table:
    """The parts of one workload."""
    whole = sum(each["milliseconds"] for each in result["parts"])
    title = f"{result['workload']}, batch {result['batch']}, {result['precision']}: {result['milliseconds']:.1f} ms per iteration"
    shown = Table(title=f"{title}, {whole:.1f} under the profiler")
    for number, column in enumerate(_COLUMNS):
        shown.add_column(column, justify="right" if number else "left")
    for each in result["parts"]:
        share = 100 * each["milliseconds"] / whole
        reached = f"{100 * each['floor'] / each['milliseconds']:.0f}" if each["milliseconds"] else "–"
        shown.add_row(each["part"], f"{each['calls']:g}", f"{each['milliseconds']:.2f}", f"{share:.1f}", f"{each['floor']:.2f}", reached)
    return shown


if __name__ == "__main__":
    sys.exit(main())
