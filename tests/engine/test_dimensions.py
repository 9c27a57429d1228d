"""Teachers with BatchNorm1d and BatchNorm3d: statistics over all axes but the channels', through the same operators, and whole runs."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.mobilenetv2 import MobileNetV2
from torchvision.models.vision_transformer import VisionTransformer

from dwa_fast import recipe, synthesize
from dwa_fast.engine.backend import resolve
from dwa_fast.engine.fuse import BatchNormAct
from dwa_fast.engine.teacher import prepare
from dwa_fast.models.architectures import TokenBatchNorm, build
from dwa_fast.models.batchnorm import planes
from dwa_fast.reference.loop import recover
from dwa_fast.reference.ops import Operators
from tests.nets import SIZE, alive, assert_as_near, distance, expected_gradient, image_gradient, real_images, small_recipe


class Vectors(nn.Module):
    """BatchNorm1d of [N, C]."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.norm = nn.Linear(SIZE * SIZE, 12), nn.BatchNorm1d(12)
        self.branch, self.added, self.fc = nn.Linear(12, 12), nn.BatchNorm1d(12), nn.Linear(12, 10)

    def forward(self, images: Tensor) -> Tensor:
        features = torch.relu(self.norm(self.inner(images.flatten(1))))
        return self.fc(torch.relu(self.added(self.branch(features)) + features))


class Sequences(nn.Module):
    """BatchNorm1d of [N, C, L]: the rows of an image as channels."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.norm = nn.Conv1d(SIZE, 12, 3, padding=1), nn.BatchNorm1d(12)
        self.branch, self.added, self.fc = nn.Conv1d(12, 12, 3, padding=1), nn.BatchNorm1d(12), nn.Linear(12, 10)

    def forward(self, images: Tensor) -> Tensor:
        features = torch.relu(self.norm(self.inner(images[:, 0])))
        return self.fc(torch.relu(self.added(self.branch(features)) + features).mean(2))


class Tokens(nn.Module):
    """BatchNorm1d of transposed [N, S, C]."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.norm = nn.Linear(SIZE, 12), TokenBatchNorm(12)
        self.branch, self.added, self.fc = nn.Linear(12, 12), nn.BatchNorm1d(12), nn.Linear(12, 10)

    def forward(self, images: Tensor) -> Tensor:
        features = torch.relu(self.norm(self.inner(images[:, 0])))
        branch = self.added(self.branch(features).transpose(1, 2))
        return self.fc(torch.relu(branch + features.transpose(1, 2)).mean(2))


