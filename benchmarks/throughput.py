"""Iterations per second of the inner loop against its peers, on this machine; numbers are compared before times are.

python benchmarks/throughput.py --workload cifar100-resnet18 --json out.json
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import floor
import harness
import machine
import stages
import torch
from rich.console import Console
from rich.table import Table

from dwa_fast.engine.backend import resolve, resolve_device
from dwa_fast.errors import InputError
from dwa_fast.recipes import recipe

COMPARED = 3  # iterations whose losses are compared with those in float64
_FACTOR = 2  # an error may be this many times what rounding does to PyTorch's own operators
# Relative change of every weight that stands for the roundings of a precision: a few units of fp32, where sums are rounded as well,
# and one unit where only what is stored is.
_ROUNDING = {"fp32": 2.0**-22, "tf32": 2.0**-11, "bf16": 2.0**-9}
_DRAWS = 4  # such changes that are tried
_COLUMNS = (
    "peer|precision|ms/iteration|10 … 90 %|it/s|ms/image|× published|× fastest other|% of floor|peak MiB|kernels|gradient|losses"
).split("|")
DEFAULT_WORKLOADS = {"cuda": ["cifar100-resnet18", "cifar100-convnet128", "tiny-resnet18", "imagenet-resnet18", "imagenet-resnet50"]}
DEFAULT_WORKLOADS["cpu"] = ["cifar100-resnet18", "cifar100-convnet128"]
QUICK_WORKLOADS = ["digits", "cifar100-convnet128"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; 1 where a peer's errors are larger than they may be."""
    options = _parse(sys.argv[1:] if arguments is None else arguments)
    device = resolve_device(options.device)
    torch.set_float32_matmul_precision("highest")
    began = time.perf_counter()
    ceilings: dict[str, float] = {}
    results: list[dict[str, Any]] = []
    for name in options.workload or (QUICK_WORKLOADS if options.quick else DEFAULT_WORKLOADS[device.type]):
        results.append(measure(harness.WORKLOADS[name], device, ceilings, options))
        print_tables(results[-1])
        content = {**machine.facts(device, sys.argv), "ceilings": ceilings, "workloads": results}
        if options.json:  # after each workload, so that a later one cannot lose it
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
    print(f"measured in {time.perf_counter() - began:.0f} s" + (f"; everything is in {options.json}" if options.json else ""))
    wrong = [
        f"{row['peer']} ({row['precision']}) on {result['workload']}" for result in results for row in result["rows"] if not row["matches"]
    ]
    if wrong:
        print(f"errors above {_FACTOR}× what rounding does to PyTorch's own operators: {', '.join(wrong)}", file=sys.stderr)
    return 1 if wrong else 0


def measure(workload: harness.Workload, device: torch.device, ceilings: dict[str, float], options: argparse.Namespace) -> dict[str, Any]:
    """All peers of one workload, checked and timed in one process."""
    published_iterations = recipe(workload.recipe).synthesis.iterations
    whole = published_iterations if device.type == "cuda" else 2 * options.iterations  # iterations of the whole batch by wall clock
    horizon = max(COMPARED, options.iterations * (options.rounds + 2), whole)
    problem = harness.make_problem(workload, device, options.batch_size, horizon, teacher=options.teacher)
    exact = harness.numbers(harness.Published(problem, torch.float64, frozen=True), COMPARED)
    peers: dict[str, harness.Peer] = {}
    memory: dict[str, float | None] = {}
    for name in options.peers:
        for precision in harness.offered(name, device):
            if name == "published" or options.precision is None or precision in options.precision:
                key = f"{name}/{precision}"
                peers[key], memory[key] = machine.peak_memory_of(
                    lambda name=name, precision=precision: harness.make_peer(name, problem, precision),  # type: ignore[misc]
                    lambda peer: peer.advance(1),
                    device,
                )
    errors = {key: harness.errors(peer, exact, COMPARED) for key, peer in peers.items()}
    used = sorted({key.split("/")[1] for key in peers})
    allowed = {precision: _allowed(problem, precision, errors, exact) for precision in used}
    limits = {precision: functools.partial(machine.arithmetic_ceiling, device, precision, rounds=2) for precision in used}
    limits["copy"] = functools.partial(machine.copy_ceiling, device, rounds=4)
    samples, reached = harness.interleaved(peers, limits, options.iterations, options.rounds, device)
    for name, rates in reached.items():  # in turns with the peers, so that what slows the machine for a while slows both
        ceilings[name] = max(ceilings.get(name, 0.0), *rates)
    floors = {precision: _floor(problem, precision, ceilings) for precision in used}
    launched = {key: machine.kernels(lambda peer=peer: peer.advance(1), device) for key, peer in peers.items()}  # type: ignore[misc]
    rows = [
        {
            **_times(key, samples, len(problem.images), floors[key.split("/")[1]]["seconds"]),
            **_numerics(errors[key], allowed[key.split("/")[1]]),
            "peak_memory_mib": memory[key],
            "kernels": launched[key],
        }
        for key in peers
    ]
    for row in rows:
        if not row["matches"]:
            row["ratio_to_published"] = row["ratio_to_best_rival"] = None
    ascents = stages.ascents(problem, peers, 1 if device.type == "cpu" else 3)
    result = {
        "workload": workload.name,
        "teacher": str(options.teacher) if options.teacher else "random weights",
        "batch": len(problem.images),
        "published_batch": workload.batch,
        "size": workload.size,
        "device": device.type,
        "floors": floors,
        "rows": rows,
        "ascent": [
            {**_named(key), "steps": problem.config.steps, "seconds": harness.quantiles(s)[0], "samples": s} for key, s in ascents.items()
        ],
        "whole_batch": None,
        "whole_sets": [],
    }
    ours = [row for row in rows if row["peer"] == "fused" and row["matches"]]
    if ours:
        best = min(ours, key=lambda row: row["milliseconds"])
        result["whole_batch"] = stages.whole_batches(problem, best["precision"], whole)
        published = next((row for row in rows if row["peer"] == "published"), None)
        result["whole_sets"] = stages.whole_sets(problem, published_iterations, result["whole_batch"], best, published)
    return result


