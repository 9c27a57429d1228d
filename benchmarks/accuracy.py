"""What lower precision and fused operators cost where it matters: the students of digits that each way of computing has distilled.

python benchmarks/accuracy.py --seeds 5 --json benchmark-output/accuracy.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import machine
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from dwa_fast import synthesize
from dwa_fast.data.datasets import load
from dwa_fast.data.images import MemorySet
from dwa_fast.data.pixels import denormalise, normalise
from dwa_fast.data.real import sample
from dwa_fast.engine.backend import precisions, resolve_device
from dwa_fast.recipes import recipe
from dwa_fast.sets.distill import batch_specs
from dwa_fast.training.fit import top1
from dwa_fast.training.squeeze import squeeze
from dwa_fast.training.validate import validate

RECIPE = recipe("digits")


def main(arguments: Sequence[str] | None = None) -> int:
    """Distil, train and print one table; every seed has its own images and its own students."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="sets distilled each way")
    parser.add_argument("--students", type=int, default=2, help="students of each set")
    parser.add_argument("--ipc", type=int, nargs="+", default=[1, 5], help="images per class")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, …")
    parser.add_argument("--json", type=Path, help="also write everything there")
    options = parser.parse_args(arguments)
    device = resolve_device(options.device)
    train, test = (load(RECIPE.data, None, split) for split in ("train", "test"))
    assert isinstance(train, MemorySet)
    teacher = squeeze(train, RECIPE, device=device)
    ways = [("reference", "fp32")] + [("fused", precision) for precision in precisions("fused", device)]
    rows = []
    for backend, precision in ways:
        for ipc in options.ipc:
            accuracies = []
            for seed in range(options.seeds):
                distilled = distil(teacher, train, backend, precision, str(device), ipc, seed)
                chosen = replace(RECIPE, validation=replace(RECIPE.validation, students=options.students))
                result = validate(distilled, test, teacher, RECIPE.architecture, chosen, device=device, seed=seed)
                accuracies.append(statistics.fmean(result.accuracies))
            rows.append({"backend": backend, "precision": precision, "ipc": ipc, "accuracies": accuracies})
    table = Table(title=f"top-1 % of students of digits, {options.seeds} sets each; teacher {top1(teacher, test, RECIPE.data, device):.1f}")
    for column in ("back-end", "precision", "ipc", "mean", "± std over seeds"):
        table.add_column(column)
    for row in rows:
        mean, std = statistics.fmean(row["accuracies"]), statistics.stdev(row["accuracies"]) if options.seeds > 1 else 0.0
        table.add_row(row["backend"], row["precision"], str(row["ipc"]), f"{mean:.1f}", f"{std:.1f}")
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({**machine.facts(device, sys.argv), "rows": rows}, indent=1) + "\n")
    return 0


def distil(teacher: nn.Module, train: MemorySet, backend: str, precision: str, device: str, ipc: int, seed: int) -> MemorySet:
    """A DWA set in memory, rounded as PNG files are."""
    own = recipe("digits", backend=backend, precision=precision, device=device, batch_size=10)
    members = [sample(train, label, ipc, seed=seed) for label in range(10)]
    chosen = [members[label][spec.index] for spec in batch_specs(10, ipc, 10) for label in spec.labels]
    result = synthesize(teacher, normalise(train.load(chosen), own.data), train.labels[chosen], own, seed=seed)
    levels = (denormalise(result.images, own.data).clamp(0, 1) * 255).round().to(torch.uint8)
    return MemorySet(levels, train.labels[chosen], train.class_names)


if __name__ == "__main__":
    sys.exit(main())
