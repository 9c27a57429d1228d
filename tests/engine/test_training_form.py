"""Networks as their training steps run them."""

from __future__ import annotations

import copy
import logging
import math
import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dwa_fast.engine import training_form as module_under_test
from dwa_fast.engine.training_form import training_form
from dwa_fast.models.architectures import build
from dwa_fast.models.finite import has_finite_weights

CPU = torch.device("cpu")
SHAPE = (3, 16, 16)


class Mixed(nn.Module):
    """A plain average of statistics, a skip, dropout, a layer that stays in eval mode, a strided 1×1 convolution and `view`."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8, momentum=None)
        self.inner, self.again = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.down, self.frozen = nn.Conv2d(8, 12, 1, stride=2, bias=False), nn.BatchNorm2d(12)
        self.pool, self.drop, self.fc = nn.AvgPool2d(2), nn.Dropout(0.3), nn.Linear(12 * 16, 5)

    def train(self, mode: bool = True) -> Mixed:
        super().train(mode)
        self.frozen.eval()
        return self

    def forward(self, images: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(images)))
        x = F.relu(self.again(self.inner(x)) + x)
        x = self.drop(self.pool(F.silu(self.frozen(self.down(x)))))
        logits: Tensor = self.fc(x.view(len(images), -1))
        return logits


def train(network: nn.Module, forward: module_under_test.Forward, steps: int, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Some steps of SGD on the same images, dropout from the same seed."""
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9)
    source = torch.Generator().manual_seed(1)
    images, labels = torch.randn(12, *SHAPE, generator=source).to(dtype), torch.arange(12) % 5
    for step in range(steps):
        torch.manual_seed(step)
        optimizer.zero_grad()
        F.cross_entropy(forward(images), labels).backward()
        optimizer.step()
    return network


def small(name: str) -> nn.Module:
    torch.manual_seed(0)
    return (Mixed() if name == "mixed" else build(name, classes=5, channels=3, size=16)).train()


def was_fused(caplog: pytest.LogCaptureFixture) -> bool:
    return "not fused" not in caplog.text


@pytest.mark.parametrize("name", ["mixed", "convnet128", "small-resnet"])
def test_a_training_is_that_of_the_network(name: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "dwa_fast")
    start = small(name)
    exact, plain, own = copy.deepcopy(start).double(), copy.deepcopy(start), copy.deepcopy(start)
    steps = 1 if name == "mixed" else 3  # dropout draws other numbers in float64
    if name == "mixed":
        exact.get_submodule("drop").p = plain.get_submodule("drop").p = own.get_submodule("drop").p = 0.0  # type: ignore[assignment]
    train(exact, exact, steps, torch.float64)
    train(plain, plain, steps)
    train(own, training_form(own, SHAPE, CPU), steps)
    assert was_fused(caplog)
    for (key, value), theirs, mine in zip(exact.state_dict().items(), plain.state_dict().values(), own.state_dict().values(), strict=True):
        rounding = 3e-6 * float(value.double().norm())
        assert float((mine - value).double().norm()) <= 3 * float((theirs - value).double().norm()) + rounding, key
    assert own.state_dict().keys() == start.state_dict().keys()
    assert all(value.is_contiguous() for value in own.state_dict().values())


FAMILIES = ("resnet18", "resnet50", "mobilenet-v2", "shufflenet-v2", "efficientnet-b0", "vgg16-bn", "deit-tiny-bn")


@pytest.mark.parametrize("name", [pytest.param(name, marks=[] if name.startswith("resnet") else [pytest.mark.slow]) for name in FAMILIES])
@pytest.mark.parametrize("training", [True, False])
def test_networks_known_by_name_are_fused(name: str, training: bool, caplog: pytest.LogCaptureFixture) -> None:
    """With a max-pooling behind the first activation, depthwise convolutions, additions, gates; depth that magnifies rounding."""
    caplog.set_level(logging.INFO, "dwa_fast")
    torch.manual_seed(0)
    training_form(build(name, classes=5, channels=3, size=64).train(training), (3, 64, 64), CPU)
    assert was_fused(caplog)


def test_dropout_is_applied_and_follows_the_seed() -> None:
    network = small("mixed")
    forward, images = training_form(network, SHAPE, CPU), torch.randn(4, *SHAPE)
    results = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        results.append(forward(images))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_making_it_changes_nothing() -> None:
    network = small("mixed")
    before = copy.deepcopy(network.state_dict())
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    training_form(network, SHAPE, CPU)
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert all(p.grad is None for p in network.parameters())
    assert has_finite_weights(network)


def test_in_eval_mode_it_gives_the_logits_of_the_network() -> None:
    network = train(small("small-resnet"), small("small-resnet"), 1).eval()
    images = torch.randn(9, *SHAPE)
    before = copy.deepcopy(network.state_dict())
    with torch.no_grad():
        assert torch.allclose(training_form(network, SHAPE, CPU)(images), network(images), atol=1e-5)
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


def test_a_shared_layer_keeps_its_calls() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.fc = nn.BatchNorm2d(3), nn.Linear(3, 5)

        def forward(self, images: Tensor) -> Tensor:
            logits: Tensor = self.fc(self.norm(F.relu(self.norm(images))).mean((2, 3)))
            return logits

    network = Shared().train()
    images = torch.randn(6, *SHAPE)
    twin = copy.deepcopy(network)
    assert torch.allclose(training_form(network, SHAPE, CPU)(images), twin(images), atol=1e-5)
    assert int(network.norm.num_batches_tracked) == 2  # type: ignore[arg-type]
    assert torch.allclose(network.norm.running_var, twin.norm.running_var)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["branches", "differs"])
