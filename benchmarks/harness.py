"""What the benchmarks share: workloads, peers that run one and the same loop, interleaved timing, and the facts of the machine."""

from __future__ import annotations

import copy
import functools
import statistics
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TypeVar

import machine
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dwa_fast.config import Normalisation, SynthesisConfig
from dwa_fast.engine.ascent import Arena
from dwa_fast.engine.backend import Execution, graph_operators, precisions, resolve
from dwa_fast.engine.refine import Refinement, Teacher
from dwa_fast.engine.teacher import prepare
from dwa_fast.models.architectures import build
from dwa_fast.models.batchnorm import batchnorm_layers
from dwa_fast.models.checkpoint import load_teacher
from dwa_fast.recipes import Recipe, recipe
from dwa_fast.reference.loop import StatisticsHook, apply_view
from dwa_fast.schedule import Schedule, make_schedule

SEED = 0
_GENTLE = 1e-3  # share of the learning rate at which numbers are compared

Name = TypeVar("Name", bound=Hashable)


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
    recipe: Recipe
    teacher: nn.Module
    images: Tensor  # [B, C, H, W] normalised, float32
    labels: Tensor  # [B]
    schedule: Schedule
    device: torch.device

    @property
    def config(self) -> SynthesisConfig:
        """The settings of the synthesis."""
        return self.recipe.synthesis


def make_problem(workload: Workload, device: torch.device, batch: int | None, iterations: int, *, teacher: Path | None = None) -> Problem:
    """A workload with random pictures, and the weights of a checkpoint or random ones."""
    count = batch or (workload.batch if device.type == "cuda" else workload.cpu_batch)
    chosen = recipe(workload.recipe, size=workload.size, iterations=iterations, batch_size=count, device=str(device))
    torch.manual_seed(SEED)
    if teacher is None:
        module = _random_teacher(workload, chosen.data, device, min(count, 16))
    else:
        facts = {"classes": workload.classes, "channels": chosen.data.channels, "size": workload.size}
        module = load_teacher(teacher, architecture=workload.architecture, **facts)[0].to(device).eval()
    images = _pictures(count, workload, chosen.data, device)
    labels = torch.arange(count, device=device) % workload.classes
    schedule = make_schedule(chosen.synthesis, workload.size, workload.size, seed=SEED, batch=0)
    return Problem(workload, chosen, module, images, labels, schedule, device)


def _random_teacher(workload: Workload, normalisation: Normalisation, device: torch.device, count: int) -> nn.Module:
    """Random weights whose BatchNorm statistics come from such pictures, so that activations and losses are of the usual size."""
    teacher = build(workload.architecture, classes=workload.classes, channels=normalisation.channels, size=workload.size).to(device)
    layers = list(batchnorm_layers(teacher).values())
    teacher.train()
    with torch.no_grad():
        for layer in layers:
            layer.momentum = None  # a plain average over the passes
        for _ in range(2):
            teacher(_pictures(count, workload, normalisation, device))
    for layer in layers:  # off the pictures' statistics, as a real teacher's are
        layer.running_mean += 0.2 * torch.randn_like(layer.running_mean) * layer.running_var.sqrt()
        layer.running_var *= torch.empty_like(layer.running_var).uniform_(0.7, 1.4)
    return teacher.eval()


def _pictures(number: int, workload: Workload, normalisation: Normalisation, device: torch.device) -> Tensor:
    """Smooth coloured noise between black and white, normalised."""
    low, high = (torch.tensor(bound)[:, None, None] for bound in normalisation.bounds)
    coarse = torch.rand(number, normalisation.channels, 8, 8)
    fine = torch.rand(number, normalisation.channels, workload.size, workload.size)
    smooth = F.interpolate(coarse, size=(workload.size, workload.size), mode="bilinear", align_corners=False)
    return (low + (high - low) * (0.8 * smooth + 0.2 * fine)).to(device)


def disturbed(problem: Problem, amount: float, draw: int) -> Problem:
    """The same problem with every weight of the teacher changed by up to `amount` times itself."""
    teacher = copy.deepcopy(problem.teacher)
    source = torch.Generator(problem.device).manual_seed(SEED + draw)
    with torch.no_grad():
        for p in teacher.parameters():
            p.mul_(1 + amount * (2 * torch.rand(p.shape, generator=source, device=problem.device) - 1))
    return replace(problem, teacher=teacher)


class Published:
    """The loop as released: weights that keep their gradients, NCHW, float32, a hook per BatchNorm layer, losses read every time."""

    precision = "fp32"  # on a GPU with PyTorch's default, TensorFloat-32 in convolutions

    def __init__(
        self,
        problem: Problem,
        dtype: torch.dtype = torch.float32,
        *,
        frozen: bool = False,  # no gradients of the weights: the same numbers, sooner
    ) -> None:
        self.problem, self.dtype = problem, dtype
        self.model = copy.deepcopy(problem.teacher).to(dtype).requires_grad_(not frozen)
        self.hooks = [StatisticsHook(layer) for layer in batchnorm_layers(self.model).values()]
        self.low, self.high = (
            torch.tensor(bound, dtype=dtype, device=problem.device)[:, None, None] for bound in problem.recipe.data.bounds
        )
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
            ce = F.cross_entropy(self.model(apply_view(self.images, self.problem.schedule, self.step)), self.problem.labels)
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

    def losses_so_far(self) -> Tensor:
        """Losses so far, [iterations, 3]."""
        return torch.tensor(self.losses)


