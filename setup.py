"""Builds dwa_fast._C from csrc/. Everything else about the package is in pyproject.toml.

Read from the environment, while building only: CUDA_HOME or CUDA_PATH (the toolkit), CXX, MAX_JOBS, and DWA_FAST_CUDA=0 (leave CUDA
out).
"""

from __future__ import annotations

import contextlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from setuptools import find_packages, setup

try:
    import torch
except ImportError as error:
    sys.exit(
        f"dwa_fast is built against the PyTorch that it will run with, and that cannot be imported here ({error}): "
        "install torch first, then run pip with --no-build-isolation."
    )


def locate_toolkit() -> str | None:
    """The folder of the CUDA toolkit that nvcc belongs to, asked of nvcc itself because the one on the PATH may be a wrapper elsewhere."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home is not None:
        return home if Path(home, "bin", "nvcc").exists() else None
    nvcc = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    if nvcc is None:
        return None
    dry = subprocess.run([nvcc, "--dryrun", "-x", "cu", "-c", os.devnull], capture_output=True, text=True, check=False)
    top = re.search(r"^#\$ TOP=(.+)$", dry.stderr + dry.stdout, re.MULTILINE)
    return os.path.realpath(top.group(1).strip()) if top else str(Path(nvcc).resolve().parent.parent)


def toolkit_version(home: str) -> str:
    """Release of the toolkit, for example 13.0; empty where nvcc does not say."""
    output = subprocess.run([str(Path(home, "bin", "nvcc")), "--version"], capture_output=True, text=True, check=False).stdout
    release = re.search(r"release (\d+\.\d+)", output)
    return release.group(1) if release else ""


def choose_cuda() -> tuple[str | None, str]:
    """The toolkit to build CUDA sources with, or None, and the sentence that says why."""
    if os.environ.get("DWA_FAST_CUDA") == "0":
        return None, "C++ alone: DWA_FAST_CUDA=0 was set"
    if torch.version.cuda is None:
        return None, f"C++ alone: this PyTorch ({torch.__version__}) is built without CUDA"
    home = locate_toolkit()
    if home is None:
        return None, f"C++ alone: PyTorch has CUDA {torch.version.cuda}, but no nvcc was found (PATH, CUDA_HOME)"
    release = toolkit_version(home)
    if release.split(".")[0] != torch.version.cuda.split(".")[0]:
        return None, f"C++ alone: nvcc in {home} is CUDA {release or 'unknown'}, PyTorch wants CUDA {torch.version.cuda}"
    return home, f"C++ and CUDA {release}"


def nvidia_folders(leaf: str) -> list[Path]:
    """Folders of that name inside the NVIDIA Python packages beside PyTorch, the ones of its CUDA version first."""
    packages = Path(torch.__file__).resolve().parents[1] / "nvidia"
    major = (torch.version.cuda or "").split(".")[0]
    found = [folder for folder in sorted(packages.glob(f"*/{leaf}")) if folder.is_dir()]
    return sorted(found, key=lambda folder: folder.parent.name != f"cu{major}")


def extra_includes(home: str) -> list[str]:
    """NVIDIA's packages as include folders, where the toolkit lacks headers that PyTorch's own headers ask for."""
    wanted = ("cublas_v2.h", "cusparse.h", "cusolverDn.h", "cuda_runtime.h")
    if all(Path(home, "include", name).exists() for name in wanted):
        return []
    return [str(folder) for folder in nvidia_folders("include")]


def find_cudart(home: str) -> str | None:
    """The CUDA runtime library that PyTorch itself loads; else the toolkit's."""
    major = (torch.version.cuda or "").split(".")[0]
    folders = [*nvidia_folders("lib"), Path(torch.__file__).resolve().parent / "lib", Path(home, "lib64"), Path(home, "lib")]
    return next((str(found) for folder in folders for found in sorted(folder.glob(f"libcudart*.so.{major}*"))), None)


def required_standard() -> int:
    """The C++ standard that PyTorch's headers demand, as in -std=c++20."""
    header = Path(torch.__file__).resolve().parent / "include/torch/csrc/api/include/torch/all.h"
    demanded = re.search(r"__cplusplus < 20(\d\d)", header.read_text()) if header.exists() else None
    return int(demanded.group(1)) if demanded else 17


