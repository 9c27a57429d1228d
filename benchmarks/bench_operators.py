"""Milliseconds, gigabytes per second and percent of the copy ceiling of every operator; numbers are compared before times are.

python benchmarks/bench_operators.py --all-shapes --json benchmark-output/operators.json     prints one table; other flags go to pytest
pytest benchmarks/bench_operators.py --benchmark-json benchmark-output/operators.json        the same by pytest-benchmark's own means

Times are of cold memory. On a GPU the L2 cache is flushed before every call, the call is queued while the device is still busy, and the
device's events take the time. On a CPU the calls take turns on copies of their inputs that together are twice the last-level cache, up to
64 copies, and every result is kept until the next turn of its copy, so that it too is written to memory. A case that is smaller than that
(`matching_loss`) stays in the cache, and its percentage means nothing. The call from Python is part of a CPU's times.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import harness
import machine
import pytest
import torch
from operator_calls import Call, Inputs, copied, doubled
from operator_cases import Case, cases
from rich.console import Console
from rich.table import Table
from torch import Tensor

from dwa_fast.engine.backend import fused_causes, resolve, resolve_device
from dwa_fast.reference import graph_ops
from dwa_fast.reference import ops as plain
from dwa_fast.reference.ops import OPERATORS, Operators

_FACTOR = 2  # an error may be this many times that of PyTorch's own operators in the same precision
_FLOOR = {torch.float32: 5e-6, torch.bfloat16: 4e-3}  # errors that count as none: a few roundings
_SECONDS = 0.3  # spent on the rounds of a case
_ROUNDS = (7, 50)
_MAX_COPIES = 64
_HOLD = 2_000_000  # cycles, about a millisecond: longer than it takes to queue a call

pytestmark = pytest.mark.filterwarnings("ignore:Benchmark fixture was not used")  # where numbers are wrong


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    config = metafunc.config
    device = resolve_device(config.getoption("--device"))
    found = cases(device, config.getoption("--all-shapes") or device.type == "cuda")
    names = ["plain"] + ([] if fused_causes(device) else ["fused"]) + (["compiled"] if config.getoption("--compiled") else [])
    taken = [pytest.param(case, where, name, id=f"{case}, {name}".replace("×", "x")) for case, where in found.items() for name in names]
    metafunc.parametrize(("case", "networks", "implementation"), taken)


@pytest.fixture(scope="session")
def device(pytestconfig: pytest.Config) -> torch.device:
    """Where everything runs."""
    return resolve_device(pytestconfig.getoption("--device"))


@pytest.fixture(scope="session")
def ceiling(device: torch.device) -> float:
    """Bytes per second of a copy, before the first case."""
    return machine.copy_ceiling(device)


def test_operator(benchmark: Any, case: Case, networks: list[str], implementation: str, device: torch.device, ceiling: float) -> None:
    """One implementation of one operator on one input."""
    operators = implementations(implementation, case.precision, device)
    inputs, exact, allowed = oracle(case, device)
    errors = compare(case.operator.call(operators, copied(inputs))(), exact)
    assert all(error <= bound for error, bound in zip(errors, allowed, strict=True)), (
        f"relative errors {errors} of the results, where {allowed} are allowed: not timed"
    )
    traffic = case.operator.traffic(inputs)
    turns = Turns([case.operator.call(operators, copied(inputs)) for _ in range(copies(traffic, device))], device)
    benchmark.group, benchmark._timer = str(case), machine.clock(device)
    benchmark.pedantic(turns.run, setup=turns.prepare, rounds=turns.rounds())
    if benchmark.stats is None:  # --benchmark-disable
        return
    median = benchmark.stats.stats.median
    benchmark.extra_info.update(
        operator=case.operator.name,
        subject=str(case.subject),
        precision=case.precision,
        implementation=implementation,
        networks=networks,
        errors=errors,
        bytes=traffic,
        copies=len(turns.calls),
        gigabytes_per_second=traffic / median / 1e9,
        copy_ceiling_gigabytes_per_second=ceiling / 1e9,
        percent_of_copy=100 * traffic / median / ceiling,
    )


def implementations(name: str, precision: str, device: torch.device) -> Operators:
    """The operators by the name of who computes them."""
    if name == "fused":
        return resolve("fused", precision, str(device)).operators  # type: ignore[arg-type]
    if name == "plain":
        return Operators(name)
    torch.compiler.reset()
    compilable = {each: getattr(graph_ops, each, getattr(plain, each)) for each in OPERATORS}
    return Operators(name, **{each: torch.compile(twin, dynamic=False) for each, twin in compilable.items()})


@functools.lru_cache(maxsize=1)
def oracle(case: Case, device: torch.device) -> tuple[Inputs, tuple[Tensor, ...], list[float]]:
    """Inputs, the results that the plain operator gives in float64, and the error that each may have."""
    inputs, twins = case.inputs(device), Operators("plain")
    exact = tuple(result.detach() for result in case.operator.call(twins, doubled(inputs))())
    own = case.operator.call(twins, copied(inputs))()
    allowed = [max(_FACTOR * error, _FLOOR[result.dtype]) for error, result in zip(compare(own, exact), own, strict=True)]
    return inputs, exact, allowed


def compare(results: Sequence[Tensor], exact: Sequence[Tensor]) -> list[float]:
    """Relative error of each result."""
    return [harness.distance(result.detach(), wanted) for result, wanted in zip(results, exact, strict=True)]


class Turns:
    """Calls that take turns on copies of their inputs, each of which then has to come from memory."""

    def __init__(self, calls: Sequence[Call], device: torch.device) -> None:
        self.calls, self.now = calls, machine.clock(device)
        self.kept: list[tuple[Tensor, ...]] = [()] * len(calls)
        self.turn = 0
        cache = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0
        self.flushing = torch.zeros(4 * cache, dtype=torch.uint8, device=device)

    def prepare(self) -> None:
        """Not timed: the next copy, without its last result; on a GPU an empty cache, and work to do while the call is queued."""
        self.turn = (self.turn + 1) % len(self.calls)
        self.kept[self.turn] = ()
        if self.flushing.is_cuda:
            self.flushing.max()  # only read: what is written would have to leave the cache during the call
            with torch.cuda.device(self.flushing.device):
                torch.cuda._sleep(_HOLD)

    def run(self) -> None:
        """The call."""
        self.kept[self.turn] = self.calls[self.turn]()

    def rounds(self) -> int:
        """How often to measure, after every copy had a turn to warm up."""
        samples = []
        for _ in range(max(3, len(self.calls))):
            self.prepare()
            start = self.now()
            self.run()
            samples.append(self.now() - start)
        return min(max(int(_SECONDS / statistics.median(samples)), _ROUNDS[0]), _ROUNDS[1])


def copies(traffic: int, device: torch.device) -> int:
    """So many copies of what a call touches that a CPU's last-level cache cannot hold half of them."""
    return 1 if device.type == "cuda" else min(max(math.ceil(2 * last_level_cache() / traffic), 1), _MAX_COPIES)