def _named(key: str) -> dict[str, str]:
    return dict(zip(("peer", "precision"), key.split("/"), strict=True))


def _times(key: str, samples: dict[str, list[float]], images: int, least: float) -> dict[str, Any]:
    """A row's times, and its ratios within this run."""
    median, low, high = harness.quantiles(samples[key])
    medians = {other: harness.quantiles(taken)[0] for other, taken in samples.items()}
    precision = key.split("/")[1]
    rivals = [m for other, m in medians.items() if other.endswith(f"/{precision}") and other not in (key, "published/fp32")]
    return {
        **_named(key),
        "milliseconds": 1e3 * median,
        "milliseconds_10": 1e3 * low,
        "milliseconds_90": 1e3 * high,
        "milliseconds_per_image": 1e3 * median / images,
        "iterations_per_second": 1 / median,
        "ratio_to_published": medians["published/fp32"] / median if "published/fp32" in medians else None,
        "ratio_to_best_rival": min(rivals) / median if rivals else None,
        "percent_of_floor": 100 * least / median,
        "samples": samples[key],
    }


def _numerics(errors: tuple[float, float], allowed: list[float]) -> dict[str, Any]:
    return {
        "gradient_error": errors[0],
        "loss_error": errors[1],
        "allowed_errors": allowed,
        "matches": all(error <= bound for error, bound in zip(errors, allowed, strict=True)),
    }


def _allowed(
    problem: harness.Problem, precision: str, errors: dict[str, tuple[float, float]], exact: tuple[torch.Tensor, torch.Tensor]
) -> list[float]:
    """Largest errors of gradient and losses that count as a match.

    Twice the largest of: a rounding, the published loop's in this precision, the eager one's, and those of the published loop in float32
    when its weights change by a rounding, a few times.

    Gradients are compared image by image and the median counts, because a ReLU whose input is 0 to rounding flips in some images and not
    in others, for every peer, and moves their gradients by up to 1e-2.
    """
    own = [f"{name}/{precision}" for name in ("published", "eager") if precision in harness.offered(name, problem.device)]
    known = [errors[key] if key in errors else _errors_of(key, problem, exact) for key in own]
    known.append((_ROUNDING[precision],) * 2)
    with resolve("reference", "fp32", str(problem.device)).arithmetic():
        for draw in range(_DRAWS):
            other = harness.Published(harness.disturbed(problem, _ROUNDING[precision], draw), frozen=True)
            known.append(harness.errors(other, exact, COMPARED))
    return [_FACTOR * max(each) for each in zip(*known, strict=True)]


def _errors_of(key: str, problem: harness.Problem, exact: tuple[torch.Tensor, torch.Tensor]) -> tuple[float, float]:
    name, precision = key.split("/")
    return harness.errors(harness.make_peer(name, problem, precision), exact, COMPARED)