class Volumes(nn.Module):
    """BatchNorm3d of [N, C, D, H, W], with a BatchNorm2d before and a BatchNorm1d behind."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.norm = nn.Conv2d(1, 12, 3, padding=1), nn.BatchNorm2d(12)
        self.branch, self.added = nn.Conv3d(3, 3, 3, padding=1), nn.BatchNorm3d(3)
        self.last, self.fc = nn.BatchNorm1d(3), nn.Linear(3, 10)

    def forward(self, images: Tensor) -> Tensor:
        features = torch.relu(self.norm(self.inner(images))).unflatten(1, (3, 4))
        return self.fc(self.last(torch.relu(self.added(self.branch(features)) + features).mean((2, 3, 4))))


FUSED = ["BatchNorm + ReLU", "BatchNorm + addition + ReLU"]
TEACHERS: dict[str, tuple[type[nn.Module], list[str]]] = {
    "vectors": (Vectors, FUSED),
    "sequences": (Sequences, FUSED),
    "tokens": (Tokens, ["BatchNorm", "BatchNorm + addition + ReLU"]),
    "volumes": (Volumes, [*FUSED, "BatchNorm"]),
}


def teacher(name: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return alive(TEACHERS[name][0]())


@pytest.mark.parametrize("name", TEACHERS)
def test_rewritten_teacher_is_the_teacher(name: str) -> None:
    execution, labels = resolve("fused", "fp32", "cpu"), torch.tensor([0, 3, 6, 9])
    module, images = teacher(name), torch.randn(4, 1, SIZE, SIZE)
    network, _ = prepare(module, images, execution)
    assert network.traced
    assert [layer.extra_repr() for layer in network.layers.values()] == TEACHERS[name][1]
    exact = copy.deepcopy(module).double().requires_grad_(False)
    assert torch.allclose(network(images).double(), exact(images.double()), atol=1e-5)
    wanted, wanted_terms = expected_gradient(exact, images.double(), labels)
    got, got_terms = image_gradient(network, images, labels)
    assert distance(got_terms, wanted_terms) < 1e-5
    assert distance(got, wanted) < 1e-5


@pytest.mark.parametrize("name", TEACHERS)
@pytest.mark.parametrize("backend", ["reference", "fused"])
def test_whole_run_equals_the_loop(name: str, backend: str, device: torch.device) -> None:
    images, labels = (each.to(device) for each in real_images(12))
    precision = "fp64" if backend == "reference" else "fp32"
    images = images.double() if precision == "fp64" else images
    config = small_recipe(iterations=8, rho=0.3, learning_rate=0.01, backend=backend, precision=precision, device=device.type)
    got = synthesize(teacher(name), images, labels, config)
    exact = recover(teacher(name), images.double(), labels, config)
    if precision == "fp64":
        assert distance(got.images, exact.images) < 1e-10
        assert distance(got.losses, exact.losses) < 1e-6
    else:
        assert_as_near(got, recover(teacher(name), images, labels, config), exact)
    assert torch.equal(got.images, synthesize(teacher(name), images, labels, config).images)


@pytest.mark.parametrize("name", TEACHERS)
def test_lower_precision_is_near(name: str, device: torch.device) -> None:
    images, labels = (each.to(device) for each in real_images(12))
    exact, lower = (
        synthesize(teacher(name), images, labels, small_recipe(iterations=4, backend="fused", precision=precision, device=device.type))
        for precision in ("fp32", "bf16")
    )
    assert distance(lower.losses[:, 0], exact.losses[:, 0]) < 0.05


FEATURES: dict[str, tuple[Callable[[], nn.Module], Callable[[Tensor], Tensor], tuple[int, ...]]] = {
    "[N, C]": (lambda: nn.BatchNorm1d(6), lambda y: y, (5, 6)),
    "[N, C, L]": (lambda: nn.BatchNorm1d(6), lambda y: y, (3, 6, 7)),
    "tokens": (lambda: nn.BatchNorm1d(6), lambda y: y.transpose(1, 2), (3, 7, 6)),
    "every other position": (lambda: nn.BatchNorm1d(6), lambda y: y[:, :, ::2], (3, 6, 8)),
    "[N, C, H, W]": (lambda: nn.BatchNorm2d(6), lambda y: y, (3, 6, 4, 5)),
    "[N, C, D, H, W]": (lambda: nn.BatchNorm3d(6), lambda y: y, (2, 6, 3, 4, 5)),
    "channels-last volumes": (lambda: nn.BatchNorm3d(6), lambda y: y.movedim(4, 1), (2, 3, 4, 5, 6)),
    "part of a volume": (lambda: nn.BatchNorm3d(6), lambda y: y[:, :, :, :3, 1:], (2, 6, 3, 4, 5)),
}


@pytest.mark.parametrize("name", FEATURES)
def test_layer_gives_what_batchnorm_gives_and_the_moments_of_every_channel(name: str) -> None:
    make, seen_as, shape = FEATURES[name]
    layer = alive(make())
    assert isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d))
    assert layer.running_mean is not None
    memory = torch.randn(shape)
    for operators in (Operators("reference"), resolve("fused", "fp32", "cpu").operators):
        act = BatchNormAct(layer, operators)
        y = seen_as(memory)
        assert torch.allclose(act(y), layer(y), atol=1e-6)
        by_channel = (y.movedim(1, -1) - layer.running_mean).reshape(-1, 6)
        assert act.count == len(by_channel)
        assert torch.allclose(act.sums[0], torch.stack([by_channel.sum(0), by_channel.square().sum(0)]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", FEATURES)
def test_gradients(name: str) -> None:
    make, seen_as, shape = FEATURES[name]
    act = BatchNormAct(alive(make()).double(), Operators("reference"))  # type: ignore[arg-type]
    act.activation, act.skip = "relu", True

    def both(memory: Tensor, skip: Tensor) -> tuple[Tensor, Tensor]:
        act.sums.clear()
        return act(seen_as(memory), seen_as(skip)), act.sums[0]

    torch.manual_seed(0)
    leaves = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    assert torch.autograd.gradcheck(both, leaves)


def test_transposed_tokens_are_read_where_they_are() -> None:
    tokens = torch.randn(3, 7, 6)
    seen = planes(tokens.transpose(1, 2))
    assert seen.shape == (3, 6, 7, 1)
    assert seen.is_contiguous(memory_format=torch.channels_last)
    assert seen.data_ptr() == tokens.data_ptr()
    act = BatchNormAct(nn.BatchNorm1d(6).eval(), resolve("fused", "fp32", "cpu").operators)
    assert act(tokens.transpose(1, 2)).transpose(1, 2).is_contiguous()


class Branching(Tokens):
    """One that cannot be traced."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images if images.sum() > -1e9 else -images)


