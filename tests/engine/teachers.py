"""Teachers as people write them: what their layers, forward passes and weights do that a plain network does not."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import MethodType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torchvision.ops import FrozenBatchNorm2d

from dwa_fast import recipe
from dwa_fast.recipes import Recipe
from tests.nets import alive

SIZE, CLASSES = 12, 5
BACKENDS = ["reference", "fused"]


class Net(nn.Module):
    """Two convolutions with a layer each behind them, and a classifier."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, 6, 3, padding=1, bias=False), layers[0] if layers else nn.BatchNorm2d(6)
        self.conv2, self.norm2 = nn.Conv2d(6, 8, 3, stride=2), layers[1] if len(layers) > 1 else nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, CLASSES)

    def forward(self, images: Tensor) -> Any:
        return self.classify(self.features(images))

    def features(self, images: Tensor) -> Tensor:
        return F.relu(self.norm2(self.conv2(F.relu(self.norm1(self.conv1(images))))))

    def classify(self, features: Tensor) -> Tensor:
        return self.fc(features.mean((2, 3)))


class BNReLU(nn.BatchNorm2d):
    """An activation inside, as timm has it."""

    def forward(self, input: Tensor) -> Tensor:
        return F.relu(super().forward(input))


class BNNamed(nn.BatchNorm2d):
    """A subclass that changes nothing."""


class BNLabelled(nn.BatchNorm2d):
    """One that is called with more than its input."""

    def forward(self, input: Tensor, scale: float = 1.0) -> Tensor:  # type: ignore[override]
        return super().forward(input) * scale


class OwnFrozenBatchNorm2d(nn.Module):
    """Frozen statistics as DETR has them: no subclass of anything."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        weight, bias, mean, var = (each.view(1, -1, 1, 1) for each in (self.weight, self.bias, self.running_mean, self.running_var))
        return (x - mean) * (var + 1e-5).rsqrt() * weight + bias


class Keyword(Net):
    def features(self, images: Tensor) -> Tensor:
        return F.relu(self.norm2(input=self.conv2(F.relu(self.norm1(input=self.conv1(images))))))


class Labelled(Net):
    def features(self, images: Tensor) -> Tensor:
        return F.relu(self.norm2(self.conv2(self.norm1(self.conv1(images), 0.5))))


class Views(Net):
    """The most common line of CIFAR networks, with more than one pixel left."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8 * 25, CLASSES)

    def classify(self, features: Tensor) -> Tensor:
        return self.fc(features.view(features.size(0), -1))


class NoGradPart(Net):
    def features(self, images: Tensor) -> Tensor:
        first = F.relu(self.norm1(self.conv1(images)))
        with torch.no_grad():
            gate = torch.sigmoid(first.mean((2, 3), keepdim=True))
        return F.relu(self.norm2(self.conv2(first * gate)))


class ValueBranch(Net):
    def classify(self, features: Tensor) -> Tensor:
        return super().classify(features if features.sum() > 0 else -features)


class ShapeBranch(Net):
    """Compares shapes and makes numbers of them, as Hugging Face's networks do; its batch size is a number in places."""

    def features(self, images: Tensor) -> Tensor:
        count, channels, height, width = images.shape
        if channels != 3 or int(height) % 2:
            raise ValueError("wanted three channels and an even height")
        tokens = images.reshape(count * 3, height, width).reshape(count, 3, height, width)
        return super().features(tokens[:count].expand(count, -1, -1, -1))


class BatchBranch(Net):
    """Another path for more than four images."""

    def classify(self, features: Tensor) -> Tensor:
        return super().classify(features * 2 if len(features) > 4 else features)


class MadeInside(Net):
    def features(self, images: Tensor) -> Tensor:
        return nn.ReLU(inplace=True)(self.norm2(self.conv2(nn.ReLU(inplace=True)(self.norm1(self.conv1(images))))))


class Functional(Net):
    """Calls one layer's arithmetic, not the layer; hooks do not see it."""

    def features(self, images: Tensor) -> Tensor:
        first, m = self.conv1(images), self.norm1
        first = F.batch_norm(first, m.running_mean, m.running_var, m.weight, m.bias, False, m.momentum, m.eps)
        return F.relu(self.norm2(self.conv2(F.relu(first))))


