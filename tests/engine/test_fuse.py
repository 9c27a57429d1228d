"""Rewritten teachers against the unmodified ones: logits, statistics, gradients of images and of weights, and what was fused."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from dwa_fast import InputError
from dwa_fast.engine.backend import resolve
from dwa_fast.engine.teacher import prepare
from dwa_fast.models.architectures import build
from tests.nets import alive, distance, expected_gradient, image_gradient

MODELS = torchvision.models
TEACHERS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "resnet18": (lambda: MODELS.resnet18(num_classes=7), 32),
    "resnet34": (lambda: MODELS.resnet34(num_classes=7), 32),
    "resnet50": (lambda: MODELS.resnet50(num_classes=7), 32),
    "resnet101": (lambda: MODELS.resnet101(num_classes=7), 32),
    "resnet18-cifar": (lambda: build("resnet18-cifar", classes=7, size=16), 16),
    "resnet50-cifar": (lambda: build("resnet50-cifar", classes=7, size=16), 16),
    "bottlenecks": (lambda: MODELS.ResNet(MODELS.resnet.Bottleneck, [1, 1, 1, 1], num_classes=7), 32),
    "convnet128": (lambda: build("convnet128", classes=7, size=32), 32),
    "vgg16_bn": (lambda: MODELS.vgg16_bn(num_classes=7), 32),
    "mobilenet_v2": (lambda: MODELS.mobilenet_v2(num_classes=7), 32),
    "shufflenet_v2": (lambda: MODELS.shufflenet_v2_x1_0(num_classes=7), 32),
    "efficientnet_b0": (lambda: MODELS.efficientnet_b0(num_classes=7), 32),
    "densenet121": (lambda: MODELS.densenet121(num_classes=7), 32),
    "small densenet": (lambda: MODELS.DenseNet(8, (2, 2, 2, 2), 16, num_classes=7), 32),
}
LARGE = {"resnet34", "resnet50", "resnet101", "resnet50-cifar", "vgg16_bn", "densenet121"}  # of families that smaller ones stand for
FUSED = {  # layers in all, with an addition, with an activation
    "resnet18": (20, 8, 17),
    "resnet34": (36, 16, 33),
    "resnet50": (53, 16, 49),
    "resnet101": (104, 33, 100),
    "resnet18-cifar": (20, 8, 17),
    "resnet50-cifar": (53, 16, 49),
    "bottlenecks": (17, 4, 13),
    "convnet128": (3, 0, 3),
    "vgg16_bn": (13, 0, 13),
    "mobilenet_v2": (52, 10, 35),
    "shufflenet_v2": (56, 0, 37),
    "efficientnet_b0": (49, 9, 33),
    "densenet121": (121, 0, 121),
    "small densenet": (21, 0, 21),
}


def weight_gradients(module: nn.Module, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Gradients of the cross-entropy to all weights, by their names in the teacher."""
    gradients = torch.autograd.grad(F.cross_entropy(module(images), labels), list(module.parameters()))
    names = [name.removeprefix("module.") for name, _ in module.named_parameters()]
    return dict(zip(names, gradients, strict=True))


def all_weights(gradients: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    """Distance of all gradients together from the exact ones, which are those of the same weights."""
    assert gradients.keys() == exact.keys()
    return distance(*(torch.cat([each[name].double().flatten() for name in exact]) for each in (gradients, exact)))


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] if name in LARGE else []) for name in TEACHERS])
def test_rewritten_teacher_is_the_teacher(name: str) -> None:
    """Twice as far from float64 as PyTorch's own fp32, at most."""
    make, size = TEACHERS[name]
    execution, labels = resolve("fused", "fp32", "cpu"), torch.tensor([0, 3, 6])
    errors = []
    for seed in range(6):
        torch.manual_seed(seed)
        module, images = alive(make()), torch.randn(3, 3, size, size)
        network, classes = prepare(module, images, execution)
        assert classes == 7
        assert network.traced
        fused = network.layers.values()
        assert (len(fused), sum(layer.skip for layer in fused), sum(layer.activates for layer in fused)) == FUSED[name]
        exact = copy.deepcopy(module).double()
        exact_weights, plain_weights = weight_gradients(exact, images.double(), labels), weight_gradients(module, images, labels)
        with network.trainable():
            got_weights = weight_gradients(network, images, labels)
        wanted, wanted_terms = expected_gradient(exact.requires_grad_(False), images.double(), labels)
        plain, plain_terms = expected_gradient(module.requires_grad_(False), images, labels)
        got, got_terms = image_gradient(network, images, labels)
        assert distance(got_terms, wanted_terms) < max(2 * distance(plain_terms, wanted_terms), 1e-6)
        errors.append((distance(got, wanted), distance(plain, wanted)))
        errors.append((all_weights(got_weights, exact_weights), all_weights(plain_weights, exact_weights)))
        # A ReLU whose input is 0 to rounding may fall on either side, of ours or of PyTorch's: such a draw says nothing, the next one may.
        if all(ours < max(2 * theirs, 1e-6) and theirs < 1e-5 for ours, theirs in errors[-2:]):
            break
    else:
        pytest.fail(f"gradients of images and of weights differ: {errors}")


