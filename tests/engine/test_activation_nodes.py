"""Activations behind a BatchNorm layer: which are recognised, and values and gradients of what is fused, against the untouched teacher."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dwa_fast.engine.ascent import Ascent
from dwa_fast.engine.backend import resolve
from dwa_fast.engine.network import Network
from dwa_fast.engine.teacher import prepare
from dwa_fast.seeding import generator
from tests.nets import alive, distance, expected_gradient, image_gradient, small_recipe

CHANNELS = 5
Act = Callable[[Tensor], Tensor]


class Net(nn.Module):
    """Convolution, BatchNorm, an addition if wanted, an activation."""

    def __init__(self, act: Act, skip: bool = False) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, CHANNELS, 1)
        self.conv, self.norm, self.fc = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1), nn.BatchNorm2d(CHANNELS), nn.Linear(CHANNELS, 5)
        self.act, self.skip = act, skip

    def forward(self, images: Tensor) -> Tensor:
        features = self.first(images)
        behind = self.norm(self.conv(features))
        return self.fc(self.act(behind + features if self.skip else behind).mean((2, 3)))


class Learned(nn.Module):
    """PReLU as a function of a parameter."""

    def __init__(self, apply: Callable[[Tensor, Tensor], Tensor], count: int = CHANNELS) -> None:
        super().__init__()
        self.weight, self.apply_ = nn.Parameter(torch.full((count,), 0.3)), apply

    def forward(self, features: Tensor) -> Tensor:
        return self.apply_(features, self.weight)


FUSED: dict[str, tuple[Callable[[], Act], str]] = {
    "ReLU": (nn.ReLU, "ReLU"),
    "ReLU6": (lambda: nn.ReLU6(inplace=True), "ReLU6"),
    "Hardtanh": (lambda: nn.Hardtanh(0, 6), "ReLU6"),
    "SiLU": (nn.SiLU, "SiLU"),
    "Hardswish": (nn.Hardswish, "Hardswish"),
    "GELU": (nn.GELU, "GELU"),
    "GELU, tanh": (lambda: nn.GELU(approximate="tanh"), "GELU (tanh)"),
    "LeakyReLU": (lambda: nn.LeakyReLU(0.2, inplace=True), "LeakyReLU"),
    "LeakyReLU, negative": (lambda: nn.LeakyReLU(-0.2), "LeakyReLU"),
    "PReLU": (nn.PReLU, "PReLU"),
    "PReLU, channels": (lambda: nn.PReLU(CHANNELS), "PReLU"),
    "relu, method": (lambda: lambda x: x.relu(), "ReLU"),
    "relu_, method": (lambda: lambda x: x.relu_(), "ReLU"),
    "relu, keyword": (lambda: lambda x: F.relu(input=x, inplace=True), "ReLU"),
    "relu6": (lambda: lambda x: F.relu6(x, True), "ReLU6"),
    "hardtanh": (lambda: lambda x: F.hardtanh(x, 0, 6), "ReLU6"),
    "hardtanh, keywords": (lambda: lambda x: F.hardtanh_(x, max_val=6.0, min_val=0.0), "ReLU6"),
    "silu": (lambda: lambda x: F.silu(x, inplace=True), "SiLU"),
    "hardswish": (lambda: F.hardswish, "Hardswish"),
    "gelu": (lambda: F.gelu, "GELU"),
    "gelu, tanh": (lambda: lambda x: F.gelu(x, approximate="tanh"), "GELU (tanh)"),
    "leaky_relu": (lambda: F.leaky_relu, "LeakyReLU"),
    "leaky_relu, keyword": (lambda: lambda x: F.leaky_relu(x, negative_slope=0.2), "LeakyReLU"),
    "leaky_relu_": (lambda: lambda x: F.leaky_relu_(x, 0.2), "LeakyReLU"),
    "prelu": (lambda: Learned(F.prelu), "PReLU"),
    "prelu, method": (lambda: Learned(lambda x, w: x.prelu(w), 1), "PReLU"),
    "prelu, keyword": (lambda: Learned(lambda x, w: torch.prelu(input=x, weight=w)), "PReLU"),
}


def prepared(module: nn.Module, images: Tensor) -> Network:
    return prepare(module, images, resolve("fused", "fp32", "cpu"))[0]


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("name", FUSED)
def test_fused(name: str, skip: bool) -> None:
    make, title = FUSED[name]
    module, images, labels = alive(Net(make(), skip)), torch.randn(4, 3, 6, 6), torch.tensor([0, 1, 2, 3])
    network = prepared(module, images)
    assert network.layers["norm"].extra_repr() == "BatchNorm" + " + addition" * skip + f" + {title}"
    exact = copy.deepcopy(module).double()
    wanted, terms = expected_gradient(copy.deepcopy(exact).requires_grad_(False), images.double(), labels)
    plain, plain_terms = expected_gradient(copy.deepcopy(module).requires_grad_(False), images, labels)
    got, got_terms = image_gradient(network, images, labels)
    assert distance(got, wanted) < max(2 * distance(plain, wanted), 1e-6)
    assert distance(got_terms, terms) < max(2 * distance(plain_terms, terms), 1e-6)

    with network.trainable():
        found = torch.autograd.grad(F.cross_entropy(network(images), labels), list(network.parameters()))
    expected = torch.autograd.grad(F.cross_entropy(exact(images.double()), labels), list(exact.parameters()))
    by_norm = [torch.stack([each.double().norm() for each in gradients]).sort().values for gradients in (found, expected)]
    assert torch.allclose(*by_norm, rtol=1e-5, atol=1e-7)
    if title == "PReLU":
        slope: Any = network.layers["norm"].slope
        position = next(i for i, p in enumerate(network.parameters()) if p is slope)
        weight = next(i for i, p in enumerate(exact.parameters()) if p is exact.act.weight)  # type: ignore[union-attr]
        assert torch.allclose(found[position].double(), expected[weight], rtol=1e-4, atol=1e-7)


def with_forward() -> nn.Module:
    layer = nn.ReLU()
    layer.forward = lambda features: features.abs()  # type: ignore[method-assign]
    return layer


def hooked(layer: nn.Module, kind: str) -> nn.Module:
    hooks: dict[str, Callable[..., Any]] = {
        "register_forward_hook": lambda _, __, result: result * 2,
        "register_forward_pre_hook": lambda _, given: given[0] * 2,
        "register_full_backward_hook": lambda _, gradients, __: (gradients[0] * 2,),
    }
    getattr(layer, kind)(hooks[kind])
    return layer


class Twice(nn.Module):
    """One PReLU, used again behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.PReLU()

    def forward(self, features: Tensor) -> Tensor:
        return self.layer(self.layer(features) - 0.5)


