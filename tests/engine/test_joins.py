"""Residual blocks whose skip ends in a BatchNorm of its own: which are one operator call, and that they compute what the teacher does."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from dwa_fast.engine.ascent import Ascent
from dwa_fast.engine.backend import resolve
from dwa_fast.engine.fuse import BatchNormAct
from dwa_fast.engine.layers import SampledConv
from dwa_fast.engine.network import Network
from dwa_fast.engine.teacher import prepare
from dwa_fast.models.architectures import build
from dwa_fast.seeding import generator
from tests.nets import alive, distance, expected_gradient, image_gradient, small_recipe

IMAGES, LABELS = (4, 3, 8, 8), torch.tensor([0, 1, 2, 4])


class Join(nn.Module):
    """Two branches, each a convolution and a BatchNorm, added and handed on, to two uses or to one."""

    def __init__(self, join: Callable[[Tensor, Tensor], Tensor], *, twice: bool = True) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.conv, self.norm = nn.Conv2d(6, 20, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(20)
        self.downsample = nn.Sequential(nn.Conv2d(6, 20, 1, stride=2, bias=False), nn.BatchNorm2d(20))
        self.join, self.twice = join, twice
        self.last, self.after, self.fc = nn.Conv2d(20, 20, 3, padding=1), nn.BatchNorm2d(20), nn.Linear(20, 5)

    def forward(self, images: Tensor) -> Tensor:
        x = torch.tanh(self.stem(images))
        x = self.join(self.norm(self.conv(x)), self.downsample(x))
        y = self.after(self.last(x))
        return self.fc(F.relu(y + x if self.twice else y).mean((2, 3)))


def prepared(teacher: nn.Module) -> Network:
    network, _ = prepare(teacher, torch.randn(IMAGES), resolve("fused", "fp32", "cpu"))
    assert network.traced
    return network


def titles(network: Network) -> tuple[str, str]:
    return network.layers["norm"].extra_repr(), network.layers["downsample.1"].extra_repr()


def assert_is_the_teacher(network: Network, teacher: nn.Module) -> None:
    """Gradients of images, terms and gradients of weights as near to float64 as PyTorch's."""
    images = torch.randn(IMAGES, generator=torch.Generator().manual_seed(1))
    exact = copy.deepcopy(teacher).double()
    with network.trainable():
        weights = torch.autograd.grad(F.cross_entropy(network(images), LABELS), list(network.parameters()))
    names = [name.removeprefix("module.") for name, _ in network.named_parameters()]
    parameters = dict(exact.named_parameters())
    assert sorted(names) == sorted(parameters)
    wanted = torch.autograd.grad(F.cross_entropy(exact(images.double()), LABELS), [parameters[name] for name in names])
    for name, got, expected in zip(names, weights, wanted, strict=True):
        assert distance(got.double(), expected) < 2e-5, name
    gradient, terms = image_gradient(network, images, LABELS)
    expected, exact_terms = expected_gradient(exact.requires_grad_(False), images.double(), LABELS)
    assert distance(gradient, expected) < 1e-5
    assert distance(terms, exact_terms) < 1e-5


@pytest.mark.parametrize("twice", [False, True])
@pytest.mark.parametrize(
    ("join", "behind"),
    [
        (lambda y, skip: F.relu(y + skip), " + ReLU"),
        (lambda y, skip: F.relu(skip + y), " + ReLU"),
        (lambda y, skip: F.silu(torch.add(y, skip)), " + SiLU"),
        (lambda y, skip: F.gelu(y + skip), " + GELU"),
        (lambda y, skip: F.leaky_relu(y + skip, 0.1), " + LeakyReLU"),
        (lambda y, skip: F.hardswish(y + F.dropout(skip, 0.5, False)), " + Hardswish"),
        (lambda y, skip: y + skip, ""),
        (lambda y, skip: torch.tanh(y + skip), ""),
    ],
)
def test_two_layers_are_one_call(join: Callable[[Tensor, Tensor], Tensor], behind: str, twice: bool) -> None:
    torch.manual_seed(0)
    teacher = alive(Join(join, twice=twice))
    network = prepared(teacher)
    assert titles(network) == (f"BatchNorm + BatchNorm of the skip{behind}", "BatchNorm of a skip")
    assert_is_the_teacher(network, teacher)


def test_a_learned_slope_takes_its_gradient() -> None:
    class Sloped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.prelu = nn.PReLU(20, init=0.2)

        def forward(self, y: Tensor, skip: Tensor) -> Tensor:
            return self.prelu(y + skip)

    torch.manual_seed(0)
    teacher = alive(Join(Sloped()))
    network = prepared(teacher)
    assert titles(network)[0] == "BatchNorm + BatchNorm of the skip + PReLU"
    names = [name for name, _ in network.named_parameters()]
    images = torch.randn(IMAGES)
    with network.trainable():
        got = torch.autograd.grad(F.cross_entropy(network(images), LABELS), list(network.parameters()))
    exact = copy.deepcopy(teacher).double()
    wanted = torch.autograd.grad(F.cross_entropy(exact(images.double()), LABELS), exact.get_parameter("join.prelu.weight"))
    assert distance(got[names.index("module.norm.slope")].double(), wanted[0]) < 1e-5