class Ours:
    """One of our back-ends, or plain PyTorch tuned by hand, through the package's own inner loop."""

    def __init__(self, problem: Problem, execution: Execution) -> None:
        self.problem, self.precision, self.execution = problem, execution.precision, execution
        self.network, _ = prepare(problem.teacher, problem.images, execution)
        Arena(self.network, execution, moves=False)
        with execution.arithmetic():
            teachers = [Teacher(self.network, self.network)]
            self.refinement = Refinement(teachers, problem.images.shape, problem.config, problem.recipe.data, execution)
        self.reset()

    def reset(self) -> None:
        """Start the batch anew."""
        self.step = 0
        with self.execution.arithmetic():
            self.refinement.load(self.problem.images, self.problem.labels, self.problem.schedule)

    def advance(self, iterations: int) -> None:
        """Some iterations more."""
        with self.execution.arithmetic():
            self.refinement.advance(iterations)
        self.step += iterations

    def first_gradient(self) -> Tensor:
        """Gradient of the images in the first iteration: twice Adam's first moment, since β₁ is ½ and it began at 0."""
        self.reset()
        self.advance(1)
        return 2 * self.refinement.exp_avg.contiguous()

    def losses_so_far(self) -> Tensor:
        """Losses so far, [iterations, 3]."""
        return self.refinement.losses[: self.step].float().cpu()


class Tuned(Execution):
    """An execution whose convolutions cuDNN chooses by trying all of them: the fastest, but not the same one in every process."""

    @classmethod
    def of(cls, execution: Execution) -> Tuned:
        """The same otherwise."""
        return cls(**{each.name: getattr(execution, each.name) for each in fields(execution)})

    @contextmanager
    def arithmetic(self) -> Iterator[None]:
        """As without tuning, but for the choice."""
        with super().arithmetic():
            torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = True, False
            yield


Peer = Published | Ours


def make_peer(name: str, problem: Problem, precision: str) -> Peer:
    """A peer by name, tuned as its best friend would."""
    if name == "published":
        return Published(problem)
    if name in ("eager", "eager+graph"):
        return Ours(problem, Tuned(name, graph_operators(name), problem.device, precision, captures=name == "eager+graph"))
    execution = resolve(name, precision, str(problem.device))  # type: ignore[arg-type]
    return Ours(problem, execution if name == "fused" else Tuned.of(execution))


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
    return machine.timed(lambda: peer.advance(iterations), device) / iterations


def warm_up(jobs: Mapping[Name, Callable[[], object]], least: float = 0.0) -> None:
    """Run all of them for nothing: once, or for as many turns as take that many seconds."""
    until = time.perf_counter() + least
    while True:
        for job in jobs.values():
            job()
        if time.perf_counter() >= until:
            return


def in_turns(jobs: Mapping[Name, Callable[[], float]], rounds: int) -> dict[Name, list[float]]:
    """What every job returns, `rounds` times, taken in turns so that all see the same machine."""
    samples: dict[Name, list[float]] = {name: [] for name in jobs}
    for _ in range(rounds):
        for name, job in jobs.items():
            samples[name].append(job())
    return samples


def interleaved(
    peers: Mapping[str, Peer], others: Mapping[str, Callable[[], float]], iterations: int, rounds: int, device: torch.device
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Seconds per iteration of every peer, and what every other job returns, `rounds` samples each, taken in turns."""
    jobs = {("peer", name): functools.partial(seconds, peer, iterations, device) for name, peer in peers.items()}
    warm_up(jobs)
    samples = in_turns({**jobs, **{("other", name): job for name, job in others.items()}}, rounds)
    return {name: samples["peer", name] for name in peers}, {name: samples["other", name] for name in others}


def numbers(peer: Peer, iterations: int) -> tuple[Tensor, Tensor]:
    """The first gradient of the images, and the losses of the first iterations, at a thousandth of the learning rate.

    Adam's first steps have the size of the learning rate whatever the size of the gradient: where that is 0 to rounding, rounding decides
    which way a pixel goes, and at the published learning rate the losses after three iterations tell which pixels those were.
    """
    problem, schedule = peer.problem, peer.problem.schedule
    peer.problem = replace(problem, schedule=replace(schedule, learning_rates=_GENTLE * schedule.learning_rates))
    gradient = peer.first_gradient()
    peer.advance(iterations - 1)
    losses = peer.losses_so_far()
    peer.problem = problem
    peer.reset()
    return gradient, losses


def errors(peer: Peer, exact: tuple[Tensor, Tensor], iterations: int) -> tuple[float, float]:
    """Relative errors of both; of the gradient, the median over the images."""
    gradient, losses = numbers(peer, iterations)
    of_images = [distance(own, wanted) for own, wanted in zip(gradient, exact[0], strict=True)]
    return statistics.median(of_images), distance(losses, exact[1])


def distance(got: Tensor, wanted: Tensor) -> float:
    """‖got − wanted‖ / ‖wanted‖, computed where `wanted` is."""
    exact = wanted.double()
    return float((got.to(exact.device).double() - exact).norm() / exact.norm())


def quantiles(samples: Sequence[float]) -> tuple[float, float, float]:
    """Median, 10 % and 90 % quantile."""
    ordered = sorted(samples)
    last = len(ordered) - 1
    return statistics.median(ordered), ordered[round(0.1 * last)], ordered[round(0.9 * last)]