def _floor(problem: harness.Problem, precision: str, ceilings: dict[str, float]) -> dict[str, float]:
    """Operations, bytes and seconds that an iteration must take in this precision."""
    peer = harness.make_peer("fused", problem, precision)
    assert isinstance(peer, harness.Ours)
    calls = floor.count(peer)
    return {
        "operations": sum(call.operations for call in calls),
        "bytes": sum(call.traffic for call in calls),
        "seconds": floor.seconds(calls, ceilings[precision], ceilings["copy"]),
    }


def print_tables(result: dict[str, Any]) -> None:
    """One workload for a reader."""
    console = Console(width=None if sys.stdout.isatty() else 170)
    smaller = "" if result["batch"] == result["published_batch"] else f" (published: {result['published_batch']})"
    title = f"{result['workload']}: batch {result['batch']}{smaller}, {result['size']} px, {result['device']}, {result['teacher']}"
    table = Table(title=title)
    for column in _COLUMNS:
        table.add_column(column, justify="left" if column == "peer" else "right")
    for row in result["rows"]:
        table.add_row(
            row["peer"],
            row["precision"],
            f"{row['milliseconds']:.4g}",
            f"{row['milliseconds_10']:.4g} … {row['milliseconds_90']:.4g}",
            f"{row['iterations_per_second']:.3g}",
            f"{row['milliseconds_per_image']:.3g}",
            _number(row["ratio_to_published"], ".2f"),
            _number(row["ratio_to_best_rival"], ".2f"),
            f"{row['percent_of_floor']:.0f}",
            _number(row["peak_memory_mib"], ".0f"),
            _number(row["kernels"], "d"),
            f"{row['gradient_error']:.1e}",
            f"{row['loss_error']:.1e}",
        )
    console.print(table)
    for row in result["ascent"]:
        console.print(f"  ascent, {row['steps']} steps: {row['peer']} {row['precision']} {1e3 * row['seconds']:.4g} ms", highlight=False)
    batch = result["whole_batch"]
    if batch:
        published = batch["published_seconds"]
        console.print(
            f"  whole batch with {batch['iterations']} iterations, files to files: fused {batch['precision']} {batch['seconds']:.3g} s "
            f"(and {batch['setup_seconds']:.2g} s once per set), published {published:.3g} s",
            highlight=False,
        )
        for each in result["whole_sets"]:
            console.print(
                f"  extrapolated, ipc {each['ipc']}, {each['batches']} batches of {each['iterations']} iterations: fused "
                f"{each['hours']:.3g} h, published {_number(each['published_hours'], '.3g')} h",
                highlight=False,
            )


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", nargs="+", choices=list(harness.WORKLOADS), help="what is distilled; default: a few for the device")
    parser.add_argument("--teacher", type=Path, help="checkpoint of the teacher, for one workload; default: random weights")
    parser.add_argument("--batch-size", type=int, help="images of a batch; default: as published, smaller on a CPU")
    parser.add_argument("--iterations", type=int, help="iterations of one sample; default: 2 on a CPU, 200 on a GPU")
    parser.add_argument("--rounds", type=int, help="samples of each peer, taken in turns; default: 7 on a CPU, 5 on a GPU")
    parser.add_argument("--precision", nargs="+", choices=list(_ROUNDING), help="only these")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, …")
    parser.add_argument("--peers", nargs="+", default=list(harness.PEERS), choices=list(harness.PEERS), help="only these")
    parser.add_argument("--json", type=Path, help="also write everything there, raw samples included")
    parser.add_argument("--quick", action="store_true", help="small workloads, fewer samples, and no peer that compiles")
    options = parser.parse_args(arguments)
    for name in ("batch_size", "iterations", "rounds"):
        value = getattr(options, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    if options.teacher and len(options.workload or []) != 1:
        parser.error("--teacher belongs to one workload; name it with --workload")
    on_cpu = resolve_device(options.device).type == "cpu"
    options.iterations = options.iterations or (2 if on_cpu else 200)
    options.rounds = options.rounds or (7 if on_cpu else 5)
    if options.quick:
        options.rounds = min(options.rounds, 3)
        options.peers = [peer for peer in options.peers if peer != "compiled"]
    return options


if __name__ == "__main__":
    try:
        sys.exit(main())
    except InputError as error:
        sys.exit(f"throughput.py: {error}")