def test_the_branch_may_come_first() -> None:
    """In the order of the modules too."""

    class First(Join):
        def __init__(self) -> None:
            super().__init__(lambda y, skip: F.relu(y + skip))
            norm, conv = self.norm, self.conv
            del self.norm, self.conv
            self.conv, self.norm = conv, norm

    torch.manual_seed(0)
    teacher = alive(First())
    network = prepared(teacher)
    assert titles(network) == ("BatchNorm of a skip", "BatchNorm + BatchNorm of the skip + ReLU")
    assert_is_the_teacher(network, teacher)


def hooked() -> nn.Module:
    teacher = Join(lambda y, skip: F.relu(y + skip))
    teacher.downsample[1].register_forward_hook(lambda layer, inputs, output: 2 * output)
    return teacher


def hooked_branch() -> nn.Module:
    """The branch as a whole has a hook, which tracing keeps as what it does."""
    teacher = Join(lambda y, skip: F.relu(y + skip))
    teacher.downsample.register_forward_hook(lambda layer, inputs, output: output * 1.5)
    return teacher


@pytest.mark.parametrize(
    ("make", "wanted"),
    [
        (hooked, ("BatchNorm + addition + ReLU", "BatchNorm2d, statistics by a hook")),
        (hooked_branch, ("BatchNorm + addition + ReLU", "BatchNorm")),
        (lambda: Join(lambda y, skip: F.relu(y + F.relu(skip))), ("BatchNorm + addition + ReLU", "BatchNorm + ReLU")),
        (lambda: Join(lambda y, skip: F.relu(y + skip) + skip), ("BatchNorm + addition + ReLU", "BatchNorm")),
        (lambda: Join(lambda y, skip: F.relu(F.silu(y) + skip)), ("BatchNorm + SiLU", "BatchNorm + addition + ReLU")),
        (lambda: Join(lambda y, skip: F.relu(y - skip)), ("BatchNorm", "BatchNorm")),
        (lambda: Join(lambda y, skip: F.relu(y + skip.mean((2, 3), True))), ("BatchNorm", "BatchNorm")),
        (lambda: Join(lambda y, skip: F.relu6(y + skip)), ("BatchNorm + addition + ReLU6", "BatchNorm")),
    ],
)
def test_what_stays_as_it_was(make: Callable[[], nn.Module], wanted: tuple[str, str]) -> None:
    """A hook, an activation or a second use of the skip; something else than an addition of equals."""
    torch.manual_seed(0)
    teacher = alive(make())
    network = prepared(teacher)
    assert titles(network) == wanted
    assert_is_the_teacher(network, teacher)


def test_a_shared_branch_is_not_joined() -> None:
    """Its result is the skip of two blocks."""

    class Shared(Join):
        def __init__(self) -> None:
            super().__init__(lambda y, skip: F.relu(y + skip))

        def forward(self, images: Tensor) -> Tensor:
            x = torch.tanh(self.stem(images))
            skip = self.downsample(x)
            return self.fc(F.relu(self.after(self.last(F.relu(self.norm(self.conv(x)) + skip))) + skip).mean((2, 3)))

    torch.manual_seed(0)
    teacher = alive(Shared())
    network = prepared(teacher)
    assert titles(network) == ("BatchNorm + addition + ReLU", "BatchNorm")
    assert_is_the_teacher(network, teacher)


def test_a_layer_that_reads_its_own_skip_is_not_joined() -> None:
    """Its one user needs the skip's result twice."""

    class Chain(Join):
        def __init__(self) -> None:
            super().__init__(lambda y, skip: y)
            self.downsample = nn.Sequential(nn.Identity(), nn.BatchNorm2d(20))

        def forward(self, images: Tensor) -> Tensor:
            x = self.downsample(self.conv(torch.tanh(self.stem(images))))
            x = F.relu(self.norm(x) + x)
            return self.fc(F.relu(self.after(self.last(x))).mean((2, 3)))

    torch.manual_seed(0)
    teacher = alive(Chain())
    network = prepared(teacher)
    assert titles(network) == ("BatchNorm + addition + ReLU", "BatchNorm")
    assert_is_the_teacher(network, teacher)


