"""Every Triton kernel compiles for sm_80, sm_90 and sm_100 without a GPU, keeps its values in registers and moves 16 bytes at a time.

Started as a program, without the interpreter that the other tests use, this file prints the table:

    python tests/kernels/test_compile.py [--json] [--few] [80] [90] [100]

With --few, as in the tests that are not slow: of the launches in bfloat16 whose arguments have the same types the first one, of a kernel's
launches in float32 the first one, and of those in float16 none.

What is compiled is what the launchers launch: they run on meta tensors of real shapes, and their launches are written down instead of run.
"""

from __future__ import annotations

import importlib
import itertools
import json
import math
import os
import pkgutil
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

CAPABILITIES = (80, 90, 100)

# Kernels that cost what their traffic costs: at even sizes and addresses they load and store 16 bytes per thread and access.
WIDE = {
    "ascend._ascend_square_sum_kernel",
    "ascend._ascend_update_kernel",
    "bn_act._bn_act_backward_kernel",
    "bn_act._bn_act_forward_kernel",
    "bn_act_join._bn_act_join_backward_kernel",
    "bn_act_join._bn_act_join_forward_kernel",
    "moments._moments_backward_kernel",
    "moments._moments_forward_kernel",
}

# Of those, the ones that store sums alone, and the bytes of a sum.
SUMS = {"ascend._ascend_square_sum_kernel": 8, "moments._moments_forward_kernel": 4}

ALONE = {"matching_loss._matching_loss_kernel"}  # one program per layer, fewer than there are multiprocessors: many loads at once instead


class Launch(NamedTuple):
    """One launch of a kernel as Triton would specialise it."""

    kernel: str  # module.name
    case: str  # what was launched
    signature: dict[str, str]  # Triton's type of every argument
    constants: dict[str, Any]
    aligned: frozenset[str]  # arguments that are multiples of 16
    warps: int

    def has(self, argument: str) -> bool:
        return argument not in self.constants or self.constants[argument] is not None

    def leaves_gradients(self) -> bool:
        """Whether it could write gradients of features, and writes its sums alone."""
        could = [name for name in ("grad_y", "grad_skip") if name in self.signature]
        return bool(could) and not any(map(self.has, could))

    @property
    def precision(self) -> str:
        """That of the features: sums are float32 beside any."""
        return next((kind for kind in ("bf16", "fp16") if f"*{kind}" in self.signature.values()), "fp32")

    def same_types(self) -> object:
        return self.kernel, tuple(self.signature.items()), self.aligned

    def same_code(self) -> object:
        return self.same_types(), repr(self.constants), self.warps


def specialise(module: str, case: str, function: Any, arguments: dict[str, Any], warps: int) -> Launch:
    """The types, constants and alignments that Triton takes from the values of the arguments."""
    import torch
    from triton.runtime.jit import mangle_type

    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    aligned = set()
    for parameter in function.params:
        name, value = parameter.name, arguments[parameter.name]
        is_one = isinstance(value, int) and value == 1 and not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or is_one:
            signature[name], constants[name] = "constexpr", value
        else:
            signature[name] = mangle_type(value, specialize=False)
            address = value.storage_offset() * value.element_size() if isinstance(value, torch.Tensor) else value
            if isinstance(address, int) and address % 16 == 0 and not parameter.do_not_specialize:
                aligned.add(name)
    return Launch(f"{module}.{function.__name__}", case, signature, constants, frozenset(aligned), warps)


def launches() -> Iterator[tuple[str, Callable[[], object]]]:
    """Calls of every launcher at real shapes, on meta tensors: the `launches` of the tests in this folder, and those of ascend."""
    import torch

    sys.path.append(str(Path(__file__).resolve().parents[2]))  # behind the installed package
    for path in sorted(Path(__file__).parent.glob("test_*.py")):
        if path.name != Path(__file__).name:
            yield from getattr(importlib.import_module(f"tests.kernels.{path.stem}"), "launches", list)()

    from dwa_fast.kernels import ascend
    from tests.kernels.cases import meta

    arena = meta(11_220_144)
    for dtype in (torch.bfloat16, torch.float16):
        yield f"copy {dtype}", partial(ascend.ascend_, arena, arena, 0.1, compute=arena.to(dtype))
    yield "no copy", partial(ascend.ascend_, arena, arena, 0.1, normalize=False)
    yield "odd address", partial(ascend.ascend_, arena[1:], arena[1:], 0.1)


