"""What operators work on: layers, images and weights as ResNet-18 and ResNet-50 have them."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field, replace
from typing import Any

import harness
import torch
from torch import Tensor, nn

from dwa_fast.engine.cpu_convolutions import CpuConv
from dwa_fast.engine.fuse import trace
from dwa_fast.engine.pool_nodes import Windows
from dwa_fast.models.architectures import build
from dwa_fast.models.batchnorm import batchnorm_layers
from dwa_fast.ops.activation import Activation, title
from dwa_fast.reference.ops import Operators

_CPU_ELEMENTS = 2**22  # of the largest tensor of a case on a CPU, so that it takes milliseconds


@dataclass(frozen=True)
class Network:
    """A teacher and its batches; `depth` 50 takes the place of the workload's ResNet-18."""

    workload: harness.Workload
    depth: int
    device: torch.device

    @property
    def name(self) -> str:
        """For the reader."""
        return f"ResNet-{self.depth}, {self.workload.size} px"

    def build(self) -> nn.Module:
        """The network with fresh weights, in eval mode."""
        architecture = self.workload.architecture.replace("18", str(self.depth))
        return build(architecture, classes=self.workload.classes, size=self.workload.size).eval()

    def batch(self, elements: int) -> int:
        """Images at once, where a layer has that many elements per image: as published, on a CPU fewer."""
        return self.workload.batch if self.device.type == "cuda" else max(1, min(self.workload.batch, _CPU_ELEMENTS // elements))


@dataclass(frozen=True)
class Layer:
    """A BatchNorm layer with what was fused into it."""

    shape: tuple[int, int, int, int]  # N, C, H, W of its input
    skip: bool
    activation: Activation = "none"
    windows: Windows | None = None  # of a pooling
    joins: bool = False  # whether the skip comes out of a BatchNorm layer of its own

    def __str__(self) -> str:
        parts = ["×".join(map(str, self.shape)), *(["a second one"] if self.joins else ["skip"] if self.skip else [])]
        parts += [title(self.activation, None)] if self.activation != "none" else []
        return " + ".join([*parts, *([f"{self.windows.title} {self.windows.window}/{self.windows.stride}"] if self.windows else [])])


@dataclass(frozen=True)
class Layers:
    """All BatchNorm layers of a network, as the matching loss sees them: the same work at every image size."""

    network: str
    channels: tuple[int, ...]
    counts: tuple[int, ...] = field(compare=False)  # N·H·W of each

    def __str__(self) -> str:
        return f"{self.network}: {len(self.channels)} layers, {sum(self.channels)} channels"


@dataclass(frozen=True)
class Images:
    """A batch in the course of a recipe."""

    shape: tuple[int, int, int, int]
    recipe: str

    def __str__(self) -> str:
        return f"{'×'.join(map(str, self.shape))}, {self.recipe}"


@dataclass(frozen=True)
class Weights:
    """The arena of a network's weights: but for the last layer the same at every image size."""

    network: str
    count: int = field(compare=False)

    def __str__(self) -> str:
        return f"{self.network}: {self.count / 1e6:.1f} M weights"


Subject = Layer | Layers | Images | Weights


@functools.cache
def layers(network: Network) -> tuple[Layer, ...]:
    """Every BatchNorm layer of a network in the order of execution, two that are joined as one, seen by hooks on the traced network."""
    image = torch.zeros(1, 3, network.workload.size, network.workload.size)
    seen: list[Layer] = []

    def keep_shape(layer: nn.Module, given: tuple[Any, ...], _: Tensor) -> None:
        inner = tuple(given[0].shape[1:])
        shape = network.batch(math.prod(inner)), *inner
        seen.append(Layer(shape, len(given) > 1, layer.activation, layer.windows, len(given) > 2))  # type: ignore[arg-type]

    module = network.build()
    rewritten = trace(module, batchnorm_layers(module), Operators("shapes", fuses=True), image.expand(3, -1, -1, -1))
    for layer in rewritten.layers.values():
        layer.register_forward_hook(keep_shape)
    with torch.no_grad():
        rewritten.module(image)
    return tuple(seen)


def distinct_layers(network: Network) -> list[Subject]:
    found = dict.fromkeys(layer for layer in layers(network) if layer.windows is None and not layer.joins)
    return sorted(found, key=lambda layer: (math.prod(layer.shape[1:]), layer.skip), reverse=True)


def pooled_layers(network: Network) -> list[Subject]:
    return [layer for layer in layers(network) if layer.windows is not None]


def averaged_layers(network: Network) -> list[Subject]:
    """The first block of a ConvNet-128 on images of the network's size; the same for every depth."""
    (layer,) = pooled(network)
    return [replace(layer, activation="relu", windows=Windows(2, 2, 0, averages=True))]


def joined_layers(network: Network) -> list[Subject]:
    found = dict.fromkeys(layer for layer in layers(network) if layer.joins)
    return sorted(found, key=lambda layer: math.prod(layer.shape[1:]), reverse=True)


def inputs_of_layers(network: Network) -> list[Subject]:
    """What the layers read, whatever comes behind them."""
    shapes = dict.fromkeys(layer.shape for layer in layers(network))
    return [Layer(shape, skip=False) for shape in sorted(shapes, key=lambda shape: math.prod(shape[1:]), reverse=True)]


def pooled(network: Network) -> list[Layer]:
    """What a ConvNet-128 pools between its blocks, on images of the network's size; the same for every depth."""
    return [Layer((network.batch(128 * network.workload.size**2), 128, *(network.workload.size,) * 2), skip=False)]


@functools.cache
def convolutions(network: Network) -> list[Subject]:
    """What the 3×3 convolutions read that keep the number of channels."""
    seen: dict[Subject, None] = {}

    def keep_shape(layer: nn.Module, given: tuple[Tensor, ...], _: Tensor) -> None:
        inner = given[0].shape[1:]
        seen[Layer((network.batch(math.prod(inner)), *inner), skip=False)] = None

    module = network.build()
    for layer in module.modules():
        if CpuConv.is_3x3(layer) and layer.in_channels == layer.out_channels:  # asked before the hook: no layer with one is taken
            layer.register_forward_hook(keep_shape)
    with torch.no_grad():
        module(torch.zeros(1, 3, network.workload.size, network.workload.size))
    return list(seen)


def small_convolutions(network: Network) -> list[Subject]:
    """Those of them, with the smallest map, that may be matrix products in bf16."""
    found = convolutions(network)
    least = min((math.prod(layer.shape[2:]) for layer in found), default=0)
    return [layer for layer in found if math.prod(layer.shape[2:]) == least]


def all_layers(network: Network) -> list[Subject]:
    found = [layer for layer in layers(network) for _ in range(2 if layer.joins else 1)]
    counts = tuple(network.workload.batch * math.prod(layer.shape[2:]) for layer in found)
    return [Layers(f"ResNet-{network.depth}", tuple(layer.shape[1] for layer in found), counts)]


def images(network: Network) -> list[Subject]:
    size = network.workload.size
    return [Images((network.batch(3 * size * size), 3, size, size), network.workload.recipe)]


def weights(network: Network) -> list[Subject]:
    with torch.device("meta"):
        return [Weights(f"ResNet-{network.depth}", sum(p.numel() for p in network.build().parameters()))]