def test_what_cannot_be_fused_trains_as_it_is(kind: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.fc = nn.BatchNorm2d(3), nn.Linear(3, 5)

        def forward(self, images: Tensor) -> Tensor:
            features = self.norm(images).mean((2, 3))
            if kind == "branches" and features.sum() > 100:
                features = -features
            logits: Tensor = self.fc(features)
            return logits

    caplog.set_level(logging.INFO, "dwa_fast")
    if kind == "differs":  # a fused layer that is wrong
        forward = module_under_test._TrainedBatchNormAct.forward
        monkeypatch.setattr(module_under_test._TrainedBatchNormAct, "forward", lambda self, y: 1.03 * forward(self, y))
    network, images = Branching().train(), torch.randn(6, *SHAPE)
    twin = copy.deepcopy(network)
    assert torch.allclose(training_form(network, SHAPE, CPU)(images), twin(images), atol=1e-6)
    assert not was_fused(caplog)


def test_one_image_per_channel_is_refused_as_by_pytorch() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 16), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 5)).train()
    forward = training_form(network, SHAPE, CPU)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        forward(torch.randn(1, *SHAPE))


def test_under_autocast_a_skip_may_be_float32() -> None:
    """Images that are added to features in bfloat16, whatever the comparison in float32 has seen."""

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.fc = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.Linear(3, 5)

        def forward(self, images: Tensor) -> Tensor:
            logits: Tensor = self.fc(F.relu(self.norm(self.conv(images)) + images).mean((2, 3)))
            return logits

    network, images = Residual().train(), torch.randn(6, *SHAPE)
    exact, form = copy.deepcopy(network), training_form(network, SHAPE, CPU)
    with torch.autocast("cpu", torch.bfloat16):
        logits = form(images)
    torch.testing.assert_close(logits.float(), exact(images), rtol=0.02, atol=0.02)
    logits.float().square().sum().backward()
    assert network.conv.weight.grad is not None


class GhostBatchNorm(nn.Module):
    """Statistics of at most 16 images each, as pytorch-tabnet has them: another number of calls for more images."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.norm(part) for part in x.chunk(math.ceil(x.shape[0] / 16))])


class MinibatchDeviation(nn.Module):
    """The deviation over groups of at most 32 images as a further channel, as StyleGAN's discriminator has it."""

    def forward(self, x: Tensor) -> Tensor:
        groups = min(32, x.shape[0])
        deviation = x.reshape(groups, -1, *x.shape[1:]).std(0, unbiased=False).mean((1, 2, 3), keepdim=True)
        return x + deviation.repeat(groups, 1, 1, 1)


class RandomDepth(nn.Module):
    """Stochastic depth with Python's random numbers."""

    def forward(self, x: Tensor) -> Tensor:
        return x if self.training and random.random() < 0.5 else 2 * x


def around(layer: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    first, last = nn.Conv2d(3, 8, 3, padding=1), nn.Sequential(nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
    return nn.Sequential(first, nn.BatchNorm2d(8), nn.ReLU(), layer, last)


@pytest.mark.parametrize(("layer", "training"), [(GhostBatchNorm(), True), (MinibatchDeviation(), False)])
def test_a_network_that_does_otherwise_with_more_images(layer: nn.Module, training: bool, caplog: pytest.LogCaptureFixture) -> None:
    """What it does for a few images is not taken for what it does for a whole batch."""
    caplog.set_level(logging.INFO, "dwa_fast")
    network = around(layer).train(training)
    form = training_form(network, SHAPE, CPU)
    assert was_fused(caplog)
    images = torch.randn(64, *SHAPE) * torch.linspace(0.2, 3, 64).view(-1, 1, 1, 1)
    before = copy.deepcopy(network.state_dict())
    torch.manual_seed(3)
    got, drawn = form(images), torch.rand(3)
    after = copy.deepcopy(network.state_dict())
    network.load_state_dict(before)
    torch.manual_seed(3)
    assert torch.allclose(got, network(images), atol=1e-5)
    assert torch.equal(drawn, torch.rand(3))
    assert all(torch.allclose(value, after[key], atol=1e-5) for key, value in network.state_dict().items())
    assert "network runs layer by layer, not fused: with 64 images " in caplog.text


def test_other_numbers_of_images_are_compared_where_sizes_are_read_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[int] = []
    plain = module_under_test._difference

    def counted(module: nn.Module, form: nn.Module, trial: Tensor, **kind: Any) -> str | None:
        compared.append(len(trial))
        return plain(module, form, trial, **kind)

    monkeypatch.setattr(module_under_test, "_difference", counted)
    for network in (around(nn.Identity()), around(MinibatchDeviation())):
        form = training_form(network.train(), SHAPE, CPU)
        for count in (4, 8, 6, 4):
            form(torch.randn(count, *SHAPE))
    assert compared == [8, 8, 4, 6]


def test_random_numbers_of_python_are_drawn_anew_in_every_step(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "dwa_fast")
    random.seed(5)
    expected = random.Random(5).random()
    network = around(RandomDepth())
    form = training_form(network.train(), SHAPE, CPU)
    assert random.random() == expected
    assert "not fused: its forward pass draws random numbers of Python or NumPy" in caplog.text
    images = torch.randn(4, *SHAPE)
    assert len({tuple(form(images).flatten().tolist()) for _ in range(30)}) == 2
    training_form(network.eval(), SHAPE, CPU)
    assert caplog.text.count("not fused") == 1