def collect() -> tuple[list[str], list[Launch]]:
    """Names of all kernels, and one launch for every code that the launchers would have compiled."""
    from triton.runtime.jit import JITFunction

    import dwa_fast.kernels

    names: dict[Any, str] = {}
    for module in pkgutil.iter_modules(dwa_fast.kernels.__path__):
        for name, value in vars(importlib.import_module(f"dwa_fast.kernels.{module.name}")).items():
            if isinstance(value, JITFunction) and name.endswith("_kernel"):
                names[value] = module.name
    found: dict[object, Launch] = {}
    case = ""

    def write_down(self: Any, *args: Any, grid: Any, warmup: bool, num_warps: int, **kwargs: Any) -> None:
        assert len(grid) <= 3
        assert grid[0] < 2**31
        assert all(0 < size < 2**16 for size in grid[1:])
        launch = specialise(names[self], case, self, self.signature.bind(*args, **kwargs).arguments, num_warps)
        found.setdefault(launch.same_code(), launch)

    JITFunction.run = write_down
    for label, call in launches():
        case = label
        call()
    return sorted(f"{module}.{kernel.__name__}" for kernel, module in names.items()), list(found.values())


def a_few(found: list[Launch]) -> list[Launch]:
    """See the top of this file."""
    low = {launch.kernel for launch in found if launch.precision == "bf16"}
    chosen: dict[object, Launch] = {}
    for launch in found:
        if launch.precision != "fp16":
            first_suffices = launch.precision == "fp32" and launch.kernel in low
            chosen.setdefault(launch.kernel if first_suffices else launch.same_types(), launch)
    return list(chosen.values())


def counted(launch: Launch) -> int | None:
    """The registers that the grid of a kernel which leaves sums counts with."""
    from dwa_fast.kernels import bn_act, bn_act_join, bn_act_pool, moments

    activation = launch.constants.get("ACTIVATION", "")
    if launch.kernel == "bn_act._bn_act_forward_kernel":
        return bn_act.registers(launch.has("skip"), activation)
    if launch.kernel == "bn_act_pool._bn_act_pool_forward_kernel":
        return bn_act_pool.registers(activation)
    if launch.kernel == "bn_act_join._bn_act_join_forward_kernel":
        return bn_act_join.registers(activation)
    if launch.kernel == "bn_act_join._bn_act_join_backward_kernel" and launch.has("partials"):
        return bn_act_join.backward_registers(activation)
    if launch.kernel.endswith("_backward_kernel") and launch.kernel.startswith("bn_act") and launch.has("partials"):
        return bn_act.backward_registers(activation)
    return moments.REGISTERS if launch.kernel == "moments._moments_forward_kernel" else None


def assembler(capability: int) -> str:
    """ptxas as Triton brings it, which knows the version of PTX that Triton writes, one of its own from sm_100 on; else the toolkit's."""
    import triton

    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    names = ["ptxas-blackwell", "ptxas"] if capability >= 100 else ["ptxas"]
    bundled = [str(folder / name) for name in names if (folder / name).exists()]
    found = bundled[0] if bundled else shutil.which("ptxas")
    assert found is not None, "no ptxas: neither Triton nor a CUDA toolkit brings one"
    return found


