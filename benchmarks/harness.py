"""What the benchmarks share: workloads, peers that run one and the same loop, interleaved timing, and the facts of the machine."""

from __future__ import annotations

import copy
import platform
import resource
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dwa_fast import __version__, compiled, ops
from dwa_fast.architectures import build
from dwa_fast.backend import Execution, Operators, precisions, resolve
from dwa_fast.config import SynthesisConfig
from dwa_fast.recipes import full_recipe
from dwa_fast.reference.loop import StatisticsHook, see
from dwa_fast.refine import Refinement
from dwa_fast.synthesis import Batch, Lane
from dwa_fast.teacher import prepare
from dwa_fast.views import Schedule, draw_schedule

SEED = 0


@dataclass(frozen=True)
class Workload:
    """A teacher and the shape of its batches."""

    name: str
    recipe: str
    architecture: str
    size: int
    classes: int
    batch: int  # on a GPU, as published
    cpu_batch: int  # on a CPU, so that an iteration takes about a second


WORKLOADS = {
    each.name: each
    for each in (
        Workload("digits", "digits", "small-resnet", 16, 10, 100, 10),
        Workload("cifar10-resnet18", "cifar10", "resnet18-cifar", 32, 10, 100, 50),
        Workload("cifar100-resnet18", "cifar100", "resnet18-cifar", 32, 100, 100, 50),
        Workload("cifar100-convnet128", "cifar100", "convnet128", 32, 100, 100, 50),
        Workload("tiny-resnet18", "tiny", "resnet18-cifar", 64, 200, 200, 10),
        Workload("tiny-resnet50", "tiny", "resnet50-cifar", 64, 200, 200, 4),
        Workload("imagenet-resnet18", "imagenet", "resnet18", 224, 1000, 100, 8),
        Workload("imagenet-resnet50", "imagenet", "resnet50", 224, 1000, 100, 4),
    )
}
PEERS = ("published", "eager", "eager+graph", "compiled", "fused")


@dataclass(frozen=True)
class Problem:
    """One workload with weights and inputs that are random but not degenerate."""

    workload: Workload
    config: SynthesisConfig
    teacher: nn.Module
    images: Tensor  # [B, C, H, W] normalised, float32
    labels: Tensor  # [B]
    schedule: Schedule
    device: torch.device


def make_problem(workload: Workload, device: torch.device, batch: int | None, iterations: int) -> Problem:
    """Random weights whose BatchNorm statistics come from such images, so that activations and losses are of the usual size."""
    recipe = full_recipe(workload.recipe)
    count = batch or (workload.batch if device.type == "cuda" else workload.cpu_batch)
    torch.manual_seed(SEED)
    config = replace(recipe.synthesis, iterations=iterations, batch_size=count, device=str(device))
    teacher = build(workload.architecture, classes=workload.classes, channels=config.channels, size=workload.size).to(device)
    low, high = (torch.tensor(bound)[:, None, None] for bound in config.bounds)

    def pictures(number: int) -> Tensor:
        """Smooth coloured noise between black and white."""
        coarse = torch.rand(number, config.channels, 8, 8)
        fine = torch.rand(number, config.channels, workload.size, workload.size)
        smooth = F.interpolate(coarse, size=(workload.size, workload.size), mode="bilinear", align_corners=False)
        return (low + (high - low) * (0.8 * smooth + 0.2 * fine)).to(device)

    teacher.train()
    with torch.no_grad():
        for layer in teacher.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.momentum = None  # a plain average over the passes
        for _ in range(2):
            teacher(pictures(min(count, 16)))
    for layer in teacher.modules():
        if isinstance(layer, nn.BatchNorm2d):  # off the images' statistics, as a real teacher's are
            layer.running_mean += 0.2 * torch.randn_like(layer.running_mean) * layer.running_var.sqrt()
            layer.running_var *= torch.empty_like(layer.running_var).uniform_(0.7, 1.4)
    teacher.eval()
    labels = torch.arange(count, device=device) % workload.classes
    schedule = draw_schedule(config, workload.size, workload.size, seed=SEED, batch=0)
    return Problem(workload, config, teacher, pictures(count), labels, schedule, device)


