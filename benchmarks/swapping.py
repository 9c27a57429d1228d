"""What each level of swapping dwa_fast into a published recover loop gains on this machine; losses are compared before times are taken.

python benchmarks/swapping.py --workload cifar100-resnet18 --batch-size 50 --json out.json
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import harness
import machine
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dwa_fast.compat import BNFeatureHook, Perterb
from dwa_fast.compat.namespace import Recovery, read_namespace
from dwa_fast.config import Precision
from dwa_fast.engine.backend import precisions, resolve_device
from dwa_fast.engine.synthesis import Batch, Synthesizer
from dwa_fast.errors import InputError
from dwa_fast.recipes import recipe
from dwa_fast.reference.loop import apply_view
from dwa_fast.schedule import make_schedule
from dwa_fast.seeding import generator, normal

COMPARED = 3  # iterations whose losses are compared with those in float64
_ALLOWED = {"fp32": 1e-4, "tf32": 1e-2, "bf16": 0.15}  # relative error of the losses, or twice the plain loop's
_EPSILON = 1e-12  # of the ascent, as published
_COLUMNS = ("code base", "way", "precision", "ms/iteration", "10 … 90 %", "× plain", "ascent s", "batch s", "× plain", "losses")


class PublishedHook:
    """The statistics of a layer's input by the operations of the published class: a mean, a copy channel by channel, its variance."""

    def __init__(self, module: nn.Module, args: Namespace) -> None:
        self.r_var = args.r_var
        self.hook = module.register_forward_hook(self.hook_fn)

    def hook_fn(self, module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        """After each forward pass."""
        y = inputs[0]
        var = y.transpose(0, 1).reshape(y.shape[1], -1).var(1, unbiased=False)
        mean = y.mean((0, 2, 3))
        self.r_feature = torch.norm(module.running_var.data - var, 2) * self.r_var + torch.norm(module.running_mean.data - mean, 2)


class PublishedPerterb:
    """The ascent step weight by weight, as published."""

    def __init__(self, params: Any, base_optimizer: torch.optim.Optimizer, rho: float) -> None:
        self.params, self.rho, self.moves = list(params), rho, {}

    @torch.no_grad()
    def first_step(self, zero_grad: bool = False) -> None:
        """Uphill, along the gradient."""
        moving = [p for p in self.params if p.grad is not None]
        scale = self.rho / (torch.norm(torch.stack([p.grad.norm(p=2) for p in moving]), p=2) + _EPSILON)
        for p in moving:
            move = p.grad * scale.to(p)
            p.add_(move)
            self.moves[p] = move
            p.grad = None if zero_grad else p.grad


class Way(Protocol):
    """One way to run the loop of a batch."""

    precision: str

    def begin(self) -> None:
        """Ascent and start of the batch."""

    def advance(self, iterations: int) -> None:
        """Some iterations more."""

    def losses(self) -> Tensor:
        """Cross-entropy and the sum of r_feature of the iterations since `begin`, [iterations, 2]."""


class Loop:
    """The published recover loop, with the hooks and the ascent that it is given; `frozen` weights take no gradients (SRe2L, CDA)."""

    precision = "fp32"

    def __init__(
        self,
        problem: harness.Problem,
        recovery: Recovery,
        hook: Callable[..., Any] = PublishedHook,
        perterb: Callable[..., Any] = PublishedPerterb,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.problem, self.recovery, self.perterb, self.dtype = problem, recovery, perterb, dtype
        self.model = copy.deepcopy(problem.teacher).to(dtype).requires_grad_(recovery.config.adjusts)
        arguments = Namespace(r_var=recovery.r_var)
        self.hooks = [hook(module, arguments) for module in self.model.modules() if isinstance(module, nn.BatchNorm2d)]
        self.original = [p.detach().clone() for p in self.model.parameters()]
        size, noise = problem.workload.size, generator(harness.SEED, "noise", 0)
        self.start = problem.images if recovery.config.initial == "real" else normal(noise, tuple(problem.images.shape)).to(problem.device)
        self.schedule = make_schedule(recovery.config, size, size, seed=harness.SEED, batch=0)

    def begin(self) -> None:
        """Start the batch anew: weights as trained, then K ascent steps."""
        config = self.recovery.config
        with torch.no_grad():
            for p, old in zip(self.model.parameters(), self.original, strict=True):
                p.copy_(old)
        self.model.zero_grad()
        self.step, self.seen_losses = 0, []
        self.inputs = self.start.to(self.dtype, copy=True).requires_grad_(True)
        self.optimizer = torch.optim.Adam([self.inputs], lr=config.learning_rate, betas=(0.5, 0.9), eps=1e-8)
        if config.adjusts:
            adjusted = self.perterb(self.model.parameters(), self.optimizer, rho=config.rho / config.steps)
            seen = apply_view(self.inputs, self.schedule, 0)
            for _ in range(config.steps):
                F.cross_entropy(self.model(seen), self.problem.labels).backward()
                adjusted.first_step(True)
            self.inputs.grad = None  # the published loop keeps it; get_images does not

    def advance(self, iterations: int) -> None:
        """Some iterations more; losses are read in each, as the published loops do."""
        config = self.recovery.config
        for _ in range(iterations):
            self.optimizer.param_groups[0]["lr"] = float(self.schedule.learning_rates[self.step])
            self.optimizer.zero_grad()
            loss_ce = F.cross_entropy(self.model(apply_view(self.inputs, self.schedule, self.step)), self.problem.labels)
            rescale = [config.first_layer_weight] + [1.0] * (len(self.hooks) - 1)
            loss_bn = torch.stack([hook.r_feature * factor for hook, factor in zip(self.hooks, rescale, strict=True)]).sum()
            (loss_ce + config.lambda_mean * loss_bn).backward()
            self.optimizer.step()
            with torch.no_grad():
                for channel, (low, high) in enumerate(zip(*self.recovery.normalisation.bounds, strict=True)):
                    self.inputs[:, channel].clamp_(low, high)
            self.seen_losses.append([loss_ce.item(), loss_bn.item()])
            self.step = (self.step + 1) % config.iterations

    def losses(self) -> Tensor:
        """As `Way` says."""
        return torch.tensor(self.seen_losses)


class Swapped:
    """What get_images does for one batch."""

    def __init__(self, problem: harness.Problem, recovery: Recovery) -> None:
        run = Synthesizer(problem.teacher, problem.images[:1], recovery.config, recovery.normalisation)
        self.replica, self.precision, self.r_var = run.replicas[0], run.execution.precision, recovery.r_var
        self.batch = Batch(0, problem.images, problem.labels)

    def begin(self) -> None:
        """Views, ascent and start of the batch; the first time the steps are captured too."""
        self.replica.begin(self.batch, harness.SEED)
        self.step = 0

    def advance(self, iterations: int) -> None:
        """Some iterations more."""
        self.replica.advance(iterations)
        self.step += iterations

    def losses(self) -> Tensor:
        """As `Way` says."""
        _, terms = self.replica.finish()
        terms = terms[: self.step].float().cpu()
        return torch.stack([terms[:, 0], terms[:, 1] + self.r_var * terms[:, 2]], 1)


def namespace(problem: harness.Problem, code_base: str) -> Namespace:
    """The fields of a script's namespace for this workload, with the recipe's values."""
    config = problem.config
    fields = {
        "iteration": config.iterations,
        "batch_size": len(problem.images),
        "lr": config.learning_rate,
        "jitter": config.jitter,
        "r_bn": config.lambda_mean,
        "first_bn_multiplier": config.first_layer_weight,
    }
    if code_base == "dwa":
        fields |= {"r_var": config.lambda_var / config.lambda_mean, "rho": config.rho, "steps": config.steps, "init_path": "."}
    return Namespace(**fields)


def make_ways(problem: harness.Problem, code_base: str) -> tuple[dict[str, Way], Loop]:
    """Every way by name, the plain one first; and the plain loop in float64."""

    def recovery(precision: Precision) -> Recovery:
        args, device = namespace(problem, code_base), str(problem.device)
        return read_namespace(args, problem.teacher, recipe=problem.workload.recipe, backend="auto", precision=precision, device=device)

    in_fp32 = recovery("fp32")
    ways: dict[str, Way] = {"plain": Loop(problem, in_fp32), "hooks": Loop(problem, in_fp32, BNFeatureHook)}
    if code_base == "dwa":
        ways["hooks and Perterb"] = Loop(problem, in_fp32, BNFeatureHook, Perterb)
    for precision in dict.fromkeys(["fp32", precisions("fused", problem.device)[0]]):
        ways[f"get_images, {precision}"] = Swapped(problem, recovery(precision))  # type: ignore[arg-type]
    return ways, Loop(problem, in_fp32, dtype=torch.float64)


def measure(problem: harness.Problem, code_base: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """All ways of a code base, checked and then timed in turns."""
    ways, exact = make_ways(problem, code_base)
    wanted = first_losses(exact)
    errors = {name: harness.distance(first_losses(way), wanted) for name, way in ways.items()}
    device = problem.device
    ascents = {name: functools.partial(machine.timed, way.begin, device) for name, way in ways.items()}
    iterations = {
        name: functools.partial(machine.timed, functools.partial(way.advance, options.iterations), device) for name, way in ways.items()
    }
    ascent_samples = harness.in_turns(ascents, max(1, options.rounds // 2))
    harness.warm_up(iterations)
    samples = harness.in_turns(iterations, options.rounds)
    whole = recipe(problem.workload.recipe).synthesis.iterations
    rows = []
    for name, way in ways.items():
        median, low, high = (seconds / options.iterations for seconds in harness.quantiles(samples[name]))
        ascent = harness.quantiles(ascent_samples[name])[0]
        rows.append(
            {
                "code_base": code_base,
                "way": name,
                "precision": way.precision,
                "seconds": median,
                "seconds_10": low,
                "seconds_90": high,
                "samples": [seconds / options.iterations for seconds in samples[name]],
                "begin_seconds": ascent,
                "batch_seconds": ascent + whole * median,
                "batch_iterations": whole,
                "loss_error": errors[name],
                "matches": errors[name] <= max(2 * errors["plain"], _ALLOWED[way.precision]),
            }
        )
    for row in rows:
        for ratio, of in (("iteration_gain", "seconds"), ("batch_gain", "batch_seconds")):
            row[ratio] = rows[0][of] / row[of] if row["matches"] and rows[0]["matches"] else None
    return rows


def first_losses(way: Way) -> Tensor:
    """The losses of the first iterations of a batch."""
    way.begin()
    way.advance(COMPARED)
    return way.losses()


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; 1 where losses differ by more than they may."""
    options = _parse(sys.argv[1:] if arguments is None else arguments)
    device = resolve_device(options.device)
    torch.set_float32_matmul_precision("highest")
    horizon = max(COMPARED, options.iterations * (options.rounds + 1))
    problem = harness.make_problem(harness.WORKLOADS[options.workload], device, options.batch_size, horizon, teacher=options.teacher)
    rows = [row for code_base in options.code_base for row in measure(problem, code_base, options)]
    print("\n".join(table(rows)))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        content = {
            **machine.facts(device, sys.argv),
            "workload": options.workload,
            "teacher": str(options.teacher) if options.teacher else "random weights",
            "batch": len(problem.images),
            "iterations": options.iterations,
            "rows": rows,
        }
        options.json.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
    wrong = [f"{row['way']} ({row['code_base']})" for row in rows if not row["matches"]]
    if wrong:
        print(f"losses differ from float64 by more than rounding: {', '.join(wrong)}", file=sys.stderr)
    return 1 if wrong else 0


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The rows as Markdown, for docs/swapping-in.md."""
    lines = [_COLUMNS, ("---",) * len(_COLUMNS)]
    for row in rows:
        gains = ["–" if row[name] is None else f"{row[name]:.2f}" for name in ("iteration_gain", "batch_gain")]
        quantiles = f"{1e3 * row['seconds_10']:.0f} … {1e3 * row['seconds_90']:.0f}"
        times = f"{1e3 * row['seconds']:.0f}", quantiles, gains[0], f"{row['begin_seconds']:.2f}", f"{row['batch_seconds']:.0f}", gains[1]
        lines.append((row["code_base"], row["way"], row["precision"], *times, f"{row['loss_error']:.1e}"))
    return ["| " + " | ".join(line) + " |" for line in lines]


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", default="cifar100-resnet18", choices=list(harness.WORKLOADS), help="what is distilled")
    parser.add_argument("--batch-size", type=int, help="images of a batch; default: as published, smaller on a CPU")
    parser.add_argument("--iterations", type=int, default=2, help="iterations of one sample")
    parser.add_argument("--rounds", type=int, default=7, help="samples of each way, taken in turns")
    parser.add_argument("--code-base", nargs="+", default=["dwa", "sre2l"], choices=["dwa", "sre2l"], help="whose loop; CDA's is SRe2L's")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, …")
    parser.add_argument("--teacher", type=Path, help="checkpoint of a trained teacher; default: random weights")
    parser.add_argument("--json", type=Path, help="also write everything there, raw samples included")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except InputError as error:
        sys.exit(f"swapping.py: {error}")