def widest(ptx: str, instruction: str) -> int:
    """Bytes of the widest access of one thread to global memory; 0 without one."""
    accesses = re.findall(rf"\b{instruction}\.global[\w.:]*?(?:\.v(\d))?\.b(\d+)\s", ptx)
    return max((int(count or 1) * int(bits) // 8 for count, bits in accesses), default=0)


def shortest_run(ttgir: str) -> int:
    """Contiguous bytes that the lanes of a warp touch at once, in the access to a whole tile where they are fewest; 0 without a tile."""
    layouts = dict(re.findall(r"(#\w+) = #ttg\.blocked<\{sizePerThread = (.+?), warpsPerCTA", ttgir))
    runs = []
    for shape, kind, layout in re.findall(r"tt\.(?:load|store) .*?tensor<([\dx]+)x!tt\.ptr<\w*?(\d+)>, (#\w+)>", ttgir):
        sizes = [int(size) for size in shape.split("x")]
        if math.prod(sizes) >= 1024:
            per_thread, per_warp = (json.loads(part) for part in layouts[layout].split(", threadsPerWarp = "))
            runs.append(min(per_thread[-1] * per_warp[-1], sizes[-1]) * int(kind) // 8)
    return min(runs, default=0)


def compile_launch(launch: Launch, capability: int) -> dict[str, Any]:
    """One row of the table: what ptxas -v says about one launch of a kernel."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, name = launch.kernel.split(".")
    kernel = getattr(importlib.import_module(f"dwa_fast.kernels.{module}"), name)
    position = {argument: index for index, argument in enumerate(kernel.arg_names)}
    attributes = {(position[argument],): [["tt.divisibility", 16]] for argument in launch.aligned}
    source = ASTSource(kernel, launch.signature, launch.constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": launch.warps})
    ptx: str = compiled.asm["ptx"]
    target = re.search(r"\.target (sm_\w+)", ptx)
    assert target is not None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.ptx")
        path.write_text(ptx)
        command = [assembler(capability), "-v", f"--gpu-name={target.group(1)}", str(path), "-o", str(Path(folder, "kernel.cubin"))]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers, spills = re.search(r"Used (\d+) registers", said), re.findall(r"(\d+) bytes spill", said)
    assert registers, f"ptxas says nothing about registers: {said}"
    assert spills, f"ptxas says nothing about spills: {said}"
    return {
        "kernel": launch.kernel,
        "case": launch.case.replace("torch.", ""),
        "capability": capability,
        "warps": launch.warps,
        "registers": int(registers.group(1)),
        "counted": counted(launch),
        "stores": SUMS.get(launch.kernel, 4 if launch.leaves_gradients() else 16),
        "spills": sum(map(int, spills)),
        "shared": compiled.metadata.shared,
        "load": widest(ptx, "ld"),
        "store": widest(ptx, "st"),
        "run": shortest_run(compiled.asm["ttgir"]),
    }


def table(rows: list[dict[str, Any]]) -> str:
    head = ["kernel", "launch", "sm", "warps", "registers", "spilled bytes", "shared bytes", "load bytes", "store bytes", "run bytes"]
    keys = ["kernel", "case", "capability", "warps", "registers", "spills", "shared", "load", "store", "run"]
    lines = [head, ["---"] * 2 + ["---:"] * 8] + [[str(row[key]) for key in keys] for row in rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    return "\n".join("| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines)


def main(arguments: list[str]) -> None:
    os.environ.pop("TRITON_INTERPRET", None)
    capabilities = [int(argument) for argument in arguments if argument.isdigit()] or list(CAPABILITIES)
    kernels, found = collect()
    found = a_few(found) if "--few" in arguments else found
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("fork")) as workers:  # with everything imported
        rows = list(workers.map(compile_launch, *zip(*itertools.product(found, capabilities), strict=True), chunksize=4))
    print(json.dumps({"kernels": kernels, "rows": rows}) if "--json" in arguments else table(rows))


if __name__ == "__main__":
    main(sys.argv[1:])
else:
    import pytest

    @pytest.mark.parametrize(
        ("capability", "few"), [(90, ["--few"]), *(pytest.param(each, [], marks=pytest.mark.slow) for each in CAPABILITIES)]
    )
    def test_compiles_without_spills(capability: int, few: list[str], tmp_path: Path) -> None:
        pytest.importorskip("triton", reason="this PyTorch comes without Triton")
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        environment["TRITON_CACHE_DIR"] = str(tmp_path)
        command = [sys.executable, "-P" if sys.version_info >= (3, 11) else "-s", __file__, "--json", *few, str(capability)]
        run = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, env=environment)
        assert run.returncode == 0, run.stderr
        result = json.loads(run.stdout)
        assert {row["kernel"] for row in result["rows"]} == set(result["kernels"]), "every kernel needs a launch in launches()"
        assert set(result["kernels"]) >= WIDE
        for row in result["rows"]:
            assert row["spills"] == 0, row
            if row["counted"] is not None and capability == 90 and "odd" not in row["case"]:
                assert row["registers"] <= row["counted"], row
            if row["kernel"] not in ALONE:
                assert row["registers"] * row["warps"] * 32 <= 32768, f"fewer than two programs fit a multiprocessor: {row}"
            if row["kernel"] in WIDE and "odd" not in row["case"]:
                assert row["load"] == 16, row
                assert row["store"] == row["stores"], row
                assert row["run"] >= 128, row
            if row["kernel"].startswith("view"):
                assert row["run"] >= 64, row
            if row["kernel"].startswith("bn_act_pool") and "odd" not in row["case"]:  # the places have a byte each
                assert (row["load"], row["store"]) == (16, row["stores"]), row
                assert row["run"] >= 64, row
