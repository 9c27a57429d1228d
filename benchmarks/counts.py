"""Kernels that one iteration launches on a GPU, and bytes that they move; counted without one.

python benchmarks/counts.py [--json benchmark-output/counts.json] [--workload imagenet-resnet50]

The step runs on fake tensors with the operators that CUDA would run. An operator of ours counts what its Triton launcher launches, one of
PyTorch as `aten_launches` says. Bytes: every tensor that an operator reads or writes, once.
"""

from __future__ import annotations

import argparse
import importlib
import json
import pkgutil
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import floor
import harness
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_map_only

from dwa_fast.engine import backend
from dwa_fast.engine.ascent import Arena
from dwa_fast.engine.refine import Refinement, Teacher
from dwa_fast.engine.teacher import prepare
from dwa_fast.models.architectures import build
from dwa_fast.ops import _library
from dwa_fast.recipes import recipe

# Kernels, and bytes where they were counted, before the fusions of version 0.2
BEFORE = {"cifar100-resnet18": (144, 1.5e9), "imagenet-resnet18": (147, 6.2e9), "imagenet-resnet50": (320, 26.5e9)}

_TRIAL = 64  # pixels of the images on which the rewritten teacher is compared with the untouched one, at most
# What PyTorch launches on CUDA for an operator that is not one kernel: nll_loss_backward fills its result with zeros first.
_ATEN = {"nll_loss_backward": 2, "max_pool2d_with_indices_backward": 2}


_NOTHING = ("as_strided_", "new_empty", "new_empty_strided")  # return memory, though their schemas do not show it


def aten_launches(target: torch._ops.OpOverload, args: Sequence[Any]) -> int:
    """Kernels of one call of an operator of PyTorch: one, but for those that return a view or memory, and those of the table."""
    name = target.overloadpacket.__name__
    if target.namespace != "aten" or floor.touches_nothing(target) or name in _NOTHING:
        return 0
    if name == "convolution_backward":
        return sum(map(bool, args[-1]))
    return _ATEN.get(name, 1)


class Counting(TorchDispatchMode):
    """Writes down the kernels that the operators called inside would launch, by name, and the bytes that they would move."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: Counter[str] = Counter()
        self.traffic: Counter[str] = Counter()
        self._launches: dict[str, tuple[list[str], Counter[str]]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "aten":
            with self:  # what consists of other operators, such as `contiguous`, which copies or does nothing
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        result = func(*args, **kwargs)
        plain = [f"aten.{func.overloadpacket.__name__}"] * aten_launches(func, args)
        names, copied = self._own(func, args) if func.namespace == "dwa_fast" else (plain, Counter())
        self.kernels.update(names)
        self.traffic.update(copied)
        if names:
            self.traffic[names[0]] += floor.traffic(func, args, kwargs, result)
        return result

    def _own(self, func: Any, args: tuple[Any, ...]) -> tuple[list[str], Counter[str]]:
        """Names of the kernels that the launcher of an operator of ours launches for such arguments, and the bytes of its own copies."""
        name = func.overloadpacket.__name__
        shapes = tree_map_only(Tensor, lambda each: (each.shape, each.stride(), each.dtype), args)
        key = f"{name} {shapes}"
        if key not in self._launches:
            launcher = getattr(importlib.import_module(f"dwa_fast.kernels.{_library._launchers[name]}"), name)
            with _disable_current_modes(), written_down() as launched, Counting() as beside:
                launcher(*tree_map_only(Tensor, _on_meta, args))
            self._launches[key] = launched + list(beside.kernels.elements()), beside.traffic
        return self._launches[key]


@contextmanager
def written_down() -> Iterator[list[str]]:
    """Inside, Triton kernels are not launched: their names are appended to the list."""
    import dwa_fast.kernels

    launched: list[str] = []

    def instead_of(name: str) -> Any:
        kernel = mock.MagicMock()
        kernel.__getitem__.return_value = lambda *args, **kwargs: launched.append(name)
        return kernel

    patches = []
    for info in pkgutil.iter_modules(dwa_fast.kernels.__path__):
        module = importlib.import_module(f"dwa_fast.kernels.{info.name}")
        patches += [mock.patch.object(module, name, instead_of(f"{info.name}.{name}")) for name in vars(module) if name.endswith("_kernel")]
    for patch in patches:
        patch.start()
    try:
        yield launched
    finally:
        for patch in patches:
            patch.stop()


def _on_meta(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def count(teacher: nn.Module, workload: harness.Workload, batch: int, precision: str = "bf16") -> Counting:
    """Kernels and bytes of an iteration in its steady state."""
    own = recipe(workload.recipe, iterations=4, batch_size=batch)
    _library.load()
    cuda = torch.device("cuda")
    execution = backend.Execution("fused", backend.fused_operators(cuda), torch.device("cpu"), precision)
    images = torch.randn(batch, own.data.channels, workload.size, workload.size)
    network, _ = prepare(teacher, images[:3, :, :_TRIAL, :_TRIAL], execution)
    assert network.traced
    Arena(network, execution, moves=False)
    with execution.arithmetic():
        refinement = Refinement([Teacher(network, network)], images.shape, own.synthesis, own.data, execution)
        with FakeTensorMode(allow_non_fake_inputs=True):
            refinement._iterate()  # what is made once per shape of the batch
            counting = Counting()
            with counting:
                refinement._iterate()
    return counting


def table(name: str, counting: Counting) -> Table:
    """One workload: its kernels by name."""
    total, moved = counting.kernels.total(), counting.traffic.total()
    shown = Table(title=f"{name}: {total} kernels, {moved / 1e9:.2f} GB per iteration")
    for column in ("kernel", "launches", "GB"):
        shown.add_column(column, justify="left" if column == "kernel" else "right")
    for kernel, launches in counting.kernels.most_common():
        shown.add_row(kernel, str(launches), f"{counting.traffic[kernel] / 1e9:.3f}")
    return shown


def main(arguments: Sequence[str] | None = None) -> int:
    """Count and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", nargs="+", choices=list(harness.WORKLOADS), default=list(BEFORE))
    parser.add_argument("--precision", default="bf16", help="bf16, fp32, …")
    parser.add_argument("--json", type=Path, help="also write everything there")
    options = parser.parse_args(arguments)
    console, results = Console(width=None if sys.stdout.isatty() else 120), []
    summary = Table(title="Per iteration: before → now")
    for column in ("workload", "kernels", "GB"):
        summary.add_column(column)
    for name in options.workload:
        workload = harness.WORKLOADS[name]
        torch.manual_seed(harness.SEED)
        channels = recipe(workload.recipe).data.channels
        teacher = build(workload.architecture, classes=workload.classes, channels=channels, size=workload.size).eval()
        counting = count(teacher, workload, workload.batch, options.precision)
        console.print(table(name, counting))
        kernels, moved = counting.kernels.total(), counting.traffic.total()
        before = BEFORE.get(name)
        summary.add_row(name, f"{before[0] if before else '–'} → {kernels}", f"{before[1] / 1e9 if before else '–'} → {moved / 1e9:.2f}")
        results.append({"workload": name, "kernels": dict(counting.kernels), "bytes": dict(counting.traffic)})
    console.print(summary)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
