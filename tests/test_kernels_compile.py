"""Every Triton kernel compiles for sm_80 and sm_90 without a GPU, and keeps its values in registers.

Started as a program (python test_kernels_compile.py 90) this file compiles them, without the interpreter that the other tests use.
"""

from __future__ import annotations

import importlib
import json
import os
import pkgutil
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

# One row per way in which a kernel is launched: the kernel, types of its arguments in order, compile-time values, warps.
# Arguments of the same name as in the kernel; pointers and sizes marked "16" are multiples of 16, as the launcher's usually are.
LAUNCHES: dict[str, list[dict[str, Any]]] = {
    "ascend._square_sum_kernel": [
        {"types": {"gradients": "*fp32 16", "partials": "*fp32 16", "count": "i32 16"}, "constants": {"BLOCK": 4096}, "warps": 8},
        {"types": {"gradients": "*fp32", "partials": "*fp32 16", "count": "i32"}, "constants": {"BLOCK": 4096}, "warps": 8},
    ],
    "ascend._finalize_kernel": [
        {
            "types": {"partials": "*fp32 16", "norm": "*fp32 16", "scale": "*fp32 16", "count": "i32", "radius": "fp32"},
            "constants": {"NORMALIZE": normalize, "BLOCK": 1024},
            "warps": 8,
        }
        for normalize in (True, False)
    ],
    "ascend._update_kernel": [
        {
            "types": {
                "weights": "*fp32 16",
                "gradients": "*fp32 16",
                "compute": f"{compute} 16",
                "norm": "*fp32 16",
                "scale": "*fp32 16",
                "count": "i32 16",
            },
            "constants": {"HAS_COMPUTE": compute != "*fp32", "BLOCK": 4096},
            "warps": 8,
        }
        for compute in ("*fp32", "*bf16", "*fp16")
    ],
}


def kernels() -> dict[str, Any]:
    """Every @triton.jit function of dwa_fast.kernels that is launched from Python, by module and name."""
    from triton.runtime.jit import JITFunction

    import dwa_fast.kernels

    found = {}
    for module in pkgutil.iter_modules(dwa_fast.kernels.__path__):
        for name, value in vars(importlib.import_module(f"dwa_fast.kernels.{module.name}")).items():
            if isinstance(value, JITFunction) and name.endswith("_kernel"):
                found[f"{module.name}.{name}"] = value
    return found


def assembler() -> str:
    """ptxas as Triton brings it, which knows the version of PTX that Triton writes; else the toolkit's."""
    import triton

    bundled = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    found = str(bundled) if bundled.exists() else shutil.which("ptxas")
    assert found is not None, "no ptxas: neither Triton nor a CUDA toolkit brings one"
    return found


def compile_launch(kernel: Any, launch: dict[str, Any], capability: int) -> str:
    """What ptxas -v says about one launch of a kernel."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = {name: said.split()[0] for name, said in launch["types"].items()}
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    constants = dict(launch["constants"])
    position = {name: index for index, name in enumerate(kernel.arg_names)}
    attributes = {(position[name],): [["tt.divisibility", 16]] for name, said in launch["types"].items() if said.endswith(" 16")}
    assert set(signature) == set(launch["types"]) | set(constants), f"{kernel.__name__} has arguments {kernel.arg_names}"
    source = ASTSource(kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": launch["warps"]})
    ptx: str = compiled.asm["ptx"]
    target = re.search(r"\.target (sm_\w+)", ptx)
    assert target is not None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.ptx")
        path.write_text(ptx)
        command = [assembler(), "-v", f"--gpu-name={target.group(1)}", str(path), "-o", str(Path(folder, "kernel.cubin"))]
        return subprocess.run(command, capture_output=True, text=True, check=True).stderr


def main(capability: int) -> None:
    found = kernels()
    report = {
        f"{name} {number}": compile_launch(found[name], launch, capability)
        for name, launches in LAUNCHES.items()
        for number, launch in enumerate(launches)
    }
    json.dump({"kernels": sorted(found), "report": report}, sys.stdout)


if __name__ == "__main__":
    main(int(sys.argv[1]))
else:
    import pytest

    @pytest.mark.parametrize("capability", [80, 90])
    def test_compiles_without_spills(capability: int, tmp_path: Path) -> None:
        pytest.importorskip("triton", reason="this PyTorch comes without Triton")
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        environment["TRITON_CACHE_DIR"] = str(tmp_path)
        run = subprocess.run(
            [sys.executable, "-P" if sys.version_info >= (3, 11) else "-s", __file__, str(capability)],
            capture_output=True,
            text=True,
            check=False,
            cwd=tmp_path,
            env=environment,
        )
        assert run.returncode == 0, run.stderr
        result = json.loads(run.stdout)
        assert result["kernels"] == sorted(LAUNCHES), "every kernel needs a row in LAUNCHES, and every row a kernel"
        assert len(result["report"]) == sum(len(launches) for launches in LAUNCHES.values())
        for launch, said in result["report"].items():
            spills = [int(count) for count in re.findall(r"(\d+) bytes spill", said)]
            assert spills, f"{launch}: ptxas says nothing about spills: {said}"
            assert not any(spills), f"{launch} spills on sm_{capability}: {said}"
            assert re.search(r"Used (\d+) registers", said), said
