"""Small networks and images that the tests share."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dwa_fast.data.datasets import digits
from dwa_fast.data.images import MemorySet
from dwa_fast.data.pixels import normalise
from dwa_fast.engine.network import Network
from dwa_fast.models.architectures import SmallResNet
from dwa_fast.models.batchnorm import batchnorm_layers
from dwa_fast.recipes import Recipe, recipe
from dwa_fast.reference.loop import LoopResult, StatisticsHook
from dwa_fast.sets.synthesize import SynthesisResult

SIZE = 8
DIGITS = recipe("digits", size=SIZE)


def small_teacher(seed: int = 0) -> nn.Module:
    """A residual network with two stride-2 skips, in eval mode, whose running statistics come from real digits."""
    return copy.deepcopy(_small_teacher(seed))


def vary_norms(network: nn.Module) -> None:
    """Scales and shifts of BatchNorm layers that are not those of a fresh network, from PyTorch's own generator."""
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.normal_(layer.bias, std=0.2)


@functools.cache
def _small_teacher(seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = SmallResNet(10, 1, widths=(8, 12, 16))
        vary_norms(network)
    images = normalise(digits("train", SIZE).load(range(200)), DIGITS.data)
    network.train()
    with torch.no_grad():
        for _ in range(20):
            network(images)
    return network.eval()


def real_images(count: int = 12) -> tuple[Tensor, Tensor]:
    """The first real digits, [count, 1, SIZE, SIZE] normalised, and their labels."""
    data = digits("train", SIZE)
    return normalise(data.load(range(count)), DIGITS.data), data.labels[:count]


def small_recipe(**changes: object) -> Recipe:
    """A quick synthesis of these images in batches of six."""
    return recipe("digits", **{"size": SIZE, "iterations": 24, "batch_size": 6, "jitter": 1, "steps": 3, **changes})


def small_set(per_class: int = 6) -> MemorySet:
    """A few real digits of every class."""
    data = digits("train", SIZE)
    chosen = torch.cat([(data.labels == label).nonzero().flatten()[:per_class] for label in range(10)])
    return MemorySet(data.pixels[chosen], data.labels[chosen], data.class_names)


def stop_at(step: int) -> Callable[[int, int], None]:
    """A progress that presses Ctrl-C."""

    def progress(done: int, total: int) -> None:
        if done == step:
            raise KeyboardInterrupt

    return progress


def alive(module: nn.Module) -> nn.Module:
    """The module in eval mode with statistics, scales and shifts that are not those of a fresh one."""
    generator = torch.Generator().manual_seed(0)
    for layer in batchnorm_layers(module).values():
        for name, low, high in (("weight", 0.7, 1.3), ("bias", -0.3, 0.3), ("running_mean", -0.3, 0.3), ("running_var", 0.7, 1.3)):
            value = getattr(layer, name)
            if value is not None:
                value.data.uniform_(low, high, generator=generator)
    return module.eval()


def distance(got: Tensor, wanted: Tensor) -> float:
    """‖got − wanted‖ / ‖wanted‖."""
    return float((got.detach() - wanted.detach()).norm() / wanted.detach().norm())


def assert_as_near(got: SynthesisResult, plain: LoopResult, exact: LoopResult) -> None:
    """A run in fp32 is at most twice as far from the one in float64 as the plain loop in fp32, or some roundings.

    Of the images the median pixel counts: where a gradient is 0 to rounding, Adam's first step goes this way or that, by the learning rate.
    """
    errors = [(distance(each.losses, exact.losses), float((each.images - exact.images).abs().median())) for each in (got, plain)]
    assert all(ours <= max(2 * theirs, floor) for ours, theirs, floor in zip(*errors, (1e-5, 1e-6), strict=True)), errors


def image_gradient(network: Network, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient of the whole loss, and its three terms."""
    leaf = images.clone().requires_grad_(True)
    terms = torch.cat([F.cross_entropy(network(leaf), labels)[None], network.matching(10.0)])
    (gradient,) = torch.autograd.grad(terms @ torch.tensor([1.0, 0.01, 0.11]), leaf)
    return gradient, terms


def expected_gradient(module: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The same of the unmodified module, by the loop's hooks."""
    hooks = [StatisticsHook(layer) for layer in batchnorm_layers(module).values()]
    leaf = images.clone().requires_grad_(True)
    ce = F.cross_entropy(module(leaf), labels)
    used = list(zip([10.0] + [1.0] * (len(hooks) - 1), (hook for hook in hooks if hook.ran), strict=False))
    mean = sum(w * hook.mean_distance for w, hook in used)
    var = sum(w * hook.var_distance for w, hook in used)
    (gradient,) = torch.autograd.grad(ce + 0.01 * mean + 0.11 * var, leaf)
    for hook in hooks:
        hook.close()
    return gradient, torch.stack([ce, torch.as_tensor(mean), torch.as_tensor(var)])


def tight(classes: int, channels: int, size: int) -> nn.Module:
    """An architecture that leaves one pixel to its BatchNorm layer."""
    return nn.Sequential(nn.Conv2d(channels, 4, size), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4, classes))