def test_untraceable_teacher_is_rewritten_in_place() -> None:
    module, images, labels = alive(Branching()), torch.randn(4, 1, SIZE, SIZE), torch.tensor([0, 3, 6, 9])
    network, _ = prepare(module, images, resolve("fused", "fp32", "cpu"))
    assert not network.traced
    got, _ = image_gradient(network, images, labels)
    wanted, _ = expected_gradient(module.double().requires_grad_(False), images.double(), labels)
    assert distance(got, wanted) < 1e-5


def small_transformer() -> nn.Module:
    """DeiT with BatchNorm, in small."""
    network = VisionTransformer(16, 4, num_layers=2, num_heads=3, hidden_dim=24, mlp_dim=48, num_classes=10, norm_layer=TokenBatchNorm)
    nn.init.normal_(network.get_parameter("heads.head.weight"), std=0.1)  # 0 when fresh
    return network


def small_mobilenet() -> nn.Module:
    return MobileNetV2(10, width_mult=0.25, inverted_residual_setting=[[1, 16, 1, 1], [6, 24, 2, 1], [6, 32, 2, 2]])


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "transformer": small_transformer,
    "mobilenet": small_mobilenet,
    "vgg": lambda: build("vgg16-bn-cifar", classes=10, size=16),
}


@pytest.mark.parametrize(
    ("name", "precision"),
    [("transformer", "fp32"), ("transformer", "bf16"), ("mobilenet", "fp32"), pytest.param("vgg", "fp32", marks=pytest.mark.slow)],
)
def test_networks_of_the_paper_can_be_teachers(name: str, precision: str) -> None:
    """The first losses are those of the loop; later ones part, since such networks carry rounding far."""
    torch.manual_seed(0)
    module = alive(NETWORKS[name]())
    images, labels = torch.randn(4, 3, 16, 16), torch.tensor([0, 3, 6, 9])
    config = recipe("cifar10", iterations=2, steps=2, rho=0.1, backend="fused", precision=precision, device="cpu")
    assert prepare(module, images, resolve("fused", "fp32", "cpu"))[0].traced
    got = synthesize(module, images, labels, config)
    wanted = recover(module, images.double(), labels, config)
    assert distance(got.losses[0, 0], wanted.losses[0, 0]) < (1e-4 if precision == "fp32" else 0.05)
    assert torch.isfinite(got.images).all()
    assert not torch.equal(got.images, images)
