"""Training steps of students and teachers against plain PyTorch and the released loops, on this machine; numbers are compared first.

python benchmarks/pipeline.py --json benchmark-output/pipeline.json             on a CPU
python benchmarks/pipeline.py --device cuda --steps 50 --json gpu-results/pipeline.json

Peers: `now`, the package's own loop (`training.fit`); `before`, the same in plain PyTorch as the package had it: channels-last images,
the optimiser's default implementation, memory as the C library gives it; `released`, the loops of the published programs. All are in fp32;
where the device computes in bf16, `now bf16` and `before bf16` are too, the teacher's labels included. On a GPU samples begin behind the
steps that are called before one is captured.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import math
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import harness
import machine
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from dwa_fast.config import TrainingPrecision
from dwa_fast.data.augment import Mix, Views
from dwa_fast.data.loader import BatchPlan, TrainingBatch
from dwa_fast.engine.backend import precisions
from dwa_fast.engine.memory import kept_memory
from dwa_fast.engine.training_form import Forward, FusedForm, training_form
from dwa_fast.errors import InputError
from dwa_fast.models.architectures import build
from dwa_fast.recipes import Recipe, recipe
from dwa_fast.reference.training import train_student, train_teacher
from dwa_fast.training.fit import fit, predict, teacher_labels
from dwa_fast.training.squeeze import sgd
from dwa_fast.training.step import CALLED
from dwa_fast.training.validate import optimiser_of, soft_loss

CPU = torch.device("cpu")
PEERS = ("now", "before", "released")
BF16_PEERS = ("now bf16", "before bf16")
_FACTOR = 2  # an error may be this many times the larger one of plain PyTorch
_LEAST, _LEAST_BF16 = 1e-6, 2.0**-8  # relative, what rounding does anyway
_SMALLEST_RATE = 1e-9  # of the steps whose numbers are compared
_COLUMNS = "step|peer|ms/step|10 … 90 %|CPU ms|× before|× released|% of convolutions|faults|peak MiB|gradient|loss".split("|")


@dataclass(frozen=True)
class Case:
    """A network, its batches and what is trained."""

    architecture: str
    batch: int
    size: int = 32
    classes: int = 10


CASES = {
    "convnet128": Case("convnet128", 100),
    "resnet18": Case("resnet18-cifar", 32),
    "resnet18-224": Case("resnet18", 8, 224),
    "tiny": Case("small-resnet", 8, 8),
}


class Steps:
    """Steps of one peer on one case; each call goes on with the same network."""

    def __init__(self, peer: str, trains: str, case: Case, dtype: torch.dtype = torch.float32, device: torch.device = CPU) -> None:
        self.device = device
        self.peer, self.trains, self.dtype = peer.removesuffix(" bf16"), trains, dtype
        self.precision: TrainingPrecision = "bf16" if peer in BF16_PEERS else "fp32"
        shape = {"classes": case.classes, "channels": 3, "size": case.size}
        torch.manual_seed(harness.SEED)
        self.network = build(case.architecture, **shape).to(device, dtype).train()
        self.teacher = copy.deepcopy(self.network).eval().requires_grad_(False)
        with torch.no_grad():  # the student must not start as its own teacher
            for p in self.teacher.parameters():
                p.add_(0.3 * p.abs().mean() * torch.randn(p.shape).to(p))
        pixels = torch.randn(case.batch, case.size, case.size, 3).to(device, dtype)
        self.images = pixels.permute(0, 3, 1, 2)  # as the gather of the views leaves them
        self.labels = (torch.arange(case.batch) % case.classes).to(device)
        settings = recipe("cifar10", size=case.size)
        self.recipe: Recipe = replace(settings, validation=replace(settings.validation, precision=self.precision))
        self.clocks: list[tuple[float, float, int]] = []
        self._unmeasured, self._last = 1 if device.type == "cpu" else CALLED + 2, 0
        image_shape = (3, case.size, case.size)
        self.forward = training_form(self.network, image_shape, device) if self.peer == "now" else self.network
        if self.peer == "now":
            self.soft_labels = teacher_labels([self.teacher], self.recipe.validation, image_shape, device)
        squeezed, validated = self.recipe.squeeze, self.recipe.validation
        fused = self.peer == "now" or None
        self.optimizer = sgd(self.network, squeezed, fused) if trains == "teacher" else optimiser_of(self.network, validated, fused)

    def advance(self, steps: int, rate: float = 1e-3) -> list[float]:
        """The losses of some steps; `clocks` has the seconds, CPU seconds and page faults at the end of each."""
        self.clocks, self.losses = [], []
        if self.peer == "released":
            self._released(steps, rate)
        elif self.peer == "before":
            self._before(steps, rate)
        else:
            fit(
                self.network,
                self.optimizer,
                _Loader(self._batches(steps), steps, self.device),  # type: ignore[arg-type]
                lambda batch: [self._loss(batch)],
                epochs=1,
                learning_rate=rate,
                seed=harness.SEED,
                remedy=lambda: "",
                progress=lambda *_: self._clock(),
            )
        return [float(loss) for loss in self.losses]

    def _batches(self, steps: int) -> Iterator[TrainingBatch]:
        for _ in range(steps):
            yield TrainingBatch(self.images, self.labels, BatchPlan(torch.arange(len(self.images)), Views(), Mix()))

    def _loss(self, batch: TrainingBatch) -> Tensor:
        logits = self._logits(self.forward, batch.images)
        if self.trains == "teacher":
            loss = F.cross_entropy(logits, batch.labels)
        elif self.peer == "now":
            loss = soft_loss(logits, self.soft_labels(batch), self.recipe.validation)
        else:
            with torch.no_grad():
                labels = self._logits(self.teacher, batch.images)
            loss = soft_loss(logits, labels, self.recipe.validation)
        self.losses.append(loss.detach())
        return loss

    def _logits(self, network: Forward, images: Tensor) -> Tensor:
        return predict(network, images, self.precision) if self.dtype is torch.float32 else network(images)

    def _before(self, steps: int, rate: float) -> None:
        """The loop that the package had."""
        total = torch.zeros((), device=self.device)
        for batch in self._batches(steps):
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            self.optimizer.zero_grad()
            value = self._loss(batch)
            value.backward()
            self.optimizer.step()
            total += value.detach()
            self._clock()

    def _released(self, steps: int, rate: float) -> None:
        def ticking(values: Any) -> Iterator[Any]:
            for number in range(steps):
                if number:
                    self._clock()
                yield values
            self._clock()

        rates = [rate] * steps
        if self.trains == "teacher":
            batches = ticking((self.images, self.labels))
            self.losses = train_teacher(self.network, batches, rates, self.recipe.squeeze)
        else:
            self.losses = train_student(self.network, self.teacher, ticking(self.images), rates, self.recipe.validation)

    def _clock(self) -> None:
        if len(self.clocks) in (self._unmeasured - 1, self._last):  # between them a GPU has a queue, as in a training
            machine.wait(self.device)
        used = resource.getrusage(resource.RUSAGE_SELF)
        self.clocks.append((time.perf_counter(), used.ru_utime + used.ru_stime, used.ru_minflt))

    def sample(self, steps: int) -> tuple[float, float, float]:
        """Seconds, CPU seconds and page faults of a warm step, behind those that are not measured."""
        self._last = self._unmeasured - 1 + steps
        self.advance(self._unmeasured + steps)
        first, last = self.clocks[self._unmeasured - 1], self.clocks[self._last]
        return tuple((after - before) / steps for before, after in zip(first, last, strict=True))  # type: ignore[return-value]


@dataclass(frozen=True)
class _Loader:
    """Batches that are there already, for `fit`."""

    batches: Iterator[TrainingBatch]
    steps: int
    device: torch.device

    def epoch(self, number: int) -> Iterator[TrainingBatch]:
        """All of them."""
        return self.batches


def numbers(peer: str, trains: str, case: Case, dtype: torch.dtype = torch.float32, device: torch.device = CPU) -> tuple[Tensor, float]:
    """Gradient of all weights and loss of the first step of a fresh network."""
    steps = Steps(peer, trains, case, dtype, device)
    found = [torch.zeros(p.numel(), dtype=torch.float64, device=device) for p in steps.network.parameters()]
    for p, place in zip(steps.network.parameters(), found, strict=True):
        p.register_hook(functools.partial(_keep, place))
    (loss,) = steps.advance(1, _SMALLEST_RATE)
    return torch.cat(found).cpu(), loss


def rounding_of_loss(case: Case, loss: float) -> float:
    """Relative error of a student's loss that rounding makes in float32, about; a single draw may show less.

    KL(teacher ‖ student) of two nearly uniform distributions is what remains of logarithms of size log(classes): each is off by half a
    unit in its last place, and the mean over the batch by 1/√B of that.
    """
    return 2.0**-24 * math.log(case.classes) / math.sqrt(case.batch) / abs(loss)


def _keep(place: Tensor, grad: Tensor) -> None:
    place.copy_(grad.detach().flatten())


def convolutions(case: Case, trains: str, device: torch.device = CPU) -> Callable[[], float]:
    """Seconds of the convolutions of a step alone: forward, both gradients, and the teacher's forward; channels-last, memory kept."""
    network = build(case.architecture, classes=case.classes, channels=3, size=case.size).to(device)
    calls: list[tuple[nn.Conv2d, Tensor, Tensor]] = []

    def keep_shape(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        assert isinstance(layer, nn.Conv2d)
        x, y = (torch.randn(each.shape).to(device, memory_format=torch.channels_last) for each in (inputs[0], output))
        calls.append((layer, x, y))

    handles = [layer.register_forward_hook(keep_shape) for layer in network.modules() if isinstance(layer, nn.Conv2d)]
    with torch.no_grad():
        network(torch.randn(case.batch, 3, case.size, case.size).to(device))
    for handle in handles:
        handle.remove()

    @torch.no_grad()
    def run() -> None:
        for number, (layer, x, grad) in enumerate(calls):
            shape = layer.stride, layer.padding, layer.dilation
            for _ in range(2 if trains == "student" else 1):
                F.conv2d(x, layer.weight, layer.bias, *shape, layer.groups)
            sizes = None if layer.bias is None else [layer.out_channels]
            needed = [number > 0, True, layer.bias is not None]
            torch.ops.aten.convolution_backward(grad, x, layer.weight, sizes, *shape, False, [0, 0], layer.groups, needed)

    def seconds() -> float:
        with kept_memory(device):
            run()
            return machine.timed(run, device)

    return seconds


def measure(case: Case, trains: str, steps: int, rounds: int, device: torch.device = CPU) -> dict[str, Any]:
    """All peers of one kind of step, checked and timed in turns in one process."""
    exact, errors = numbers("before", trains, case, torch.float64, device), {}
    peers = (*PEERS, *(BF16_PEERS if precisions("fused", device)[0] == "bf16" else ()))
    for peer in peers:
        gradient, loss = numbers(peer, trains, case, device=device)
        errors[peer] = harness.distance(gradient, exact[0]), abs(loss - exact[1]) / abs(exact[1])
    allowed, wrong = {}, set()
    unavoidable = 0.0, rounding_of_loss(case, exact[1]) if trains == "student" else 0.0
    for own, *plain in (PEERS, BF16_PEERS):
        if own in errors:
            least_error = _LEAST_BF16 if own in BF16_PEERS else _LEAST
            allowed[own] = [max(least_error, _FACTOR * max(unavoidable[k], *(errors[peer][k] for peer in plain))) for k in range(2)]
            if any(error > limit for error, limit in zip(errors[own], allowed[own], strict=True)):
                wrong.add(own)
    made, peaks = {}, {}
    for peer in peers:
        made[peer], peaks[peer] = machine.peak_memory_of(
            lambda peer=peer: Steps(peer, trains, case, device=device), lambda each: each.sample(1), device
        )  # type: ignore[misc]
    floor = convolutions(case, trains, device)
    jobs: dict[str, Callable[[], Any]] = {peer: (lambda each=each: each.sample(steps)) for peer, each in made.items()}  # type: ignore[misc]
    samples = harness.in_turns({**jobs, "floor": floor}, rounds)
    seconds = {peer: statistics.median(sample[0] for sample in samples[peer]) for peer in peers}
    least = statistics.median(samples["floor"])
    rows = []
    for peer in peers:
        times = [sample[0] for sample in samples[peer]]
        median, low, high = harness.quantiles(times)
        compared = peer not in wrong
        rows.append(
            {
                "peer": peer,
                "fused": isinstance(made[peer].forward, FusedForm),
                "seconds": median,
                "low": low,
                "high": high,
                "cpu_seconds": statistics.median(sample[1] for sample in samples[peer]),
                "ratio_to_before": seconds["before"] / median if compared else None,
                "ratio_to_released": seconds["released"] / median if compared else None,
                "percent_of_floor": None if peer in BF16_PEERS else 100 * least / median,
                "faults": statistics.median(sample[2] for sample in samples[peer]),
                "peak_memory_mib": peaks[peer],
                "gradient_error": errors[peer][0],
                "loss_error": errors[peer][1],
                "samples": samples[peer],
            }
        )
    facts = {"architecture": case.architecture, "batch": case.batch, "size": case.size, "trains": trains, "matches": not wrong}
    return {**facts, "allowed": allowed, "floor_seconds": least, "floor_samples": samples["floor"], "rows": rows}


def table_of(results: Sequence[dict[str, Any]]) -> Table:
    """All peers of all steps."""
    table = Table(*_COLUMNS, title="training steps")
    for result in results:
        for row in result["rows"]:
            ratios = [row["ratio_to_before"], row["ratio_to_released"]]
            table.add_row(
                f"{result['trains']} {result['architecture']} B {result['batch']}",
                row["peer"],
                f"{1e3 * row['seconds']:.4g}",
                f"{1e3 * row['low']:.4g} … {1e3 * row['high']:.4g}",
                f"{1e3 * row['cpu_seconds']:.4g}",
                *("–" if ratio is None else f"{ratio:.2f}" for ratio in ratios),
                "–" if row["percent_of_floor"] is None else f"{row['percent_of_floor']:.0f}",
                f"{row['faults']:.0f}",
                "–" if row["peak_memory_mib"] is None else f"{row['peak_memory_mib']:.0f}",
                f"{row['gradient_error']:.1e}",
                f"{row['loss_error']:.1e}",
            )
    return table


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; 1 where our numbers are wrong, which then get no ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", nargs="+", choices=list(CASES), default=["convnet128", "resnet18"])
    parser.add_argument("--trains", nargs="+", choices=["student", "teacher"], default=["student", "teacher"])
    parser.add_argument("--batch-size", type=int, help="images of a batch; default: as the case has it")
    parser.add_argument("--steps", type=int, default=2, help="steps of one sample")
    parser.add_argument("--rounds", type=int, default=5, help="samples of each peer, taken in turns")
    parser.add_argument("--device", type=torch.device, default=CPU, help="default: cpu")
    parser.add_argument("--json", type=Path, help="also write everything there, raw samples included")
    parser.add_argument("--dry-run", action="store_true", help="a small network and one sample: whether everything runs")
    options = parser.parse_args(arguments)
    for name in ("batch_size", "steps", "rounds"):
        if (value := getattr(options, name)) is not None and value < (2 if name == "batch_size" else 1):
            parser.error(f"--{name.replace('_', '-')} is too small, got {value}")
    cases = ["tiny"] if options.dry_run else options.case
    steps, rounds = (1, 1) if options.dry_run else (options.steps, options.rounds)
    results: list[dict[str, Any]] = []
    facts = machine.facts(options.device, sys.argv)
    for name in cases:
        for trains in options.trains:
            case = replace(CASES[name], batch=options.batch_size or CASES[name].batch)
            results.append(measure(case, trains, steps, rounds, options.device))
            if options.json:  # after each, so that a later one cannot lose it
                options.json.parent.mkdir(parents=True, exist_ok=True)
                content = {**facts, "training_steps": results}
                options.json.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
    Console(width=170).print(table_of(results))
    wrong = [f"{each['trains']} {each['architecture']}" for each in results if not each["matches"]]
    if wrong:
        print(f"errors above {_FACTOR}× those of plain PyTorch, so no ratio: {', '.join(wrong)}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except InputError as error:
        sys.exit(f"pipeline.py: {error}")
