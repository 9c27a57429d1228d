"""Iterations per second of the inner loop against its peers, on this machine; numbers are compared before times are.

python benchmarks/throughput.py --workload cifar100-resnet18 --json out.json
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent))
import harness

from dwa_fast.backend import resolve_device
from dwa_fast.errors import InputError

COMPARED = 5  # iterations whose losses are compared with those in float64
_FACTOR = 2  # an error may be this many times that of PyTorch's own operators in the same precision
# Errors of gradient and losses that count as none: a single ReLU whose input is 0 to rounding moves a gradient by up to 1e-2.
_FLOOR = {"fp32": (1e-2, 1e-2), "tf32": (1e-2, 3e-2), "bf16": (1e-2, 3e-2)}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; 1 where a peer's errors are larger than they may be."""
    options = _parse(sys.argv[1:] if arguments is None else arguments)
    device = resolve_device(options.device)
    torch.set_float32_matmul_precision("highest")
    results = []
    for name in options.workload:
        results.append(measure(harness.WORKLOADS[name], device, options))
        print_table(results[-1])
    content = {**harness.facts(device, sys.argv), "workloads": results}
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(content, indent=1) + "\n")
    wrong = [
        f"{row['peer']} ({row['precision']}) on {result['workload']}" for result in results for row in result["rows"] if not row["matches"]
    ]
    if wrong:
        print(f"errors above {_FACTOR}× those of PyTorch's own operators: {', '.join(wrong)}", file=sys.stderr)
    return 1 if wrong else 0


def measure(workload: harness.Workload, device: torch.device, options: argparse.Namespace) -> dict[str, Any]:
    """All peers of one workload, checked and timed in one process."""
    horizon = max(COMPARED, options.iterations * (options.rounds + 1))
    problem = harness.make_problem(workload, device, options.batch_size, horizon)
    exact = harness.numbers(harness.Published(problem, torch.float64), COMPARED)
    peers: dict[str, harness.Peer] = {}
    errors: dict[str, tuple[float, float]] = {}
    for name in options.peers:
        for precision in harness.offered(name, device):
            if name == "published" or options.precision is None or precision in options.precision:
                key = f"{name}/{precision}"
                peers[key] = harness.make_peer(name, problem, precision)
                errors[key] = harness.errors(peers[key], exact, COMPARED)
    allowed = {}
    for precision in {key.split("/")[1] for key in peers}:
        own = [f"{name}/{precision}" for name in ("published", "eager") if precision in harness.offered(name, device)]
        known = [
            errors.get(key) or harness.errors(harness.make_peer(key.split("/")[0], problem, precision), exact, COMPARED) for key in own
        ]
        allowed[precision] = [
            max(_FACTOR * max(each), floor) for each, floor in zip(zip(*known, strict=True), _FLOOR[precision], strict=True)
        ]
    samples = harness.interleaved(peers, options.iterations, options.rounds, device)
    base = harness.spread(samples["published/fp32"])[0] if "published/fp32" in samples else None
    rows = []
    for key, taken in samples.items():
        name, precision = key.split("/")
        median, low, high = harness.spread(taken)
        rivals = [
            harness.spread(s)[0] for k, s in samples.items() if k.endswith(f"/{precision}") and k != key and not k.startswith("published")
        ]
        matches = all(error <= bound for error, bound in zip(errors[key], allowed[precision], strict=True))
        rows.append(
            {
                "peer": name,
                "precision": precision,
                "milliseconds": 1e3 * median,
                "milliseconds_10": 1e3 * low,
                "milliseconds_90": 1e3 * high,
                "milliseconds_per_image": 1e3 * median / len(problem.images),
                "iterations_per_second": 1 / median,
                "ratio_to_published": base / median if base and matches else None,
                "ratio_to_best_rival": min(rivals) / median if rivals and matches else None,
                "gradient_error": errors[key][0],
                "loss_error": errors[key][1],
                "matches": matches,
                "samples": taken,
            }
        )
    return {
        "workload": workload.name,
        "batch": len(problem.images),
        "published_batch": workload.batch,
        "size": workload.size,
        "device": device.type,
        "peak_memory_mib": harness.peak_memory(device),
        "rows": rows,
    }


def print_table(result: dict[str, Any]) -> None:
    """One workload for a reader."""
    smaller = "" if result["batch"] == result["published_batch"] else f" (published: {result['published_batch']})"
    table = Table(title=f"{result['workload']}: batch {result['batch']}{smaller}, {result['size']} px, {result['device']}")
    for column in (
        "peer",
        "precision",
        "ms/iteration",
        "10 … 90 %",
        "ms/image",
        "× published",
        "× best rival",
        "gradient error",
        "loss error",
    ):
        table.add_column(column, justify="left" if column == "peer" else "right")
    for row in result["rows"]:
        table.add_row(
            row["peer"],
            row["precision"],
            f"{row['milliseconds']:.1f}",
            f"{row['milliseconds_10']:.1f} … {row['milliseconds_90']:.1f}",
            f"{row['milliseconds_per_image']:.2f}",
            "–" if row["ratio_to_published"] is None else f"{row['ratio_to_published']:.2f}",
            "–" if row["ratio_to_best_rival"] is None else f"{row['ratio_to_best_rival']:.2f}",
            f"{row['gradient_error']:.1e}",
            f"{row['loss_error']:.1e}",
        )
    Console(width=None if sys.stdout.isatty() else 150).print(table)


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", nargs="+", default=["cifar100-resnet18"], choices=list(harness.WORKLOADS), help="what is distilled")
    parser.add_argument("--batch-size", type=int, help="images of a batch; default: as published, smaller on a CPU")
    parser.add_argument("--iterations", type=int, default=2, help="iterations of one sample")
    parser.add_argument("--rounds", type=int, default=5, help="samples of each peer, taken in turns")
    parser.add_argument("--precision", nargs="+", choices=["fp32", "tf32", "bf16"], help="only these")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, …")
    parser.add_argument("--peers", nargs="+", default=list(harness.PEERS), choices=list(harness.PEERS), help="only these")
    parser.add_argument("--json", type=Path, help="also write everything there, raw samples included")
    parser.add_argument("--quick", action="store_true", help="fewer samples, and no peer that compiles")
    options = parser.parse_args(arguments)
    if options.quick:
        options.rounds = min(options.rounds, 3)
        options.peers = [peer for peer in options.peers if peer != "compiled"]
    return options


if __name__ == "__main__":
    try:
        sys.exit(main())
    except InputError as error:
        sys.exit(f"throughput.py: {error}")