def check_compiler(compiler: list[str]) -> None:
    """Ends with one sentence where the compiler is missing, too old for PyTorch's headers, or without OpenMP."""
    standard = required_standard()
    needs = (
        f"dwa_fast needs a C++ compiler with C++{standard} and OpenMP, as PyTorch {torch.__version__} demands (g++ 11 or later has both)"
    )
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cpp")
        source.write_text("#include <omp.h>\n#include <vector>\nint main() { return omp_get_max_threads() < 1; }\n")
        command = [*compiler, f"-std=c++{standard}", "-fopenmp", str(source), "-o", str(Path(folder, "probe"))]
        try:
            probe = subprocess.run(command, capture_output=True, text=True, check=False)
        except OSError as error:
            sys.exit(f"{needs}; {compiler[0]} cannot be run: {error}.")
    if probe.returncode != 0:
        sys.exit(f"{needs}; {compiler[0]} could not compile a short program with them:\n{probe.stderr.strip()}")


with contextlib.suppress(ImportError):
    # The ninja of this environment, whether or not it is activated: another version would not know its log and compile everything again.
    import ninja

    os.environ["PATH"] = os.pathsep.join([ninja.BIN_DIR, os.environ.get("PATH", os.defpath)])

# Set before torch.utils.cpp_extension is imported, which else may take a folder that holds a wrapper of nvcc for the toolkit.
CUDA_HOME, CHOICE = choose_cuda()
if CUDA_HOME is not None:
    os.environ["CUDA_HOME"] = CUDA_HOME

from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension  # noqa: E402


class build_ext(BuildExtension):  # type: ignore[misc]  # noqa: N801  (the name that setuptools prints)
    """BuildExtension whose objects lie in one folder per Python and PyTorch, so that editable installs, wheels and rebuilds share them."""

    def finalize_options(self) -> None:
        super().finalize_options()
        tag = f"cp{sys.version_info.major}{sys.version_info.minor}-{platform.machine()}"
        self.build_temp = os.path.join("build", f"temp-{tag}-torch{torch.__version__}{'' if CUDA_HOME else '-nocuda'}")

    def build_extensions(self) -> None:
        print(f"dwa_fast._C: {CHOICE}; PyTorch {torch.__version__}", flush=True)
        check_compiler(os.environ.get("CXX", "c++").split())
        os.makedirs(self.build_temp, exist_ok=True)
        super().build_extensions()


def extension() -> CppExtension:
    """dwa_fast._C with the CUDA sources where they can be compiled."""
    sources = sorted(str(path) for pattern in ("*.cpp", "cpu/*.cpp") for path in Path("csrc").glob(pattern))
    cxx = ["-O3", "-g0", "-fopenmp", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unused-parameter"]
    common = {"include_dirs": [os.path.abspath("csrc")], "depends": sorted(str(path) for path in Path("csrc").rglob("*.h"))}
    if CUDA_HOME is None:
        return CppExtension("dwa_fast._C", sources, extra_compile_args={"cxx": cxx}, extra_link_args=["-fopenmp"], **common)
    sources += sorted(str(path) for path in Path("csrc").glob("cuda/*.cpp"))
    cuda = CUDAExtension(
        "dwa_fast._C",
        sources,
        define_macros=[("DWA_FAST_CUDA", "1")],
        extra_compile_args={"cxx": cxx},
        extra_link_args=["-fopenmp"],
        **common,
    )
    # After the toolkit's own folder: a header is taken from the packages only where the toolkit has none.
    cuda.include_dirs += extra_includes(CUDA_HOME)
    cudart = find_cudart(CUDA_HOME)
    if cudart is not None:
        cuda.libraries.remove("cudart")
        cuda.extra_link_args.append(cudart)
    return cuda


setup(
    packages=[*find_packages(include=["dwa_fast", "dwa_fast.*"]), "dwa_fast.kernels"],
    package_dir={"dwa_fast": "dwa_fast", "dwa_fast.kernels": "kernels"},
    package_data={"dwa_fast": ["py.typed", "report/templates/*"]},
    ext_modules=[extension()],
    cmdclass={"build_ext": build_ext},
)