class Strided(nn.Module):
    """A block that gives a strided 1×1 convolution and others its result; `uses` are what becomes of it and of that convolution."""

    def __init__(self, uses: Callable[[nn.Module, Tensor], Tensor], *, joined: bool) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.other = nn.Sequential(nn.Conv2d(3, 16, 1), nn.BatchNorm2d(16)) if joined else None
        self.conv = nn.Conv2d(16, 16, 3, stride=2, padding=1)
        self.strided, self.after, self.fc = nn.Conv2d(16, 16, 1, stride=2), nn.BatchNorm2d(16), nn.Linear(16, 5)
        self.uses = uses

    def forward(self, images: Tensor) -> Tensor:
        x = self.norm(self.stem(images))
        x = F.relu(x if self.other is None else x + self.other(images))
        return self.fc(F.relu(self.after(self.uses(self, x))).mean((2, 3)))


@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize(
    ("uses", "stride"),
    [
        (lambda net, x: net.conv(x) + net.strided(x), 2),
        (lambda net, x: net.strided(x) + net.conv(x), 2),
        (lambda net, x: net.strided(x) + net.conv(x) + F.avg_pool2d(x, 2, ceil_mode=True), 2),
        (lambda net, x: net.strided(x) + net.strided(x + 1) + net.conv(x), 1),  # one convolution, two calls
    ],
)
def test_a_strided_use_of_a_result(uses: Callable[[nn.Module, Tensor], Tensor], stride: int, joined: bool) -> None:
    torch.manual_seed(0)
    teacher = alive(Strided(uses, joined=joined))
    network = prepared(teacher)
    assert network.layers["norm"].alias_stride == stride  # type: ignore[union-attr]
    images = torch.randn(4, 3, 7, 9, generator=torch.Generator().manual_seed(1))
    for each in (images, torch.randn(IMAGES)):
        gradient, terms = image_gradient(network, each, LABELS)
        expected, exact_terms = expected_gradient(copy.deepcopy(teacher).double().requires_grad_(False), each.double(), LABELS)
        assert distance(gradient, expected) < 1e-5
        assert distance(terms, exact_terms) < 1e-5
    assert_is_the_teacher(network, teacher)


@pytest.mark.parametrize("uses", [lambda net, x: net.strided(x), lambda net, x: net.strided(x) * x.shape[1]])
def test_a_strided_use_alone(uses: Callable[[nn.Module, Tensor], Tensor]) -> None:
    """There is no gradient to add that of some pixels to."""
    torch.manual_seed(0)
    assert prepared(alive(Strided(uses, joined=False))).layers["norm"].alias_stride == 1  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("name", "joins"),
    [("resnet18", 3), pytest.param("resnet50", 4, marks=pytest.mark.slow), ("resnet18-cifar", 3), ("small-resnet", 2)],
)
def test_the_joins_of_resnets(name: str, joins: int) -> None:
    torch.manual_seed(0)
    cifar = "-" in name
    teacher = alive(build(name, classes=5, size=16) if cifar else getattr(torchvision.models, name)(num_classes=5))
    network, _ = prepare(teacher, torch.randn(2, 3, 32, 32), resolve("fused", "fp32", "cpu"))
    layers = [layer for layer in network.layers.values() if isinstance(layer, BatchNormAct)]
    assert (sum(layer.joins for layer in layers), sum(layer.joined for layer in layers)) == (joins, joins)
    # Each join begins with a strided 1×1 convolution, whose gradient is that of the pixels that it reads, but where nothing is strided.
    sampled = joins - (name == "resnet50")
    assert [layer.alias_stride for layer in layers if layer.alias_stride > 1] == [2] * sampled
    assert sum(isinstance(each, SampledConv) for each in network.modules()) == sampled


def test_a_copy_keeps_its_own_weights() -> None:
    """The ascent of one network moves every weight of that one alone, those of a joined layer too."""
    torch.manual_seed(0)
    network = prepared(alive(Join(lambda y, skip: F.relu(y + skip))))
    twin = copy.deepcopy(network)
    images, execution = torch.randn(IMAGES), resolve("fused", "fp32", "cpu")
    assert torch.equal(network(images), twin(images))
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    ascent = Ascent(twin, small_recipe(rho=0.1, steps=2).synthesis, execution)
    ascent.adjust(images, LABELS, generator(0, "ascent", 0))
    moved = {name: not torch.equal(p, before[name]) for name, p in twin.named_parameters()}
    assert moved.keys() == before.keys()
    assert all(moved[f"module.downsample.1.{name}"] for name in ("weight", "bias"))
    assert all(torch.equal(p, before[name]) for name, p in network.named_parameters())
    exact = image_gradient(twin, images, LABELS)[0]
    twin.layers["downsample.1"].weight.data.mul_(2)  # type: ignore[union-attr, operator]
    assert distance(image_gradient(twin, images, LABELS)[0], exact) > 1e-3