class Untraceable(nn.Module):
    """A branch that depends on the values."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.fc = nn.Linear(4, 5)

    def forward(self, images: Tensor) -> Tensor:
        features = self.body(images).mean((2, 3))
        return self.fc(features if features.sum() > -1e9 else -features)


def test_untraceable_teacher_is_rewritten_in_place(caplog: pytest.LogCaptureFixture) -> None:
    module = alive(Untraceable())
    images = torch.randn(2, 3, 8, 8)
    with caplog.at_level(logging.WARNING, "dwa_fast"):
        network, _ = prepare(module, images, resolve("fused", "fp32", "cpu"))
    assert "teacher cannot be traced" in caplog.text
    assert not network.traced
    assert [layer.extra_repr() for layer in network.layers.values()] == ["BatchNorm"]
    assert torch.allclose(network(images), module(images), atol=1e-6)


class Odd(nn.Module):
    """Additions that must not be fused: of a broadcast, of itself, of a number."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.BatchNorm2d(3) for _ in range(5))
        self.fc = nn.Linear(3, 5)

    def forward(self, images: Tensor) -> Tensor:
        x = self.norms[0](images) + images.mean((2, 3), keepdim=True)
        y = self.norms[1](x)
        y = y + y
        z = self.norms[2](y) + 1
        w = self.norms[3](z)
        v = self.norms[4](torch.relu(w) + w)
        return self.fc(torch.sigmoid(v).mean((2, 3)))


def test_additions_that_must_not_be_fused() -> None:
    module = alive(Odd())
    images, labels = torch.randn(4, 3, 6, 6), torch.tensor([0, 1, 2, 3])
    network, _ = prepare(module, images, resolve("fused", "fp32", "cpu"))
    assert [layer.extra_repr() for layer in network.layers.values()] == ["BatchNorm"] * 5
    got, _ = image_gradient(network, images, labels)
    wanted, _ = expected_gradient(module.requires_grad_(False), images, labels)
    assert torch.allclose(got, wanted, rtol=1e-4, atol=1e-6)