KEPT: dict[str, Callable[[], Act]] = {
    "Sigmoid": nn.Sigmoid,
    "Hardsigmoid": nn.Hardsigmoid,
    "Hardtanh": nn.Hardtanh,
    "Hardtanh, 5": lambda: nn.Hardtanh(0, 5),
    "hardtanh": lambda: lambda x: F.hardtanh(x, 0, 5),
    "clamp": lambda: lambda x: x.clamp(0, 6),
    "ELU": nn.ELU,
    "Softplus": nn.Softplus,
    "a forward of its own": with_forward,
    "a hook": lambda: hooked(nn.ReLU(), "register_forward_hook"),
    "a hook before": lambda: hooked(nn.SiLU(), "register_forward_pre_hook"),
    "a weight that is computed": lambda: Learned(lambda x, w: F.prelu(x, 2 * w)),
    "a PReLU that is used twice": Twice,
    "a weight that is used twice": lambda: Learned(lambda x, w: F.prelu(x, w) * w.sum()),
    "a PReLU of the BatchNorm's values": lambda: lambda x: F.prelu(torch.ones_like(x), x.mean((0, 2, 3))),
}


@pytest.mark.parametrize("name", KEPT)
def test_kept(name: str) -> None:
    module, images, labels = alive(Net(KEPT[name]())), torch.randn(4, 3, 6, 6), torch.tensor([0, 1, 2, 3])
    network = prepared(module, images)
    assert network.layers["norm"].extra_repr() == "BatchNorm"
    wanted, _ = expected_gradient(copy.deepcopy(module).double().requires_grad_(False), images.double(), labels)
    assert distance(image_gradient(network, images, labels)[0], wanted) < 1e-5


def test_backward_hooks_keep_a_layer() -> None:
    """A copy of a module loses the hook that changes its gradient, so only the recognition is looked at."""
    network = prepared(alive(Net(hooked(nn.ReLU(), "register_full_backward_hook"))), torch.randn(4, 3, 6, 6))  # type: ignore[arg-type]
    assert network.layers["norm"].extra_repr() == "BatchNorm"


class Written(nn.Module):
    """Writes into the skip after the addition."""

    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.first, self.norm, self.act, self.fc = nn.Conv2d(3, CHANNELS, 1), nn.BatchNorm2d(CHANNELS), act, nn.Linear(CHANNELS, 5)
        self.conv = nn.Conv2d(3, CHANNELS, 1)

    def forward(self, images: Tensor) -> Tensor:
        skip = self.first(images)
        features = self.act(self.norm(self.conv(images)) + skip)
        return self.fc((features + torch.relu_(skip)).mean((2, 3)))


@pytest.mark.parametrize(("act", "title"), [(nn.ReLU(), " + ReLU"), (nn.SiLU(), "")])
def test_a_skip_that_is_written_into_is_not_read_again(act: nn.Module, title: str) -> None:
    module, images, labels = alive(Written(act)), torch.randn(4, 3, 6, 6), torch.tensor([0, 1, 2, 3])
    network = prepared(module, images)
    assert network.layers["norm"].extra_repr() == f"BatchNorm + addition{title}"
    wanted, _ = expected_gradient(copy.deepcopy(module).double().requires_grad_(False), images.double(), labels)
    assert distance(image_gradient(network, images, labels)[0], wanted) < 1e-5


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_learned_slope_moves_in_the_ascent(precision: Any) -> None:
    """It is a weight as any other: its share of the step is that of its gradient."""
    execution = resolve("fused", precision, "cpu")
    module, images, labels = alive(Net(nn.PReLU(CHANNELS), skip=True)), torch.randn(4, 3, 6, 6), torch.tensor([0, 1, 2, 3])
    network, _ = prepare(module, images, execution)
    slope: Any = network.layers["norm"].slope
    ascent = Ascent(network, small_recipe(rho=0.1, steps=1).synthesis, execution)
    before = slope.detach().clone()
    ascent.adjust(images.to(execution.dtype), labels, generator(0, "ascent", 0))
    exact = copy.deepcopy(module).double()
    gradients = torch.autograd.grad(F.cross_entropy(exact(images.double()), labels), list(exact.parameters()))
    norm = torch.cat([each.flatten() for each in gradients]).norm()
    weight = next(i for i, p in enumerate(exact.parameters()) if p is exact.act.weight)  # type: ignore[union-attr]
    moved, wanted = (slope.detach() - before).double(), 0.1 * gradients[weight] / norm
    assert slope.dtype is torch.float32
    assert distance(moved, wanted) < (1e-4 if precision == "fp32" else 0.1)
