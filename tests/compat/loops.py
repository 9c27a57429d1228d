"""The published recover loop, written anew in its shape, whose hooks, ascent and draws can be exchanged."""

from __future__ import annotations

import functools
import math
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from dwa_fast import SynthesisConfig
from dwa_fast.config import Normalisation
from dwa_fast.data.pixels import denormalise
from dwa_fast.engine.refine import mean_norm, total_variation
from dwa_fast.models.architectures import SmallResNet
from dwa_fast.reference.loop import apply_view
from dwa_fast.schedule import make_schedule
from dwa_fast.seeding import generator, normal
from tests.nets import vary_norms

EPSILON = 1e-12


class PlainHook:
    """The statistics of a layer's input by their definition, at each forward pass."""

    def __init__(self, module: nn.Module, args: Any = None) -> None:
        self.r_var = args.r_var if args is not None else 1.0
        self.hook = module.register_forward_hook(self.hook_fn)

    def hook_fn(self, module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        channels = inputs[0].transpose(0, 1).flatten(1)
        mean, var = channels.mean(1), channels.var(1, unbiased=False)
        self.r_feature = torch.norm(module.running_var - var) * self.r_var + torch.norm(module.running_mean - mean)

    def close(self) -> None:
        self.hook.remove()


class PlainPerterb:
    """Weight by weight."""

    def __init__(self, params: Any, base_optimizer: torch.optim.Optimizer, rho: float) -> None:
        self.params, self.rho = list(params), rho

    @torch.no_grad()
    def first_step(self, zero_grad: bool = False) -> None:
        moving = [p for p in self.params if p.grad is not None]
        norm = torch.norm(torch.stack([p.grad.norm() for p in moving]))
        for p in moving:
            p.add_(p.grad * (self.rho / (norm + EPSILON)))
            p.grad = None if zero_grad else p.grad


@dataclass(frozen=True)
class Parts:
    """What a person swaps in the loop."""

    hook: Callable[..., Any] = PlainHook
    perterb: Callable[..., Any] = PlainPerterb


@dataclass(frozen=True)
class Draws:
    """The random numbers of a run of ours, for the loop: start images, views."""

    config: SynthesisConfig
    normalisation: Normalisation
    size: int
    start: Tensor | None  # [classes, C, S, S]; None: noise
    seed: int = 0

    def inputs(self, batch: int, labels: Tensor) -> Tensor:
        if self.start is not None:
            return self.start[labels]
        return normal(generator(self.seed, "noise", batch), (len(labels), self.normalisation.channels, self.size, self.size))

    def view(self, batch: int) -> Callable[[Tensor, int], Tensor]:
        schedule = make_schedule(self.config, self.size, self.size, seed=self.seed, batch=batch)
        return lambda images, iteration: apply_view(images, schedule, iteration)


@dataclass(frozen=True)
class Run:
    """What a run leaves behind."""

    images: Tensor  # [classes, C, S, S]
    losses: Tensor  # [batches, T, 2]: cross-entropy and the sum of r_feature


def recover(
    args: Namespace, model_teacher: nn.Module, ipc_id: int, classes: int, draws: Draws, parts: Parts, *, tidy: bool, dtype: torch.dtype
) -> Run:
    """The recover loop of one image index.

    Args:
        tidy: without what the published program does beside the paper: drifting weights, gradients that leak.
    """
    original = [p.detach().clone() for p in model_teacher.parameters()]
    arguments = (args,) if hasattr(args, "r_var") else ()
    layers = [parts.hook(module, *arguments) for module in model_teacher.modules() if isinstance(module, nn.BatchNorm2d)]
    targets_all = torch.arange(classes)
    finished, losses = [], []
    batches = range(0, classes, args.batch_size)
    for number, kk in enumerate(batches):
        targets = targets_all[kk : kk + args.batch_size]
        batch = ipc_id * len(batches) + number
        inputs = draws.inputs(batch, targets).to(dtype).requires_grad_(True)
        view = draws.view(batch)
        optimizer = torch.optim.Adam([inputs], lr=args.lr, betas=(0.5, 0.9), eps=1e-8)
        rho = getattr(args, "rho", 0.0)
        adjusted = parts.perterb(model_teacher.parameters(), optimizer, rho=rho / args.steps) if rho else None
        criterion = nn.CrossEntropyLoss()
        for iteration in range(args.iteration):
            for group in optimizer.param_groups:
                group["lr"] = 0.5 * (1 + math.cos(math.pi * iteration / args.iteration)) * args.lr
            inputs_jit = view(inputs, iteration)
            optimizer.zero_grad()
            if adjusted is not None and iteration == 0:
                for _ in range(args.steps):
                    criterion(model_teacher(inputs_jit), targets).backward()
                    adjusted.first_step(True)
                if tidy:
                    inputs.grad = None
            outputs = model_teacher(inputs_jit)
            loss_ce = criterion(outputs, targets)
            rescale = [args.first_bn_multiplier] + [1.0] * (len(layers) - 1)
            loss_bn = torch.stack([layer.r_feature * factor for layer, factor in zip(layers, rescale, strict=True)]).sum()
            loss = loss_ce + args.r_bn * loss_bn + priors(args, inputs_jit)
            loss.backward()
            optimizer.step()
            clip(inputs, draws.normalisation)
            losses.append(torch.stack([loss_ce, loss_bn]).detach())
        finished.append(inputs.detach())
        if args.store_best_images:
            save_images(args, denormalise(inputs.detach(), draws.normalisation), targets, ipc_id)
        if tidy:
            model_teacher.zero_grad()
            with torch.no_grad():
                for p, old in zip(model_teacher.parameters(), original, strict=True):
                    p.copy_(old)
    for layer in layers:
        layer.close()
    return Run(torch.cat(finished), torch.stack(losses).view(len(batches), args.iteration, 2))


def priors(args: Namespace, inputs_jit: Tensor) -> Tensor:
    """SRe2L's, where the namespace has them."""
    total = inputs_jit.new_zeros(())
    if hasattr(args, "tv_l2"):
        total = total + args.tv_l2 * total_variation(inputs_jit) + args.l2_scale * mean_norm(inputs_jit)
    return total


@torch.no_grad()
def clip(inputs: Tensor, normalisation: Normalisation) -> None:
    for channel, (low, high) in enumerate(zip(*normalisation.bounds, strict=True)):
        inputs[:, channel].clamp_(low, high)


def save_images(args: Namespace, images: Tensor, targets: Tensor, ipc_id: int) -> None:
    for image, target in zip(images.clamp(0, 1), targets.tolist(), strict=True):
        folder = Path(args.syn_data_path, f"new{target:03d}")
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray((image * 255).to(torch.uint8).permute(1, 2, 0).numpy()).save(folder / f"class{target:03d}_id{ipc_id:03d}.jpg")


@functools.cache
def colour_teacher(classes: int, size: int, widths: tuple[int, int, int] = (16, 16, 32)) -> nn.Module:
    """A network for colour images whose running statistics come from smooth noise, in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        network = SmallResNet(classes, 3, widths=widths).train()
        vary_norms(network)
        with torch.no_grad():
            for _ in range(10):
                network(nn.functional.interpolate(torch.randn(16, 3, 8, 8), size=(size, size), mode="bilinear"))
    return network.eval()