class Residual(nn.Module):
    """A residual block that regularises its branch before the addition."""

    def __init__(self, regularise: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Linear(3, 5)
        self.regularise = regularise

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(torch.relu(self.regularise(self.norm(self.conv(images))) + images).mean((2, 3)))


class Functional(nn.Module):
    """A dropout by function, on its default or told by the module whether it is in training."""

    def __init__(self, drop: Callable[..., Tensor], told: bool) -> None:
        super().__init__()
        self.drop, self.told = drop, told

    def forward(self, features: Tensor) -> Tensor:
        return self.drop(features, 0.5, training=self.training) if self.told else self.drop(features, 0.5)


IDENTITIES: dict[str, Callable[[], nn.Module]] = {
    "Identity": nn.Identity,
    "Dropout": nn.Dropout,
    "Dropout2d": nn.Dropout2d,
    "Dropout3d": nn.Dropout3d,
    "AlphaDropout": nn.AlphaDropout,
    "FeatureAlphaDropout": nn.FeatureAlphaDropout,
    "StochasticDepth": lambda: torchvision.ops.StochasticDepth(0.5, "row"),
    "two of them": lambda: nn.Sequential(nn.Dropout2d(inplace=True), torchvision.ops.StochasticDepth(0.5, "batch")),
    "dropout": lambda: Functional(F.dropout, told=True),
    "dropout2d": lambda: Functional(F.dropout2d, told=True),
    "alpha_dropout": lambda: Functional(F.alpha_dropout, told=False),
}


@pytest.mark.parametrize("name", IDENTITIES)
def test_what_does_nothing_in_eval_mode_is_passed_over(name: str) -> None:
    module, images, labels = alive(Residual(IDENTITIES[name]())), torch.randn(2, 3, 6, 6), torch.tensor([0, 3])
    network, _ = prepare(module, images, resolve("fused", "fp32", "cpu"))
    assert network.layers["norm"].extra_repr() == "BatchNorm + addition + ReLU"
    assert torch.allclose(network(images), module(images), atol=1e-6)
    got, got_terms = image_gradient(network, images, labels)
    wanted, wanted_terms = expected_gradient(module.requires_grad_(False), images, labels)
    assert torch.allclose(got, wanted, rtol=1e-4, atol=1e-6)
    assert torch.allclose(got_terms, wanted_terms, rtol=1e-5)


class Always(nn.Module):
    """A layer that stays in training in eval mode."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def train(self, mode: bool = True) -> nn.Module:
        return super().train(True)

    def forward(self, features: Tensor) -> Tensor:
        return self.layer(features)


class Negated(nn.Identity):
    """Not the identity."""

    def forward(self, features: Tensor) -> Tensor:
        return -features


ACTIVE: dict[str, Callable[[], Callable[[Tensor], Tensor]]] = {  # p = 0 changes nothing either here, which tracing need not know
    "dropout in training": lambda: Always(nn.Dropout(p=0.0)),
    "stochastic depth in training": lambda: Always(torchvision.ops.StochasticDepth(0.0, "row")),
    "a function in training": lambda: lambda features: F.dropout(features, p=0.0, training=True),
    "a function in training by default": lambda: lambda features: F.dropout(features, p=0.0),
    "a subclass of the identity": Negated,
    "something else": nn.Tanh,
}


@pytest.mark.parametrize("name", ACTIVE)
def test_what_does_something_in_eval_mode_is_kept(name: str) -> None:
    module, images = alive(Residual(ACTIVE[name]())), torch.randn(2, 3, 6, 6)
    network, _ = prepare(module, images, resolve("fused", "fp32", "cpu"))
    assert network.traced
    assert network.layers["norm"].extra_repr() == "BatchNorm"
    assert torch.allclose(network(images), module(images), atol=1e-6)


class Block(nn.Module):
    """An addition in place, and a second name for what it changes."""

    def __init__(self, reads_old_name: bool) -> None:
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Linear(3, 5)
        self.reads_old_name = reads_old_name

    def forward(self, images: Tensor) -> Tensor:
        old = skip = images * 2
        skip += self.norm(self.conv(images))
        features = F.relu(skip)
        return self.fc((features + old if self.reads_old_name else features).mean((2, 3)))


def test_addition_in_place_is_fused() -> None:
    module, images = alive(Block(reads_old_name=False)), torch.randn(2, 3, 6, 6)
    network, _ = prepare(module, images, resolve("fused", "fp32", "cpu"))
    assert network.layers["norm"].extra_repr() == "BatchNorm + addition + ReLU"
    assert torch.allclose(network(images), module(images), atol=1e-6)


@pytest.mark.parametrize(("changed", "additions"), [(False, 0), (True, 1)])
def test_gradients_of_two_branches_are_added_by_the_operator(changed: bool, additions: int) -> None:
    """Autograd adds them where a branch writes into what it is given."""

    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
            self.conv, self.last, self.fc = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            x = self.norm(self.stem(x))
            skip = x.add_(1.0) if changed else x
            return self.fc(torch.relu(self.last(self.conv(x)) + skip).mean((2, 3)))

    class Additions(TorchDispatchMode):
        found = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
            self.found += func is torch.ops.aten.add.Tensor and args[0].dim() == 4
            return func(*args, **(kwargs or {}))

    torch.manual_seed(0)
    module, images, labels = alive(Branches()), torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 4])
    network, _ = prepare(module, images, resolve("fused", "fp32", "cpu"))
    assert network.traced
    with Additions() as counted:
        gradient, _ = image_gradient(network, images, labels)
    assert counted.found == additions
    exact, _ = expected_gradient(copy.deepcopy(module).double().requires_grad_(False), images.double(), labels)
    assert distance(gradient.double(), exact) < 1e-5


def test_teacher_that_tracing_would_change_is_rewritten_in_place(caplog: pytest.LogCaptureFixture) -> None:
    """Tracing takes an addition in place for a new value; where the old name is read too, the logits give it away."""
    module, images = alive(Block(reads_old_name=True)), torch.randn(2, 3, 6, 6)
    with caplog.at_level(logging.WARNING, "dwa_fast"):
        network, _ = prepare(module, images, resolve("fused", "fp32", "cpu"))
    assert "teacher cannot be traced (the trace differs: its logits are off by" in caplog.text
    assert not network.traced
    assert torch.allclose(network(images), module(images), atol=1e-6)


def test_shared_layer_is_refused() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.BatchNorm2d(3)
            self.second, self.fc = self.first, nn.Linear(3, 5)

        def forward(self, images: Tensor) -> Tensor:
            return self.fc(self.second(self.first(images) * 2).mean((2, 3)))

    with pytest.raises(InputError, match="BatchNorm layer 'first' runs 2 times in a forward pass; each layer may run once"):
        prepare(alive(Shared()), torch.randn(2, 3, 6, 6), resolve("fused", "fp32", "cpu"))


def test_tied_weights_are_adjusted_once() -> None:
    from dwa_fast.engine.ascent import Ascent
    from dwa_fast.seeding import generator
    from tests.nets import small_recipe

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.norm = nn.Conv2d(1, 1, 3, padding=1), nn.BatchNorm2d(1)
            self.two: Any = nn.Conv2d(1, 1, 3, padding=1)
            self.two.weight = self.one.weight
            self.fc = nn.Linear(1, 10)

        def forward(self, images: Tensor) -> Tensor:
            return self.fc(self.two(self.norm(self.one(images))).mean((2, 3)))

    execution = resolve("fused", "fp32", "cpu")
    network, _ = prepare(alive(Tied()), torch.randn(2, 1, 8, 8), execution)
    adjust = Ascent(network, small_recipe(rho=0.1, steps=1).synthesis, execution)
    adjust.adjust(torch.randn(4, 1, 8, 8), torch.tensor([1, 2, 3, 4]), generator(0, "ascent", 0))
    inner: Any = network.module
    assert inner.one.weight.data_ptr() == inner.two.weight.data_ptr()
    assert float((adjust.arena.weights - adjust.arena.original).norm()) == pytest.approx(0.1, rel=1e-3)
