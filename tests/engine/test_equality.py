"""The engine against the reference loop over a whole run, on the network of the CIFAR recipes, and between back-ends and precisions."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, ResNet

from dwa_fast import recipe, synthesize
from dwa_fast.models.architectures import build
from dwa_fast.reference.loop import recover
from tests.nets import alive, assert_as_near, real_images, small_recipe, small_teacher

pytestmark = pytest.mark.usefixtures("two_threads")


def distance(got: Tensor, wanted: Tensor) -> float:
    return float((got - wanted).norm() / wanted.norm())


@pytest.fixture(scope="module")
def resnet18() -> nn.Module:
    """The CIFAR ResNet-18 with running statistics of smooth noise."""
    torch.manual_seed(0)
    network = build("resnet18-cifar", classes=10, size=16).train()
    with torch.no_grad():
        for _ in range(8):
            network(torch.nn.functional.interpolate(torch.randn(8, 3, 4, 4), size=(16, 16), mode="bilinear"))
    return network.eval()


def test_iterations_of_resnet18_equal_the_loop(resnet18: nn.Module, device: torch.device) -> None:
    """With a small learning rate: at the published one, rounding alone carries two runs of the loop itself apart."""
    torch.manual_seed(1)
    images, labels = torch.randn(3, 3, 16, 16).to(device), torch.tensor([1, 5, 9]).to(device)
    config = recipe("cifar10", iterations=4, steps=3, learning_rate=1e-3, backend="fused", precision="fp32", device=device.type)
    got = synthesize(resnet18, images, labels, config)
    assert_as_near(got, recover(resnet18, images, labels, config), recover(resnet18, images.double(), labels, config))


def test_max_pool_and_a_smaller_last_batch_equal_the_loop(device: torch.device) -> None:
    """Half a ResNet-18 of ImageNet's kind, whose stem pools: two batches of different sizes share the engine."""
    torch.manual_seed(0)
    teacher = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=7).train()
    with torch.no_grad():
        for _ in range(4):
            teacher(torch.nn.functional.interpolate(torch.randn(6, 3, 8, 8), size=(64, 64), mode="bilinear"))
    images, labels = torch.randn(5, 3, 64, 64).to(device), torch.tensor([1, 5, 2, 0, 6]).to(device)
    config = recipe(
        "imagenet", iterations=3, steps=2, learning_rate=1e-3, batch_size=3, backend="fused", precision="fp32", device=device.type
    )
    got = synthesize(teacher.eval(), images, labels, config)
    assert_as_near(got, recover(teacher, images, labels, config), recover(teacher, images.double(), labels, config))


@pytest.mark.parametrize("precision", ["bf16", pytest.param("tf32", marks=pytest.mark.gpu), pytest.param("fp16", marks=pytest.mark.gpu)])
def test_lower_precision_ends_within_the_spread_of_seeds(precision: str) -> None:
    images, labels = real_images(10)
    device = "cpu" if precision == "bf16" and not torch.cuda.is_available() else "auto"

    def final(seed: int, precision: str) -> Tensor:
        config = small_recipe(iterations=50, batch_size=10, backend="fused", precision=precision, device=device)
        weights = torch.tensor([1.0, config.synthesis.lambda_mean, config.synthesis.lambda_var])
        return synthesize(small_teacher(), images, labels, config, seed=seed).losses[0, -10:].mean(0) * weights

    exact = torch.stack([final(seed, "fp32") for seed in range(4)])
    lower = final(0, precision)
    spread = exact.max(0).values - exact.min(0).values
    assert ((lower - exact[0]).abs() <= spread + 0.05 * exact[0].abs()).all()


@pytest.mark.parametrize(("precision", "flights"), [("fp32", (1, 1, 2, 5)), ("bf16", (1, 2))])
def test_same_bits_every_time_and_in_flight_together(precision: str, flights: tuple[int, ...], device: torch.device) -> None:
    images, labels = real_images(18)
    images, labels = images.to(device), labels.to(device)
    fused = {"backend": "fused", "device": device.type}
    runs = [
        synthesize(small_teacher(), images, labels, small_recipe(iterations=8, precision=precision, concurrent_batches=n, **fused))
        for n in flights
    ]
    assert all(torch.equal(run.images, runs[0].images) for run in runs[1:])
    assert all(torch.equal(run.losses, runs[0].losses) for run in runs[1:])


def test_number_of_threads_does_not_change_the_bits() -> None:
    images, labels = real_images(6)
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(
            synthesize(small_teacher(), images, labels, small_recipe(iterations=3, backend="fused", precision="fp32", device="cpu"))
        )
    assert distance(results[0].images, results[1].images) < 1e-6


class TwoLayers(nn.Module):
    """The least with a skip and two BatchNorm layers: compiling takes seconds for every layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(1, 8, 3, 2, 1), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, 1, 1), nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        z = self.bn1(self.conv1(x)).relu()
        logits: Tensor = self.fc((self.bn2(self.conv2(z)) + z).relu().mean((2, 3)))
        return logits


@functools.cache
def two_layers() -> nn.Module:
    torch.manual_seed(0)
    return alive(TwoLayers())


@pytest.mark.parametrize(
    ("make", "settings"),
    [
        (two_layers, {}),
        *(
            pytest.param(small_teacher, each, marks=pytest.mark.slow)
            for each in ({}, {"view": "crop"}, {"matching_weights": "original", "rho": 0.3})
        ),
    ],
)
def test_compiled_equals_the_loop(make: Callable[[], nn.Module], settings: dict[str, object]) -> None:
    images, labels = real_images(6)
    config = small_recipe(iterations=8, backend="compiled", precision="fp32", device="cpu", learning_rate=0.01, **settings)
    got = synthesize(make(), images, labels, config)
    assert_as_near(got, recover(make(), images, labels, config), recover(make(), images.double(), labels, config))