class Published:
    """The loop as released: weights that keep their gradients, NCHW, float32, a hook per BatchNorm layer, losses read every time."""

    precision = "fp32"  # on a GPU with PyTorch's default, TensorFloat-32 in convolutions

    def __init__(self, problem: Problem, dtype: torch.dtype = torch.float32) -> None:
        self.problem, self.dtype = problem, dtype
        self.model = copy.deepcopy(problem.teacher).to(dtype).requires_grad_(True)
        self.hooks = [StatisticsHook(layer) for layer in self.model.modules() if isinstance(layer, nn.BatchNorm2d)]
        self.low, self.high = (torch.tensor(bound, dtype=dtype, device=problem.device)[:, None, None] for bound in problem.config.bounds)
        self.reset()

    def reset(self) -> None:
        """Start the batch anew."""
        self.step = 0
        self.losses: list[list[float]] = []
        self.images = self.problem.images.to(self.dtype, copy=True).requires_grad_(True)
        self.optimizer = torch.optim.Adam([self.images], lr=self.problem.config.learning_rate, betas=(0.5, 0.9), eps=1e-8)

    def advance(self, iterations: int) -> None:
        """Some iterations more."""
        config, weights = self.problem.config, [self.problem.config.first_layer_weight] + [1.0] * (len(self.hooks) - 1)
        for _ in range(iterations):
            self.optimizer.param_groups[0]["lr"] = float(self.problem.schedule.learning_rates[self.step])
            self.optimizer.zero_grad()
            ce = F.cross_entropy(self.model(see(self.images, self.problem.schedule, self.step)), self.problem.labels)
            mean = torch.stack([w * hook.mean_distance for w, hook in zip(weights, self.hooks, strict=True)]).sum()
            var = torch.stack([w * hook.var_distance for w, hook in zip(weights, self.hooks, strict=True)]).sum()
            (ce + config.lambda_mean * mean + config.lambda_var * var).backward()
            self.optimizer.step()
            with torch.no_grad():
                self.images.clamp_(self.low, self.high)
            self.losses.append([ce.item(), mean.item(), var.item()])
            self.step += 1

    def first_gradient(self) -> Tensor:
        """Gradient of the images in the first iteration."""
        self.reset()
        self.advance(1)
        assert self.images.grad is not None
        return self.images.grad.clone()

    def recorded(self) -> Tensor:
        """Losses so far, [iterations, 3]."""
        return torch.tensor(self.losses)


class Ours:
    """One of our back-ends, or plain PyTorch tuned by hand, through the package's own inner loop."""

    def __init__(self, problem: Problem, execution: Execution) -> None:
        self.problem, self.precision, self.execution = problem, execution.precision, execution
        network, _ = prepare(problem.teacher, problem.images, execution)
        self.lane = Lane(network, replace(problem.config, ascent="none"), execution)
        self.refinement: Refinement = self.lane.begin(Batch(0, problem.images, problem.labels), SEED)
        self.reset()

    def reset(self) -> None:
        """Start the batch anew."""
        self.step = 0
        with self.lane.active():
            self.refinement.load(self.problem.images, self.problem.labels, self.problem.schedule)

    def advance(self, iterations: int) -> None:
        """Some iterations more."""
        with self.lane.active():
            self.refinement.advance(iterations)
        self.step += iterations

    def first_gradient(self) -> Tensor:
        """Gradient of the images in the first iteration: twice Adam's first moment, since β₁ is ½ and it began at 0."""
        self.reset()
        self.advance(1)
        return 2 * self.refinement.exp_avg.contiguous()

    def recorded(self) -> Tensor:
        """Losses so far, [iterations, 3]."""
        return self.refinement.losses[: self.step].float().cpu()


Peer = Published | Ours


def make_peer(name: str, problem: Problem, precision: str) -> Peer:
    """A peer by name, tuned as its best friend would."""
    if name == "published":
        return Published(problem)
    if name in ("eager", "eager+graph"):
        plain = Operators(name, matching_loss=compiled.matching_loss, view=compiled.view, adam_clip_=compiled.adam_clip_)
        return Ours(problem, Execution(name, plain, problem.device, precision))
    return Ours(problem, resolve(name, precision, str(problem.device)))  # type: ignore[arg-type]


def offered(name: str, device: torch.device) -> list[str]:
    """Precisions that a peer is measured in; none where it cannot run."""
    if name == "published":
        return ["fp32"]
    if name == "eager+graph" and device.type == "cpu":
        return []
    return [each for each in precisions("fused", device) if each != "fp16"]


