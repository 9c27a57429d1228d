"""The machine under the benchmarks: its facts, its clock, its memory, and the most that its arithmetic and its memory can do."""

from __future__ import annotations

import ctypes
import functools
import gc
import os
import platform
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
import torch.nn.functional as F

from dwa_fast import __version__, ops
from dwa_fast.engine.backend import bf16_instructions, resolve

T = TypeVar("T")
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Moment:
    """A point in the work that a CUDA device's current stream has been given; one minus an earlier one are the device's seconds."""

    def __init__(self, device: torch.device) -> None:
        self.event = torch.cuda.Event(enable_timing=True)
        self.event.record(torch.cuda.current_stream(device))

    def __sub__(self, earlier: Moment) -> float:
        self.event.synchronize()
        return earlier.event.elapsed_time(self.event) / 1e3


def clock(device: torch.device) -> Callable[[], Any]:
    """Two of its readings subtracted are seconds: of the host on a CPU, of the device's own events on a GPU."""
    return functools.partial(Moment, device) if device.type == "cuda" else time.perf_counter


def copy_ceiling(device: torch.device, rounds: int = 15) -> float:
    """Bytes per second, reads and writes counted, of the fastest of some copies that no cache holds: what moving memory can reach here."""
    source = torch.rand(2**28 if device.type == "cuda" else 2**26, device=device)  # 1 GiB and 256 MiB
    target, now, samples = torch.zeros_like(source), clock(device), []
    for _ in range(rounds):
        start = now()
        target.copy_(source)
        samples.append(now() - start)
    return 2 * source.nbytes / min(samples)


def arithmetic_ceiling(device: torch.device, precision: str, rounds: int = 7) -> float:
    """Floating-point operations per second of the faster of a large matrix product and a large convolution in that precision."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    large = device.type == "cuda"
    size, batch = (8192, 256) if large else (2048, 32)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    images = torch.randn(batch, 256, 16, 16, device=device).to(dtype, memory_format=torch.channels_last)
    kernel = torch.randn(256, 256, 3, 3, device=device).to(dtype, memory_format=torch.channels_last)
    now = clock(device)
    best = 0.0
    with resolve("fused", precision, str(device)).arithmetic(), torch.no_grad():
        for work, operations in ((lambda: a @ b, 2 * size**3), (lambda: F.conv2d(images, kernel), 2 * batch * 14 * 14 * 256 * 256 * 9)):
            for _ in range(rounds):
                start = now()
                work()
                best = max(best, operations / (now() - start))
    return best


def facts(device: torch.device, command: Sequence[str]) -> dict[str, Any]:
    """Commit, versions and machine, for the JSON."""
    cuda = device.type == "cuda"
    return {
        "commit": commit(),
        "command": list(command),
        "device": torch.cuda.get_device_name(device) if cuda else processor(),
        "driver": driver() if cuda else None,
        "threads": torch.get_num_threads(),
        "vector level": ops.cpu_level() if hasattr(ops, "cpu_level") else torch.backends.cpu.get_cpu_capability(),
        "bf16 instructions": bf16_instructions(),
        "versions": {"dwa_fast": __version__, "torch": torch.__version__, "cuda": torch.version.cuda, "python": platform.python_version()},
        "precision flags": {
            "cudnn.allow_tf32": torch.backends.cudnn.allow_tf32,
            "matmul.allow_tf32": torch.backends.cuda.matmul.allow_tf32,
        },
    }


def commit() -> str | None:
    """The commit that is measured: of the checkout, or $DWA_FAST_COMMIT where there is no git; None where neither is known."""

    def git(*arguments: str) -> str:
        root = Path(__file__).resolve().parent.parent
        return subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("DWA_FAST_COMMIT")


def driver() -> str | None:
    """Version of NVIDIA's driver, where there is its tool to ask."""
    try:
        query = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        return None
    return query.stdout.partition("\n")[0].strip() or None


def processor() -> str:
    """Name of the CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def peak_memory_of(build: Callable[[], T], run: Callable[[T], None], device: torch.device) -> tuple[T, float | None]:
    """What `build` makes, and the MiB that it and `run` hold at most while it runs, beyond what was there before.

    On a GPU this is what PyTorch has reserved, with the memory of captured graphs; on a CPU the resident memory of the process, whose
    peak only Linux lets one reset: None elsewhere.
    """
    _release(device)
    before = _memory(device, "VmRSS")
    made = build()
    run(made)  # its first run may need more than those that follow
    _release(device)
    run(made)
    after = _memory(device, "VmHWM")
    return made, None if before is None or after is None else after - before


def _release(device: torch.device) -> None:
    """Give back memory that is not used, and forget the peak."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    elif _STATUS.exists():
        ctypes.CDLL(None).malloc_trim(0)
        _CLEAR.write_text("5")


def _memory(device: torch.device, kind: Literal["VmRSS", "VmHWM"]) -> float | None:
    """MiB now, or at the peak."""
    if device.type == "cuda":
        now, peak = torch.cuda.memory_reserved(device), torch.cuda.max_memory_reserved(device)
        return (peak if kind == "VmHWM" else now) / 2**20
    if not _STATUS.exists():
        return None
    return next(int(line.split()[1]) / 1024 for line in _STATUS.read_text().splitlines() if line.startswith(kind))


def kernels(run: Callable[[], None], device: torch.device) -> int | None:
    """Kernels that a GPU runs meanwhile, those of a captured graph one by one; None on a CPU."""
    return sum(map(len, kernel_times(run, device).values())) if device.type == "cuda" else None


def kernel_times(run: Callable[[], None], device: torch.device) -> dict[str, list[float]]:
    """Seconds of every kernel that a GPU runs meanwhile, by its name, those of a captured graph one by one; empty on a CPU."""
    if device.type != "cuda":
        run()
        return {}
    from torch.profiler import DeviceType, ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as profiled:
        run()
        torch.cuda.synchronize(device)
    times: dict[str, list[float]] = {}
    for event in profiled.events():
        if event.device_type == DeviceType.CUDA and not event.name.startswith(("Memcpy", "Memset")):
            times.setdefault(event.name, []).append(event.device_time_total / 1e6)
    return times


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of some work, the device's included."""
    wait(device)
    start = time.perf_counter()
    work()
    wait(device)
    return time.perf_counter() - start
