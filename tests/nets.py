"""Small networks and images that the tests share."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from dwa_fast import SynthesisConfig
from dwa_fast.architectures import SmallResNet
from dwa_fast.datasets import MemorySet, digits, normalise
from dwa_fast.recipes import recipe

SIZE = 8


def small_teacher(seed: int = 0) -> nn.Module:
    """A residual network with two stride-2 skips, in eval mode, whose running statistics come from real digits."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = SmallResNet(10, 1, widths=(8, 12, 16))
        for layer in network.modules():
            if isinstance(layer, nn.BatchNorm2d):
                nn.init.uniform_(layer.weight, 0.5, 1.5)
                nn.init.normal_(layer.bias, std=0.2)
    images = normalise(digits("train", SIZE).load(range(200)), recipe("digits"))
    network.train()
    with torch.no_grad():
        for _ in range(20):
            network(images)
    return network.eval()


def real_images(count: int = 12) -> tuple[Tensor, Tensor]:
    """The first real digits, [count, 1, SIZE, SIZE] normalised, and their labels."""
    data = digits("train", SIZE)
    return normalise(data.load(range(count)), recipe("digits")), data.labels[:count]


def small_config(**changes: object) -> SynthesisConfig:
    """A quick synthesis of these images in batches of six."""
    return recipe("digits", **{"iterations": 24, "batch_size": 6, "jitter": 1, "steps": 3, **changes})


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