def seconds(peer: Peer, iterations: int, device: torch.device) -> float:
    """Seconds per iteration of some iterations, the device's work included."""
    if peer.step + iterations > peer.problem.config.iterations:
        peer.reset()
    _wait(device)
    start = time.perf_counter()
    peer.advance(iterations)
    _wait(device)
    return (time.perf_counter() - start) / iterations


def interleaved(peers: dict[str, Peer], iterations: int, rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds per iteration of every peer, `rounds` samples each, taken in turns so that all see the same machine."""
    for peer in peers.values():
        seconds(peer, iterations, device)
    samples: dict[str, list[float]] = {name: [] for name in peers}
    for _ in range(rounds):
        for name, peer in peers.items():
            samples[name].append(seconds(peer, iterations, device))
    return samples


class Moment:
    """A point in the work that the current CUDA stream has been given; one minus an earlier one are the device's seconds between them."""

    def __init__(self) -> None:
        self.event = torch.cuda.Event(enable_timing=True)
        self.event.record()

    def __sub__(self, earlier: Moment) -> float:
        self.event.synchronize()
        return earlier.event.elapsed_time(self.event) / 1e3


def clock(device: torch.device) -> Callable[[], Any]:
    """Two of its readings subtracted are seconds: of the host on a CPU, of the device's own events on a GPU."""
    return Moment if device.type == "cuda" else time.perf_counter


def copy_ceiling(device: torch.device, rounds: int = 15) -> float:
    """Bytes per second, reads and writes counted, of the fastest of some copies that no cache holds: what moving memory can reach here."""
    source = torch.rand(2**28 if device.type == "cuda" else 2**26, device=device)  # 1 GiB and 256 MiB
    target, now, samples = torch.zeros_like(source), clock(device), []
    for _ in range(rounds):
        start = now()
        target.copy_(source)
        samples.append(now() - start)
    return 2 * source.nbytes / min(samples)


def numbers(peer: Peer, iterations: int) -> tuple[Tensor, Tensor]:
    """The first gradient of the images, and the losses of the first iterations."""
    gradient = peer.first_gradient()
    peer.advance(iterations - 1)
    return gradient, peer.recorded()


def errors(peer: Peer, exact: tuple[Tensor, Tensor], iterations: int) -> tuple[float, float]:
    """Relative errors of both."""
    gradient, losses = numbers(peer, iterations)
    return distance(gradient, exact[0]), distance(losses, exact[1])


def distance(got: Tensor, wanted: Tensor) -> float:
    """‖got − wanted‖ / ‖wanted‖, computed where `wanted` is."""
    exact = wanted.double()
    return float((got.to(exact.device).double() - exact).norm() / exact.norm())


def spread(samples: Sequence[float]) -> tuple[float, float, float]:
    """Median, 10 % and 90 % quantile."""
    ordered = sorted(samples)
    last = len(ordered) - 1
    return statistics.median(ordered), ordered[round(0.1 * last)], ordered[round(0.9 * last)]


def facts(device: torch.device, command: Sequence[str]) -> dict[str, Any]:
    """Commit, versions and machine, for the JSON."""
    root = Path(__file__).resolve().parent.parent
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=False).stdout.strip()
    changed = subprocess.run(["git", "status", "--porcelain"], cwd=root, capture_output=True, text=True, check=False).stdout
    cuda = device.type == "cuda"
    return {
        "commit": commit + ("+changes" if changed.strip() else ""),
        "command": list(command),
        "device": torch.cuda.get_device_name(device) if cuda else processor(),
        "threads": torch.get_num_threads(),
        "vector level": ops.cpu_level() if hasattr(ops, "cpu_level") else torch.backends.cpu.get_cpu_capability(),
        "versions": {"dwa_fast": __version__, "torch": torch.__version__, "cuda": torch.version.cuda, "python": platform.python_version()},
        "precision flags": {
            "cudnn.allow_tf32": torch.backends.cudnn.allow_tf32,
            "matmul.allow_tf32": torch.backends.cuda.matmul.allow_tf32,
        },
    }


def processor() -> str:
    """Name of the CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def peak_memory(device: torch.device) -> float:
    """MiB at the peak: of the device's allocations, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