def hooked(register: str) -> nn.Module:
    """A hook on a BatchNorm layer that changes what comes in or goes out."""
    net = Net()
    if register == "forward":
        net.norm1.register_forward_hook(lambda layer, inputs, output: output * 1.5 + 0.3)
    else:
        net.norm1.register_forward_pre_hook(lambda layer, inputs: (inputs[0] * 1.5 + 0.3,))
    return net


class NumberOfWeights(Net):
    """A captured step must not take a number of θ for that of θ̃."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * self.scale * self.scale.item())


def pruned() -> nn.Module:
    net = Net()
    prune.l1_unstructured(net.conv2, "weight", amount=0.5)
    return net


def old_weight_norm() -> nn.Module:
    net = Net()
    with pytest.warns(FutureWarning, match="weight_norm"):
        nn.utils.weight_norm(net.conv2)
    return net


def parametrised(wrap: Callable[..., nn.Module]) -> nn.Module:
    net = Net()
    wrap(net.conv2)
    return net


def with_replaced_forward() -> nn.Module:
    net = Net()
    net.norm1.forward = MethodType(lambda self, input: F.relu(nn.BatchNorm2d.forward(self, input)), net.norm1)  # type: ignore[method-assign]
    return net


def with_hooked_activation() -> nn.Module:
    behind = nn.ReLU(), nn.Identity(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(150, CLASSES)
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), *behind)
    for index in (2, 3, 4):
        net[index].register_forward_hook(lambda layer, inputs, output: output + 0.1)
    return net


TEACHERS: dict[str, tuple[Callable[[], nn.Module], int, bool]] = {  # layers that are matched, and whether it is traced
    "subclass with an activation": (lambda: Net(BNReLU(6), BNReLU(8)), 2, True),
    "a subclass beside a plain layer": (lambda: Net(nn.BatchNorm2d(6), BNReLU(8)), 2, True),
    "subclass that changes nothing": (lambda: Net(BNNamed(6), BNNamed(8)), 2, True),
    "subclass that takes more": (lambda: Labelled(BNLabelled(6)), 2, True),
    "replaced forward": (with_replaced_forward, 2, True),
    "forward hook": (lambda: hooked("forward"), 2, True),
    "pre-hook": (lambda: hooked("pre"), 2, True),
    "hooks behind the layer": (with_hooked_activation, 1, True),
    "SyncBatchNorm": (lambda: nn.SyncBatchNorm.convert_sync_batchnorm(Net()), 2, True),
    "SyncBatchNorm beside BatchNorm2d": (lambda: Net(nn.SyncBatchNorm(6), nn.BatchNorm2d(8)), 2, True),
    "torchvision's FrozenBatchNorm2d": (lambda: Net(FrozenBatchNorm2d(6), FrozenBatchNorm2d(8)), 2, True),
    "frozen, of one's own": (lambda: Net(OwnFrozenBatchNorm2d(6)), 2, True),
    "keywords": (Keyword, 2, True),
    "keywords, frozen": (lambda: Net(FrozenBatchNorm2d(6)), 2, True),
    "view": (Views, 2, True),
    "no_grad inside": (NoGradPart, 2, False),
    "branch on values": (ValueBranch, 2, False),
    "a number read from the weights": (NumberOfWeights, 2, False),
    "branch on shapes": (ShapeBranch, 2, True),
    "branch on the batch": (BatchBranch, 2, False),
    "modules made inside": (MadeInside, 2, True),
    "functional": (Functional, 1, True),
    "pruned": (pruned, 2, True),
    "old weight norm": (old_weight_norm, 2, True),
    "weight norm": (lambda: parametrised(parametrizations.weight_norm), 2, True),
    "spectral norm": (lambda: parametrised(parametrizations.spectral_norm), 2, True),
    "orthogonal": (lambda: parametrised(parametrizations.orthogonal), 2, True),
}


def teacher(name: str) -> nn.Module:
    torch.manual_seed(3)
    return alive(TEACHERS[name][0]())


def double(module: nn.Module) -> nn.Module:
    return copy.deepcopy(
        module, {id(v): v.detach().clone() for m in module.modules() for v in vars(m).values() if isinstance(v, Tensor)}
    ).double()


def config(backend: str = "fused", precision: str = "fp32", **changes: Any) -> Recipe:
    return recipe("cifar10", **{"iterations": 2, "steps": 1, "rho": 0.1, "device": "cpu", **changes}, backend=backend, precision=precision)
