"""What is shipped, and what importing it costs."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = ("csrc", "kernels", "dwa_fast", "tests", "benchmarks", "docs")


def run_python(code: str, folder: Path) -> str:
    """Output of a fresh interpreter that sees the installed package and not the checkout."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "TRITON_INTERPRET")}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=folder, env=environment)
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


def build(kind: str, folder: Path) -> Path:
    """An sdist or wheel of the checkout; the wheel takes the objects that are already compiled for this Python and PyTorch."""
    shutil.rmtree(ROOT / "build" / "lib", ignore_errors=True)
    for stale in (ROOT / "build").glob("lib.*"):
        shutil.rmtree(stale)
    code = f"import setuptools.build_meta as backend; backend.build_{kind}({str(folder)!r})"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert run.returncode == 0, run.stdout + run.stderr
    (built,) = folder.iterdir()
    return built


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Names in the sdist, without its top folder."""
    with tarfile.open(build("sdist", tmp_path_factory.mktemp("sdist"))) as archive:
        return {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    return zipfile.ZipFile(build("wheel", tmp_path_factory.mktemp("wheel")))


def sources(folder: str, *suffixes: str) -> set[str]:
    """Files of the checkout with those suffixes."""
    return {str(path.relative_to(ROOT)) for path in (ROOT / folder).rglob("*") if path.suffix in suffixes}


def test_sdist_holds_everything_that_builds_and_tests(sdist: set[str]) -> None:
    wanted = {"LICENSE", "CHANGELOG.md", "README.md", "Makefile", "constraints.txt", "pyproject.toml", "setup.py"}
    for folder in SHIPPED:
        wanted |= sources(folder, ".py", ".cpp", ".cu", ".cuh", ".h", ".typed", ".md", ".html", ".png")
    assert wanted <= sdist, f"missing from the sdist: {sorted(wanted - sdist)}"


def test_sdist_holds_nothing_that_was_built(sdist: set[str]) -> None:
    assert not [name for name in sdist if name.endswith((".so", ".o", ".pyc")) or name.startswith(("build/", ".venv"))]


def test_wheel_holds_the_package_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    compiled = {name for name in names if name.endswith(".so")}
    kernels = {f"dwa_fast/{name}" for name in sources("kernels", ".py")}
    assert len(compiled) == 1
    assert re.fullmatch(r"dwa_fast/_C\.[\w.-]+\.so", compiled.pop())
    assert kernels
    assert {name for name in names if not name.endswith(".so")} == sources("dwa_fast", ".py", ".typed", ".html", ".md") | kernels


def test_wheel_says_what_it_is(wheel: zipfile.ZipFile) -> None:
    (info,) = {name.split("/")[0] for name in wheel.namelist() if ".dist-info/" in name}
    metadata = wheel.read(f"{info}/METADATA").decode()
    assert "Name: dwa-fast\n" in metadata
    assert "License-Expression: Apache-2.0\n" in metadata
    assert "Requires-Python: >=3.10\n" in metadata
    assert "dwa-fast = dwa_fast.commands.cli:main" in wheel.read(f"{info}/entry_points.txt").decode()
    assert any(name.endswith("LICENSE") for name in wheel.namelist())


def test_console_script_is_installed() -> None:
    (script,) = importlib.metadata.entry_points(group="console_scripts", name="dwa-fast")
    assert script.value == "dwa_fast.commands.cli:main"
    assert callable(script.load())


def test_version_is_the_one_installed(tmp_path: Path) -> None:
    assert run_python("import dwa_fast; print(dwa_fast.__version__)", tmp_path) == importlib.metadata.version("dwa-fast")


def test_import_is_lean(tmp_path: Path) -> None:
    """Neither Triton, nor the extension, nor CUDA: the first call of an operator loads what it needs."""
    code = """
import sys
import dwa_fast.ops, dwa_fast.reference
import torch
print("triton" in sys.modules, "dwa_fast._C" in sys.modules, torch.cuda.is_initialized())
"""
    assert run_python(code, tmp_path) == "False False False"


def test_a_command_can_be_stopped_before_pytorch_is_there(tmp_path: Path) -> None:
    """By Ctrl-C in the first second, as later: no traceback."""
    code = """
import sys
class Stop:
    def find_spec(self, name, path, target=None):
        if name == "torch":
            raise KeyboardInterrupt
sys.meta_path.insert(0, Stop())
from dwa_fast.commands.cli import main
main(["info"])
"""
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert (process.returncode, process.stdout, process.stderr) == (130, "", "dwa-fast: stopped\n")


def test_kernels_import_only_torch_and_triton(tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="this PyTorch comes without Triton")
    code = """
import importlib, pkgutil, sys
import dwa_fast.kernels
before = {name for name in sys.modules if name.startswith("dwa_fast")}
for module in pkgutil.iter_modules(dwa_fast.kernels.__path__):
    importlib.import_module(f"dwa_fast.kernels.{module.name}")
after = {name for name in sys.modules if name.startswith("dwa_fast")}
print(sorted(name for name in after - before if not name.startswith("dwa_fast.kernels")))
"""
    assert run_python(code, tmp_path) == "[]"


def test_extension_needs_no_driver() -> None:
    """A machine without a GPU driver can load it: libcuda is not among the libraries that it asks for."""
    if shutil.which("readelf") is None:
        pytest.skip("needs readelf, of the binutils that come with a compiler")
    from dwa_fast import _C

    needed = subprocess.run(["readelf", "-d", _C.__file__], capture_output=True, text=True, check=True).stdout
    assert "libc10.so" in needed
    assert "libcuda.so" not in needed


def test_says_why_the_extension_cannot_be_used(tmp_path: Path) -> None:
    """A file built for something else gives one sentence with the cause, and no operator falls back silently."""
    code = """
import importlib.util, sys
import dwa_fast.ops as ops
from importlib.machinery import EXTENSION_SUFFIXES, ExtensionFileLoader
class Broken:
    def find_spec(self, name, path=None, target=None):
        if name == "dwa_fast._C":
            file = "_C" + EXTENSION_SUFFIXES[0]
            open(file, "w").write("not a library")
            import os
            return importlib.util.spec_from_file_location(name, os.path.abspath(file))
sys.meta_path.insert(0, Broken())
print(ops.cause())
try:
    ops.load()
except ImportError as error:
    print(type(error.__cause__).__name__, "\\n" in str(error))
"""
    said, raised = run_python(code, tmp_path).splitlines()
    assert said.startswith("the compiled operators of dwa_fast cannot be used: ")
    assert "PyTorch" in said
    assert raised == "ImportError False"