@functools.cache
def last_level_cache() -> int:
    """Bytes of this CPU's largest cache; 32 MiB where the system does not say."""
    found = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(size[:-1]) << {"K": 10, "M": 20}[size[-1]] for size in found if size[-1] in "KM"), default=32 << 20)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmarks and print one table of them; pytest's exit status, which is 1 where numbers are wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write everything there, raw samples included")
    options, others = parser.parse_known_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        target = options.json or Path(folder) / "operators.json"
        target.parent.mkdir(parents=True, exist_ok=True)
        status = pytest.main([__file__, "--benchmark-json", str(target), "--benchmark-quiet", "--quiet", *others])
        if target.exists() and target.stat().st_size:
            content = json.loads(target.read_text())
            print_table(content)
            target.write_text(json.dumps(compact(content), separators=(",", ":"), allow_nan=False) + "\n")
    return int(status)


def compact(content: dict[str, Any]) -> dict[str, Any]:
    """The same with samples to a ten-thousandth of themselves: thousands of digits of noise make a large file."""
    for bench in content["benchmarks"]:
        bench["stats"]["data"] = [float(f"{sample:.4g}") for sample in bench["stats"]["data"]]
    return content


def print_table(content: dict[str, Any]) -> None:
    """What was measured, for a reader."""
    rows = [bench["extra_info"] | {"median": bench["stats"]["median"]} for bench in content["benchmarks"]]
    plain_times = {_case(row): row["median"] for row in rows if row["implementation"] == "plain"}
    ceiling = rows[0]["copy_ceiling_gigabytes_per_second"]
    table = Table(title=f"{content['machine_info']['device']}: a copy reads and writes {ceiling:.1f} GB/s")
    for column in ("operator", "input", "precision", "by", "ms", "GB/s", "% of copy", "× plain"):
        table.add_column(column, justify="left" if column in ("operator", "input", "precision", "by") else "right")
    for row in rows:
        table.add_row(
            row["operator"],
            row["subject"],
            row["precision"],
            row["implementation"],
            f"{1e3 * row['median']:.3f}",
            f"{row['gigabytes_per_second']:.1f}",
            f"{row['percent_of_copy']:.0f}",
            f"{plain_times[_case(row)] / row['median']:.2f}" if _case(row) in plain_times else "–",
        )
    Console(width=None if sys.stdout.isatty() else 150).print(table)


def _case(row: dict[str, Any]) -> tuple[str, ...]:
    return row["operator"], row["subject"], row["precision"]


if __name__ == "__main__":
    sys.exit(main())
